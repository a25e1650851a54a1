"""Fuses blocks of torchvision and transformers, without an import of them: norm, shortcut and activation."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from triton_norm.converting.joining import (
    Example,
    Fused,
    Fusible,
    Join,
    built,
    is_observed,
    is_recorded,
    is_reverted,
    joined,
    normalized,
    normalized_sum,
    options_of,
    path_of,
)

_SEQUENTIAL = path_of(nn.Sequential)
_OF_RESIDUAL_LAYERS = (
    "transformers.models.mobilenet_v2.modeling_mobilenet_v2.MobileNetV2ConvLayer",
    "transformers.models.regnet.modeling_regnet.RegNetConvLayer",
    "transformers.models.resnet.modeling_resnet.ResNetConvLayer",
)
"""Layers whose normalization is joined with the shortcut of the layer around them."""


class FusedConvLayer(Fused):
    """Joins normalization and activation."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if is_reverted(self):
            return type(self).forward(self, hidden_states)  # type: ignore[no-any-return]
        return normalized(self.normalization, self.convolution(hidden_states), self.activation)


class FusedRegNetConvLayer(Fused):
    """Joins normalization and activation; the argument has another name."""

    def forward(self: Any, hidden_state: Tensor) -> Tensor:
        if is_reverted(self):
            return type(self).forward(self, hidden_state)  # type: ignore[no-any-return]
        return normalized(self.normalization, self.convolution(hidden_state), self.activation)


class FusedConvNormLayer(Fused):
    """Joins norm and activation."""

    def forward(self: Any, hidden_state: Tensor) -> Tensor:
        if is_reverted(self):
            return type(self).forward(self, hidden_state)  # type: ignore[no-any-return]
        return normalized(self.norm, self.conv(hidden_state), self.activation)


class FusedMobileConvLayer(Fused):
    """Joins normalization and activation, each of which may be None."""

    def forward(self: Any, features: Tensor) -> Tensor:
        if is_reverted(self):
            return type(self).forward(self, features)  # type: ignore[no-any-return]
        features = self.convolution(_padded(self, features))
        if self.normalization is not None:
            return normalized(self.normalization, features, self.activation)
        return features if self.activation is None else self.activation(features)


def _padded(layer: Any, features: Tensor) -> Tensor:
    """Returns the input of the layer's convolution: MobileNet's pads it as TensorFlow does."""
    padding: Any = vars(sys.modules[path_of(type(layer)).rpartition(".")[0]]).get("apply_tf_padding")
    if padding is None or not layer.config.tf_padding:  # MobileViT's is without
        return features
    return padding(features, layer.convolution)  # type: ignore[no-any-return]


class FusedInvertedResidual(Fused):
    """Joins the last layer's normalization and the addition of the input."""

    def forward(self: Any, features: Tensor) -> Tensor:
        if is_reverted(self):
            return type(self).forward(self, features)  # type: ignore[no-any-return]
        last = self.reduce_1x1
        if is_recorded(features) or not (self.use_residual and _passes_over(last)):
            return super().forward(features)  # type: ignore[misc, no-any-return]
        residual = features
        features = self.conv_3x3(self.expand_1x1(features))
        features = last.convolution(_padded(last, features))
        options = joined(last.normalization, features, None, residual)
        if options is None:
            return residual + last.normalization(features)  # type: ignore[no-any-return]
        return last.normalization(features, **options)  # type: ignore[no-any-return]


class FusedResidualLayer(Fused):
    """Joins the last layer's normalization, the addition of the shortcut and the activation."""

    def forward(self: Any, hidden_state: Tensor) -> Tensor:
        if is_reverted(self):
            return type(self).forward(self, hidden_state)  # type: ignore[no-any-return]
        last = _last(self.layer)
        if is_recorded(hidden_state) or last is None:
            return super().forward(hidden_state)  # type: ignore[misc, no-any-return]
        y = hidden_state
        for layer in tuple(self.layer)[:-1]:
            y = layer(y)
        y = last.convolution(y)
        return normalized_sum(last.normalization, y, self.shortcut(hidden_state), self.activation)


class FusedBasicBlock(Fused):
    """Joins each norm with its activation, and the last one with the shortcut too."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if is_reverted(self):
            return type(self).forward(self, x)  # type: ignore[no-any-return]
        if is_recorded(x):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        y = self.conv2(normalized(self.bn1, self.conv1(x), self.relu))
        return normalized_sum(self.bn2, y, x if self.downsample is None else self.downsample(x), self.relu)


class FusedBottleneck(Fused):
    """Joins each norm with its activation, and the last one with the shortcut too."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if is_reverted(self):
            return type(self).forward(self, x)  # type: ignore[no-any-return]
        if is_recorded(x):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        y = self.conv2(normalized(self.bn1, self.conv1(x), self.relu))
        y = self.conv3(normalized(self.bn2, y, self.relu))
        return normalized_sum(self.bn3, y, x if self.downsample is None else self.downsample(x), self.relu)


class FusedResNet(Fused):
    """Joins the norm and the activation before the first stage."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if is_reverted(self):
            return type(self).forward(self, x)  # type: ignore[no-any-return]
        y = self.maxpool(normalized(self.bn1, self.conv1(x), self.relu))
        y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
        return self.fc(torch.flatten(self.avgpool(y), 1))  # type: ignore[no-any-return]


def _passes_over(layer: Any) -> bool:
    """Decides whether the layer is a listed one without an activation, whose parts can be called directly."""
    if path_of(type(layer)) not in _OF_RESIDUAL_LAYERS or is_observed(layer) or layer.normalization is None:
        return False
    activation = layer.activation
    return activation is None or (type(activation) is nn.Identity and not is_observed(activation))


def _last(layer: Any) -> Any:
    """Returns the last layer of a Sequential if its parts can be called directly, else None."""
    if path_of(type(layer)) != _SEQUENTIAL or is_observed(layer) or len(layer) == 0:
        return None
    last = layer[-1]
    return last if _passes_over(last) else None


def _joins_of(norm: str, activation: str = "activation") -> Callable[[Any], list[Join]]:
    """Returns the `joins` of a layer with these attributes."""

    def joins(module: Any) -> list[Join]:
        after = getattr(module, activation)
        if getattr(module, norm) is None or options_of(after) == {}:
            return []
        return [Join(f"{norm} + {activation}", getattr(module, norm), after)]

    return joins


def _joins_of_inverted_residual(module: Any) -> list[Join]:
    last = module.reduce_1x1
    if not (module.use_residual and _passes_over(last)):
        return []
    return [Join("reduce_1x1.normalization + shortcut", last.normalization, passed=(last,))]


def _joins_of_residual_layer(module: Any) -> list[Join]:
    last = _last(module.layer)
    if last is None:
        return []
    parts = f"layer.{len(module.layer) - 1}.normalization + shortcut + activation"
    return [Join(parts, last.normalization, module.activation, module.shortcut, (module.layer, last))]


def _joins_of_block(*norms: str) -> Callable[[Any], list[Join]]:
    def joins(module: Any) -> list[Join]:
        *inner, last = norms
        result = [Join(f"{norm} + relu", getattr(module, norm), module.relu) for norm in inner]
        last_norm = getattr(module, last)
        return [*result, Join(f"{last} + shortcut + relu", last_norm, module.relu, module.downsample)]

    return joins


def _images() -> Tensor:
    return torch.empty(2, 4, 7, 7)


class _Config:
    """Stands for a model's configuration in small modules."""

    tf_padding = False


class _PaddingConfig:
    tf_padding = True


def _convolution() -> nn.Module:
    return nn.Conv2d(4, 4, 3, padding=1, bias=False)


def _layer_examples(convolution: str, norm: str) -> Callable[[Any], list[Example]]:
    def examples(cls: Any) -> list[Example]:
        parts = {convolution: _convolution(), norm: nn.BatchNorm2d(4)}
        return [Example(built(cls, **parts, activation=after), (_images(),)) for after in (nn.ReLU(), nn.Identity())]

    return examples


def _layer(cls: Any, activation: nn.Module | None, config: Any = _Config) -> nn.Module:
    parts = {"convolution": _convolution(), "normalization": nn.BatchNorm2d(4), "activation": activation}
    return built(cls, **parts, config=config)


def _mobile_examples(cls: Any) -> list[Example]:
    layers = [
        _layer(cls, activation, config) for activation in (nn.SiLU(), None) for config in (_Config, _PaddingConfig)
    ]
    plain = built(cls, convolution=_convolution(), normalization=None, activation=nn.ReLU(), config=_Config)
    return [Example(layer, (_images(),)) for layer in (*layers, plain)]


def _of_same_model(cls: Any) -> Any:
    """Returns the class of the convolution layers in the class's module."""
    (path,) = (path for path in _OF_RESIDUAL_LAYERS if path.startswith(f"{cls.__module__}."))
    return vars(sys.modules[cls.__module__])[path.rpartition(".")[2]]


def _inverted_residual_examples(cls: Any) -> list[Example]:
    layer = _of_same_model(cls)
    parts = {"expand_1x1": nn.ReLU(), "conv_3x3": nn.SiLU(), "reduce_1x1": _layer(layer, None)}
    return [Example(built(cls, **parts, use_residual=adds), (_images(),)) for adds in (True, False)]


def _residual_layer_examples(cls: Any) -> list[Example]:
    layer = _of_same_model(cls)
    examples = []
    for shortcut in (nn.Identity(), _convolution()):
        layers = nn.Sequential(_layer(layer, nn.ReLU()), _layer(layer, nn.Identity()))
        examples.append(Example(built(cls, layer=layers, shortcut=shortcut, activation=nn.SiLU()), (_images(),)))
    return examples


def _block_examples(n_norms: int) -> Callable[[Any], list[Example]]:
    def examples(cls: Any) -> list[Example]:
        return [Example(block(cls, shortcut), (_images(),)) for shortcut in (None, _convolution())]

    def block(cls: Any, shortcut: nn.Module | None) -> nn.Module:
        parts = {f"conv{number}": _convolution() for number in range(1, n_norms + 1)}
        parts |= {f"bn{number}": nn.BatchNorm2d(4) for number in range(1, n_norms + 1)}
        return built(cls, **parts, relu=nn.ReLU(inplace=True), downsample=shortcut)

    return examples


def _resnet_examples(cls: Any) -> list[Example]:
    parts: dict[str, nn.Module] = {f"layer{number}": _convolution() for number in range(1, 5)}
    parts |= {"conv1": _convolution(), "bn1": nn.BatchNorm2d(4), "relu": nn.ReLU(inplace=True)}
    return [
        Example(built(cls, **parts, maxpool=nn.MaxPool2d(2), avgpool=nn.AvgPool2d(2), fc=nn.Linear(4, 3)), (_images(),))
    ]


def _of_transformers(fusible: Fusible, classes: str) -> dict[str, Fusible]:
    """Returns the entries of classes model.Class, or model.file.Class, of transformers.models."""
    paths = (each.split(".") for each in classes.split())
    return {
        f"transformers.models.{model}.modeling_{file[0] if file else model}.{name}": fusible
        for model, *file, name in paths
    }


_NORMALIZATION = _joins_of("normalization"), _layer_examples("convolution", "normalization")
_NORM = _joins_of("norm"), _layer_examples("conv", "norm")

BLOCKS: dict[str, Fusible] = {
    "torchvision.models.resnet.BasicBlock": Fusible(FusedBasicBlock, _joins_of_block("bn1", "bn2"), _block_examples(2)),
    "torchvision.models.resnet.Bottleneck": Fusible(
        FusedBottleneck, _joins_of_block("bn1", "bn2", "bn3"), _block_examples(3)
    ),
    "torchvision.models.resnet.ResNet": Fusible(FusedResNet, _joins_of("bn1", "relu"), _resnet_examples),
    **_of_transformers(
        Fusible(FusedConvLayer, *_NORMALIZATION),
        """
        beit.BeitConvLayer data2vec.data2vec_vision.Data2VecVisionConvLayer pp_doclayout_v3.PPDocLayoutV3ConvLayer
        pp_lcnet.PPLCNetConvLayer pp_lcnet_v3.PPLCNetV3ConvLayer pp_ocrv5_mobile_rec.PPOCRV5MobileRecConvLayer
        pp_ocrv5_server_rec.PPOCRV5ServerRecConvLayer pp_ocrv6_small_rec.PPOCRV6SmallRecConvLayer resnet.ResNetConvLayer
        rt_detr.rt_detr_resnet.RTDetrResNetConvLayer slanet.SLANetConvLayer uvdoc.UVDocConvLayer
        """,
    ),
    **_of_transformers(Fusible(FusedRegNetConvLayer, *_NORMALIZATION), "regnet.RegNetConvLayer"),
    **_of_transformers(
        Fusible(FusedConvNormLayer, *_NORM),
        """
        d_fine.DFineConvNormLayer deimv2.Deimv2ConvNormLayer efficientloftr.EfficientLoFTRConvNormLayer
        lw_detr.LwDetrConvNormLayer omdet_turbo.OmDetTurboConvNormLayer pp_doclayout_v2.PPDocLayoutV2ConvNormLayer
        pp_doclayout_v3.PPDocLayoutV3ConvNormLayer pp_doclayout_v4.PPDocLayoutV4ConvNormLayer
        rt_detr.RTDetrConvNormLayer rt_detr_v2.RTDetrV2ConvNormLayer
        """,
    ),
    **_of_transformers(
        Fusible(FusedMobileConvLayer, _joins_of("normalization"), _mobile_examples),
        """
        mobilenet_v1.MobileNetV1ConvLayer mobilenet_v2.MobileNetV2ConvLayer mobilevit.MobileViTConvLayer
        mobilevitv2.MobileViTV2ConvLayer
        """,
    ),
    **_of_transformers(
        Fusible(FusedInvertedResidual, _joins_of_inverted_residual, _inverted_residual_examples),
        "mobilenet_v2.MobileNetV2InvertedResidual",
    ),
    **_of_transformers(
        Fusible(FusedResidualLayer, _joins_of_residual_layer, _residual_layer_examples),
        """
        regnet.RegNetXLayer regnet.RegNetYLayer resnet.ResNetBasicLayer resnet.ResNetBottleNeckLayer
        """,
    ),
}
"""Each key is module.Class."""
