"""Lists the layers of Hugging Face's transformers that `convert(model, fuse=True)` fuses, by their norms of sums."""

_LAYERS = {
    "post_attention_layernorm": """
        arcee.ArceeDecoderLayer aria.AriaTextDecoderLayer axk1.AXK1DecoderLayer axk2.AXK2DecoderLayer
        bailing_hybrid.BailingHybridDecoderLayer bitnet.BitNetDecoderLayer blt.BltTransformerLayer
        chameleon.ChameleonDecoderLayer clvp.ClvpDecoderLayer cosmos3_edge.Cosmos3EdgeTextDecoderLayer
        csm.CsmDecoderLayer cwm.CwmDecoderLayer deepseek_ocr2.DeepseekOcr2VisionEncoderLayer
        deepseek_v2.DeepseekV2DecoderLayer deepseek_v3.DeepseekV3DecoderLayer deepseek_v32.DeepseekV32DecoderLayer
        diffllama.DiffLlamaDecoderLayer doge.DogeDecoderLayer dots1.Dots1DecoderLayer dots3_note.Dots3NoteAudioLayer
        dots3_note.Dots3NoteTextDecoderLayer emu3.Emu3DecoderLayer ernie4_5.Ernie4_5DecoderLayer
        ernie4_5_moe.Ernie4_5_MoeDecoderLayer ernie4_5_vl_moe.Ernie4_5_VLMoeDecoderLayer eurobert.EuroBertDecoderLayer
        evolla.EvollaDecoderLayer exaone_moe.ExaoneMoeDecoderLayer flint.FlintDecoderLayer gemma.GemmaDecoderLayer
        glm.GlmDecoderLayer glm4.Glm4DecoderLayer glm4_moe.Glm4MoeDecoderLayer glm4_moe_lite.Glm4MoeLiteDecoderLayer
        glm4v.Glm4vTextDecoderLayer glm4v_moe.Glm4vMoeTextDecoderLayer glm_image.GlmImageTextDecoderLayer
        glm_moe_dsa.GlmMoeDsaDecoderLayer glm_ocr.GlmOcrTextDecoderLayer glmasr.GlmAsrEncoderLayer gpt_neox.GPTNeoXLayer
        gpt_oss.GptOssDecoderLayer gradium_phonon_tts.GradiumPhononTTSDecoderLayer granite.GraniteDecoderLayer
        granite4_vision.Granite4VisionTextDecoderLayer granite_docling.GraniteDoclingTextDecoderLayer
        granite_swa.GraniteSWADecoderLayer granitemoe.GraniteMoeDecoderLayer granitemoe_swa.GraniteMoeSWADecoderLayer
        granitemoehybrid.GraniteMoeHybridDecoderLayer granitemoeshared.GraniteMoeSharedDecoderLayer
        helium.HeliumDecoderLayer hrm_text.HrmTextDecoderLayer hunyuan_v1_dense.HunYuanDenseV1DecoderLayer
        hunyuan_v1_moe.HunYuanMoEV1DecoderLayer hunyuan_vl.HunYuanVLDenseV1DecoderLayer hy_v3.HYV3DecoderLayer
        hyperclovax.HyperCLOVAXDecoderLayer idefics.IdeficsDecoderLayer idefics2.Idefics2PerceiverLayer
        inkling.InklingDecoderLayer jais2.Jais2DecoderLayer jetmoe.JetMoeDecoderLayer kimi_linear.KimiLinearDecoderLayer
        kolibri1.Kolibri1DecoderLayer kyutai_speech_to_text.KyutaiSpeechToTextDecoderLayer laguna.LagunaDecoderLayer
        lara_mini.LaraMiniDecoderLayer llama.LlamaDecoderLayer llama4.Llama4TextDecoderLayer
        llama4.Llama4VisionEncoderLayer mellum.MellumDecoderLayer mimi.MimiTransformerLayer
        mimo_v2_flash.MiMoV2FlashDecoderLayer minicpm3.MiniCPM3DecoderLayer minimax.MiniMaxDecoderLayer
        minimax_m2.MiniMaxM2DecoderLayer minimax_m3_vl.MiniMaxM3VLDecoderLayer ministral.MinistralDecoderLayer
        ministral3.Ministral3DecoderLayer mistral.MistralDecoderLayer mistral4.Mistral4DecoderLayer
        mistral_large4.MistralLarge4TextDecoderLayer mixtral.MixtralDecoderLayer mllama.MllamaSelfAttentionDecoderLayer
        mllama.MllamaVisionEncoderLayer moonshine.MoonshineEncoderLayer moshi.MoshiDecoderLayer
        muse_glimmer_assistant.MuseGlimmerAssistantDecoderLayer nanochat.NanoChatDecoderLayer
        neucodec.NeuCodecDecoderLayer olmo_hybrid.OlmoHybridLinearAttentionDecoderLayer olmoe.OlmoeDecoderLayer
        openai_privacy_filter.OpenAIPrivacyFilterEncoderLayer paddleocr_vl.PaddleOCRDecoderLayer
        pe_audio.PeAudioEncoderLayer pe_audio_video.PeAudioVideoEncoderLayer pe_video.PeVideoEncoderLayer
        persimmon.PersimmonDecoderLayer phi3.Phi3DecoderLayer phi4_multimodal.Phi4MultimodalDecoderLayer
        phimoe.PhimoeDecoderLayer pocket_tts.PocketTTSDecoderLayer
        pocket_tts_audio_tokenizer.PocketTTSAudioTokenizerTransformerLayer qwen2.Qwen2DecoderLayer
        qwen2_5_omni.Qwen2_5OmniDecoderLayer qwen2_5_vl.Qwen2_5_VLDecoderLayer qwen2_moe.Qwen2MoeDecoderLayer
        qwen2_vl.Qwen2VLDecoderLayer qwen3.Qwen3DecoderLayer qwen3_5.Qwen3_5DecoderLayer
        qwen3_5_moe.Qwen3_5MoeDecoderLayer qwen3_moe.Qwen3MoeDecoderLayer qwen3_next.Qwen3NextDecoderLayer
        qwen3_omni_moe.Qwen3OmniMoeCode2WavTransformerLayer qwen3_omni_moe.Qwen3OmniMoeTalkerCodePredictorDecoderLayer
        qwen3_omni_moe.Qwen3OmniMoeThinkerTextDecoderLayer qwen3_vl.Qwen3VLTextDecoderLayer
        qwen3_vl_moe.Qwen3VLMoeTextDecoderLayer seed_oss.SeedOssDecoderLayer smollm3.SmolLM3DecoderLayer
        solar_open.SolarOpenDecoderLayer stablelm.StableLmDecoderLayer starcoder2.Starcoder2DecoderLayer
        step3p7.Step3p7DecoderLayer ultrabert.UltrabertDecoderLayer unlimited_ocr.UnlimitedOcrTextDecoderLayer
        voxtral_realtime.VoxtralRealtimeTextDecoderLayer xcodec2.Xcodec2DecoderLayer youtu.YoutuDecoderLayer
    """,
    "LayerNorm": """
        align.AlignTextOutput align.AlignTextSelfOutput altclip.AltRobertaOutput altclip.AltRobertaSelfOutput
        bert.BertOutput bert.BertSelfOutput bert_generation.BertGenerationOutput
        bert_generation.BertGenerationSelfOutput big_bird.BigBirdOutput big_bird.BigBirdSelfOutput
        blip_2.Blip2QFormerOutput blip_2.Blip2QFormerSelfOutput bridgetower.BridgeTowerOutput
        bridgetower.BridgeTowerSelfOutput bros.BrosOutput bros.BrosSelfOutput camembert.CamembertOutput
        camembert.CamembertSelfOutput canine.CanineOutput canine.CanineSelfOutput chinese_clip.ChineseCLIPTextOutput
        chinese_clip.ChineseCLIPTextSelfOutput clap.ClapTextOutput clap.ClapTextSelfOutput convbert.ConvBertOutput
        convbert.ConvBertSelfOutput deberta_v2.DebertaV2Output deberta_v2.DebertaV2SelfOutput electra.ElectraOutput
        electra.ElectraSelfOutput ernie.ErnieOutput ernie.ErnieSelfOutput fnet.FNetBasicOutput fnet.FNetOutput
        git.GitOutput git.GitSelfOutput instructblip.InstructBlipQFormerOutput
        instructblip.InstructBlipQFormerSelfOutput instructblipvideo.InstructBlipVideoQFormerOutput
        instructblipvideo.InstructBlipVideoQFormerSelfOutput layoutlm.LayoutLMOutput layoutlm.LayoutLMSelfOutput
        layoutlmv2.LayoutLMv2Output layoutlmv2.LayoutLMv2SelfOutput layoutlmv3.LayoutLMv3Output
        layoutlmv3.LayoutLMv3SelfOutput lilt.LiltOutput lilt.LiltSelfOutput longformer.LongformerOutput
        longformer.LongformerSelfOutput luke.LukeOutput luke.LukeSelfOutput lxmert.LxmertAttentionOutput
        lxmert.LxmertOutput markuplm.MarkupLMOutput markuplm.MarkupLMSelfOutput mpnet.MPNetOutput mra.MraOutput
        mra.MraSelfOutput nystromformer.NystromformerOutput nystromformer.NystromformerSelfOutput rembert.RemBertOutput
        rembert.RemBertSelfOutput roberta.RobertaOutput roberta.RobertaSelfOutput roc_bert.RoCBertOutput
        roc_bert.RoCBertSelfOutput roformer.RoFormerOutput roformer.RoFormerSelfOutput sew_d.SEWDOutput
        sew_d.SEWDSelfOutput splinter.SplinterOutput splinter.SplinterSelfOutput tapas.TapasOutput tapas.TapasSelfOutput
        visual_bert.VisualBertOutput visual_bert.VisualBertSelfOutput xlm_roberta.XLMRobertaOutput
        xlm_roberta.XLMRobertaSelfOutput yoso.YosoOutput yoso.YosoSelfOutput
    """,
    "layer_norm2": """
        altclip.AltCLIPEncoderLayer blip.BlipEncoderLayer blip_2.Blip2EncoderLayer chinese_clip.ChineseCLIPVisionLayer
        clip.CLIPEncoderLayer clipseg.CLIPSegEncoderLayer cosmos3_edge.Cosmos3EdgeVisionEncoderLayer
        git.GitVisionEncoderLayer got_ocr2.GotOcr2VisionLayer granite_docling.GraniteDoclingEncoderLayer
        groupvit.GroupViTEncoderLayer hunyuan_vl.HunYuanVLVisionBlock hy_v4_vl.HYV4VLVisionBlock
        idefics2.Idefics2EncoderLayer idefics3.Idefics3EncoderLayer instructblip.InstructBlipEncoderLayer
        instructblipvideo.InstructBlipVideoEncoderLayer janus.JanusVisionEncoderLayer kosmos2.Kosmos2VisionEncoderLayer
        metaclip_2.MetaClip2EncoderLayer minicpm_ocr.MiniCPMOcrVisionEncoderLayer
        minicpmv4_6.MiniCPMV4_6VisionEncoderLayer minicpmv4_7.MiniCPMV4_7VisionEncoderLayer
        minimax_m3_vl.MiniMaxM3VLVisionEncoderLayer mlcd.MLCDEncoderLayer molmo2.Molmo2VisionEncoderLayer
        nemotron3_5_transcribe.Nemotron3_5TranscribeAsrAudioLayer nemotron3_diarization.Nemotron3DiarizationAudioLayer
        oneformer.OneFormerTextTransformerLayer owlv2.Owlv2EncoderLayer owlvit.OwlViTEncoderLayer
        paddleocr_vl.PaddleOCRVisionEncoderLayer phi4_multimodal.Phi4MultimodalVisionEncoderLayer
        pp_formulanet.PPFormulaNetVisionLayer pp_ocrv5_mobile_rec.PPOCRV5MobileRecBlock
        pp_ocrv5_server_rec.PPOCRV5ServerRecBlock pp_ocrv6_small_rec.PPOCRV6SmallRecBlock sam2.Sam2MultiScaleBlock
        sam3.Sam3ViTLayer sam3_lite_text.Sam3LiteTextTextEncoderLayer siglip.SiglipEncoderLayer
        siglip2.Siglip2EncoderLayer slanext.SLANeXtVisionLayer smolvlm.SmolVLMEncoderLayer tipsv2.Tipsv2TextEncoderLayer
        unlimited_ocr.UnlimitedOcrEncoderLayer video_llama_3.VideoLlama3VisionEncoderLayer
        vjepa2.VJEPA2PoolerCrossAttentionLayer vjepa2.VJEPA2PoolerSelfAttentionLayer x_clip.XCLIPEncoderLayer
    """,
    "norm2": """
        cohere_compass.CohereCompassVisionBlock dinov2.Dinov2Layer dinov2_with_registers.Dinov2WithRegistersLayer
        dinov3_vit.DINOv3ViTLayer dots3_note.Dots3NoteVisionBlock eomt.EomtLayer eomt_dinov3.EomtDinov3Layer
        ernie4_5_vl_moe.Ernie4_5_VLMoeVisionBlock exaone4_5.Exaone4_5_VisionBlock glm4v.Glm4vVisionBlock
        glm4v_moe.Glm4vMoeVisionBlock glm5_next.Glm5NextVisionBlock glm_image.GlmImageVisionBlock
        glm_ocr.GlmOcrVisionBlock kimi_k25.Kimi_K25VisionEncoderLayer mgp_str.MgpstrLayer
        muse_glimmer.MuseGlimmerVisionEncoderLayer muse_spark.MuseSparkVisionEncoderLayer
        qwen2_5_omni.Qwen2_5OmniVisionBlock qwen2_5_vl.Qwen2_5_VLVisionBlock qwen2_vl.Qwen2VLVisionBlock
        qwen3_5.Qwen3_5VisionBlock qwen3_5_moe.Qwen3_5MoeVisionBlock qwen3_omni_moe.Qwen3OmniMoeVisionBlock
        qwen3_vl.Qwen3VLVisionBlock qwen3_vl_moe.Qwen3VLMoeVisionBlock qwen4_exp.Qwen4ExpVisionBlock radio.RadioLayer
        rf_detr.RfDetrDinov2Layer sapiens2.Sapiens2Layer tipsv2.Tipsv2VisionLayer videomt.VideomtLayer
        vjepa2.VJEPA2Layer
    """,
    "final_layer_norm": """
        audioflamingo3.AudioFlamingo3EncoderLayer bigbird_pegasus.BigBirdPegasusEncoderLayer biogpt.BioGptDecoderLayer
        blenderbot.BlenderbotEncoderLayer dab_detr.DabDetrDecoderLayerFFN hubert.HubertEncoderLayerStableLayerNorm
        kosmos2_5.Kosmos2_5TextBlock m2m_100.M2M100EncoderLayer mbart.MBartEncoderLayer
        moss_transcribe_diarize.MossTranscribeDiarizeAudioLayer musicgen_melody.MusicgenMelodyDecoderLayer
        omniasr.OmniASREncoderLayer pegasus.PegasusEncoderLayer qwen2_5_omni.Qwen2_5OmniAudioEncoderLayer
        qwen2_audio.Qwen2AudioEncoderLayer qwen3_asr.Qwen3ASRAudioEncoderLayer
        qwen3_omni_moe.Qwen3OmniMoeAudioEncoderLayer speech_to_text.Speech2TextEncoderLayer
        table_transformer.TableTransformerEncoderLayer unispeech.UniSpeechEncoderLayerStableLayerNorm
        unispeech_sat.UniSpeechSatEncoderLayerStableLayerNorm voxtral.VoxtralEncoderLayer
        voxtral_realtime.VoxtralRealtimeEncoderLayer wav2vec2.Wav2Vec2EncoderLayerStableLayerNorm
        wavlm.WavLMEncoderLayerStableLayerNorm whisper.WhisperEncoderLayer
    """,
    "layernorm_after": """
        audio_spectrogram_transformer.ASTLayer beit.BeitLayer cvt.CvtLayer deit.DeiTLayer dpt.DPTViTLayer
        ijepa.IJepaLayer inkling2.Inkling2VisionEncoderLayer internvl.InternVLVisionLayer
        mobilevit.MobileViTTransformerLayer pixio.PixioLayer qianfan_ocr.QianfanOCRVisionLayer segformer.SegformerLayer
        step3p7.Step3p7VisionEncoderLayer videomae.VideoMAELayer vit.ViTLayer vit_mae.ViTMAELayer vit_msn.ViTMSNLayer
        vitpose_backbone.VitPoseBackboneLayer vivit.VivitLayer yolos.YolosLayer
    """,
    "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm": """
        bart.BartDecoderLayer blenderbot_small.BlenderbotSmallDecoderLayer conditional_detr.ConditionalDetrDecoderLayer
        deformable_detr.DeformableDetrDecoderLayer deimv2.Deimv2DecoderLayer detr.DetrDecoderLayer
        informer.InformerDecoderLayer led.LEDDecoderLayer marian.MarianDecoderLayer
        maskformer.MaskFormerDetrDecoderLayer mvp.MvpDecoderLayer plbart.PLBartDecoderLayer
        pp_doclayout_v2.PPDocLayoutV2DecoderLayer pp_doclayout_v3.PPDocLayoutV3DecoderLayer
        pp_doclayout_v4.PPDocLayoutV4DecoderLayer rt_detr.RTDetrDecoderLayer rt_detr_v2.RTDetrV2DecoderLayer
        speecht5.SpeechT5DecoderLayer time_series_transformer.TimeSeriesTransformerDecoderLayer trocr.TrOCRDecoderLayer
    """,
    "self_attn_layer_norm final_layer_norm": """
        bart.BartEncoderLayer blenderbot_small.BlenderbotSmallEncoderLayer conditional_detr.ConditionalDetrEncoderLayer
        dab_detr.DabDetrEncoderLayer deformable_detr.DeformableDetrEncoderLayer detr.DetrEncoderLayer fsmt.EncoderLayer
        grounding_dino.GroundingDinoDeformableLayer informer.InformerEncoderLayer marian.MarianEncoderLayer
        mask2former.Mask2FormerPixelDecoderEncoderLayer mm_grounding_dino.MMGroundingDinoDeformableLayer
        mvp.MvpEncoderLayer omdet_turbo.OmDetTurboEncoderLayer oneformer.OneFormerPixelDecoderEncoderLayer
        plbart.PLBartEncoderLayer time_series_transformer.TimeSeriesTransformerEncoderLayer
    """,
    "pre_feedforward_layernorm": """
        embedding_gemma2.EmbeddingGemma2EncoderLayer gemma2.Gemma2DecoderLayer gemma3.Gemma3DecoderLayer
        gemma4.Gemma4TextDecoderLayer gemma4.Gemma4VisionEncoderLayer gemma4_unified.Gemma4UnifiedTextDecoderLayer
        muse_glimmer.MuseGlimmerTextDecoderLayer t5gemma.T5GemmaEncoderLayer t5gemma2.T5Gemma2DecoderLayer
        t5gemma2.T5Gemma2EncoderLayer timesfm2_5.TimesFm2_5DecoderLayer vaultgemma.VaultGemmaDecoderLayer
    """,
    "layer_norm final_layer_norm": """
        hubert.HubertEncoderLayer sew.SEWEncoderLayer speecht5.SpeechT5EncoderLayer unispeech.UniSpeechEncoderLayer
        unispeech_sat.UniSpeechSatEncoderLayer vits.VitsEncoderLayer wav2vec2.Wav2Vec2EncoderLayer
        wavlm.WavLMEncoderLayer
    """,
    "layer_norm2 layer_norm3 layer_norm4": """
        edgetam.EdgeTamTwoWayAttentionBlock edgetam_video.EdgeTamVideoTwoWayAttentionBlock sam.SamTwoWayAttentionBlock
        sam2.Sam2TwoWayAttentionBlock sam2_video.Sam2VideoTwoWayAttentionBlock
        sam3_tracker.Sam3TrackerTwoWayAttentionBlock sam3_tracker_video.Sam3TrackerVideoTwoWayAttentionBlock
        sam_hq.SamHQTwoWayAttentionBlock
    """,
    "layer_norm2 layer_norm3": """
        edgetam_video.EdgeTamVideoMemoryAttentionLayer sam2_video.Sam2VideoMemoryAttentionLayer
        sam3.Sam3DetrEncoderLayer sam3.Sam3GeometryEncoderLayer sam3_lite_text.Sam3LiteTextDetrEncoderLayer
        sam3_lite_text.Sam3LiteTextGeometryEncoderLayer sam3_tracker_video.Sam3TrackerVideoMemoryAttentionLayer
    """,
    "ffn_layer_norm": """
        seamless_m4t.SeamlessM4TConformerAdapterLayer seamless_m4t.SeamlessM4TEncoderLayer
        seamless_m4t_v2.SeamlessM4Tv2ConformerAdapterLayer seamless_m4t_v2.SeamlessM4Tv2EncoderLayer
        wav2vec2_bert.Wav2Vec2BertAdapterLayer
    """,
    "ffn_norm": """
        lfm2.Lfm2DecoderLayer lfm2_moe.Lfm2MoeDecoderLayer lfm3.Lfm3DecoderLayer lfm3_vl.Lfm3VlVisionLayer
        pixtral.PixtralAttentionLayer
    """,
    "norm_self_att norm_conv norm_feed_forward2 norm_out": """
        granite_speech5.GraniteSpeech5EncoderBlock granite_speech5.GraniteSpeech5EncoderSubsamplingBlock
        lasr.LasrEncoderBlock nemotron_asr_streaming.NemotronAsrStreamingEncoderBlock parakeet.ParakeetEncoderBlock
    """,
    "norm": """
        d_fine.DFineGate deimv2.Deimv2Gate pp_doclayout_v2.PPDocLayoutV2ReadingOrderOutput
        pp_doclayout_v2.PPDocLayoutV2ReadingOrderSelfOutput
    """,
    "pre_ff_layernorm": """
        bamba.BambaDecoderLayer falcon_h1.FalconH1DecoderLayer jamba.JambaAttentionDecoderLayer
        jamba.JambaMambaDecoderLayer
    """,
    "self_attn_layer_norm ffn2_layer_norm final_layer_norm": """
        seamless_m4t.SeamlessM4TConformerEncoderLayer seamless_m4t_v2.SeamlessM4Tv2ConformerEncoderLayer
        wav2vec2_bert.Wav2Vec2BertEncoderLayer wav2vec2_conformer.Wav2Vec2ConformerEncoderLayer
    """,
    "layer_norm": """
        funnel.FunnelPositionwiseFFN tvp.TvpOutputLayer xlnet.XLNetFeedForward
    """,
    "post_attention_layernorm post_mlp_layernorm": """
        gte.GteLayer jina_embeddings_v3.JinaEmbeddingsV3Layer nomic_bert.NomicBertLayer
    """,
    "post_norm": """
        diffusion_gemma.DiffusionGemmaSelfConditioning granite_speech.GraniteSpeechConformerBlock
        granite_speech_plus.GraniteSpeechPlusConformerBlock
    """,
    "self_attn_layer_norm": """
        autoformer.AutoformerEncoderLayer d_fine.DFineDecoderLayer dab_detr.DabDetrDecoderLayerSelfAttention
    """,
    "feedforward_layernorm": """
        apertus.ApertusDecoderLayer apertus1p5.Apertus1p5TextDecoderLayer
    """,
    "layer_norm_before layer_norm_after": """
        grounding_dino.GroundingDinoTextEnhancerLayer mm_grounding_dino.MMGroundingDinoTextEnhancerLayer
    """,
    "mlp_norm": """
        modernbert.ModernBertEncoderLayer modernbert_decoder.ModernBertDecoderLayer
    """,
    "pre_mlp_layer_norm": """
        kosmos2_5.Kosmos2_5VisionLayer pix2struct.Pix2StructVisionLayer
    """,
    "rms_norm2": """
        aimv2.Aimv2EncoderLayer ovis2.Ovis2VisionEncoderLayer
    """,
    "self_attn_layer_norm cross_attn_layer_norm": """
        lw_detr.LwDetrDecoderLayer rf_detr.RfDetrDecoderLayer
    """,
    "self_attn_layer_norm encoder_attn_text_layer_norm encoder_attn_layer_norm final_layer_norm": """
        grounding_dino.GroundingDinoDecoderLayer mm_grounding_dino.MMGroundingDinoDecoderLayer
    """,
    "text_mlp_out_norm": """
        sam3.Sam3DotProductScoring sam3_lite_text.Sam3LiteTextDotProductScoring
    """,
    "LayerNorm LayerNorm LayerNorm": """
        bridgetower.BridgeTowerLinkTower
    """,
    "channel_pre_norm": """
        recurrent_gemma.RecurrentGemmaDecoderLayer
    """,
    "encoder_attn_layer_norm final_layer_norm": """
        table_transformer.TableTransformerDecoderLayer
    """,
    "ff_layer_norm": """
        nllb_moe.NllbMoeEncoderLayer
    """,
    "ff_norm": """
        qwen2_5_omni.DiTDecoderLayer
    """,
    "full_layer_layer_norm": """
        albert.AlbertLayer
    """,
    "layer_norm1 layer_norm2": """
        clipseg.CLIPSegDecoderLayer
    """,
    "layer_norm_att layer_norm": """
        phi4_multimodal.Phi4MultimodalAudioConformerEncoderLayer
    """,
    "layer_norm_self": """
        edgetam_video.EdgeTamVideoPerceiverEncoderLayer
    """,
    "layernorm2": """
        ctrl.EncoderLayer
    """,
    "ln2": """
        rwkv.RwkvBlock
    """,
    "norm1": """
        omdet_turbo.OmDetTurboResidualLayer
    """,
    "norm2 norm3": """
        oneformer.OneFormerTextTransformerDecoderLayer
    """,
    "norm2 norm_post": """
        groupvit.GroupViTCrossAttentionLayer
    """,
    "norm3": """
        x_clip.PromptGeneratorLayer
    """,
    "norm_2": """
        mpt.MptBlock
    """,
    "post_attention_rmsnorm": """
        clvp.ClvpEncoderLayer
    """,
    "post_mlp_layernorm": """
        axk1.AXK1MoE
    """,
    "post_sa_norm": """
        dia.DiaEncoderLayer
    """,
    "pre_ca_norm pre_mlp_norm": """
        dia.DiaDecoderLayer
    """,
    "pre_cross_attn_layernorm pre_feedforward_layernorm": """
        t5gemma.T5GemmaDecoderLayer
    """,
    "pre_mlp_layernorm": """
        afmoe.AfmoeDecoderLayer
    """,
    "sa_layer_norm output_layer_norm": """
        distilbert.TransformerBlock
    """,
    "self_attn_layer_norm conv_layer_norm": """
        seamless_m4t_v2.SeamlessM4Tv2TextToUnitDecoderLayer
    """,
    "self_attn_layer_norm cross_attn_layer_norm feed_forward_layer_norm": """
        prophetnet.ProphetNetDecoderLayer
    """,
    "self_attn_layer_norm feed_forward_layer_norm": """
        prophetnet.ProphetNetEncoderLayer
    """,
}
"""Each key has the names of the attributes, in the order of the forward's code. Each entry is model.Class, of
transformers.models.model.modeling_model."""

LAYERS = {path: tuple(names.split()) for names, paths in _LAYERS.items() for path in paths.split()}
