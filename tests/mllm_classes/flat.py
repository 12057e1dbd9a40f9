"""Grids of patches of one frame each, and layouts of rows that are not the grid alone."""

from __future__ import annotations

from collections.abc import Callable

import mllm_zoo as zoo
import torch
from mllm_zoo import END, FAKE, IMAGE, START, TEXT_IDS, VIDEO, Item, Spec
from torch import Tensor

from .core import Class
from .grids import _GLM_IDS, _QWEN, _QWEN_VIDEO, _TOWER, VIDEO_END, VIDEO_START


def _flat_patches(kind: str, spec: Spec, generator: torch.Generator) -> Tensor:
    """As they are cut, not flattened, and one frame each."""
    frames, high, wide = spec
    return torch.randn(frames * high * wide, 3, 8, 8, generator=generator)


# -- Kimi: a video is cut into chunks of up to four frames, whose patches are averaged -------------------------------


def _kimi_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    tokens = spec[1] * spec[2] // 4
    if kind == "image":
        return [START, FAKE, *[IMAGE] * tokens, END]
    stamp = torch.randint(*TEXT_IDS, (spec[0], 3), generator=generator).tolist()
    return [token for i in range(0, spec[0], 2) for token in [*stamp[i], START, FAKE, *[VIDEO] * tokens, END]]


def _kimi_pack(items: list[Item], rows: int) -> dict[str, Tensor]:
    out = zoo._qwen_pack()(items, rows)
    if "video_grid_thw" in out:  # chunks of two frames, the last of one
        grids = [[min(2, t - i), h, w] for t, h, w in out["video_grid_thw"].tolist() for i in range(0, t, 2)]
        out["video_grid_thw"] = torch.tensor(grids)
    return out


# -- Ernie: two frames of a video are one row of features, and experts are chosen by what a token is ------------------


def _ernie_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    if kind == "image":
        return zoo._qwen_ids(kind, spec, generator)
    return [VIDEO_START, *[VIDEO] * (spec[0] * spec[1] * spec[2] // 8), VIDEO_END]


def _ernie_patches(kind: str, spec: Spec, generator: torch.Generator) -> Tensor:
    return torch.randn(spec[0] * spec[1] * spec[2], 192, generator=generator)


def _ernie_types(ids: Tensor, mask: Tensor, types: Tensor) -> dict[str, Tensor]:
    images, videos = (torch.isin(ids, torch.tensor(part)) for part in ((START, END), (VIDEO_START, VIDEO_END)))
    return {"moe_mm_token_type_ids": types + images + 2 * videos}


# -- Hunyuan: a newline for each row of the grid, a begin and an end, all of them the one placeholder ------------------


def _hunyuan_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    return [START, *[IMAGE] * (spec[1] // 2 * (spec[2] // 2 + 1) + 2), END]


def _hy4_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    return [START, *[VIDEO if kind == "video" else IMAGE] * (spec[0] * (spec[1] // 2) * (spec[2] // 2 + 1)), END]


_HUNYUAN_TOWER = {**zoo._TOWER, "out_hidden_size": 64, "patch_size": 8, "max_image_size": 64}

# -- VideoLLaMA 3: images are not merged, videos are, and frames lose the rows that hardly changed --------------------


def _llama3_kept(spec: Spec) -> Tensor:
    """Of the frames after the first, every other row."""
    tokens = spec[1] * spec[2] // 4
    return torch.cat([torch.ones(tokens, dtype=torch.bool), torch.arange((spec[0] - 1) * tokens) % 2 == 0])


def _llama3_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    if kind == "image":
        return [IMAGE] * (spec[1] * spec[2])
    stamp = torch.randint(*TEXT_IDS, (spec[0], 3), generator=generator).tolist()
    counts = [int(part.sum()) for part in _llama3_kept(spec).chunk(spec[0])]
    return [token for i, count in enumerate(counts) for token in [*stamp[i], *[VIDEO] * count]]


def _llama3_pack(items: list[Item], rows: int) -> dict[str, Tensor]:
    out = zoo._qwen_pack()(items, rows)
    if "image_grid_thw" in out:
        out["image_merge_sizes"] = torch.ones(len(out["image_grid_thw"]), dtype=torch.long)
    if videos := zoo._of(items, "video"):
        out["video_merge_sizes"] = torch.full((len(videos),), 2)
        out["video_compression_mask"] = torch.cat([_llama3_kept(item.spec) for item in videos])
    return out


# -- Nemotron: tubelets of two frames, told by the image's placeholder ------------------------------------------------


def _nemotron_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    frame = [START, *[IMAGE] * (spec[-2] * spec[-1] // 4), END]
    if kind == "image":
        return frame
    stamp = torch.randint(*TEXT_IDS, (spec[0], 3), generator=generator).tolist()
    return [token for i in range(spec[0]) for token in [*stamp[i], *frame]]


def _nemotron_pixels(kind: str, spec: Spec, generator: torch.Generator) -> Tensor:
    if kind == "video":
        return torch.randn(spec[0], 6, 8 * spec[1], 8 * spec[2], generator=generator)
    return torch.randn(spec[0] * spec[1], 192, generator=generator)


def _nemotron_pack(items: list[Item], rows: int) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    if images := zoo._of(items, "image"):
        out["pixel_values"] = torch.cat([item.pixels for item in images])
        out["image_grid_hw"] = torch.tensor([item.spec for item in images])
    if videos := zoo._of(items, "video"):
        out["pixel_values_videos"] = torch.stack([item.pixels for item in videos])
    return out


# -- Inkling and Fuyu: a row of features for each square of pixels ----------------------------------------------------


def _squares_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    return [IMAGE] * (spec[0] * spec[1])


def _fuyu_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    return [*[*[IMAGE] * spec[1], FAKE] * spec[0], 1]


def _squares(*shape: int) -> Callable[[str, Spec, torch.Generator], Tensor]:
    return lambda kind, spec, generator: torch.randn(spec[0] * spec[1], *shape, generator=generator)


def _inkling2_pack(items: list[Item], rows: int) -> dict[str, Tensor]:
    out = zoo._concatenated(items, rows)
    return {**out, "image_grid_thw": torch.tensor([[1, *item.spec] for item in items])} if items else {}


_SQUARES: list[Spec] = [(5, 4), (3, 6), (4, 4)]
_INKLING_TEXT = {
    **zoo._TEXT,
    "unpadded_vocab_size": zoo.VOCAB,
    "head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "log_scaling_n_floor": 8,
}
_INKLING2_TOWER = {**zoo._TOWER, "patch_size": 8, "posemb_grid_size": 8, "projection_hidden_dim": 64}


CLASSES: dict[str, Class] = {
    "paddleocr_vl": Class(
        zoo._config(
            "PaddleOCRVLConfig",
            text_config={**zoo._TEXT, "head_dim": 32, "rope_parameters": zoo._rope(4, 6, 6)},
            vision_config={**zoo._TOWER, "image_size": 64, "patch_size": 8},
            **zoo._QWEN_IDS,
        ),
        **{**_QWEN, "ids": zoo._qwen_ids, "pixels": _flat_patches},
    ),
    "kimi_k25": Class(
        zoo._config(
            "Kimi_K25Config",
            text_config={
                "model_type": "deepseek_v3",
                **zoo._TEXT,
                "num_key_value_heads": 4,
                "moe_intermediate_size": 32,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 2,
                "topk_group": 1,
                "first_k_dense_replace": 1,
                "kv_lora_rank": 16,
                "q_lora_rank": 24,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 16,
                "v_head_dim": 16,
            },
            vision_config={
                **zoo._TOWER,
                "patch_size": 8,
                "pos_emb_height": 8,
                "pos_emb_width": 8,
            },
            projection_hidden_size=48,
            tie_word_embeddings=False,
            **zoo._QWEN_IDS,
        ),
        images=zoo._QWEN_IMAGES,
        ids=_kimi_ids,
        pixels=_flat_patches,
        pack=_kimi_pack,
        video=(3, 6, 8),
    ),
    "ernie4_5_vl_moe": Class(
        zoo._config(
            "Ernie4_5_VLMoeConfig",
            text_config={
                **zoo._TEXT,
                "moe_intermediate_size": [32, 16],
                "moe_num_experts": 4,
                "moe_k": 2,
                "moe_num_shared_experts": 1,
                "rope_parameters": zoo._rope(3, 3, 2),
            },
            vision_config={**_TOWER, "temporal_merge_size": 2},
            **{k: v for k, v in _GLM_IDS.items()},
        ),
        **{**_QWEN_VIDEO, "ids": _ernie_ids, "pixels": _ernie_patches, "video": (4, 6, 8)},
        more=_ernie_types,
    ),
    "hunyuan_vl": Class(
        zoo._config(
            "HunYuanVLConfig",
            text_config={**zoo._TEXT, "head_dim": 16, "rope_parameters": zoo._rope(2, 2, 2, 2)},
            vision_config=_HUNYUAN_TOWER,
            image_token_id=IMAGE,
            im_start_id=START,
            im_end_id=END,
            im_newline_id=FAKE,
            tie_word_embeddings=False,
        ),
        **{**_QWEN, "ids": _hunyuan_ids, "pixels": _ernie_patches},
    ),
    "hy_v4_vl": Class(
        zoo._config(
            "HYV4VLConfig",
            text_config={
                **zoo._TEXT,
                "moe_intermediate_size": 32,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "q_lora_rank": 24,
                "kv_lora_rank": 16,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 16,
                "v_head_dim": 16,
                "index_topk": 8,
                "index_head_dim": 32,
                "index_n_heads": 8,
                "indexer_types": ["full", "full", "shared"],
                "mlp_layer_types": ["dense", "sparse", "sparse"],
                "hc_mult": 2,
                "rope_parameters": zoo._rope(4, 2, 2),
            },
            vision_config=_HUNYUAN_TOWER,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        **{**_QWEN_VIDEO, "ids": _hy4_ids, "pixels": _ernie_patches},
        sdpa=False,
    ),
    "video_llama_3": Class(
        zoo._config(
            "VideoLlama3Config",
            text_config={"model_type": "qwen2", **zoo._TEXT},
            vision_config={**zoo._TOWER, "patch_size": 8},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        images=[(1, 5, 4), (1, 3, 6), (1, 4, 4)],
        ids=_llama3_ids,
        pixels=_ernie_patches,
        pack=_llama3_pack,
        video=(3, 6, 8),
    ),
    "cosmos3_edge": Class(
        zoo._config(
            "Cosmos3EdgeConfig",
            text_config={**zoo._TEXT, "head_dim": 16, "rope_parameters": zoo._rope(4, 2, 2)},
            vision_config={**zoo._TOWER, "patch_size": 8, "num_patches": 64},
            projector_hidden_size=64,
            **zoo._QWEN_IDS,
        ),
        **{**_QWEN_VIDEO, "pixels": _ernie_patches},
    ),
    "dots3_note": Class(
        zoo._config(
            "Dots3NoteConfig",
            text_config={
                **zoo._TEXT,
                "num_key_value_heads": 4,
                "head_dim": 24,
                "moe_intermediate_size": 32,
                "shared_experts_intermediate_size": 32,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "q_lora_rank": 24,
                "kv_lora_rank": 16,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
                "index_topk": 8,
                "index_head_dim": 16,
                "index_n_heads": 8,
                "sliding_window": 8,
                "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
                "swa_num_attention_heads": 2,
                "swa_num_key_value_heads": 2,
                "swa_q_lora_rank": 24,
                "swa_kv_lora_rank": 16,
                "swa_head_dim": 24,
                "swa_qk_nope_head_dim": 16,
                "swa_v_head_dim": 16,
            },
            vision_config={
                **zoo._TOWER,
                "patch_size": 8,
                "moe_intermediate_size": 32,
                "num_local_experts": 2,
                "num_experts_per_tok": 2,
                "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
                "adapter_in_dim": 48,
                "adapter_out_dim": 64,
            },
            audio_config={
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "feature_size": 16,
                "downsample_hidden_size": 8,
                "adapter_input_size": 32,
                "adapter_out_dim": 64,
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=117,
        ),
        **{**_QWEN_VIDEO, "ids": zoo._qwen_ids, "types": None, "pixels": _ernie_patches},
    ),
    "nemotron_h_omni": Class(
        zoo._config(
            "NemotronH_Omni_Reasoning_V3_Config",
            text_config={
                "model_type": "nemotron_h",
                **{key: value for key, value in zoo._TEXT.items() if key != "num_hidden_layers"},
                "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
                "head_dim": 16,
                "ssm_state_size": 16,
                "mamba_num_heads": 4,
                "mamba_head_dim": 32,
                "n_groups": 2,
                "chunk_size": 8,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "moe_shared_expert_intermediate_size": 32,
            },
            vision_config={
                "model_type": "radio",
                "hidden_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "mlp_ratio": 2.0,
                "patch_size": 8,
                "max_img_size": 128,
                "video_temporal_patch_size": 2,
            },
            projector_hidden_size=64,
            vision_hidden_size=48,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=117,
        ),
        images=[(10, 8), (6, 12), (8, 8)],
        ids=_nemotron_ids,
        pixels=_nemotron_pixels,
        pack=_nemotron_pack,
        video=(3, 6, 8),
        lacks=("image_video",),
    ),
    "inkling_mm_model": Class(
        zoo._config(
            "InklingConfig",
            text_config={
                **_INKLING_TEXT,
                "mlp_layer_types": ["dense", "sparse", "sparse"],
                "n_shared_experts": 1,
            },
            vision_config={"patch_size": 8, "num_hidden_layers": 3},
            audio_config={"n_mel_bins": 4, "mel_vocab_size": 8},
            image_token_id=IMAGE,
            audio_token_id=117,
        ),
        images=_SQUARES,
        ids=_squares_ids,
        pixels=_squares(2, 8, 8, 3),
        pack=zoo._concatenated,
    ),
    "inkling2": Class(
        zoo._config(
            "Inkling2Config",
            text_config={**_INKLING_TEXT, "n_layers_per_attn_res_block": 2},
            vision_config={**_INKLING2_TOWER, "text_hidden_size": 64},
            image_token_id=IMAGE,
        ),
        images=_SQUARES,
        ids=_squares_ids,
        pixels=_squares(16, 16, 3),
        pack=_inkling2_pack,
        sdpa=False,
    ),
    "inkling2_loop": Class(
        zoo._config(
            "Inkling2LoopConfig",
            text_config={
                **_INKLING_TEXT,
                "n_layers_per_attn_res_block": 1,
                "loop_layer_index_start": 1,
                "loop_layer_index_end": 2,
                "loop_num_passes": 2,
                "loop_gate_rank": 8,
            },
            vision_config={"model_type": "inkling2_vision", **_INKLING2_TOWER, "text_hidden_size": 64},
            image_token_id=IMAGE,
        ),
        images=_SQUARES,
        ids=_squares_ids,
        pixels=_squares(16, 16, 3),
        pack=_inkling2_pack,
        sdpa=False,
    ),
    "fuyu": Class(
        zoo._config(
            "FuyuConfig",
            text_config={
                "model_type": "persimmon",
                **{key: value for key, value in zoo._TEXT.items() if key != "num_key_value_heads"},
            },
            patch_size=8,
            image_token_id=IMAGE,
        ),
        images=_SQUARES,
        ids=_fuyu_ids,
        pixels=_squares(192),
        pack=zoo._concatenated,
    ),
}
