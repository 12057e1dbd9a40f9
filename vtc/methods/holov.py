"""HoloV: Don't Just Chase "Highlighted Tokens" in MLLMs, NeurIPS 2025, https://arxiv.org/abs/2510.02912."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.checks import check_number
from vtc.errors import OptionError
from vtc.layout import Grid
from vtc.methods.downsample import cells, coarse_grid
from vtc.methods.ranked import Ranked, checked, require
from vtc.methods.selector import Selector, each
from vtc.tokens import Tokens

CELLS, INSIDE = ("runs", "grid"), ("attention", "score")


@dataclass(frozen=True)
class HoloV(Ranked, Selector):
    """Shares the budget K out among crops of the image, so that no part of it is left out, and keeps in each crop the
    tokens that received the most attention in the vision tower.

    In a crop c of m tokens, with `S_ij = cos(z_i, z_j)` but `S_ii = 0`, and a the attention:
    `mu_i = sum_j S_ij / (m - 1)`, `var_i = sum_j (S_ij - mu_i)^2 / (m - 1)`,
    `s_i = 1000 a_i + 0.09 var_i mean(1000 a) / (mean var + 1e-6)`, in a crop of one token `s_i = a_i`;
    `W_c = mean s`, `w_c = W_c / (sum W + 1e-6)`, and the crop gets `floor(w_c K)` tokens; those that are left go to the
    crops of the largest w, one each.

    That is the released code. As var is scaled to the crop's attention, W_c is 1090 times its mean attention: diversity
    decides nothing, neither between crops nor, by default, inside them. What a crop gets beyond its tokens the released
    code loses; here it goes to crops with room, one token each, the largest w first, until K are placed. The order of
    picking takes all crops in step, so that a frame takes its places from all of them alike.

    Args:
        crops: how many; at most, with cells="grid", and where an image has fewer tokens.
        cells: "runs" of tokens in raster order, of equal length but for one token, as in the released code; or "grid",
            cells of the image, in rows and columns.
        inside: what the tokens of a crop are chosen by: "attention", a, or "score", s.
        importance: a score to use as a instead of that attention; if it has negative values, it is shifted so that its
            lowest value is 0.
    """

    importance: str = "attention"
    crops: int = 16
    cells: str = "runs"
    inside: str = "attention"

    name: ClassVar[str] = "holov"
    summary: ClassVar[str] = "keeps attended tokens in every part of the image"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("crops", self.crops, 1, whole=True)
        for name, known in (("cells", CELLS), ("inside", INSIDE)):
            if getattr(self, name) not in known:
                raise OptionError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"grid"} if self.cells == "grid" else ())

    def pick(self, tokens: Tokens, count: int | Tensor) -> Tensor:
        attention = self.weight(tokens)
        checked(tokens.features.float().sum(-1), "features", tokens)  # a share that is NaN has no floor
        batch, total = attention.shape
        grid = require(tokens, "grid", self.name) if self.cells == "grid" else None
        if not attention.numel():
            return torch.zeros(batch, 0, dtype=torch.long, device=attention.device)
        attention = attention - attention.amin(1, keepdim=True).clamp(max=0)
        real = torch.ones_like(attention, dtype=torch.bool) if tokens.mask is None else tokens.mask
        members = crops_of(real, self.crops, grid).to(attention.device)  # [B, C, m]
        there, at = members >= 0, members.clamp(min=0).flatten(1)
        unit = ops.normalize(tokens.features)
        rows = unit.gather(1, at[..., None].expand(-1, -1, unit.shape[2])).view(*members.shape, unit.shape[2])
        received = attention.double().gather(1, at).view_as(members).masked_fill(~there, 0.0)
        score, share = scores(rows, received, there)

        room = zip(share.tolist(), there.sum(2).tolist(), each(count, batch), strict=True)
        quota = torch.tensor([quotas(*image) for image in room], device=members.device)[..., None]
        value = (score if self.inside == "score" else received).float().masked_fill(~there, float("-inf"))
        place = value.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        turn = torch.where(place < quota, -(place + 1) / quota.clamp(min=1), float("-inf")).flatten(1)
        column = torch.where(there, members, total).flatten(1)
        turns = turn.new_zeros(batch, total + 1).scatter(1, column, turn)[:, :total]
        return ops.top_select(turns, count, tokens.mask)


def crops_of(real: Tensor, crops: int, grid: tuple[Grid | None, ...] | None) -> Tensor:
    """The tokens of every crop [B, C, m], ascending, then -1, from which tokens are real [B, N]."""
    found: list[list[Tensor]] = []
    for b, row in enumerate(real.cpu()):
        at = row.nonzero()[:, 0]
        if grid is None:
            found.append(list(at.tensor_split(max(1, min(crops, len(at))))))
        elif (shape := grid[b]) is None or shape[0] * shape[1] != len(at):
            raise OptionError(f'cells="grid" needs all tokens of each image, but {shape} are not its {len(at)}')
        else:
            cell = cells(shape, coarse_grid(shape, crops))[0]
            found.append(list(at[cell.argsort(stable=True)].split(cell.bincount().tolist())))
    most = max(map(len, found))
    padded = [crop for image in found for crop in [*image, *[image[0][:0]] * (most - len(image))]]
    return torch.nn.utils.rnn.pad_sequence(padded, True, -1).unflatten(0, (len(found), most))


def scores(unit: Tensor, attention: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """s of every token [B, C, m] and w of every crop [B, C], from the crops' unit vectors [B, C, m, D] and attention
    [B, C, m]. Both are float64: in float32 equal crops would differ by rounding, and floor(w K) jumps."""
    size = there.sum(2, keepdim=True)
    count, others = size.clamp(min=1), (size - 1).clamp(min=1)
    cosine = ops.cosines(unit.flatten(0, 1), there.flatten(0, 1)).view(*there.shape, there.shape[2])
    cosine.diagonal(0, 2, 3).zero_()
    mean = cosine.sum(3, dtype=torch.float64) / others
    apart = (cosine - mean.float()[..., None]).masked_fill_(~there[:, :, None], 0.0).square_()
    variance = (apart.sum(3, dtype=torch.float64) / others).masked_fill(~there, 0.0)
    scaled, typical = 1000 * attention, variance.sum(2, keepdim=True) / count
    score = scaled + 0.09 * variance * (scaled.sum(2, keepdim=True) / count) / (typical + 1e-6)
    score = torch.where(size == 1, attention, score)
    weight = score.sum(2) / count[..., 0]
    return score, weight / (weight.sum(1, keepdim=True) + 1e-6)


def quotas(share: list[float], size: list[int], count: int) -> list[int]:
    """How many of `count` tokens every crop keeps, by its share w and the number of its tokens."""
    heaviest = torch.tensor(share).argsort(descending=True, stable=True).tolist()  # in float32: equal shares tie
    quota = [math.floor(w * count) for w in share]
    for c in heaviest[: count - sum(quota)]:
        quota[c] += 1
    quota = [min(n, m) for n, m in zip(quota, size, strict=True)]
    left = min(count, sum(size)) - sum(quota)
    while left:
        for c in heaviest:
            if left and quota[c] < size[c]:
                quota[c], left = quota[c] + 1, left - 1
    return quota
