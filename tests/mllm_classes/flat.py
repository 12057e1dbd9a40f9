"""Grids of patches of one frame each, and layouts of rows that are not the grid alone."""

from __future__ import annotations

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
}
