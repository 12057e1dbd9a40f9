"""Images of any size as one long list of patches, and a table of their grids: the line of Qwen and its like."""

from __future__ import annotations

from typing import Any

import mllm_zoo as zoo
import torch
from mllm_zoo import END, IMAGE, START, TEXT_IDS, VIDEO, Item, Spec
from torch import Tensor

from .core import Class

_QWEN = {"images": zoo._QWEN_IMAGES, "pixels": zoo._patches, "pack": zoo._qwen_pack(), "types": "mm_token_type_ids"}
_QWEN_VIDEO = {**_QWEN, "ids": zoo._qwen3_ids, "video": (3, 6, 8)}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_TOWER = {**zoo._QWEN_TOWER, "hidden_size": 48, "intermediate_size": 64, "out_hidden_size": 64}
_QWEN3_TOWER = {**_TOWER, "num_position_embeddings": 64}
_MROPE = zoo._rope(8, 4, 4, mrope_interleaved=True)
_LINEAR = {
    "head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    # a quarter of the head turns, so that the sections need 32 * 4 / 8
    "rope_parameters": zoo._rope(4, 2, 2, mrope_interleaved=True, partial_rotary_factor=0.5),
}

# -- GLM: frames of a video are images, told apart by what they are wrapped in ---------------------------------------

VIDEO_START, VIDEO_END = 115, 116
_GLM_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
}
_GLM_TOWER = {**_TOWER, "hidden_size": 64, "intermediate_size": 80, "image_size": 64}
_GLM_ROPE = zoo._rope(4, 2, 2, partial_rotary_factor=0.5)


def _glm_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    frame = [START, *[IMAGE] * (spec[1] * spec[2] // 4), END]
    if kind == "image":
        return frame
    stamp = torch.randint(*TEXT_IDS, (spec[0], 3), generator=generator).tolist()
    frames = [token for i in range(spec[0]) for token in [*frame, *stamp[i][: 2 + i % 2]]]
    return [VIDEO_START, *frames, VIDEO_END]


def _glm(kind: str, text: dict[str, Any], vision: dict[str, Any] | None = None) -> Class:
    text = {**zoo._TEXT, "head_dim": 32, "rope_parameters": _GLM_ROPE, **text}
    config = zoo._config(kind, text_config=text, vision_config={**_GLM_TOWER, **(vision or {})}, **_GLM_IDS)
    # Both masks look for the image's placeholder, so an image and a video in one call are refused.
    return Class(config, **{**_QWEN_VIDEO, "ids": _glm_ids}, lacks=("image_video",))


# -- Omni thinkers, here without sound: positions are found by the ids alone ------------------------------------------

_OMNI_IDS = {**zoo._QWEN_IDS, "audio_start_token_id": 117, "audio_end_token_id": 118, "tie_word_embeddings": False}
_AUDIO = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 16}


def _omni_pack(items: list[Item], rows: int) -> dict[str, Tensor]:
    out = zoo._qwen_pack(seconds=True)(items, rows)
    if "second_per_grid_ts" in out:
        out["video_second_per_grid"] = out.pop("second_per_grid_ts")
    return out


_OMNI = {**_QWEN_VIDEO, "ids": zoo._qwen_ids, "types": None, "pack": _omni_pack}

CLASSES: dict[str, Class] = {
    "qwen3_5": Class(
        zoo._config("Qwen3_5Config", text_config={**zoo._TEXT, **_LINEAR}, vision_config=_QWEN3_TOWER, **zoo._QWEN_IDS),
        **_QWEN_VIDEO,
    ),
    "qwen3_5_moe": Class(
        zoo._config(
            "Qwen3_5MoeConfig",
            text_config={**zoo._TEXT, **_LINEAR, **_MOE, "shared_expert_intermediate_size": 32},
            vision_config=_QWEN3_TOWER,
            **zoo._QWEN_IDS,
        ),
        **_QWEN_VIDEO,
    ),
    "qwen3_vl_moe": Class(
        zoo._config(
            "Qwen3VLMoeConfig",
            text_config={**zoo._TEXT, **_MOE, "head_dim": 32, "rope_parameters": _MROPE, "mlp_only_layers": [1]},
            vision_config={**_QWEN3_TOWER, "deepstack_visual_indexes": [0, 2]},
            **zoo._QWEN_IDS,
        ),
        **_QWEN_VIDEO,
    ),
    "glm4v": _glm("Glm4vConfig", {}),
    "glm46v": _glm("Glm46VConfig", {"model_type": "glm4v_text"}, {"model_type": "glm4v_vision"}),
    "glm4v_moe": _glm(
        "Glm4vMoeConfig",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
    ),
    "glm_ocr": _glm("GlmOcrConfig", {}),
    "lfm3_vl": Class(
        zoo._config(
            "Lfm3VlConfig",
            text_config={
                "model_type": "lfm3",
                **zoo._TEXT,
                "num_hidden_layers": 4,
                "head_dim": 16,
                "sliding_window": 8,
                "conv_L_cache": 3,
                "layer_types": ["conv", "sliding_attention", "full_attention", "conv"],
            },
            vision_config={
                "hidden_size": 48,
                "intermediate_size": 64,
                "patch_size": 8,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            },
            projector_hidden_size=64,
            **zoo._QWEN_IDS,
        ),
        **{**_QWEN_VIDEO, "types": None},
    ),
    "qwen2_5_omni_thinker": Class(
        zoo._config(
            "Qwen2_5OmniThinkerConfig",
            text_config={**zoo._TEXT, "rope_parameters": zoo._rope(4, 2, 2)},
            vision_config={**_TOWER, "window_size": 32, "fullatt_block_indexes": [1, 3]},
            audio_config={**_AUDIO, "output_dim": 64},
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            audio_token_index=116,
            **{k: v for k, v in _OMNI_IDS.items() if k not in ("image_token_id", "video_token_id")},
        ),
        **_OMNI,
    ),
    "qwen3_omni_moe_thinker": Class(
        zoo._config(
            "Qwen3OmniMoeThinkerConfig",
            text_config={**zoo._TEXT, **_MOE, "head_dim": 32, "rope_parameters": _MROPE},
            vision_config={**_QWEN3_TOWER, "deepstack_visual_indexes": [0, 2]},
            audio_config={**_AUDIO, "output_dim": 64, "downsample_hidden_size": 16},
            audio_token_id=116,
            **_OMNI_IDS,
        ),
        **_OMNI,
    ),
    "qwen4_exp": Class(
        zoo._config(
            "Qwen4ExpConfig",
            text_config={
                **zoo._TEXT,
                **_LINEAR,
                **_MOE,
                "shared_expert_intermediate_size": 32,
                "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
                "hc_count": 2,
                "hc_lowrank": 8,
                "ple_layer_ids": [1],
                "ple_embed_dim": 64,
                "ngram_vocab_size_base": 64,
                "make_ngram_vocab_size_divisible_by": 8,
                "split_ngram_parts": 8,
                "heads_per_ngram": 2,
                "indexer_n_heads": 8,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 32,
                "indexer_budget": 8,
                "indexer_compress_ratio": 4,
            },
            vision_config=_QWEN3_TOWER,
            **zoo._QWEN_IDS,
        ),
        **_QWEN_VIDEO,
    ),
    "glm5_next": Class(
        zoo._config(
            "Glm5NextConfig",
            text_config={
                **zoo._TEXT,
                "num_key_value_heads": 4,
                "moe_intermediate_size": 32,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "kv_lora_rank": 16,
                "q_lora_rank": 24,
                "qk_nope_head_dim": 16,
                "v_head_dim": 16,
                "mlp_layer_types": ["dense", "sparse", "sparse"],
                "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
                "index_topk": 8,
                "index_kpool": 2,
                "index_head_dim": 16,
                "index_n_heads": 8,
                "linear_head_dim": 16,
                "linear_num_heads": 4,
                "hc_mult": 2,
            },
            vision_config={**_GLM_TOWER, "projection_intermediate_size": 64},
            **_GLM_IDS,
        ),
        **{**_QWEN_VIDEO, "ids": _glm_ids, "types": None},
    ),
    "exaone4_5": Class(
        zoo._config(
            "Exaone4_5_Config",
            text_config={
                "model_type": "exaone4",
                **zoo._TEXT,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            vision_config={**_TOWER, "num_key_value_heads": 2, "window_size": 32, "fullatt_block_indexes": [1, 3]},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        **{**_QWEN_VIDEO, "ids": zoo._qwen_ids, "types": None},
    ),
    "cohere_compass": Class(
        zoo._config(
            "CohereCompassConfig",
            text_config={
                **zoo._TEXT,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "logit_scale": 1.0,
                "rope_parameters": {
                    kind: zoo._rope(4, 2, 2, mrope_interleaved=True) for kind in ("sliding_attention", "full_attention")
                },
            },
            vision_config={**_QWEN3_TOWER, "deepstack_visual_indexes": [0, 2]},
            **zoo._QWEN_IDS,
        ),
        **_QWEN_VIDEO,
    ),
    "cosmos3_omni": Class(
        zoo._config(
            "Cosmos3OmniConfig",
            text_config={
                "model_type": "qwen3_vl_text",
                **zoo._TEXT,
                "head_dim": 32,
                "rope_parameters": _MROPE,
            },
            vision_config={
                "model_type": "qwen3_vl_vision",
                **_QWEN3_TOWER,
                "deepstack_visual_indexes": [0, 2],
            },
            **zoo._QWEN_IDS,
        ),
        **_QWEN_VIDEO,
    ),
    "hyperclovax_vision_v2": Class(
        zoo._config(
            "HyperCLOVAXVisionV2Config",
            text_config={
                "model_type": "hyperclovax",
                **zoo._TEXT,
                "embedding_multiplier": 2.0,
                "residual_multiplier": 0.7,
            },
            vision_config={
                "model_type": "qwen2_5_vl_vision",
                **_TOWER,
                "window_size": 32,
                "fullatt_block_indexes": [1, 3],
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        **{**_QWEN_VIDEO, "ids": zoo._qwen_ids, "types": None},
    ),
    "minimax_m3_vl": Class(
        zoo._config(
            "MiniMaxM3VLConfig",
            text_config={
                **zoo._TEXT,
                "head_dim": 16,
                "rotary_dim": 8,
                "intermediate_size": 32,
                "dense_intermediate_size": 80,
                "shared_intermediate_size": 32,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "mlp_layer_types": ["dense", "sparse", "sparse"],
                "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
                "index_n_heads": 2,
                "index_head_dim": 16,
                "index_block_size": 4,
                "index_topk_blocks": 2,
                "index_local_blocks": 1,
            },
            vision_config={**zoo._TOWER, "image_size": 96, "patch_size": 8},
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            projector_hidden_size=64,
        ),
        **{**_QWEN_VIDEO, "types": None},
    ),
    "muse_glimmer": Class(
        zoo._config(
            "MuseGlimmerConfig",
            text_config={
                **zoo._TEXT,
                "head_dim": 16,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
                "layer_rope_theta": [1e4, 1e4, 0],
            },
            vision_config={
                **zoo._TOWER,
                "patch_size": 8,
                "pos_emb_height": 8,
                "pos_emb_width": 8,
                "layer_types": ["window_attention", "full_attention"] * 2,
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            out_hidden_size=192,
            projector_hidden_size=64,
        ),
        **{**_QWEN_VIDEO, "types": None},
    ),
    "muse_spark": Class(
        zoo._config(
            "MuseSparkConfig",
            text_config={
                **zoo._TEXT,
                "head_dim": 16,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
                "layer_rope_theta": [1e4, 1e4, 0],
                "moe_intermediate_size": 32,
                "moe_hidden_size": 32,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "mlp_layer_types": ["dense", "sparse", "sparse"],
            },
            vision_config={
                **zoo._TOWER,
                "patch_size": 8,
                "pos_emb_height": 8,
                "pos_emb_width": 8,
                "layer_types": ["window_attention", "full_attention"] * 2,
            },
            audio_config={"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "out_hidden_size": 64},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=117,
            out_hidden_size=192,
            projector_hidden_size=64,
        ),
        **{**_QWEN_VIDEO, "types": None},
    ),
}
