"""Tiny models of transformers' image-text-to-text classes, beside the eleven of `mllm_zoo`, and prompts for them.

Real towers with random weights, and pixels in the format of each class's own processor. The interface is `mllm_zoo`'s:
`CLASSES`, `CASES`, `build`, `inputs`, `alone`, `tokens_per_item`. A key is transformers' `model_type`, with a suffix
where one type is here with two decoders. `python -m mllm_classes [name ...]` says what runs.
"""

from __future__ import annotations

from functools import cache

from mllm_zoo import PROMPTS
from torch import Tensor, nn

from . import core, crops, flat, grids, sizes, squares
from .core import Class

CLASSES: dict[str, Class] = {**grids.CLASSES, **flat.CLASSES, **sizes.CLASSES, **crops.CLASSES, **squares.CLASSES}
CASES: dict[str, list[str]] = {name: family.cases() for name, family in CLASSES.items()}

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


def tokens_per_item(name: str, case: str) -> list[int]:
    """Placeholders of each image and video of a case in prompt order, crops and frames of one item together."""
    rows = [core.draw(CLASSES[name], prompt, row, 0) for row, prompt in enumerate(PROMPTS[case])]
    return [item.tokens for _, _, items in rows for item in items]
