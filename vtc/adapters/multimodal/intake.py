"""Where a decoder takes in image tokens: fewer of them, at their own positions.

The model's forward runs as it is, on a shorter prompt. Image features are encoded once and a method decides; then the
placeholders of the tokens that go are taken out of the ids, the mask and everything else that has a column per token,
and the model's own code does the rest: it fills in the features it is handed, builds its masks, its caches, its
DeepStack planes. Only the rotary embedding is told that the positions have gaps (`Positions`), so that nothing else in
the model takes a gap for a border between packed sequences.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.multimodal.cache import Entries, Shortened, cache_name, shorten
from vtc.adapters.multimodal.events import in_events
from vtc.adapters.multimodal.evidence import Evidence
from vtc.adapters.multimodal.family import Family, Kind
from vtc.adapters.multimodal.guard import Guard
from vtc.adapters.multimodal.layers import Call, Thinning
from vtc.adapters.multimodal.question import Encoded, Question, Record, Seen, decide_all, two_d
from vtc.adapters.multimodal.rotary import Positions
from vtc.adapters.multimodal.standins import Encode, IntakeForward, Loss
from vtc.adapters.tower import Tower
from vtc.errors import InputError
from vtc.functional import check_finite
from vtc.methods.base import Method
from vtc.token_map import TokenMap

# What the model's forward is given as pixels where the features exist: it only looks whether there are any.
_NO_PIXELS = torch.empty(1, 0)


@dataclass(eq=False)
class Intake:
    """One patched multimodal model: its family, the method, and the last call."""

    family: Family
    path: str
    inner: Any
    owners: tuple[nn.Module, ...]  # models with a language head around it
    method: Method
    tower: Tower | None = None  # merging happens in here instead
    evidence: Evidence | None = None
    patched: list[Any] = field(default_factory=list)
    record: Record | None = None
    columns: Tensor | None = None  # of the call in progress or just done, for the labels
    carried: Tensor | None = None  # [slots, B, L]: the columns whose positions each column of this call carries (PPE)
    encoding: bool = False
    latest: dict[str, tuple[Encoded, Tensor]] = field(default_factory=dict)  # by kind, with the first and last row
    thinning: Thinning | None = None  # tokens go between layers of the decoder

    @property
    def where(self) -> str:
        return self.path or type(self.inner).__name__

    # -- on and off ---------------------------------------------------------------------------------------------

    def install(self, root: nn.Module) -> None:
        decoder = getattr(self.inner, self.family.decoder)
        name = "_old_forward" if "_old_forward" in self.inner.__dict__ else "forward"
        self.positions = Positions(decoder.rotary_emb, self.method.ppe)
        self.encoders = {kind.name: Encode(self, kind) for kind in self.family.kinds}
        forward = IntakeForward(self, name)
        self.guard = Guard(self)
        self.guard.install(root)
        self.patched = [forward, self.positions, *self.encoders.values(), *(Loss(self, own) for own in self.owners)]
        for patch in self.patched:
            patch.install()
        if self.method.in_decoder or self.method.cascade or self.method.proportional:
            self.thinning = Thinning(self.family, self.inner, self.method, self.positions)
            self.patched += self.thinning.install()
        if self.method.in_decoder:
            return
        idle = self.tower is not None or self.method.keep == 1.0  # everything stays, whatever the evidence
        needs = frozenset() if idle else self.method.needs - {"grid", "text"}
        if self.method.encoder:  # the keys that ToMe and PiToMe compare in a tower; here they compare the tokens
            needs -= {"keys"}
        if needs:
            self.evidence = Evidence(self.family, self.inner, needs)
            self.evidence.install()
        if self.tower is not None:
            self.tower.install(root)

    # -- running ------------------------------------------------------------------------------------------------

    def run(self, patch: IntakeForward, call: dict[str, Any]) -> Any:
        call = {name: value for name, value in call.items() if value is not None}
        if "past_key_values" in call:  # which newer versions still take
            call.setdefault(cache_name(), call.pop("past_key_values"))
        given = dict(call.pop("mm_encoder_outputs", None) or {})  # `generate` encodes before it calls
        for kind in self.family.kinds:
            if kind.pixels in call:
                encode = self.encoders[kind.name]
                wanted = {name for name in encode.names[1:] if name in call} - self.family.ignored
                given[kind.name] = encode(call[kind.pixels], **{name: call[name] for name in wanted}, return_dict=True)
        seen = [
            self.see(kind, given[kind.name], call) for kind in self.family.kinds if given.get(kind.name) is not None
        ]
        self.guard.saw(bool(seen), call)
        question = self.question(seen, call) if seen else None
        columns = None
        if question is not None and not self.method.in_decoder:
            columns, question = self.reduce(seen, question, call)
        for item in seen:  # the model asks its encoders, which hand out what they have given already, reduced
            call.setdefault(item.kind.pixels, _NO_PIXELS)
            handed = self.encoders[item.kind.name].output = copy.copy(item.output)
            handed.__dict__.pop("vtc_encoded", None)  # newer versions make it part of what the model gives
        try:
            more = self.thinning is not None and question is not None  # tokens may go on the way
            if columns is None and not more and not isinstance(call.get(cache_name()), Shortened):
                self.columns = None  # nothing went
                return patch.original(**call)
            return self.shortened(patch, call, columns, question)
        finally:
            for encode in self.encoders.values():
                encode.output = None
            self.latest.clear()

    def encode(self, encode: Encode, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run one of the model's encoders, with ears on what the method needs."""
        if self.encoding:  # one encoder calling the other
            return encode.original(*args, **kwargs)
        self.guard.enter(encode)
        if self.evidence is not None:
            self.evidence.start()
        self.encoding = True
        try:
            output = encode.original(*args, **kwargs)
        finally:
            self.encoding = False
            self.guard.leave(encode)
            heard = {} if self.evidence is None else self.evidence.stop()
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:  # return_dict=False: not for us
            return output
        call = {**dict(zip(encode.names, args, strict=False)), **kwargs}
        call[encode.kind.pixels] = call[encode.names[0]]  # which is what the argument is called, but for old versions
        lengths = tuple(x.numel() // x.shape[-1] for x in pooled)
        layout = self.family.layout(self.inner, encode.kind, list(lengths), call)
        found: dict[str, Tensor] = {}
        if self.evidence is not None:
            with torch.no_grad(), torch.autocast(pooled[0].device.type, enabled=False):
                found = self.evidence.gather(heard, encode.kind, layout, sum(lengths), call)
        stage = None if self.tower is None else self.tower.stage
        merged = None if stage is None or stage.total is None else stage.total.drop_prefix(stage.prefix)
        output.vtc_encoded = Encoded(self, lengths, layout, found, merged)
        filled = [x.reshape(-1, x.shape[-1]) for x in pooled if x.numel()]  # a prompt without images has no rows
        if filled:
            ends = torch.stack([filled[0][0], filled[-1][-1]])
            self.latest[encode.kind.name] = (output.vtc_encoded, ends.detach())
        return output

    def known(self, kind: Kind, output: Any, rows: Tensor) -> Encoded:
        """What was noted of an output when it was encoded."""
        encoded = getattr(output, "vtc_encoded", None)
        if encoded is not None and encoded.owner is self:
            return encoded
        # accelerate copies outputs between devices, without what was noted on them: is it the last one?
        if kind.name in self.latest:
            last, ends = self.latest[kind.name]
            fits = len(rows) > 0 and len(rows) % sum(last.lengths) == 0
            if fits and torch.equal(rows[[0, -1]].to(ends.device), ends):
                return last
        raise InputError(
            f"the {kind.name} was encoded before vtc compressed this model, or in chunks (prefill_chunk_size): "
            "pass the pixels, without chunks, or call vtc.remove(model)"
        )

    def see(self, kind: Kind, output: Any, call: dict[str, Any]) -> Seen:
        """Find where an encoder's tokens go in the prompt."""
        rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in output.pooler_output])
        encoded = self.known(kind, output, rows)
        token = getattr(self.inner.config, kind.token)
        if "input_ids" in call:
            placeholder = call["input_ids"] == token
        else:
            inputs = call["inputs_embeds"]
            embedded = self.inner.get_input_embeddings()(torch.tensor(token, device=inputs.device))
            placeholder = (inputs == embedded).all(-1)
        columns = placeholder.flatten().nonzero().flatten()
        behind = self.family.trailing(self.inner, kind)
        if behind:  # not the encoder's: they stay
            own = torch.cat([torch.arange(n + behind, device=columns.device) < n for n in encoded.lengths])
            columns = columns[own] if len(own) == len(columns) else columns
        if len(columns) != len(rows):
            count = len(output.pooler_output)
            raise InputError(
                f"the prompt has {len(columns)} {kind.name} placeholders (id {token}), but the {count} "
                f"{kind.name}{'s' * (count != 1)} given make {len(rows)} tokens: the number of {kind.name}s does not "
                "match the prompt"
            )
        if len(rows) != sum(encoded.lengths):  # beams: `generate` repeats the images of every prompt
            times = len(rows) // sum(encoded.lengths)
            encoded = encoded.repeated(placeholder.sum(1).tolist(), times)
        return Seen(kind, output, encoded, rows, columns)

    def reduce(self, seen: list[Seen], question: Question, call: dict[str, Any]) -> tuple[Tensor | None, Question]:
        """Which columns [B, S] of the call stay (-1 = padding; None = all), with the outputs in `seen` reduced; and the
        tokens by the units that the record speaks of."""
        method, device = self.method, question.rows.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            check_finite(question.rows, f"image tokens of {type(self.inner).__name__}")
            if self.tower is not None:
                token_map, notes = question.from_tower(), ""
            else:
                fields: dict[str, Any] = {}
                if "projector" in method.needs:
                    fields["projector"] = self.family.projection(self.inner)
                if "text" in method.needs:
                    fields["text"], fields["text_mask"] = self.text(call, question.prompts)
                tokens = question.tokens(method, **fields)
                removed = question.removals(method.keep)
                token_map, notes = decide_all(method, tokens, removed), ""
                if bool(torch.as_tensor(removed).any()):
                    own = "" if self.evidence is None else self.evidence.note
                    notes = "; ".join(filter(None, (method.notes(tokens), own)))
                    if method.ppe and self.positions.slots == 1:
                        notes += "; " * bool(notes) + "PPE has no effect: the rotary sections have no common divisor"
                if getattr(method, "events", None):
                    question, token_map, events = in_events(question, token_map, method)  # type: ignore[arg-type]
                    notes = "; ".join(filter(None, (notes, events)))
        mask = two_d(call.get("attention_mask"), question.batch, question.length)
        stays, self.record = question.answered(token_map, mask, notes)
        if bool(stays.all()):
            return None, question
        self.carried = question.carried(token_map, self.positions.slots)
        means = token_map if method.merges and self.tower is None else None
        for item, span in zip(seen, question.spans, strict=True):
            self.shrink(item, question, span, stays[span], means)
        return self.record.columns, question

    def question(self, seen: list[Seen], call: dict[str, Any]) -> Question:
        given = call["input_ids"] if "input_ids" in call else call["inputs_embeds"]
        return Question(seen, given.shape[0], given.shape[1], self.method.pooled)

    def text(self, call: dict[str, Any], prompts: list[int]) -> tuple[Tensor, Tensor]:
        """Embeddings [U, T, C] of the text tokens of every unit's prompt, and which are real."""
        ids = call.get("input_ids")
        if ids is None:
            raise InputError(f"{self.method.name} reads the prompt's words: pass input_ids, not inputs_embeds")
        visual = torch.zeros_like(ids, dtype=torch.bool)
        for kind in self.family.kinds:
            visual |= ids == getattr(self.inner.config, kind.token)
        mask = two_d(call.get("attention_mask"), *ids.shape)
        words = ~visual if mask is None else ~visual & mask[:, -ids.shape[1] :].bool()
        embeds = self.inner.get_input_embeddings()(torch.where(visual, 0, ids))
        return embeds[prompts].detach(), words[prompts]

    def shrink(self, item: Seen, question: Question, span: slice, stays: Tensor, means: TokenMap | None) -> None:
        """Give an encoder's output the rows that stay: as they are, or the means of their groups."""

        def shorter(x: Tensor) -> Tensor:
            if means is not None:
                whole = x.new_zeros(len(question.rows), x.shape[-1])
                whole = torch.cat([whole[: span.start], x, whole[span.stop :]])
                merged = means.merge(question.packed(whole))[means.anchor >= 0]
                at = question.anchors(means)
                inside = (at >= span.start) & (at < span.stop)
                x = x.index_copy(0, at[inside] - span.start, merged[inside].to(x.dtype))
            return x[stays]

        output = item.output = copy.copy(item.output)
        small = shorter(item.rows)
        if not isinstance(output.pooler_output, Tensor):
            output.pooler_output = (small,)
        elif self.family.trailing(self.inner, item.kind):  # one row per item, for the model to add to
            output.pooler_output = small.view(len(item.encoded.lengths), -1, small.shape[-1])
        else:
            output.pooler_output = small[:, None]
        if getattr(output, "deepstack_features", None) is not None:
            output.deepstack_features = [
                shorter(level) if isinstance(level, Tensor) else (shorter(torch.cat(list(level))),)
                for level in output.deepstack_features
            ]

    # -- the shorter prompt -------------------------------------------------------------------------------------

    def shortened(
        self, patch: IntakeForward, call: dict[str, Any], columns: Tensor | None, question: Question | None
    ) -> Any:
        """The model's own forward on the columns that stay (None = all of this call's), behind the cache as it is."""
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        given: Tensor = call["inputs_embeds"] if ids is None else ids
        batch, length = given.shape[:2]
        device = given.device
        cache = call.get(cache_name())
        if cache is None:
            past = Entries.whole(batch, 0, device)
        elif isinstance(cache, Shortened):
            past = cache.vtc_entries
        else:
            past = Entries.whole(batch, cache.get_seq_length(), device)
        padded = columns is not None and bool((columns < 0).any())
        if columns is None:
            columns = torch.arange(length, device=device).expand(batch, length)
        entries = past.extend(columns, length, padded)
        mask = two_d(call.get("attention_mask"), batch, entries.length)
        positions = call.get("position_ids")
        if positions is None:
            words = given if ids is None else self.inner.get_input_embeddings()(ids.clamp(min=0))
            positions = self.family.positions(self.inner, call, past.length, words)
        positions = positions[-3:] if positions.ndim == 3 else positions
        positions = positions.expand(*positions.shape[:-2], batch, -1)[..., -length:]

        short = dict(call)
        at = columns.clamp(min=0)
        absent = columns < 0
        if ids is not None:
            short["input_ids"] = ids.gather(1, at).masked_fill(absent, self.filler())
        if embeds is not None:
            short["inputs_embeds"] = embeds.gather(1, at[..., None].expand(-1, -1, embeds.shape[-1]))
        for name in ("token_type_ids", "mm_token_type_ids"):
            kinds = call.get(name)
            if kinds is not None and kinds.shape[-1] == length:
                short[name] = kinds.gather(1, at).masked_fill(absent, 0)
            elif kinds is not None:  # of the whole conversation; drafted tokens may be missing, and are text
                missing = entries.length - kinds.shape[-1]
                short[name] = entries.take(torch.cat([kinds, kinds[:, -1:].expand(-1, max(0, missing))], dim=1))
        short.pop("labels", None)  # Gemma 3 hands them down for nothing
        before = past.columns.shape[1]
        rows = torch.arange(before, before + columns.shape[1], device=device)
        if call.get("cache_position") is not None:
            short["cache_position"] = rows
        short["position_ids"] = rows.expand(batch, -1)
        if mask is None:
            short["attention_mask"] = (entries.columns >= 0).long() if entries.padded else None
        else:
            if mask.shape[1] != entries.length:
                raise InputError(
                    f"attention_mask has {mask.shape[1]} columns, but the conversation has {entries.length}: with a "
                    "cache the mask covers the whole conversation, image tokens that vtc removed included"
                )
            short["attention_mask"] = entries.take(mask.long())
        self.columns = columns
        self.positions.ids = self.positions.taken(positions, at, self.carried)
        levels: tuple[Entries, ...] = ()
        try:
            if self.thinning is not None:
                real = None if mask is None else mask[:, -length:].bool()
                record = None if self.method.in_decoder else self.record
                seen = None if question is None else Call(question, record, columns, positions, real, before)
                self.thinning.begin(cache, seen, columns, before)
            if isinstance(cache, Shortened):
                cache.vtc_inside = True
            output = patch.original(**short)
        finally:
            self.positions.ids = self.carried = None
            if self.thinning is not None:
                levels = self.thinning.end()
            if isinstance(cache, Shortened):
                cache.vtc_inside = False
        new = getattr(output, cache_name(), None)
        if new is not None:
            shorten(new, entries, levels)
        if self.thinning is not None and self.thinning.record is not None:
            self.record = self.thinning.record
            self.columns = self.record.columns
        return output

    def filler(self) -> int:
        """A token id to put where there is nothing; it is masked, so any that is no placeholder will do."""
        taken = {getattr(self.inner.config, kind.token) for kind in self.family.kinds}
        return next(token for token in range(len(taken) + 1) if token not in taken)
