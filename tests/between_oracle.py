"""What a decoder must compute when tokens go or merge between its layers, or carry several positions, without any code
of `vtc`: the plain decoder on every column, one row at a time, in which nothing is ever taken out. A token that is gone
from a layer on is a column that nobody attends to from there on; a merged one is its anchor's column with the mean for
its values; proportional attention is the logarithm of the sizes, added to the mask. So nothing is shortened, no cache
is cut, and every token keeps its place by itself.

`plain`, around `classes_oracle.expected`, does this in hooks on the decoder's layers. `carrying` turns merged tokens by
the positions of their members: each column of the model's own rotary table is taken from the member whose turn it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from test_cascade import Token
from test_ppe import pair_slots
from torch import Tensor, nn

# What happens before a layer: the tokens there are, their rows -> those that are left, with their rows.
Step = Callable[[list[Token], Tensor], tuple[list[Token], Tensor]]

_SHUT = torch.finfo(torch.float32).min
NEXT = {"glm4v", "glm46v", "glm_ocr", "ernie4_5_vl_moe", "aya_vision", "cohere2_vision"}  # a pair is two neighbours
_THREE = [0, 1, 2, 0, 1, 2, 0, 0]  # sections 4, 2, 2, interleaved
_SIX = [0, 1, 2] * 4 + [0] * 4
# The axis of every rotary pair, in the order of frequencies, -1 where it does not turn; else all pairs are of one. Some
# decoders have another table for each type of layer.
AXES: dict[str, list[int]] = {
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), _THREE),
    **dict.fromkeys(("cosmos3_edge", "cohere_compass", "hy_v4_vl"), _THREE),
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_omni_moe_thinker", "cosmos3_omni"), _SIX),
    **dict.fromkeys(("glm4v", "glm46v", "glm_ocr", "glm4v_moe", "qwen2_5_omni_thinker"), [0] * 4 + [1, 1, 2, 2]),
    "paddleocr_vl": [0] * 4 + [1] * 6 + [2] * 6,
    "ernie4_5_vl_moe": [1, 2] * 3 + [0] * 2,
    "lfm3_vl full_attention": [0] * 4 + [-1] * 4,
    **{f"{name} full_attention": [0] * 4 + [-1] * 12 for name in ("gemma4", "gemma4_moe", "gemma4_unified")},
}
MIXED = {name.split()[0] for name in AXES if " " in name}


def axis_of(name: str, pairs: int, kind: str = "") -> list[int]:
    return AXES.get(f"{name} {kind}") or AXES.get(name) or [0] * pairs


def slots_of(name: str, rotary: Any) -> int:
    """The largest number up to 8 that divides all sections, of every table."""
    axes = []
    for kind in getattr(rotary, "layer_types", None) or [""]:
        table, _ = rotary(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.long), *filter(None, [kind]))
        axes.append(axis_of(name, table.shape[-1] // 2, kind))
    sections = {axis.count(number) for axis in axes for number in set(axis) - {-1}}
    return max(k for k in range(1, 9) if all(n % k == 0 for n in sections))


def turned(name: str, axis: list[int], table: Tensor, tokens: list[Token], slots: int) -> Tensor:
    """A rotary table [1, S, 2 P] of the columns by themselves -> of tokens, each with those of its members."""
    slot = pair_slots(axis, slots)
    slot = [s for s in slot for _ in (0, 1)] if name in NEXT else slot * 2
    out = table.clone()
    for token in tokens:
        turns = token.members[:slots]
        for column, turn in enumerate(slot):
            out[0, token.column, column] = table[0, turns[turn % len(turns)], column]
    return out


@contextmanager
def carrying(
    name: str, text: nn.Module, rows: list[tuple[Tensor, list[Token], list[int]]], slots: int
) -> Iterator[None]:
    """In the prefill of every row in turn the decoder's rotary table is that of merged tokens. A row: the positions of
    all its columns, tokens that carry several, and the columns that stay."""
    module, kinds, calls = text.rotary_emb, len(getattr(text.rotary_emb, "layer_types", None) or [1]), [0]

    def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if position_ids.shape[-1] == 1:
            return type(module).forward(module, x, position_ids, *args, **kwargs)
        positions, tokens, columns = rows[calls[0] // kinds]
        calls[0] += 1
        whole = type(module).forward(module, x, positions, *args, **kwargs)
        axis = axis_of(name, whole[0].shape[-1] // 2, *args, *kwargs.values())
        return tuple(turned(name, axis, table, tokens, slots)[:, columns] for table in whole)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward
    assert calls[0] == kinds * len(rows)


class Row:
    """One row of a prompt on its way through the decoder, and what its layers attended to."""

    def __init__(self, units: list[list[int]], columns: int) -> None:
        """`units`: the columns of every image, crop or frame, counted without padding."""
        unit = {column: number for number, inside in enumerate(units) for column in inside}
        self.tokens = [Token(c, [c], unit.get(c)) for c in range(columns)]
        self.held: list[list[Token]] = []  # by layer

        self.count = columns

    def mask(self, index: int, given: Any, steps: int, bias: bool) -> Tensor:
        """[1, 1, Q, K] to add: the model's own, or the causal one, without the columns that are not there."""
        count = self.count
        if steps:
            base = torch.zeros(1, 1, 1, count + steps)
        elif given is None:
            base = torch.full((1, 1, count, count), _SHUT).triu(1)
        else:
            base = given if given.is_floating_point() else torch.zeros(given.shape).masked_fill(~given, _SHUT)
        there = torch.full((count + steps,), _SHUT)
        there[count:] = 0
        for token in self.held[index]:
            there[token.column] = torch.tensor(float(len(token.members))).log() if bias else 0.0
        return (base + there).clamp(min=_SHUT)


@contextmanager
def plain(
    name: str, text: nn.Module, rows: list[Row], steps: dict[int, Step], bias: bool = False, slots: int = 1
) -> Iterator[None]:
    """Every row in turn runs through the decoder's layers with `steps` before some of them."""
    turn = {"row": -1, "step": 0}

    def enter(*args: Any, **kwargs: Any) -> Any:
        """Step 0 is in front of the decoder; what DeepStack adds later is merged as the tokens are."""
        x = kwargs["inputs_embeds"]
        turn["row"], turn["step"] = (turn["row"], turn["step"] + 1) if x.shape[1] == 1 else (turn["row"] + 1, 0)
        if turn["step"] or 0 not in steps:
            return type(text).forward(text, *args, **kwargs)
        row = rows[turn["row"]]
        row.tokens, new = steps[0](row.tokens, x[0])
        kwargs["inputs_embeds"] = _put(x, row, new)
        planes = kwargs.get("deepstack_visual_embeds") or []
        if planes:
            number = (kwargs["visual_pos_masks"][0].long().cumsum(0) - 1).tolist()
            planes = kwargs["deepstack_visual_embeds"] = [plane.clone() for plane in planes]
        for plane in planes:
            whole = plane.clone()
            for token in row.tokens:
                if token.unit is not None:
                    plane[number[token.column]] = whole[[number[c] for c in token.members]].mean(0)
        return type(text).forward(text, *args, **kwargs)

    def before(index: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        x, *others = args
        row, step = rows[turn["row"]], turn["step"]
        if not step:
            if index in steps and index > 0:
                row.tokens, new = steps[index](row.tokens, x[0, [t.column for t in row.tokens]])
                x = _put(x, row, new)
            row.held.append(row.tokens)
            if slots > 1:
                tables = kwargs["position_embeddings"]
                axis = axis_of(name, tables[0].shape[-1] // 2)
                tables = tuple(turned(name, axis, table, row.tokens, slots) for table in tables)
                kwargs = {**kwargs, "position_embeddings": tables}
        mask = row.mask(index, kwargs.get("attention_mask"), step, bias)
        return (x, *others), {**kwargs, "attention_mask": mask}

    text.forward, hooks = enter, []
    for number, layer in enumerate(text.layers):
        hook = partial(lambda index, module, args, kwargs: before(index, args, kwargs), number)
        hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        del text.forward
        for hook in hooks:
            hook.remove()
    assert turn["row"] == len(rows) - 1


def _put(x: Tensor, row: Row, new: Tensor) -> Tensor:
    x = x.clone()
    x[0, [token.column for token in row.tokens]] = new
    return x


def gone(keep: list[int], tokens: list[Token], x: Tensor) -> tuple[list[Token], Tensor]:
    """The step of a method that drops tokens: those at the columns `keep` are left."""
    at = [i for i, token in enumerate(tokens) if token.column in set(keep)]
    return [tokens[i] for i in at], x[at]
