"""Tiny models of transformers' image-text-to-text classes, beside the eleven of `mllm_zoo`, and prompts for them.

Real towers with random weights, and pixels in the format of each class's own processor. The interface is `mllm_zoo`'s:
`CLASSES`, `CASES`, `build`, `inputs`, `alone`, `tokens_per_item`. A key is transformers' `model_type`, with a suffix
where one type is here with two decoders. `python -m mllm_classes [name ...]` says what runs.
"""

from __future__ import annotations

from functools import cache

import torch
from mllm_zoo import PROMPTS
from torch import Tensor, nn

from . import codes, core, crops, flat, grids, sizes, squares
from .core import Class

CLASSES: dict[str, Class] = {
    **grids.CLASSES,
    **flat.CLASSES,
    **sizes.CLASSES,
    **crops.CLASSES,
    **squares.CLASSES,
    **codes.CLASSES,
}
CASES: dict[str, list[str]] = {name: family.cases() for name, family in CLASSES.items()}
_QUERIES = "a few learned queries from a Q-Former; pixels are required, and `generate` is the class's own"
_ENCODER = "encoder-decoder: the image is the encoder's, the decoder attends to it across"

# Every other model type of transformers' image-text-to-text and multimodal-LM mappings, and why it is not here.
LEFT_OUT: dict[str, str] = {
    **dict.fromkeys(("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "in `mllm_zoo`"),
    **dict.fromkeys(("internvl", "idefics3", "smolvlm", "gemma3", "paligemma"), "in `mllm_zoo`"),
    "llama4": "fails on every call in transformers 5.24, at `outputs.image_outputs`",  # a tiny one: `crops.BROKEN`
    "glmga": "alias of glm46v, the same class",
    "shieldgemma2": "alias of gemma3, the same class",
    "pp_chart2table": "alias of got_ocr2, the same class",
    "mistral4": "a decoder without images; with them it is a `mistral3`",
    "florence2": _ENCODER,
    "pix2struct": _ENCODER,
    "pp_formulanet": _ENCODER,
    "t5gemma2": _ENCODER,
    "udop": _ENCODER,
    "vision-encoder-decoder": _ENCODER,
    "blip": "cross-attention of a BERT-like decoder to the image",
    "idefics": "cross-attention layers between those of the decoder",
    "mllama": "cross-attention layers between those of the decoder",
    "evolla": "proteins, not images, and by cross-attention",
    "blip-2": _QUERIES,
    "instructblip": _QUERIES,
    "instructblipvideo": _QUERIES,
    "kosmos-2": "64 learned queries at a mask of positions, not at a placeholder's id; `generate` is the class's own",
    "kosmos-2.5": "2048 learned queries of flattened patches at a mask of positions, not at a placeholder's id",
    "git": "the image is put before the text inside the decoder: no placeholders in the sequence",
    "pi0": "robot actions by flow matching, no text is generated",
    "diffusion_gemma": "a block-diffusion decoder: tokens are denoised, not decoded one after another",
    "qwen2_5_omni": "wraps qwen2_5_omni_thinker with a talker",
    "qwen3_omni_moe": "wraps qwen3_omni_moe_thinker with a talker",
    **dict.fromkeys(
        (
            "fun_asr_nano",
            "glmasr",
            "granite_speech",
            "granite_speech_plus",
            "kyutai_speech_to_text",
            "moss_transcribe_diarize",
            "nemo_speechlm",
            "omniasr",
            "qwen2_audio",
            "qwen3_asr",
            "vibevoice_asr",
            "voxtral",
            "voxtral_realtime",
        ),
        "sound only",
    ),
}

# Where a row of a left-padded batch answers otherwise than alone, by the class's own doing.
UNEQUAL: dict[str, str] = {
    "hunyuan_vl": "the fourth axis numbers the images of the whole batch, not of the row; `generate` and `forward`",
    "minimax_m3_vl": "the sparse index compares columns with positions and does not know of padding; both",
    "inkling_mm_model": "distances and the log scaling count columns, padding too; both",
    "emu3": "the tower normalises over a batch's padding, and the codes change; both",
    "inkling2": "the log scaling takes the positions, which a bare `forward` counts by column; `generate` is equal",
    "inkling2_loop": "as inkling2",
    "mistral3_ministral3": "the temperature takes the positions, which a bare `forward` counts by column",
    "mistral3_mistral4": "as mistral3_ministral3",
    "mistral_large4": "as mistral3_ministral3",
}

# Classes whose tower cannot be made tiny, and which are therefore not here.
SYNTHETIC: dict[str, str] = {}

_cached = cache(lambda name, attn: core.make(CLASSES[name], attn))


def build(name: str, attn: str = "sdpa", fresh: bool = False) -> nn.Module:
    """One model per process, name and attention; tests that change it ask for a fresh one or give it back as it was."""
    return core.make(CLASSES[name], attn) if fresh else _cached(name, attn)


def inputs(name: str, case: str, seed: int = 0) -> dict[str, Tensor]:
    """The keyword arguments of `model(...)` and `model.generate(...)`."""
    rows = [core.draw(CLASSES[name], prompt, row, seed) for row, prompt in enumerate(PROMPTS[case])]
    return core.assemble(CLASSES[name], rows, right=case == "ragged_right")


def alone(name: str, case: str, row: int, seed: int = 0) -> dict[str, Tensor]:
    """One row of `inputs(name, case, seed)` as a batch of one, without padding."""
    return core.assemble(CLASSES[name], [core.draw(CLASSES[name], PROMPTS[case][row], row, seed)])


def text_model(model: nn.Module) -> nn.Module:
    """The module of the decoder's layers. In Phi-4 and Chameleon it also embeds and merges: it is handed ids."""
    inner = getattr(model, "model", model)
    for name in ("language_model", "text_model"):
        inner = getattr(inner, name, inner)
    return getattr(inner, "model", inner)


def placeholders(name: str, input_ids: Tensor) -> Tensor:
    """Where features go in."""
    return torch.isin(input_ids, torch.tensor(CLASSES[name].marks))


def tokens_per_item(name: str, case: str) -> list[int]:
    """Placeholders of each image and video of a case in prompt order, crops and frames of one item together."""
    rows = [core.draw(CLASSES[name], prompt, row, 0) for row, prompt in enumerate(PROMPTS[case])]
    return [item.tokens for _, _, items in rows for item in items]
