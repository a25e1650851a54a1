"""Reproduces norms of Hugging Face's transformers and diffusers with the kernels. Neither is imported."""

import functools
import inspect
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from triton_norm import explaining, functional, reference
from triton_norm.converting.adaptive import ADAPTIVE, AdaptiveNorm, path_of, unknown_norm
from triton_norm.converting.adaptive_trial import agrees
from triton_norm.converting.gated import (
    COMPUTES_ELSE,
    GATED,
    SERVED,
    GatedRMSNorm,
    Type,
    dtype_of,
    takes,
    width_of,
)
from triton_norm.dispatch import Explanation, goes_to_triton
from triton_norm.modules import LayerNorm
from triton_norm.specs import RowOptions, RowSpec, RowTensors
from triton_norm.symbolic import Scriptable, signed


class Arithmetic(NamedTuple):
    """Describes an RMSNorm over the last axis, or a LayerNorm.

    Args:
        eps: name of the attribute that holds eps.
        weighted: it has a weight.
        weight_offset: added to the weight in float32.
        x_hat, y: dtype that each is rounded to: the input's, the weight's, or that of their product; None: no rounding.
        optional: the weight may be None, and y is then of the input's dtype. There may be a bias.
        centred: LayerNorm.
    """

    eps: str = "eps"
    weighted: bool = True
    weight_offset: float = 0.0
    x_hat: Type | None = None
    y: Type = "input"
    optional: bool = False
    centred: bool = False


LLAMA = Arithmetic("variance_epsilon", x_hat="input", y="promoted")
LLAMA_4 = LLAMA._replace(eps="eps")
OLMO_2 = Arithmetic("variance_epsilon")
MOSHI = Arithmetic()
GEMMA = Arithmetic(weight_offset=1.0)
T5 = Arithmetic("variance_epsilon", x_hat="weight", y="weight")
NANO_CHAT = Arithmetic(weighted=False)

_RMS_NORMS = {
    LLAMA: """
        aimv2.Aimv2RMSNorm apertus.ApertusRMSNorm apertus1p5.Apertus1p5TextRMSNorm arcee.ArceeRMSNorm
        aria.AriaTextRMSNorm axk1.AXK1RMSNorm axk2.AXK2RMSNorm bailing_hybrid.BailingHybridRMSNorm bamba.BambaRMSNorm
        bitnet.BitNetRMSNorm blt.BltRMSNorm chameleon.ChameleonRMSNorm clvp.ClvpRMSNorm cohere2_moe.Cohere2MoeRMSNorm
        cosmos3_edge.Cosmos3EdgeTextRMSNorm csm.CsmRMSNorm cwm.CwmRMSNorm deepseek_ocr2.DeepseekOcr2TextRMSNorm
        deepseek_ocr2.DeepseekOcr2VisionRMSNorm deepseek_v2.DeepseekV2RMSNorm deepseek_v3.DeepseekV3RMSNorm
        deepseek_v32.DeepseekV32RMSNorm deimv2.Deimv2RMSNorm dia.DiaRMSNorm diffllama.DiffLlamaRMSNorm doge.DogeRMSNorm
        dots1.Dots1RMSNorm dots3_note.Dots3NoteRMSNorm emu3.Emu3RMSNorm ernie4_5.Ernie4_5RMSNorm
        ernie4_5_moe.Ernie4_5_MoeRMSNorm ernie4_5_vl_moe.Ernie4_5_VLMoeRMSNorm eurobert.EuroBertRMSNorm
        evolla.EvollaRMSNorm exaone4.Exaone4RMSNorm exaone4_5.Exaone4_5_RMSNorm exaone_moe.ExaoneMoeRMSNorm
        falcon_h1.FalconH1RMSNorm falcon_mamba.FalconMambaRMSNorm glm.GlmRMSNorm glm4.Glm4RMSNorm
        glm4_moe.Glm4MoeRMSNorm glm4_moe_lite.Glm4MoeLiteRMSNorm glm4v.Glm4vRMSNorm glm4v_moe.Glm4vMoeRMSNorm
        glm4v_moe.Glm4vMoeTextRMSNorm glm5_next.Glm5NextRMSNorm glm5_next.Glm5NextTextRMSNorm glm_image.GlmImageRMSNorm
        glm_moe_dsa.GlmMoeDsaRMSNorm glm_ocr.GlmOcrRMSNorm gpt_neox.GPTNeoXRMSNorm granite.GraniteRMSNorm
        granite4_vision.Granite4VisionTextRMSNorm granite_docling.GraniteDoclingTextRMSNorm
        granite_swa.GraniteSWARMSNorm granitemoe.GraniteMoeRMSNorm granitemoe_swa.GraniteMoeSWARMSNorm
        granitemoehybrid.GraniteMoeHybridRMSNorm granitemoeshared.GraniteMoeSharedRMSNorm
        higgs_audio_v2.HiggsAudioV2RMSNorm hunyuan_v1_dense.HunYuanDenseV1RMSNorm hunyuan_v1_moe.HunYuanMoEV1RMSNorm
        hunyuan_vl.HunYuanVLRMSNorm hy_v3.HYV3RMSNorm hy_v4.HYV4RMSNorm hy_v4_vl.HYV4VLRMSNorm
        hyperclovax.HyperCLOVAXRMSNorm idefics2.Idefics2RMSNorm idefics3.Idefics3RMSNorm inkling.InklingRMSNorm
        internvl.InternVLVisionRMSNorm jamba.JambaRMSNorm jetmoe.JetMoeRMSNorm kimi_linear.KimiLinearRMSNorm
        kolibri1.Kolibri1RMSNorm laguna.LagunaRMSNorm lfm2.Lfm2RMSNorm lfm2_moe.Lfm2MoeRMSNorm lfm3.Lfm3RMSNorm
        lfm3_vl.Lfm3VlVisionRMSNorm lighton_ocr.LightOnOcrRMSNorm llama.LlamaRMSNorm longcat_flash.LongcatFlashRMSNorm
        mamba.MambaRMSNorm mamba2.Mamba2RMSNorm mellum.MellumRMSNorm mimo_v2_flash.MiMoV2FlashRMSNorm
        minicpm3.MiniCPM3RMSNorm minimax.MiniMaxRMSNorm minimax_m2.MiniMaxM2RMSNorm ministral.MinistralRMSNorm
        ministral3.Ministral3RMSNorm mistral.MistralRMSNorm mistral3.Mistral3RMSNorm mistral4.Mistral4RMSNorm
        mistral_large4.MistralLarge4RMSNorm mixtral.MixtralRMSNorm mllama.MllamaTextRMSNorm molmo2.Molmo2RMSNorm
        muse_glimmer_assistant.MuseGlimmerAssistantRMSNorm neucodec.NeuCodecRMSNorm olmoe.OlmoeRMSNorm
        ovis2.Ovis2RMSNorm paddleocr_vl.PaddleOCRRMSNorm pe_audio.PeAudioEncoderRMSNorm
        pe_audio_video.PeAudioVideoEncoderRMSNorm pe_video.PeVideoEncoderRMSNorm phi3.Phi3RMSNorm
        phi4_multimodal.Phi4MultimodalRMSNorm pixtral.PixtralRMSNorm qianfan_ocr.QianfanOCRVisionRMSNorm
        qwen2.Qwen2RMSNorm qwen2_5_omni.Qwen2_5OmniRMSNorm qwen2_5_vl.Qwen2_5_VLRMSNorm qwen2_moe.Qwen2MoeRMSNorm
        qwen2_vl.Qwen2VLRMSNorm qwen3.Qwen3RMSNorm qwen3_moe.Qwen3MoeRMSNorm qwen3_omni_moe.Qwen3OmniMoeCode2WavRMSNorm
        qwen3_omni_moe.Qwen3OmniMoeRMSNorm qwen3_omni_moe.Qwen3OmniMoeTextRMSNorm
        qwen3_omni_moe.Qwen3OmniMoeThinkerTextRMSNorm qwen3_vl.Qwen3VLTextRMSNorm qwen3_vl_moe.Qwen3VLMoeTextRMSNorm
        sapiens2.Sapiens2RMSNorm seed_oss.SeedOssRMSNorm smollm3.SmolLM3RMSNorm smolvlm.SmolVLMRMSNorm
        solar_open.SolarOpenRMSNorm timesfm.TimesFmRMSNorm timesfm2_5.TimesFm2_5RMSNorm ultrabert.UltrabertRMSNorm
        ultravbert.UltraVBertRMSNorm unlimited_ocr.UnlimitedOcrTextRMSNorm vibevoice.VibeVoiceRMSNorm
        vibevoice_acoustic_tokenizer.VibeVoiceAcousticTokenizerRMSNorm vibevoice_asr.VibeVoiceAsrRMSNorm
        voxtral_realtime.VoxtralRealtimeRMSNorm xcodec2.Xcodec2RMSNorm youtu.YoutuRMSNorm zamba.ZambaRMSNorm
        zamba2.Zamba2RMSNorm zaya.ZayaRMSNorm
    """,
    LLAMA_4: """
        llama4.Llama4TextRMSNorm
    """,
    OLMO_2: """
        afmoe.AfmoeRMSNorm beam.BeamRMSNorm deepseek_v4.DeepseekV4RMSNorm flex_olmo.FlexOlmoRMSNorm flint.FlintRMSNorm
        gpt_oss.GptOssRMSNorm helium.HeliumRMSNorm inkling2.Inkling2RMSNorm inkling2_loop.Inkling2LoopRMSNorm
        lara_mini.LaraMiniRMSNorm nemotron_h.NemotronHRMSNorm nemotron_h_omni.NemotronH_Omni_RMSNorm olmo2.Olmo2RMSNorm
        olmo3.Olmo3RMSNorm olmo_hybrid.OlmoHybridRMSNorm openai_privacy_filter.OpenAIPrivacyFilterRMSNorm
    """,
    MOSHI: """
        diffusion_gemma.DiffusionGemmaRMSNorm embedding_gemma2.EmbeddingGemma2RMSNorm gemma3n.Gemma3nRMSNorm
        gemma4.Gemma4RMSNorm gemma4_unified.Gemma4UnifiedRMSNorm kyutai_speech_to_text.KyutaiSpeechToTextRMSNorm
        moshi.MoshiRMSNorm muse_glimmer.MuseGlimmerRMSNorm muse_spark.MuseSparkRMSNorm neomme.NeoMMERMSNorm
    """,
    GEMMA: """
        gemma.GemmaRMSNorm gemma2.Gemma2RMSNorm gemma3.Gemma3RMSNorm minimax_m3_vl.MiniMaxM3VLRMSNorm
        muse_glimmer.MuseGlimmerTextCenteredRMSNorm qwen3_5.Qwen3_5RMSNorm qwen3_5_moe.Qwen3_5MoeRMSNorm
        qwen3_next.Qwen3NextRMSNorm recurrent_gemma.RecurrentGemmaRMSNorm step3p7.Step3p7RMSNorm t5gemma.T5GemmaRMSNorm
        t5gemma2.T5Gemma2RMSNorm vaultgemma.VaultGemmaRMSNorm
    """,
    T5: """
        idefics.IdeficsRMSNorm kosmos2_5.Kosmos2_5LayerNorm longt5.LongT5LayerNorm mt5.MT5LayerNorm
        pix2struct.Pix2StructLayerNorm pop2piano.Pop2PianoLayerNorm switch_transformers.SwitchTransformersLayerNorm
        t5.T5LayerNorm udop.UdopLayerNorm umt5.UMT5LayerNorm
    """,
    NANO_CHAT: """
        esmfold2.EsmFold2RMSNorm falcon_mamba.FalconMambaWeightlessRMSNorm hrm_text.HrmTextRMSNorm
        llama4.Llama4TextL2Norm nanochat.NanoChatRMSNorm
    """,
}
"""Each entry is model.Class, of transformers.models.model.modeling_model."""

_LAYER_NORMS = """
    convnext.ConvNextLayerNorm convnextv2.ConvNextV2LayerNorm deepseek_ocr2.DeepseekOcr2SamLayerNorm
    deepseek_vl_hybrid.DeepseekVLHybridLayerNorm dinov3_convnext.DINOv3ConvNextLayerNorm edgetam.EdgeTamLayerNorm
    edgetam_video.EdgeTamVideoLayerNorm got_ocr2.GotOcr2LayerNorm lw_detr.LwDetrLayerNorm
    pp_formulanet.PPFormulaNetLayerNorm rf_detr.RfDetrLayerNorm sam.SamLayerNorm sam2.Sam2LayerNorm
    sam2_video.Sam2VideoLayerNorm sam3_tracker.Sam3TrackerLayerNorm sam3_tracker_video.Sam3TrackerVideoLayerNorm
    sam_hq.SamHQLayerNorm seggpt.SegGptLayerNorm slanext.SLANeXtLayerNorm unlimited_ocr.UnlimitedOcrSamLayerNorm
"""
"""These subclasses of torch.nn.LayerNorm call its forward, channels-first if their data_format says so."""


def listed_path(cls: type) -> str:
    """Returns model.Class for a class of transformers, file.Class for one of diffusers, "" for others."""
    package, _, rest = cls.__module__.partition(".models.")
    model, _, file = rest.partition(".")
    if package == "transformers" and file == f"modeling_{model}":
        return f"{model}.{cls.__qualname__}"
    return path_of(cls)


_DIFFUSERS = {
    "normalization.FP32LayerNorm": MOSHI._replace(optional=True, centred=True),
    "normalization.MochiRMSNorm": MOSHI._replace(optional=True),
    "normalization.RMSNorm": T5._replace(eps="eps", optional=True),
}
"""Each key is file.Class, of diffusers.models.file."""

ARITHMETIC = {path: arithmetic for arithmetic, paths in _RMS_NORMS.items() for path in paths.split()} | _DIFFUSERS
LAYER_NORMS = frozenset(_LAYER_NORMS.split())


class _Made(Scriptable):
    """Marks classes that are created on request, so that copy and pickle can't find them by name.

    Args:
        original: the class that it is made from.
        argument: name of the input in that class's forward.
    """

    argument: str

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles by `original`. A subclass, as torch's parametrizations create, is pickled as usual, if at all."""
        reduced: Any = super().__reduce_ex__(protocol)
        return (_make, (self.original,), *reduced[2:]) if is_counterpart(type(self)) else reduced

    def _input(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Returns the only argument of a call, passed by position or name, or None for any other call."""
        if named:
            return named.get(self.argument) if len(named) == 1 and not inputs else None
        return inputs[0] if len(inputs) == 1 else None


class RowNorm(_Made):
    """Precedes a listed norm in the order of inheritance. Calls that the kernels can't serve go to that class."""

    arithmetic: Arithmetic

    @property
    def _function(self) -> str:
        return "layer_norm" if self.arithmetic.centred else "rms_norm"

    def _arguments(self: Any, x: Tensor) -> tuple[RowTensors, RowOptions] | None:
        """Returns the arguments of the function, or None if the class computes something else, or raises."""
        eps, weighted, weight_offset, x_hat, y, optional, centred = self.arithmetic
        if x.dtype not in SERVED or x.dim() == 0:
            return None
        weighted = weighted and self.__dict__.get("with_scale", True)  # False in a Gemma3nRMSNorm without weight
        weight = self.weight if weighted else None
        bias = getattr(self, "bias", None) if optional else None
        if bias is not None and (not centred or bias.dtype not in SERVED):
            return None
        if weight is None:
            if weighted and not optional:
                return None
            shape = self.normalized_shape if centred else x.shape[-1:]
            plain = RowOptions._make((shape, getattr(self, eps), None, 0.0, None, x.dtype))
            return RowTensors._make((x, None, None, bias)), plain
        if weight.dtype not in SERVED or weight.dim() != 1:
            return None
        dtypes = dtype_of(x_hat, x, weight), dtype_of(y, x, weight)
        options = RowOptions._make((weight.shape, getattr(self, eps), None, weight_offset, *dtypes))
        return RowTensors._make((x, None, weight, bias)), options

    def row_call(self: Any, x: Tensor) -> tuple[str, RowTensors, RowOptions] | None:
        """Returns the arguments of normalize_rows, or None if the class computes something else of x, or raises."""
        arguments = self._arguments(x)
        return None if arguments is None else (self._function, *arguments)

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        if not isinstance(self, RowNorm):  # a wrapper calls it after the module was reverted
            return type(self).forward(self, *inputs, **named)
        own, x = super().forward, self._input(inputs, named)  # type: ignore[misc]
        arguments = None if x is None else self._arguments(x)
        if arguments is not None:
            return functional.normalize_rows(self._function, *arguments, own)
        if x is not None or takes(own, inputs, named):
            goes_to_triton(COMPUTES_ELSE)
        return own(*inputs, **named)

    def explain_call(self: Any, *inputs: Any, **named: Any) -> Explanation:
        x = self._input(inputs, named)
        if x is None:
            inspect.signature(self.original.forward).bind(self, *inputs, **named)
        arguments = None if x is None else self._arguments(x)
        if arguments is None:
            return Explanation(self._function, "torch", COMPUTES_ELSE)
        tensors, options = arguments
        bias = {"bias": tensors.bias} if self.arithmetic.centred else {}
        function = getattr(functional, self._function)
        return explaining.explain(function, x, weight=tensors.weight, **bias, **options._asdict())


class _LayerNorm(_Made):
    """Precedes a listed LayerNorm in the order of inheritance."""

    def explain_call(self: Any, *inputs: Any, **named: Any) -> Explanation:
        x = inspect.signature(self.original.forward).bind(self, *inputs, **named).args[1]
        x = x.permute(0, 2, 3, 1) if self.data_format == "channels_first" else x
        return super().explain_call(x)  # type: ignore[misc, no-any-return]


def counterpart(cls: Any) -> type[nn.Module] | None:
    """Returns the class that modules of exactly this class are converted to, its subclass of the same name, or None."""
    path = listed_path(cls)
    return (
        _counterpart(cls, path)
        if any(path in listed for listed in (ARITHMETIC, GATED, ADAPTIVE, LAYER_NORMS))
        else None
    )


@functools.cache
def _counterpart(cls: Any, path: str) -> type[nn.Module]:
    of_class: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": cls.__qualname__,
        "original": cls,
        "argument": _argument(cls),
    }
    if path in ARITHMETIC:
        of_class |= {"arithmetic": ARITHMETIC[path], "forward": signed(RowNorm.forward, cls.forward)}
        return type(cls.__name__, (RowNorm, cls), of_class)
    if path in GATED:
        of_class |= {"gating": GATED[path], "forward": signed(GatedRMSNorm.forward, cls.forward)}
        return type(cls.__name__, (GatedRMSNorm, _Made, cls), of_class)
    if path in ADAPTIVE:
        _, *parameters = inspect.signature(cls.forward).parameters.values()
        own = {
            "adaptive": ADAPTIVE[path],
            "names": tuple(parameter.name for parameter in parameters),
            "defaults": {each.name: each.default for each in parameters if each.default is not each.empty},
            "forward": signed(AdaptiveNorm.forward, cls.forward),
        }
        return type(cls.__name__, (AdaptiveNorm, _Made, cls), of_class | own)
    # super() in the class's own forward is then this library's LayerNorm.
    return type(cls.__name__, (_LayerNorm, cls, LayerNorm), of_class)


def _argument(cls: Any) -> str:
    """Returns the name of the first argument of the class's forward, "" if it can't be passed by name."""
    try:
        _, first, *_ = inspect.signature(cls.forward).parameters.values()
    except (TypeError, ValueError):
        return ""
    return first.name if first.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD else ""


def joined(module: nn.Module) -> list[nn.Module]:
    """Returns the norms inside an adaptive norm: its counterpart does their work."""
    path = listed_path(type(module))
    names = {part.norm for part in ADAPTIVE[path].modulated} if path in ADAPTIVE else ()
    return [part for name, part in module.named_children() if name in names]


def is_counterpart(cls: Any) -> bool:
    return issubclass(cls, _Made) and counterpart(cls.original) is cls


def _make(original: type[nn.Module]) -> nn.Module:
    cls = counterpart(original)
    assert cls is not None
    return cls.__new__(cls)


def mismatch(module: nn.Module) -> str | None:
    """Returns why a module of a listed class, of the installed version of its package, can't be converted, or None.

    Compares the module to its listed arithmetic on a few numbers, x and weight each in half precision and in float32.
    Values must agree, and all but a few in every bit; those of adaptive norms within the rounding of their parts.
    """
    name, path = type(module).__name__, listed_path(type(module))
    if path in ADAPTIVE:
        reason = unknown_norm(module, ADAPTIVE[path])
        if reason is not None:
            return reason
    elif path not in ARITHMETIC and path not in GATED:
        return None
    agree = _adaptive_agrees if path in ADAPTIVE else _gated_agrees if path in GATED else _agrees
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        types = itertools.product((torch.bfloat16, torch.float32), repeat=2)
        try:
            alike = all(agree(module, x_dtype, dtype) for x_dtype, dtype in types)
        except Exception as error:  # a patched forward may raise anything on a CPU
            said = f"{type(error).__name__}: {error}".partition("\n")[0]
            return f"its version of {name} could not be tried on a few numbers, and raised {said}"
    return None if alike else f"its version of {name} computes something else than the one that is known"


def _numbers(module: nn.Module, x_dtype: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns x and a weight of as many columns as the module takes."""
    width = width_of(module, GATED.get(listed_path(type(module))))
    drawn = torch.sin(torch.arange(6.0 * width, device="cpu").square()).view(6, width)
    x = drawn[1:] * torch.tensor([1e-3, 1e-2, 1.0, 10.0, 1e4], device="cpu")[:, None]
    return x.to(x_dtype), (0.5 + drawn[0]).to(dtype)


def _probe(module: nn.Module) -> Any:
    """Returns a copy of the module, of its counterpart's class."""
    probe: Any = _make(type(module))
    probe.__dict__.update(module.__dict__)
    return probe


def _weighted(module: nn.Module, weight: Tensor) -> Any:
    """Returns a copy of the module with another weight, of another length, and without a bias."""
    probe = _probe(module)
    probe.__dict__.pop("weight", None)
    others = dict.fromkeys(name for name in module._parameters if name != "weight")
    probe.__dict__["_parameters"] = {"weight": weight, **others} if hasattr(module, "weight") else {}
    if "normalized_shape" in vars(module):
        probe.normalized_shape = tuple(weight.shape)
    return probe


def _adaptive_agrees(module: nn.Module, x_dtype: torch.dtype, dtype: torch.dtype) -> bool:
    return agrees(_probe(module), x_dtype, dtype)


def _agrees(module: nn.Module, x_dtype: torch.dtype, dtype: torch.dtype) -> bool:
    x, weight = _numbers(module, x_dtype, dtype)
    probe = _weighted(module, weight)
    arguments = probe._arguments(x)
    if arguments is None:
        return False
    tensors, options = arguments
    types, centred = (options.out_dtype, None, options.x_hat_dtype), probe.arithmetic.centred
    spec = RowSpec(x.shape[-1], options.eps, options.weight_offset, centred, *types)
    expected = reference.normalize(x, options.normalized_shape, tensors.weight, None, spec)
    return _alike(type(module).forward(probe, x), expected)


def _gated_agrees(module: nn.Module, x_dtype: torch.dtype, dtype: torch.dtype) -> bool:
    x, weight = _numbers(module, x_dtype, dtype)
    probe = _weighted(module, weight)
    gate = x.flip(-1) / x.abs().amax(-1, keepdim=True) * 4.0
    expected = probe.expected(x, gate)
    return expected is not None and _alike(type(module).forward(probe, x, gate), expected)


def _alike(result: Tensor, expected: Tensor) -> bool:
    if result.dtype != expected.dtype:
        return False
    difference = (result.double() - expected.double()).abs() / expected.double().abs()
    return bool((difference <= 2.0**-21).double().mean() > 0.95 and difference.max() < 2.0**-6)
