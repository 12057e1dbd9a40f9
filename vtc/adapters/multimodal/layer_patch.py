"""Fewer image tokens from some layers of the decoder on: FastV and DART drop them once, a cascade merges again.

A level is the set of layers between two reductions: the layers before the first reduction see all rows that enter the
decoder; later layers see the rows that are left, at their own positions, and cache only those. The model's loop passes
the same mask and rotary table, for all rows, to every layer, so each level selects its own rows and columns.

There are two numberings: the columns of the prompt, and the rows that enter the decoder (and its first layer's cache),
which are the columns left after the reduction at the input. Levels refer to rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vtc import scores
from vtc.adapters.attention_tap import AttentionTap, listen
from vtc.adapters.multimodal import masks
from vtc.adapters.multimodal.cache import Entries, Shortened
from vtc.adapters.multimodal.columns import TYPES
from vtc.adapters.multimodal.families.base import Family
from vtc.adapters.multimodal.rotary import Positions, kinds
from vtc.adapters.multimodal.token_batch import CallRecord, TokenBatch
from vtc.adapters.patch import Patch, forward_name
from vtc.checks import check_finite
from vtc.decide import decide
from vtc.errors import InputError
from vtc.macs import attention
from vtc.methods.base import Method
from vtc.token_map import TokenMap
from vtc.tokens import Tokens


@dataclass(frozen=True)
class Level:
    """What the layers from one reduction to the next see in this call.

    Attributes:
        columns: [B, S] long, which of the rows that entered the decoder these layers see; -1 = padding.
        entries: the entries of their caches, as indices into those of the first layer.
        ids: the rotary positions of the rows, if they differ from those of the decoder's table (PPE).
    """

    columns: Tensor
    entries: Entries
    ids: Tensor | None = None


@dataclass(frozen=True)
class PendingCall:
    """A call with images in progress, in columns of its prompt [B, L].

    Attributes:
        batch: the image tokens.
        record: how they were reduced at the decoder's input; None = they were not.
        columns: [B, S], which column each row that enters the decoder is; -1 = padding.
        positions: [axes, B, L] or [B, L].
        mask: [B, L] bool, columns that are not padding; None = all.
        words: the same according to the caller's own mask, for methods that read the text.
        past: number of entries of the first layer's cache before the call.
    """

    batch: TokenBatch
    record: CallRecord | None
    columns: Tensor
    positions: Tensor
    mask: Tensor | None
    words: Tensor | None
    past: int


@dataclass(eq=False)
class DecoderPatch:
    """One decoder whose layers see fewer and fewer tokens, and the call in progress.

    told: the layers read positions outside of the rotary table, so they get those of their rows."""

    family: Family
    inner: Any
    method: Method
    positions: Positions
    told: bool = False
    tap: AttentionTap | None = None
    call: PendingCall | None = None
    levels: list[Level] = field(default_factory=list)  # the first one has all rows
    past: tuple[Entries, ...] = ()  # entries of every level's caches, before the call
    record: CallRecord | None = None

    @property
    def steps(self) -> tuple[tuple[int, float | int], ...]:
        """(layer, keep) of every reduction."""
        if self.method.in_decoder:
            return ((self.method.layer, self.method.keep),)  # type: ignore[attr-defined, return-value]
        return self.method.cascade

    def install(self) -> list[LayerForward]:
        layers = getattr(self.inner, self.family.decoder).layers
        first = 0 if self.method.proportional else self.steps[0][0]
        if self.method.in_decoder:
            self.tap = listen(attention(layers[first - 1]))
        patches = [LayerForward(self, i, layer) for i, layer in enumerate(layers) if i >= first]
        for patch in patches:
            patch.install()
        return patches

    # -- a call -------------------------------------------------------------------------------------------------

    def begin(self, cache: Any, call: PendingCall | None, entering: Tensor, past: int) -> None:
        """Before the decoder runs on new rows, `entering` [B, S], behind `past` entries of its first layer's cache."""
        (batch, rows), device = entering.shape, entering.device
        known = cache.vtc_levels if isinstance(cache, Shortened) else ()
        self.levels, self.call, self.record = [], call, None
        if call is None and not known:  # nothing was removed, and nothing will be
            return
        if getattr(cache, "is_compileable", False):
            raise InputError(
                f"{self.method.name} leaves layers with caches of different lengths, which a static cache cannot hold: "
                "use the default one, or a method that works at the decoder's input"
            )
        known = known or (Entries.whole(batch, past, device),) * (len(self.steps) + 1)
        if self.tap is not None:
            self.tap.calls = [] if call is not None else None
        columns = torch.arange(rows, device=device).expand(batch, rows)
        if call is None:  # text only: the same rows for all levels
            self.levels = [Level(columns, entries.extend(columns, rows, False)) for entries in known]
            return
        sizes = self.sizes(call.record, call.columns)
        self.past = known
        self.levels = [Level(columns, known[0].extend(columns, rows, False, sizes))]

    def end(self) -> tuple[Entries, ...]:
        """After the decoder ran: the entries of every level's caches."""
        done = tuple(level.entries for level in self.levels)
        if self.tap is not None:
            self.tap.calls = None
        self.levels, self.call = [], None
        return done

    def run(self, patch: LayerForward, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        depth = sum(layer <= patch.index for layer, _ in self.steps)  # number of reductions at and before this layer
        if not self.levels or (depth == 0 and not self.method.proportional):
            return patch.original(x, *args, **kwargs)
        if args or (self.call is not None and torch.is_grad_enabled() and checkpoints(patch.module)):
            raise InputError(
                f"{self.method.name} cannot take tokens out between layers that are checkpointed: switch gradient "
                "checkpointing off, or use a method that works at the decoder's input"
            )
        if self.call is not None and depth == len(self.levels):
            x = self.reduce(x, *self.steps[depth - 1])
        return patch.original(x, **self.narrowed(kwargs, self.levels[depth], x))

    # -- a reduction --------------------------------------------------------------------------------------------

    def reduce(self, x: Tensor, layer: int, keep: float | int) -> Tensor:
        """Decide before `layer` on its rows x [B, S, C], note the next level, and return the rows that are left."""
        call, earlier = self.call, self.record
        assert call is not None
        batch, record = call.batch, earlier or call.record
        now = call.columns if record is None else record.columns  # the columns of the prompt that the rows of x have
        total = None if record is None else record.token_map
        prompts = torch.tensor(batch.prompts, device=x.device)[:, None]
        rows = _rows_of(now, batch.length)
        members, real = self.tokens_of(x, prompts, rows, batch, total)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            mask = None if bool(real.all()) else real
            features = members.detach()
            check_finite(features, f"hidden states before layer {layer} of {type(self.inner).__name__}")
            fields = {"grid": batch.grids} | self.evidence(call, x.detach(), real) if self.method.in_decoder else {}
            tokens = Tokens(features, size=None if total is None else total.size, mask=mask, **fields)
            step = decide(self.method, tokens, batch.removals(keep, real.sum(1).tolist()))
            after = step if total is None else total.compose(step)
            _, decided = batch.answered(after, call.mask, self.method.notes(tokens), layer)
        self.record = replace(decided, earlier=record)
        left = decided.columns
        x = x.gather(1, rows.gather(1, left.clamp(min=0))[..., None].expand(-1, -1, x.shape[-1]))
        if self.method.merges:
            slot = after.anchor >= 0
            at = _rows_of(left, batch.length)[prompts, _at(batch.places, after.anchor).clamp(min=0)]
            merged = step.merge(members)[slot].to(x.dtype)
            x = x.index_put((prompts.expand_as(at)[slot], at[slot]), merged)
        self.note(call, after if self.method.merges else None, left)
        return x

    def tokens_of(
        self, x: Tensor, prompts: Tensor, rows: Tensor, batch: TokenBatch, total: TokenMap | None
    ) -> tuple[Tensor, Tensor]:
        """The image tokens [U, N, C] that are among the rows of x, 0 on padding, and which are real."""
        columns = batch.places if total is None else _at(batch.places, total.anchor)
        real = columns >= 0
        return x[prompts, rows[prompts, columns.clamp(min=0)]].masked_fill(~real[..., None], 0), real

    def note(self, call: PendingCall, after: TokenMap | None, left: Tensor) -> None:
        """Record the level that begins: which of this call's rows its layers see, and the position of each merged
        token."""
        absent = left < 0
        columns = _rows_of(call.columns, call.batch.length).gather(1, left.clamp(min=0)).masked_fill(absent, -1)
        sizes = self.sizes(self.record, left)
        past = self.past[len(self.levels)]
        entries = past.extend(columns, call.columns.shape[1], bool(absent.any()), sizes)
        ids = None
        if after is not None and self.positions.slot:
            carried = call.batch.carried(after, self.positions.slots)
            ids = self.positions.taken(call.positions, left.clamp(min=0), carried)
        self.levels.append(Level(columns, entries, ids))

    def sizes(self, record: CallRecord | None, columns: Tensor) -> Tensor | None:
        """[B, S] float32, how many tokens every row stands for; None if sizes are not used."""
        if not self.method.proportional or record is None:
            return None
        token_map, device = record.token_map, columns.device
        of_column = torch.ones(record.kept.shape, device=device)
        unit, slot = (token_map.anchor >= 0).nonzero(as_tuple=True)
        column = record.places[unit, token_map.anchor[unit, slot]]
        of_column[torch.tensor(record.rows, device=device)[unit], column] = token_map.size[unit, slot]
        return of_column.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, 1.0)

    # -- what FastV and DART read: all tokens have reached their layer, so rows equal columns ---------------------

    def evidence(self, call: PendingCall, hidden: Tensor, real: Tensor) -> dict[str, Any]:
        batch, method = call.batch, self.method
        assert self.tap is not None
        if not self.tap.calls:
            raise InputError(
                f"layer {self.steps[0][0] - 1} of the decoder attended without being heard: if its attention was "
                "replaced since vtc compressed the model, compress it again"
            )
        query, key, _, scale = self.tap.calls[-1]
        self.tap.calls = None
        prompts = torch.tensor(batch.prompts, device=hidden.device)[:, None]
        keys = key.transpose(1, 2)  # [B, past + L, heads, D]
        chosen = keys[prompts, batch.places.clamp(min=0) + call.past]
        fields: dict[str, Any] = {}
        if "prompt_attention" in method.needs:
            last = self.last_words(batch, call.words)[prompts[:, 0]]
            asking = query.transpose(1, 2)[prompts[:, 0], last]
            fields["prompt_attention"] = scores.last_query_attention(
                asking, chosen.transpose(1, 2), scale=scale, mask=batch.mask
            )
        if method.turned:
            fields["rotary"] = batch.of_columns(self.positions.means(call.positions))
        if "decoder_keys" in method.needs:
            fields["decoder_keys"] = batch.padded(chosen.flatten(2))
        if "decoder_text" in method.needs:
            fields["decoder_text"], fields["text_mask"] = self.text(batch, hidden, keys[:, call.past :], call.words)
        return fields

    def words(self, batch: TokenBatch, real: Tensor | None) -> Tensor:
        """[B, L] bool, the columns with text."""
        visual = torch.zeros(batch.size * batch.length, dtype=torch.bool, device=batch.columns.device)
        visual[batch.columns] = True
        text = ~visual.view(batch.size, batch.length)
        return text if real is None else text & real

    def last_words(self, batch: TokenBatch, real: Tensor | None) -> Tensor:
        """[B], the last column with text."""
        text = self.words(batch, real)
        place = torch.arange(batch.length, device=text.device)
        return torch.where(text, place, -1).amax(1).clamp(min=0)

    def text(self, batch: TokenBatch, hidden: Tensor, keys: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Hidden states [U, T, C] of the text in every unit's prompt, by falling L1 norm of the keys, and which are
        real."""
        text = self.words(batch, real)
        norm = keys.float().abs().sum((2, 3)).masked_fill(~text, -1.0)
        order = norm.argsort(dim=1, descending=True, stable=True)[:, : int(text.sum(1).max())]
        states = hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))
        return states[batch.prompts], text.gather(1, order)[batch.prompts]

    # -- the inputs of a level's layers ---------------------------------------------------------------------------

    def narrowed(self, kwargs: dict[str, Any], level: Level, x: Tensor) -> dict[str, Any]:
        """A layer's arguments for the tokens that are left: rows at `columns`, keys at the entries of its cache."""
        entries, columns = level.entries, level.columns
        kwargs, at = dict(kwargs), columns.clamp(min=0)
        batch, rows = columns.shape
        tables = kwargs.get("position_embeddings")
        if level.ids is not None:
            kind = kinds(self.positions.module)[0]  # all layers are of one: others are refused
            kwargs["position_embeddings"] = self.positions.table(x, level.ids, *kind)
        elif tables is not None:
            kwargs["position_embeddings"] = tuple(
                t.expand(batch, -1, -1).gather(1, at[..., None].expand(-1, -1, t.shape[-1])) for t in tables
            )
        first = entries.columns.shape[1] - rows
        for name in TYPES:  # experts may be chosen by them
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name].gather(1, at)
        ids = kwargs.get("position_ids")
        if ids is not None and self.told:
            kwargs["position_ids"] = ids.expand(*ids.shape[:-2], batch, -1).gather(
                -1, at.expand(*ids.shape[:-2], -1, -1)
            )
        elif ids is not None:  # consecutive, so that no gap is taken for a border
            kwargs["position_ids"] = masks.counted(masks.packs(ids, None, ids.shape[-1]), at, first)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2:
            kwargs["attention_mask"] = entries.take(mask)
            return kwargs
        if mask is not None:
            keys = entries.columns.clamp(min=0)
            mask = mask.expand(batch, *mask.shape[1:])
            mask = mask.gather(2, at[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
            mask = mask.gather(3, keys[:, None, None].expand(-1, mask.shape[1], rows, -1))
            absent = (entries.columns < 0)[:, None, None]
            shut = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            mask = mask.masked_fill(absent, shut)
        elif entries.padded or (rows > 1 and first > 0) or entries.sizes is not None:
            mask = self.mask(entries, columns, x)
        if mask is not None and mask.ndim == 4 and entries.sizes is not None:  # proportional attention, ToMe's Eq. 1
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(
                    ~mask, torch.finfo(x.dtype).min
                )
            mask = mask + entries.sizes.log()[:, None, None].to(mask.dtype)
        kwargs["attention_mask"] = mask
        return kwargs

    def mask(self, entries: Entries, columns: Tensor, x: Tensor) -> Tensor:
        """A causal mask, if the model made none because nothing was padded. [B, E], or [B, 1, S, E] for sdpa."""
        real = entries.columns >= 0
        if "flash" in str(getattr(self.inner, self.family.decoder).config._attn_implementation):
            return real.long()
        count, rows = entries.columns.shape[1], columns.shape[1]
        place = torch.arange(count, device=x.device)
        causal = place <= place[-rows:, None]
        seen = causal & real[:, None]
        return (seen | (place == place[-rows:, None]))[:, None]  # padding attends to itself, so that no row is empty


def _rows_of(columns: Tensor, length: int) -> Tensor:
    """[B, S], the column of every row -> [B, length], the row of every column; 0 if it has none."""
    row = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
    spare = torch.where(columns < 0, length, columns)
    return columns.new_zeros(len(columns), length + 1).scatter(1, spare, row)[:, :length]


def _at(places: Tensor, index: Tensor) -> Tensor:
    """places[u, index[u, i]], and -1 where the index is -1."""
    return torch.where(index < 0, -1, places.gather(1, index.clamp(min=0)))


def checkpoints(layer: Any) -> bool:
    return bool(getattr(layer, "gradient_checkpointing", False)) and layer.training


class LayerForward(Patch):
    """Replaces the `forward` of a decoder layer that runs with fewer image tokens."""

    def __init__(self, decoder_patch: DecoderPatch, index: int, module: nn.Module) -> None:
        super().__init__(module, forward_name(module))
        self.decoder_patch, self.index = decoder_patch, index

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.decoder_patch.run(self, hidden_states, args, kwargs)
