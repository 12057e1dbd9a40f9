"""Fewer image tokens at the input of a decoder, at their original positions.

The model's own forward runs on a shorter prompt. Image features are encoded once and a method decides; then the
placeholders of the removed tokens are deleted from the ids, the mask and everything else that has a column per token,
and the model's own code does the rest: it inserts the remaining features and builds its masks, caches and DeepStack
planes. Only the rotary embedding gets positions with gaps (`Positions`), because other code in the model would take a
gap for a border between packed sequences.
"""

from __future__ import annotations

import copy
import inspect
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.encoders.patch import EncoderPatch
from vtc.adapters.encoders.state import CallState
from vtc.adapters.encoders.state import report as encoder_report
from vtc.adapters.multimodal import masks
from vtc.adapters.multimodal.cache import Entries, Shortened, cache_name, goes_on, shorten
from vtc.adapters.multimodal.capture import Capture, text
from vtc.adapters.multimodal.columns import as_asked, check_arguments, check_asked
from vtc.adapters.multimodal.encode import Encoders, packed
from vtc.adapters.multimodal.entrance import Entrance, said, tower_macs
from vtc.adapters.multimodal.families.base import IMAGE, Family, prompt
from vtc.adapters.multimodal.find import MultimodalSite
from vtc.adapters.multimodal.forwards import (
    CallerForward,
    Loss,
    MaskMaker,
    ModelForward,
    OwnerForward,
    WordReader,
    word_readers,
)
from vtc.adapters.multimodal.guard import Guard
from vtc.adapters.multimodal.layer_patch import DecoderPatch, PendingCall, checkpoints
from vtc.adapters.multimodal.owners import Owners
from vtc.adapters.multimodal.retrievers import Retriever
from vtc.adapters.multimodal.rotary import Positions
from vtc.adapters.multimodal.short_prompt import shorten_call
from vtc.adapters.multimodal.shrink import shrink
from vtc.adapters.multimodal.support import in_tower, tower_site
from vtc.adapters.multimodal.token_batch import CallRecord, PlacedTokens, TokenBatch, prefill_report
from vtc.adapters.multimodal.trial import try_positions
from vtc.adapters.report import Report
from vtc.checks import check_finite
from vtc.decide import decide, in_events
from vtc.errors import InputError
from vtc.layout import Grid
from vtc.methods.base import Method
from vtc.token_map import TokenMap

# Passed to the model's forward as pixels when the features exist already: it only checks whether there are any.
_NO_PIXELS = torch.empty(1, 0)


@dataclass(eq=False)
class MultimodalPatch:
    """One patched multimodal model: its family, the method, and the last call."""

    family: Family
    path: str
    inner: Any
    owners: Owners  # the models that wrap it
    method: Method
    tower: EncoderPatch | None = None  # if set, merging happens inside this tower instead
    patched: list[Any] = field(default_factory=list)
    record: CallRecord | None = None
    inside: CallState | None = None  # what `tower` did in that call
    turn: int = 0  # when that call ended
    bare_calls: int = 0  # prompts without images since then
    went: CallRecord | None = None  # of the call in progress or just finished, if columns were removed
    asked: Any = None  # the columns a wrapping model reads: logits_to_keep, or "all"; None = the shortened ones
    carried: Tensor | None = None  # [slots, B, L]: the columns whose positions each column of this call carries (PPE)
    decoder_patch: DecoderPatch | None = None  # set if tokens are removed between layers of the decoder
    told: bool = False  # other code than the rotary embedding uses positions: the decoder gets the true ones

    @classmethod
    def at(cls, site: MultimodalSite, method: Method) -> MultimodalPatch:
        tower = tower_site(site) if method.where == "tower" else None
        assert not isinstance(tower, str)
        inside = None if tower is None else EncoderPatch(tower, in_tower(method))
        return cls(site.family, site.path, site.inner, site.owners, method, inside)

    @property
    def retriever(self) -> Retriever | None:
        return self.owners.retriever

    @property
    def outer(self) -> Any:
        """The model whose own forward runs on the shorter prompt."""
        return self.owners.outer(self.inner)

    @property
    def where(self) -> str:
        return self.path or type(self.outer).__name__

    # -- reports ------------------------------------------------------------------------------------------------

    @property
    def last(self) -> CallRecord | None:
        return self.record

    @property
    def maps(self) -> list[TokenMap]:
        assert self.record is not None
        return [self.record.token_map]

    @property
    def grids(self) -> tuple[Grid | None, ...]:
        assert self.record is not None
        return self.record.grids

    def report(self, several: str = "") -> Report:
        """What the last call did: the decoder's prefill, and the tower if the method works in it."""
        assert self.record is not None
        name, inside = self.method.name, None
        if self.tower is not None and self.inside is not None:
            inside = encoder_report(name, self.tower.site, self.inside)
        decoder = getattr(self.inner, self.family.decoder)
        return prefill_report(name, self.where, decoder, self.record, inside, self.bare_calls > 0)

    @property
    def installed(self) -> bool:
        return any(patch.installed for patch in self.patched)

    # -- on and off ---------------------------------------------------------------------------------------------

    def install(self, root: nn.Module) -> None:
        decoder = getattr(self.inner, self.family.decoder)
        rotary = getattr(decoder, "rotary_emb", None)
        # a decoder without a rotary table reads no positions (support.py), and nothing calls what stands for it
        self.positions = Positions(nn.Identity() if rotary is None else rotary, self.method.ppe)
        self.told = try_positions(decoder).told
        forward = ModelForward(self)
        self.guard = Guard(self)
        self.guard.install(root)
        self.encoders = Encoders(self.family, self.inner, self.guard, self.tower)
        self.readers = [WordReader(part) for part in word_readers(decoder)]
        self.patched = [forward, self.positions, *self.encoders.by.values(), *self.readers]
        for head in self.owners.heads:
            self.patched += [OwnerForward(self, head), Loss(self, head), MaskMaker(head)]
        self.patched += [OwnerForward(self, owner, "all") for owner in self.owners.classifiers]
        self.patched += [CallerForward(self, owner) for owner in self.owners.callers]
        for patch in self.patched:
            patch.install()
        if self.method.in_decoder or self.method.cascade or self.method.proportional:
            self.decoder_patch = DecoderPatch(self.family, self.inner, self.method, self.positions, self.told)
            self.patched += self.decoder_patch.install()
        if self.method.in_decoder:
            return
        idle = self.tower is not None or self.method.keep == 1.0  # everything stays, so no evidence is needed
        needs = frozenset() if idle else self.method.needs & self.family.evidence
        if needs:
            self.encoders.capture = Capture(self.family, self.inner, needs)
            self.encoders.capture.install()
        if self.method.entrance is not None:
            self.encoders.entrance = Entrance(self.family, self.inner, self.method.entrance)
            self.encoders.entrance.install()
            self.patched.append(self.encoders.entrance)
        if self.tower is not None:
            self.tower.install(root)

    # -- running ------------------------------------------------------------------------------------------------

    def run(self, patch: ModelForward, call: dict[str, Any]) -> Any:
        call = {name: value for name, value in call.items() if value is not None}
        if "past_key_values" in call:  # newer versions still accept this name
            call.setdefault(cache_name(), call.pop("past_key_values"))
        given = dict(call.pop("mm_encoder_outputs", None) or {})  # `generate` encodes images before the call
        unknown = sorted({n for n, x in given.items() if x is not None} - {m.name for m in self.family.modalities})
        if unknown:
            raise InputError(
                f"vtc compresses the images of {type(self.inner).__name__} alone, and the call holds a {unknown[0]}: "
                "call vtc.remove(model)"
            )
        for modality in self.family.modalities:
            if modality.pixels in call:
                encode = self.encoders.by[modality.name]
                wanted = {name for name in {*encode.names[1:], *self.family.passed} if name in call}
                wanted -= self.family.ignored
                more = self.family.filled(self.inner, encode.names) | {name: call[name] for name in wanted}
                pixels = call[modality.pixels] if self.retriever is None else self.retriever.pixels(call, modality)
                given[modality.name] = encode(pixels, **more, return_dict=True)
        items = [
            self.encoders.placed(modality, given[modality.name], call)
            for modality in self.family.modalities
            if given.get(modality.name) is not None
        ]
        self.guard.saw(bool(items), call)
        batch = self.token_batch(items, call) if items else None
        before = self.record, self.inside
        bare = batch is None and self.record is not None and not goes_on(call.get(cache_name()))
        try:
            output = self.answer(patch, call, items, batch)
        except BaseException:  # an unfinished call is not the last call
            self.record, self.inside = before
            raise
        if batch is not None:
            self.turn, self.bare_calls = time.monotonic_ns(), 0
        self.bare_calls += bare
        return output

    def answer(
        self, patch: ModelForward, call: dict[str, Any], items: list[PlacedTokens], batch: TokenBatch | None
    ) -> Any:
        columns = placed = None
        if batch is not None and self.method.keep != 1.0 and (self.method.in_decoder or "text" in self.method.needs):
            masks.check_text(self.method.name, call, batch, self.entries(call).length)
        if batch is not None and not self.method.in_decoder:
            if self.method.turned:
                placed = self.placed(call, self.entries(call).length)
            columns, batch = self.reduce(items, batch, call, placed)
        for item in items:  # the model calls its encoders, which return their earlier output, reduced
            call.setdefault(item.modality.pixels, _NO_PIXELS)
            handed = self.encoders.by[item.modality.name].output = copy.copy(item.output)
            handed.__dict__.pop("vtc_encoded", None)  # newer versions make it part of the model's output
        try:
            more = self.decoder_patch is not None and batch is not None  # tokens may be removed between layers
            self.went = self.record if columns is not None else None
            if columns is None and not more and not isinstance(call.get(cache_name()), Shortened):
                return patch.original(**self.filled(call))
            return self.shortened(patch, call, columns, batch, placed)
        finally:
            self.encoders.forget()

    def reduce(
        self, items: list[PlacedTokens], batch: TokenBatch, call: dict[str, Any], placed: Tensor | None
    ) -> tuple[Tensor | None, TokenBatch]:
        """Which columns [B, S] of the call stay (-1 = padding; None = all), with the outputs in `items` reduced; and
        the tokens grouped into the units that the record describes. placed: the positions of all columns, if the method
        reads them."""
        method, device = self.method, batch.rows.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            check_finite(batch.rows, f"image tokens of {type(self.inner).__name__}")
            if self.tower is not None:
                token_map, notes = batch.from_tower(), ""
            else:
                inside, entered = batch.entered()
                if any(item.encoded.decided for item in items):
                    units, most = batch.index.shape
                    token_map, notes = entered or TokenMap.identity(units, most, device), "a stream"
                elif entered is None:
                    batch, token_map, notes = self.decided(batch, call, placed)
                else:
                    _, token_map, notes = self.decided(inside, call, placed)
                    same = bool((token_map.mask().sum(1) == entered.mask().sum(1)).all())
                    token_map = entered if same else entered.compose(token_map)
                if method.entrance is not None:
                    notes = "; ".join(filter(None, (said(method.entrance.name, items), notes)))
        stays, self.record = batch.answered(token_map, masks.padding(call.get("attention_mask")), notes)
        self.record = replace(self.record, tower=tower_macs(items))
        self.inside = None if self.tower is None else self.tower.stage
        if bool(stays.all()):
            return None, batch
        self.carried = batch.carried(token_map, self.positions.slots)
        means = token_map if method.merges and self.tower is None else None
        for item, span in zip(items, batch.spans, strict=True):
            shrink(item, batch, span, stays[span], means, self.family.trailing(self.inner, item.modality) > 0)
        return self.record.columns, batch

    def decided(
        self, batch: TokenBatch, call: dict[str, Any], placed: Tensor | None
    ) -> tuple[TokenBatch, TokenMap, str]:
        """The method's decision: the tokens in the units of the map, the map, and notes."""
        method, fields = self.method, dict[str, Any]()
        batch, removed = batch.budgeted(method)
        if "projector" in method.needs & self.family.evidence:
            fields["projector"] = self.family.projection(self.inner)
        if "text" in method.needs:
            words = text(method.name, self.family, self.inner, call, batch.prompts)
            fields["text"], fields["text_mask"] = words
        if placed is not None:
            fields["rotary"] = batch.of_columns(self.positions.means(placed))
        tokens = batch.seen_by(method, said=[], **fields)
        token_map, notes = decide(method, tokens, removed), ""
        if bool(torch.as_tensor(removed).any()) or method.only_videos:
            own = self.encoders.capture.note if self.encoders.capture else ""
            told = dict.fromkeys(tokens.said or ())
            notes = "; ".join(filter(None, (method.notes(tokens), *told, own)))
            if method.ppe and self.positions.slots == 1:
                notes += "; " * bool(notes) + "PPE has no effect: the rotary sections have no common divisor"
        if method.groups_frames:
            batch, token_map, events = in_events(batch, batch.videos(), token_map, method)
            notes = "; ".join(filter(None, (notes, events)))
        return batch, token_map, notes

    def token_batch(self, items: list[PlacedTokens], call: dict[str, Any]) -> TokenBatch:
        size, length = prompt(call).shape[:2]
        return TokenBatch(items, size, length, self.method.pooled)

    # -- the shorter prompt -------------------------------------------------------------------------------------

    def entries(self, call: dict[str, Any]) -> Entries:
        """Those that a call's cache holds before it."""
        given = prompt(call)
        return Entries.before(call.get(cache_name()), len(given), given.device)

    def shortened(
        self,
        patch: ModelForward,
        call: dict[str, Any],
        columns: Tensor | None,
        batch: TokenBatch | None,
        placed: Tensor | None,
    ) -> Any:
        """The model's own forward on the columns that stay (None = all of this call's), after the entries in the
        cache. placed: the positions of all columns; None = not computed yet."""
        cache, given, past = call.get(cache_name()), prompt(call), self.entries(call)
        if columns is not None or (batch is not None and self.decoder_patch is not None):
            own = {*inspect.signature(type(self.inner).forward).parameters, *patch.names}
            own |= {name for encode in self.encoders.by.values() for name in (encode.modality.pixels, *encode.names)}
            check_arguments(call, own, given.shape[1], past.length + given.shape[1])
        if self.went is not None:
            check_asked(self.asked, self.went)
        positions = self.placed(call, past.length) if placed is None else placed
        short = shorten_call(call, columns, past, positions, self.filler(), self.told)
        self.positions.ids = self.positions.taken(positions, short.columns.clamp(min=0), self.carried)
        levels: tuple[Entries, ...] = ()
        try:
            if self.decoder_patch is not None:
                record, pending = None if self.method.in_decoder else self.record, None
                if batch is not None:
                    pending = PendingCall(batch, record, short.columns, positions, short.real, short.words, short.past)
                self.decoder_patch.begin(cache, pending, short.columns, short.past)
            if isinstance(cache, Shortened):
                cache.vtc_inside = True
            if self.readers and columns is not None and batch is not None:
                self.read(batch, call, columns)
            arguments = self.filled(short.arguments)
            if self.retriever is not None and self.retriever.bare:
                del arguments["return_dict"]
            output = patch.original(**arguments)
        finally:
            self.positions.ids = self.carried = None
            for reader in self.readers:
                reader.prompt = reader.columns = None
            if self.decoder_patch is not None:
                levels = self.decoder_patch.end()
            if isinstance(cache, Shortened):
                cache.vtc_inside = False
        new = getattr(output, cache_name(), None)
        if new is not None:
            shorten(new, short.entries, levels)
        if self.decoder_patch is not None and self.decoder_patch.record is not None:
            self.record = self.went = self.decoder_patch.record
            check_asked(self.asked, self.went)
        if self.went is not None and self.asked is not None:
            output.last_hidden_state = as_asked(self.asked, self.went, output.last_hidden_state)
        if self.retriever is not None and self.retriever.bare:
            return output
        return output if call.get("return_dict", self.outer.config.return_dict) else output.to_tuple()

    def placed(self, call: dict[str, Any], past: int) -> Tensor:
        """The positions of all of a call's columns, [B, L] or [axes, B, L], as the dense model has them."""
        own = self.retriever
        return self.family.placed(self.inner, call, past) if own is None else own.placed(self.family, call, past)

    def filled(self, call: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the model's own forward, with the features that stay where it does not encode by itself."""
        output = self.encoders.by[IMAGE.name].output
        if self.retriever is None or output is None:
            return call
        rows = packed(self.family.pooled(output))
        return self.retriever.filled(call, rows)

    def read(self, batch: TokenBatch, call: dict[str, Any], columns: Tensor) -> None:
        """Let parts that read words together with those before them read the whole prompt: the placeholders of its
        images, and where padding goes the end of a text, as the decoder itself has it."""
        decoder = getattr(self.inner, self.family.decoder)
        if torch.is_grad_enabled() and any(map(checkpoints, decoder.layers)):  # they would be run again without it
            raise InputError(
                f"the layers of {type(decoder).__name__} read words, and those of the prompt cannot be handed to them "
                "when they are checkpointed: switch gradient checkpointing off"
            )
        end = decoder.config.eos_token_id
        words = batch.columns.new_full((batch.size * batch.length,), end[0] if isinstance(end, list) else end)
        for item in batch.items:
            words[item.columns] = self.family.token(self.inner, item.modality, call.get("input_ids"))
        for reader in self.readers:
            reader.prompt, reader.columns = words.view(batch.size, batch.length), columns

    def filler(self) -> int:
        """A token id to use for padding; it is masked, so any id that is not a placeholder will do."""
        taken = {getattr(self.inner.config, modality.token) for modality in self.family.modalities}
        return next(token for token in range(len(taken) + 1) if token not in taken)
