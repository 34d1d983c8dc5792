"""Configurations of models of some hundred kilobytes, for (nearly) every type of model that Transformers has.

A default configuration is shrunk by rules that know settings by their names: sizes, heads, experts, and one layer of
each kind. Where a type's own constraints want other values, or defaults leave something unset, `SETTINGS` has them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

_LAYERS = r"(.*_)?num_hidden_layers|(.*_)?num_layers|n_layers?|depth|encoder_layers|decoder_layers|num_layers_per_stack"
_MAX_LAYERS = 4
_VOCABULARY = 96
# The first pattern that matches a setting's whole name gives the most that it may be.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_.*)?", _VOCABULARY),
    (r"(.*_)?max_position_embeddings|model_max_length|max_(source|target)_positions|max_pos_emb", 64),
    (_LAYERS, 2),
    (r"(.*_)?intermediate_(size|dim)|(.*_)?ffn_(dim|hidden_size)|mlp_dim|(.*_)?feed_forward_hidden_size", 48),
    (r"(.*_)?num_(attention_)?heads|(.*_)?attention_heads|linear_num_(key|value)_heads|index_n_heads", 4),
    (r"(.*_)?num_key_value_heads", 2),
    (r"(.*_)?head_dim", 8),
    (r"(kv|q|o)_lora_rank|qk_head_dim", 16),
    (r"(.*_)?hidden_(size|dim)|d_model|(.*_)?embed_dim|(.*_)?proj(ection)?_dim|decoder_dim|output_dim", 32),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k", 2),
    (r"(n|num)_(expert_)?groups?|topk_group|first_k_dense_replace|num_dense_layers|decoder_sparse_step", 1),
    (r"num_mel_bins|n_mel_bins|feature_size", 16),
    (r"num_queries|num_denoising|two_stage_num_proposals", 6),
    (r"num_position_embeddings|codebook_size", 64),
    (r"output_channels|fpn_feature_size|mask_feature_size|fusion_hidden_size", 32),
    (r"c2f_num_blocks|group_detr|embedding_size|num_filters|zero_expert_num|num_depth_bins|ssm_state_size", 4),
)
_CHANNELS = r"(.*_)?hidden_sizes|encoder_in_channels|stage_.*_channels|stem_channels|downsample_channels"
_BLOCKS = r"depths|stage_num_blocks|stage_numb_of_layers"

_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_RESNET = {
    "model_type": "resnet",
    "embedding_size": 4,
    "hidden_sizes": [16, 16, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_indices": [1, 2, 3, 4],
}
_SEANET = {"hidden_size": 32, "num_filters": 2, "upsample_groups": 32}
_GRANITE_SPEECH = {"encoder_config.context_size": 32, "encoder_config.dim_head": 8}
_SWIN = {"embed_dim": 8, "num_heads": [1, 2, 4, 8]}
_NEMOTRON_LAYERS = {"text_config.layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]}
_VIBEVOICE = {"num_filters": 2, "hidden_size": 8, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}
# By model type or name of the class, more than the rules: paths of settings, and their values.
SETTINGS: dict[str, dict[str, Any]] = {
    "cosmos3_edge": {"text_config.rope_parameters": _MROPE},
    "radio": {"max_img_size": 64, "video_temporal_patch_size": 2, "video_patch_dim": 1536},
    "gemma4_unified": {
        "vision_config": {
            "model_type": "gemma4_unified_vision",
            "patch_size": 4,
            "mm_embed_dim": 32,
            "mm_posemb_size": 16,
            "output_proj_dims": 32,
        },
        "audio_config": {"model_type": "gemma4_unified_audio", "audio_embed_dim": 32},
    },
    "qwen3_omni_moe": {
        "talker_config.spatial_merge_size": 2,
        "talker_config.text_config.shared_expert_intermediate_size": 48,
    },
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},
    "hunyuan_vl": {"text_config.head_dim": 8, "vision_config.max_image_size": 64},
    "nemo_speechlm": _NEMOTRON_LAYERS,
    "NemotronH_Omni_Reasoning_V3": {
        **_NEMOTRON_LAYERS,
        "vision_config.max_img_size": 64,
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_mel_bins": 16,
            "subsampling_conv_channels": 8,
            "projection_hidden_size": 32,
            "projection_bias": True,
        },
    },
    "minimax_m3_vl": {"text_config.layer_types": ["full_attention", "minimax_m3_sparse"]},
    "BeitModel": {"use_relative_position_bias": True},
    "BeitBackbone": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "add_fpn": True},
    "BeitForSemanticSegmentation": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "lw_detr": {"projector_scale_factors": [1.0], "projector_in_channels": [32], "num_feature_levels": 1},
    "segformer": {"hidden_sizes": [4, 8, 20, 32]},
    "swin": _SWIN,
    "granite_speech": _GRANITE_SPEECH,
    "granite_speech_plus": _GRANITE_SPEECH,
    "mimi": _SEANET,
    "mimi_encoder": _SEANET,
    "mimi_decoder": _SEANET,
    "vibevoice_asr": {
        f"{part}_tokenizer_encoder_config.{name}": value
        for part in ("acoustic", "semantic")
        for name, value in _VIBEVOICE.items()
    },
    "mllama": {
        "vision_config.intermediate_layers_indices": [0, 1],
        "vision_config.vision_output_dim": 96,
        "text_config.cross_attention_layers": [1],
    },
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0], "text_config.rope_scaling_layers": [0, 1]},
    "emu3": {
        "vocabulary_map": {"<|extra_200|>": 5, "<image>": 7},
        "vq_config.base_channels": 32,
        "vq_config.channel_multiplier": [1, 1],
        "vq_config.num_res_blocks": 1,
    },
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "text_config.num_experts_per_tok": 2,
    },
    "d_fine": {"depth_mult": 0.34},
    "esm": {"vocab_size": 96},
    "flint": {"mlp_only_layers": [0]},
    "Dinov2Backbone": {"use_swiglu_ffn": True},
    "Dinov2WithRegistersBackbone": {"use_swiglu_ffn": True},
    "Tipsv2VisionBackbone": {"use_swiglu_ffn": True},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "dots3_note_text": {"head_dim": 16},
    "dots3_note": {
        "text_config.head_dim": 16,
        "audio_config.adapter_input_size": 32,
        "audio_config.adapter_out_dim": 32,
        "vision_config.adapter_in_dim": 32,
        "vision_config.adapter_out_dim": 32,
    },
    "sapiens2": {
        "head_config.upsample_out_channels": [8, 8, 8, 8],
        "head_config.upsample_kernel_sizes": [4, 4, 4, 4],
        "head_config.conv_out_channels": [8, 8, 8],
        "head_config.conv_kernel_sizes": [1, 1, 1],
    },
    "Sapiens2ForNormalEstimation": {"head_config.use_pixel_shuffle": True},
    "Sapiens2ForImageMatting": {"head_config.use_pixel_shuffle": True},
    "Sapiens2ForPointmapEstimation": {
        "head_config.scale_conv_out_channels": [8, 8, 8],
        "head_config.scale_conv_kernel_sizes": [1, 1, 1],
        "head_config.scale_final_input_size": 16,
        "head_config.scale_final_hidden_sizes": [8, 8],
    },
    "DetrForSegmentation": {"encoder_attention_heads": 8, "decoder_attention_heads": 8},
    "ConditionalDetrForSegmentation": {"encoder_attention_heads": 8, "decoder_attention_heads": 8},
    "inkling_mm_model": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "vision_config.n_layers": 4,
        "vision_config.patch_size": 4,
        "vision_config.temporal_patch_size": 2,
    },
    "ernie4_5_vl_moe": {
        "text_config.moe_intermediate_size": [16, 24],
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "sam3_tracker_video": {"memory_encoder_hidden_size": 32, "mask_downsampler_embed_dim": 32},
    "pp_doclayout_v2": {"reading_order_config.max_2d_position_embeddings": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "maskformer": {f"backbone_config.{name}": value for name, value in _SWIN.items()},
    "detr": {"backbone_config": _RESNET},
    "conditional_detr": {"backbone_config": _RESNET},
    "deformable_detr": {"backbone_config": {**_RESNET, "out_indices": [2, 3, 4]}},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "timesfm2_5": {"output_quantile_len": 8, "horizon_length": 4},
    "gradium_phonon_tts": {"flow_head_config.condition_dim": 32},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "ple_embed_dim": 32,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 4,
        "eos_token_id": 1,
    },
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
}


def tiny_config(config_class: type[PretrainedConfig], class_name: str) -> PretrainedConfig:
    """A small configuration for the model `class_name`."""
    values = _shrunk(config_class().to_dict())
    for name in (config_class.model_type, class_name):
        for path, value in SETTINGS.get(name, {}).items():
            *parents, setting = path.split(".")
            inner = values
            for parent in parents:
                inner = inner[parent]
            inner[setting] = value
    return config_class.from_dict(values)


def _shrunk(values: Mapping[str, Any]) -> dict[str, Any]:
    small = {name: _small(name, value, values) for name, value in values.items()}
    counters = {n: v for n, v in values.items() if re.fullmatch(_LAYERS, n) and isinstance(v, int) and v > 2}
    for count in sorted(set(counters.values())):
        per_layer = {n: v for n, v in values.items() if isinstance(v, (list, tuple)) and len(v) == count}
        exceptions = {int(layer): v for layer, v in (values.get("per_layer_config") or {}).items()}
        staged = len(values.get("stage_names") or ()) == count + 1
        outputs = len(values["out_indices"]) if staged else 0
        kinds = [(*(v[layer] for v in per_layer.values()), exceptions.get(layer)) for layer in range(count)]
        kept = _one_of_each(kinds, at_least=max(2, outputs))
        small.update({n: len(kept) for n, v in counters.items() if v == count})
        small.update({n: [_small(n, small[n][layer], values) for layer in kept] for n in per_layer})
        if exceptions:
            small["per_layer_config"] = {
                str(new): _shrunk(exceptions[old]) for new, old in enumerate(kept) if old in exceptions
            }
        if staged:
            del small["stage_names"], small["out_features"]
            small["out_indices"] = list(range(len(kept) - outputs + 1, len(kept) + 1))
    return small


def _one_of_each(kinds: Sequence[Any], *, at_least: int) -> list[int]:
    """The layers to keep: the first of each kind, and further ones where those are too few."""
    first = sorted({kinds.index(kind) for kind in kinds})[:_MAX_LAYERS]
    others = [layer for layer in range(len(kinds)) if layer not in first]
    return sorted(first + others[: max(0, at_least - len(first))])


def _small(name: str, value: Any, beside: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        return _shrunk(value) if "model_type" in value else value
    if isinstance(value, (list, tuple)):
        if re.fullmatch(_BLOCKS, name):
            return [1] * len(value)
        return [v if v < 16 else v // 16 for v in value] if re.fullmatch(_CHANNELS, name) else value
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name == "image_size" and isinstance(beside.get("patch_size"), int):
        return min(value, 4 * beside["patch_size"])
    if name.endswith("num_key_value_heads") and value == beside.get(name.replace("key_value", "attention")):
        name = name.replace("key_value", "attention")  # as many as there are heads, which some types insist on
    if name.endswith(("_id", "_index")):
        return value % _VOCABULARY
    return next((min(value, size) for pattern, size in _SIZES if re.fullmatch(pattern, name)), value)
