"""The state of one call between two blocks, and what is derived from it: biases, masks and positions for fewer
tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vtc.adapters.encoders.site import EncoderSite
from vtc.adapters.report import Report, plain
from vtc.layout import Grid
from vtc.positions import combine
from vtc.token_map import TokenMap


@dataclass(eq=False)
class Running:
    """The progress of one thread's call. Every thread has its own, so that several may use one model.

    Attributes:
        stage: the state after the last block that ran; None before the first block and after the last.
        grid: the grid of the images that were cut into patches last, or those of a ragged batch (NaFlex), one each.
        room: how many patches were cut from an image, and from all images, since block 0 ran; None = unknown.
        resized: the image's own grid and the one it was resized to, kept until block 0; sources: the patch that stands
            for each one, likewise (`PixelPatch`).
        wide: every block, not only the last, returns tokens at full length, and a call may stop between two blocks.
        wanted: the patch of the block whose keys are needed; keys: the keys it recorded.
        open: the running modules, outermost first, each with `cut` and `ended` as they were when it began.
        cut: an empty tensor, another one whenever images were cut into patches; ended: the state at the end of the last
            call. No numbers: a compiled graph would be made anew for each.
    """

    stage: CallState | None = None
    grid: tuple[Grid, ...] | None = None
    room: tuple[int, int] | None = None
    resized: tuple[Grid, Grid] | None = None
    sources: Tensor | None = None
    wide: bool = False
    wanted: Any = None
    keys: Tensor | None = None
    open: list[tuple[Any, Tensor | None, CallState | None]] = field(default_factory=list)
    cut: Tensor | None = None
    ended: CallState | None = None


@dataclass(frozen=True, eq=False)
class CallState:
    """The state of one call between two blocks.

    Attributes:
        layer: the next block; entry: number of tokens at the first block, prefix included.
        plan: tokens to remove per layer; [B, depth] for a ragged batch.
        grid: as in `Running`. images: [B, 0], which only says how many there are: a number that outlives a compiled
            call would need a graph of its own for every batch size.
        total: the map from the entry to now, None = nothing was reduced yet; maps: one per layer that reduced.
        size: [B, M] float32, how many tokens each token stands for, None = all 1; mask: [B, M], None = all real.
        pairs: [B or 1, H or 1, M or 1, M], a caller's mask that is not padding, bool or added to the logits.
        wide: the last block returned its tokens at full length.
        flow: (tokens in attention, tokens in the MLP) of each layer that ran, a pair of [B] lists or ints.
        suffix: how many of the `prefix` tokens stand behind the patches in the model's own order, which x has at full
            length and until the first layer that reduces.
        carried, slot: with PPE, the patches whose positions each token behind the prefix carries [K, B, M], and which
            of the K each column of a rotary table reads.
    """

    layer: int
    prefix: int
    entry: int
    plan: tuple[int, ...] | Tensor
    grid: tuple[Grid, ...] | None
    images: Tensor
    front: TokenMap | None = None  # before the encoder: the image's own patches to those of the resized image
    total: TokenMap | None = None
    size: Tensor | None = None
    mask: Tensor | None = None
    pairs: Tensor | None = None
    wide: bool = False
    maps: tuple[TokenMap, ...] = ()
    flow: tuple[tuple[Any, Any], ...] = ()
    carried: Tensor | None = None
    slot: Tensor | None = None
    suffix: int = 0

    def changed(self, **fields: Any) -> CallState:
        """With these fields; `dataclasses.replace` takes several times as long, twice a layer."""
        if torch.compiler.is_compiling():
            return replace(self, **fields)
        other = object.__new__(CallState)
        other.__dict__.update(self.__dict__, **fields)
        return other

    @property
    def batch(self) -> int:
        return self.images.shape[0]

    @property
    def grids(self) -> tuple[Grid | None, ...]:
        """Every image's."""
        grid = self.grid or (None,)
        return grid * self.batch if len(grid) == 1 else grid

    def count(self) -> Any:
        """Tokens now: an int, or [B] for a ragged batch."""
        if self.mask is not None:
            return self.mask.sum(1)
        return self.entry if self.total is None else self.total.slots

    def bias(self, x: Tensor) -> Tensor | None:
        """[B, 1, 1, M]: log size, to add to the attention logits (proportional attention); -inf on padding. With a
        caller's mask [B, 1 or H, M, M], which stays bool if nothing has to be added to it."""
        if self.size is None:
            return self.pairs
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = self.size.log()
        bias = (bias if dtype == bias.dtype else bias.to(dtype)).unsqueeze(1).unsqueeze(1)
        if self.pairs is None:
            return bias
        if self.pairs.dtype == torch.bool:
            return bias.masked_fill(~self.pairs, float("-inf"))
        return bias + self.pairs.to(dtype)

    def patches(self) -> Tensor:
        """[B, M - prefix]: which patch (row by row) each token behind the prefix is, or stands for."""
        assert self.total is not None
        return (self.total.anchor[:, self.prefix :] - self.prefix).clamp(min=0)

    def turned(self, table: Tensor) -> Tensor:
        """The rows of a rotary table of all patches, for the tokens behind the prefix: [B, 1 or H, M, D]."""
        if self.carried is None or self.slot is None:
            return taken_at(table, self.patches())
        return combine([taken_at(table, patch) for patch in self.carried], self.slot)

    @property
    def length(self) -> int:
        """How many tokens the next block must receive."""
        if self.wide and self.front is not None:
            return self.front.group.shape[1]
        return self.entry if self.wide or self.total is None else self.total.slots

    def narrow(self, x: Tensor) -> Tensor:
        """Undo `widen`: x comes at full length from a block whose output was read."""
        total = self.front if self.total is None else self.total
        return x if total is None or not self.wide else total.gather(self.fronted(x))

    def widen(self, x: Tensor, fill: int | str) -> Tensor:
        """[B, M, C] -> [B, entry, C]; the prefix is not used as a fill value."""
        total = self.front if self.total is None else self.total  # a resized image is not reduced further
        if total is None:
            return x
        if total.complete and not self.suffix:
            return total.unmerge(x)
        rest = total.drop_prefix(self.prefix).unmerge(x[:, self.prefix :], fill)
        front = self.prefix - self.suffix
        return torch.cat([x[:, :front], rest, x[:, front : self.prefix]], dim=1) if self.prefix else rest

    def fronted(self, x: Tensor) -> Tensor:
        """x [B, N, C] in the model's own order, with the tokens behind its patches in front of them."""
        front, back = self.prefix - self.suffix, x.shape[1] - self.suffix
        return torch.cat([x[:, :front], x[:, back:], x[:, front:back]], dim=1) if self.suffix else x


def taken_at(table: Tensor, index: Tensor, dim: int = -2) -> Tensor:
    """Rows of a position table [..., N, D], [N, D] or [H, N, D] at `index` [B, M]: [B, 1 or H, M, D]."""
    if table.ndim == 2:
        return table[index][:, None]
    if table.ndim == 3 and table.shape[0] == 1:
        return table[0][index][:, None]
    if table.ndim == 3:
        table = table[None]
    table = table.expand(index.shape[0], *table.shape[1:])
    return table.gather(2, index[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3]))


def relative_bias(table: Tensor, stage: CallState) -> Tensor:
    """A relative position bias [H, N, N] or [1 or B, H, N, N] at the anchors: [B, H, M, M]."""
    assert stage.total is not None
    at = stage.total.anchor.clamp(min=0)
    table = table[None] if table.ndim == 3 else table
    table = table.expand(at.shape[0], *table.shape[1:])
    rows = table.gather(2, at[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3]))
    return rows.gather(3, at[:, None, None, :].expand(-1, table.shape[1], rows.shape[2], -1))


def layer_maps(stage: CallState) -> list[TokenMap]:
    """Patches to the tokens after each layer that reduced; at least one map."""
    maps = [] if stage.front is None else [stage.front]
    for step in stage.maps:
        maps.append(maps[-1].compose(step) if maps else step)
    return [step.drop_prefix(stage.prefix) for step in maps or [TokenMap.identity(stage.batch, stage.entry)]]


def report(name: str, site: EncoderSite, stage: CallState, early: bool = False) -> Report:
    """What a call of an encoder did; `early`: tokens left in front of its first layer."""
    images, prefix = stage.batch, stage.prefix

    def each(count: Any) -> list[int]:
        return [int(n) for n in count] if isinstance(count, Tensor) else [int(count)] * images

    flow = [(each(a), each(b)) for a, b in stage.flow]
    seen = each(stage.entry) if early else flow[0][0]  # what the encoder received; an image had more before resizing
    entry = seen if stage.front is None else each(stage.front.group.shape[1])
    costs = site.macs.first(stage.layer)
    before = macs = 0
    for b in range(images):
        before += costs.dense(entry[b] - prefix)
        macs += costs.total([a[b] for a, _ in flow], [m[b] for _, m in flow], seen[b] - prefix)

    return Report(
        name,
        images,
        tuple(n - prefix for n in entry),
        tuple(n - prefix for n in flow[-1][1]),
        tuple((plain(a), plain(b)) for a, b in flow),
        before,
        macs,
        site.path,
    )
