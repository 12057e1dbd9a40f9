"""Images of one size, or cut into crops of one size: the tables of tiles that most processors write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mllm_zoo as zoo
import torch
from mllm_zoo import END, FAKE, IMAGE, PAD, START, Item, Spec
from torch import Tensor

from .core import Class


def _square(side: int) -> Callable[[str, Spec, torch.Generator], Tensor]:
    """As many squares as the spec's rows and columns make, and one of the whole where they make more than one."""

    def pixels(kind: str, spec: Spec, generator: torch.Generator) -> Tensor:
        number = spec[0] * spec[1]
        return torch.randn(number + (number > 1), 3, side, side, generator=generator)

    return pixels


# -- Llama 4: tiles, parted in both directions, then the whole --------------------------------------------------------

ACROSS, DOWN, WHOLE = 114, 115, 116


def _llama4_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    rows, columns = spec
    tile = [IMAGE] * 9
    line = [*([*tile, ACROSS] * columns)[:-1], DOWN]
    return [START, *(line * rows if rows * columns > 1 else []), WHOLE, *tile, END]


# -- one global view and local ones, of two sizes ---------------------------------------------------------------------


def _views(whole: int, local: int) -> dict[str, Any]:
    """Pixels are kept in one line: the global view, then the local ones."""
    many, few = 3 * whole**2, 3 * local**2

    def pixels(kind: str, spec: Spec, generator: torch.Generator) -> Tensor:
        return torch.randn(many + few * spec[0] * spec[1], generator=generator)

    def pack(items: list[Item], rows: int) -> dict[str, Tensor]:
        if not items:
            return {}
        out = {
            "pixel_values": torch.stack([item.pixels[:many].view(3, whole, whole) for item in items]),
            "num_local_patches": torch.tensor([item.spec[0] * item.spec[1] for item in items]),
        }
        locals_ = torch.cat([item.pixels[many:].view(-1, 3, local, local) for item in items])
        return {**out, "pixel_values_local": locals_} if len(locals_) else out

    return {"pixels": pixels, "pack": pack, "images": [(1, 2), (0, 0), (2, 2)]}


def _deepseek_ids(queries: int) -> Callable[[str, Spec, torch.Generator], list[int]]:
    return lambda kind, spec, generator: [IMAGE] * (queries * (1 + spec[0] * spec[1]) + 1)


def _step_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    rows, columns = spec
    lines = [[115, *[IMAGE] * 9, 116] * columns for _ in range(rows)]
    out = [token for line in lines for token in [*line, 117]][:-1]
    return [*out, START, *[IMAGE] * 16, END]


# -- Granite Docling: tiles of a row in one dimension, and a mask of those that are there -----------------------------


def _docling_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    tile, (rows, columns) = [IMAGE] * 16, spec
    out = [*[FAKE, 115, *tile] * columns, 5] * rows
    return [*out, 5, FAKE, 116, *tile, FAKE] if rows * columns > 1 else out


def _docling_pack(items: list[Item], rows: int) -> dict[str, Tensor]:
    if not items:
        return {}
    empty = torch.zeros(0, 3, 64, 64)
    tiles = [torch.cat([empty, *(item.pixels for item in items if item.row == row)]) for row in range(rows)]
    mask = zoo._padded([torch.ones(len(row), dtype=torch.bool) for row in tiles])
    return {"pixel_values": zoo._padded(tiles), "pixel_attention_mask": mask}


# -- Unlimited-OCR: the crops as one grid with newlines, the whole as another, a mark -------------------------


def _unlimited_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    rows, columns = spec
    crops = 3 * rows * (3 * columns + 1) if rows * columns > 1 else 0
    return [IMAGE] * (crops + 4 * 5 + 1)


def _unlimited_pack(items: list[Item], rows: int) -> dict[str, Any]:
    out: dict[str, Any] = _views(64, 48)["pack"](items, rows)
    if items:  # lists, as the processor leaves them
        out["num_local_patches"] = out["num_local_patches"].tolist()
        out["patches_grid"] = [[max(1, item.spec[1]), max(1, item.spec[0])] for item in items]
    return out


# -- Phi-4: the grid of crops without its padding and the whole, a learned row at the end of each line ---


def _phi4_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    high, wide = -(-spec[0] // 16), -(-spec[1] // 16)
    return [IMAGE] * (high * (wide + 1) + 1 + 3 * 4)


def _phi4_grid(spec: Spec) -> tuple[int, int]:
    return -(-spec[0] // 48), -(-spec[1] // 48)


def _phi4_pixels(kind: str, spec: Spec, generator: torch.Generator) -> Tensor:
    rows, columns = _phi4_grid(spec)
    return torch.randn(1 + rows * columns, 3, 48, 48, generator=generator)


def _phi4_pack(items: list[Item], rows: int) -> dict[str, Tensor]:
    if not items:
        return {}
    masks = []
    for item in items:
        down, across = _phi4_grid(item.spec)
        mask = torch.zeros(6 * down, 6 * across)
        mask[: -(-item.spec[0] // 8), : -(-item.spec[1] // 8)] = 1
        crops = mask.view(down, 6, across, 6).transpose(1, 2).flatten(0, 1)
        masks.append(torch.cat([torch.ones(1, 6, 6), crops]))
    return {
        "image_pixel_values": zoo._padded([item.pixels for item in items]),
        "image_sizes": torch.tensor([[48 * side for side in _phi4_grid(item.spec)] for item in items]),
        "image_attention_mask": zoo._padded(masks),
    }


CLASSES: dict[str, Class] = {
    "gemma3n": Class(
        zoo._config(
            "Gemma3nConfig",
            text_config={
                **zoo._TEXT,
                "num_hidden_layers": 4,
                "head_dim": 16,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "num_kv_shared_layers": 2,
                "vocab_size_per_layer_input": 104,
                "hidden_size_per_layer_input": 8,
                "altup_num_inputs": 2,
                "laurel_rank": 8,
                "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            },
            # MobileNet at a thirtieth of its width; the 2048 channels at its end are fixed.
            vision_config={
                "architecture": "mobilenetv5_300m_enc",
                "model_args": {"channel_multiplier": 0.03, "msfa_output_resolution": 4},
                "vocab_size": 8,
                "vocab_offset": 104,
            },
            audio_config={
                "vocab_size": 8,
                "vocab_offset": 112,
                "hidden_size": 32,
                "input_feat_size": 16,
                "conf_num_attention_heads": 2,
                "conf_num_hidden_layers": 1,
                "sscp_conv_channel_size": (8, 4),
            },
            vision_soft_tokens_per_image=16,
            image_token_id=IMAGE,
            boi_token_id=104,
            eoi_token_id=105,
            audio_token_id=113,
            boa_token_id=114,
            eoa_token_id=115,
        ),
        images=[()],
        ids=lambda kind, spec, generator: [104, *[IMAGE] * 16, 105],
        pixels=zoo._square(64),
        pack=zoo._stacked,
        types="token_type_ids",
    ),
    "deepseek_ocr2": Class(
        zoo._config(
            "DeepseekOcr2Config",
            text_config={
                **zoo._TEXT,
                "num_key_value_heads": 4,
                "max_position_embeddings": 2048,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_shared_experts": 1,
                "moe_intermediate_size": 32,
                "mlp_layer_types": ["dense", "sparse", "sparse"],
            },
            vision_config={
                "sam_config": {
                    "hidden_size": 32,
                    "output_channels": 16,
                    "downsample_channels": [24, 48],
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": 64,
                    "patch_size": 4,
                    "window_size": 4,
                    "global_attn_indexes": [1],
                    "mlp_ratio": 2.0,
                },
                "encoder_config": {**zoo._TOWER, "num_hidden_layers": 2, "num_key_value_heads": 2},
            },
            image_token_id=IMAGE,
        ),
        # A view is 144 queries, whatever its size: the table is fixed.
        ids=_deepseek_ids(144),
        **{**_views(64, 48), "images": [(0, 0), (1, 2), (0, 0)]},
    ),
    "step3p7": Class(
        zoo._config(
            "Step3p7Config",
            text_config={
                **zoo._TEXT,
                "head_dim": 16,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
                "sliding_window": 8,
                "num_sliding_attention_heads": 2,
                "mlp_layer_types": ["dense", "sparse", "sparse"],
                "moe_intermediate_size": 32,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "share_expert_dim": 32,
            },
            vision_config={**zoo._TOWER, "image_size": 64, "patch_size": 4, "mlp_ratio": 1.5},
            image_token_id=IMAGE,
        ),
        ids=_step_ids,
        **_views(64, 48),
    ),
    "granite4_vision": Class(
        zoo._config(
            "Granite4VisionConfig",
            image_token_index=IMAGE,
            text_config={
                **zoo._TEXT,
                "num_hidden_layers": 7,
                "embedding_multiplier": 2.0,
                "residual_multiplier": 0.7,
                "attention_multiplier": 0.3,
            },
            vision_config={**zoo._siglip(32, 4), "hidden_size": 64},
            qformer_config={
                "model_type": "blip_2_qformer",
                "num_hidden_layers": 1,
                "cross_attention_frequency": 1,
                "intermediate_size": 64,
            },
            image_grid_pinpoints=zoo._PINPOINTS,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            downsample_rate="1/2",
            deepstack_layer_map=[[1, 0], [2, 2]],
            spatial_vision_layer=-1,
            spatial_target_layers=[1, 3, 4, 5],
        ),
        images=zoo._ANYRES_IMAGES,
        ids=zoo._anyres(None),
        pixels=zoo._crops,
        pack=zoo._anyres_pack,
    ),
    "granite_docling": Class(
        zoo._config(
            "GraniteDoclingConfig",
            text_config={
                **zoo._TEXT,
                "embedding_multiplier": 2.0,
                "logits_scaling": 1.0,
                "residual_multiplier": 0.7,
                "attention_multiplier": 0.3,
            },
            vision_config={
                **zoo._TOWER,
                "image_size": 64,
                "patch_size": 8,
                "out_hidden_size": 64,
                "scale_factor": 2,
                "deepstack_visual_indexes": [0, 2],
            },
            image_token_id=IMAGE,
            pad_token_id=PAD,
            tie_word_embeddings=False,
        ),
        images=[(1, 2), (1, 1), (2, 2)],
        ids=_docling_ids,
        pixels=_square(64),
        pack=_docling_pack,
    ),
    "unlimited_ocr": Class(
        zoo._config(
            "UnlimitedOcrConfig",
            text_config={
                **zoo._TEXT,
                "num_key_value_heads": 4,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_shared_experts": 1,
                "moe_intermediate_size": 32,
                "mlp_layer_types": ["dense", "sparse", "sparse"],
                "sliding_window": 8,
            },
            vision_config={
                "sam_config": {
                    "hidden_size": 32,
                    "output_channels": 16,
                    "downsample_channels": [24, 48],
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": 64,
                    "patch_size": 4,
                    "window_size": 4,
                    "global_attn_indexes": [1],
                    "mlp_dim": 64,
                },
                "encoder_config": {**zoo._TOWER, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
            },
            image_token_id=IMAGE,
        ),
        ids=_unlimited_ids,
        **{**_views(64, 48), "pack": _unlimited_pack},
    ),
    "phi4_multimodal": Class(
        zoo._config(
            "Phi4MultimodalConfig",
            **{**zoo._TEXT, "max_position_embeddings": 512},
            original_max_position_embeddings=512,
            vision_config={
                **zoo._TOWER,
                "image_size": 48,
                "patch_size": 8,
                "crop_size": 48,
                "image_token_id": IMAGE,
            },
            audio_config={
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_blocks": 1,
                "num_attention_heads": 2,
                "ext_pw_out_channel": 32,
                "depthwise_separable_out_channel": 32,
                "nemo_conv_channels": 32,
                "input_size": 16,
                "audio_token_id": 117,
            },
        ),
        images=[(64, 90), (48, 40), (96, 56)],
        ids=_phi4_ids,
        pixels=_phi4_pixels,
        pack=_phi4_pack,
        model="Phi4MultimodalForCausalLM",
    ),
}

# Described as the others are, but transformers 5.24 itself fails on every call (see `LEFT_OUT`).
BROKEN: dict[str, Class] = {
    "llama4": Class(
        zoo._config(
            "Llama4Config",
            text_config={
                **zoo._TEXT,
                "num_hidden_layers": 4,
                "head_dim": 16,
                "intermediate_size_mlp": 80,
                "num_local_experts": 4,
                "interleave_moe_layer_step": 2,
                "no_rope_layer_interval": 4,
                "attention_chunk_size": 16,
                "floor_scale": 8,
            },
            vision_config={
                **zoo._TOWER,
                "hidden_size": 64,
                "image_size": 48,
                "patch_size": 8,
                "intermediate_size": 256,
                "vision_output_dim": 64,
                "projector_input_dim": 64,
                "projector_output_dim": 64,
            },
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
        ),
        images=[(1, 2), (1, 1), (2, 1)],
        ids=_llama4_ids,
        pixels=_square(48),
        pack=zoo._concatenated,
    ),
}
