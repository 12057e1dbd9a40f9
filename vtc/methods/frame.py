"""A frame for a selection: part of its budget goes to tokens that are kept for their place alone, so that the kept
tokens still show where in the picture they are.

Selected tokens are spread over a picture as its content is. If tokens carry no position information, the decoder infers
a token's place from how it lies among the others, and after a selection answers worse where things are; a few tokens at
known places restore this. docs/frame.md says when to use it, and lists related work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc import ops
from vtc.errors import OptionError
from vtc.methods.downsample import cells, coarse_grid
from vtc.methods.order import joined, marked
from vtc.tokens import Tokens

Frame = float | str
KINDS = ("grid", "corners", "rotary")
USUAL = 0.5  # the share that +frame after a name means
_ROTARY = 0.4  # share of the kept tokens: IVC-Prune keeps half of all tokens, and a fifth of all for their place


def read(frame: Any) -> tuple[str, float]:
    """Kind and share of the option `frame`; a share of 0 = none. Raises OptionError."""
    kind, given, share = frame.partition(":") if isinstance(frame, str) else ("grid", "", frame)
    if isinstance(frame, str) and given:
        try:
            share = float(share)
        except ValueError:
            share = None
    elif isinstance(frame, str):
        share = {"corners": 1.0, "rotary": _ROTARY}.get(kind)
    number = isinstance(share, (int, float)) and not isinstance(share, bool) and 0 <= share <= 1
    if kind not in KINDS or not number or (kind == "corners" and given):
        raise OptionError(
            f'frame={frame!r}: it takes a share of the budget in [0, 1] for an even grid of tokens, "corners", or '
            '"rotary" (with a share: "rotary:0.25")'
        )
    return kind, float(share)  # type: ignore[arg-type]


def framed(order: Tensor, tokens: Tokens, counts: list[int], frame: Frame) -> Tensor:
    """`order` [B, K] with the frame's tokens first; as many tokens per image as before, none twice.

    The rest of the budget goes to the other tokens in the order in which the method picked them.
    """
    total = tokens.features.shape[1]
    first = places(tokens, counts, *read(frame))
    known = torch.cat([marked(first, total), torch.zeros_like(order[:, :1], dtype=torch.bool)], 1)
    rest = order.masked_fill(known.gather(1, torch.where(order < 0, total, order)), -1)
    out = joined(first, rest)[:, : max(counts, default=0)]
    beyond = torch.arange(out.shape[1], device=out.device) >= torch.tensor(counts, device=out.device)[:, None]
    return out.masked_fill(beyond, -1)


def places(tokens: Tokens, counts: list[int], kind: str, share: float) -> Tensor:
    """The tokens of a frame [B, F], -1-padded, if `counts[b]` tokens of image b stay: at most `share` of them.

    "grid": the centres of that many equal cells, in rows and columns that match the picture's aspect ratio; without a
    known grid, at even steps along the tokens. "corners": the four corners, or four at even steps. "rotary": half of
    them where the mean cosine of the decoder's rotary table is highest, half where the mean sine is (arXiv 2602.03060).
    """
    device, batch = tokens.features.device, len(counts)
    if kind == "rotary":
        if tokens.rotary is None:
            raise OptionError('frame="rotary" needs the decoder\'s rotary table (Tokens.rotary): give a share instead')
        wanted = torch.tensor([round(share * k) for k in counts], device=device)
        near = ops.top_select(tokens.rotary[..., 0], wanted - wanted // 2, tokens.mask)
        left = ~marked(near, tokens.features.shape[1])
        left = left if tokens.mask is None else left & tokens.mask
        return joined(near, ops.top_select(tokens.rotary[..., 1], wanted // 2, left))
    lengths = [tokens.features.shape[1]] * batch if tokens.mask is None else tokens.mask.sum(1).tolist()
    grids = tokens.grid or (None,) * batch
    for n, grid in zip(lengths, grids, strict=True):
        if grid is not None and grid[0] * grid[1] != n:
            raise OptionError(f"frame={share!r}: a grid of {grid} is not the {n} tokens of its image")
    chosen = [
        corners(n, grid)[:k] if kind == "corners" else even(n, grid, round(share * k))
        for n, grid, k in zip(lengths, grids, counts, strict=True)
    ]
    out = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in chosen], True, -1).to(device)
    if tokens.mask is None:
        return out
    token = (~tokens.mask).long().argsort(dim=1, stable=True)  # the real tokens, by number
    return token.gather(1, out.clamp(min=0)).masked_fill(out < 0, -1)


def even(count: int, grid: tuple[int, int] | None, wanted: int) -> list[int]:
    """At most `wanted` of an image's `count` tokens, evenly spread."""
    if wanted < 1:
        return []
    if grid is None:
        return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]
    return cells(grid, coarse_grid(grid, wanted))[1].tolist()


def corners(count: int, grid: tuple[int, int] | None) -> list[int]:
    """The tokens in an image's corners, or four of its `count` at even steps from the first to the last."""
    if grid is None:
        return list(dict.fromkeys(i * (count - 1) // 3 for i in range(4)))
    rows, columns = grid
    return list(dict.fromkeys([0, columns - 1, (rows - 1) * columns, rows * columns - 1]))
