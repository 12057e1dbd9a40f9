"""Fewer image tokens from some layer of the decoder on (FastV, DART).

The layers before see everything; the others see the tokens that stay, at their own positions, and cache only those. The
model's loop over its layers hands every layer the same mask and the same rotary table, of the full prompt, so the
layers behind take their rows and columns of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtc import scores
from vtc.adapters.multimodal.cache import Entries, Shortened, shorten
from vtc.adapters.multimodal.evidence import Listening, listen
from vtc.adapters.multimodal.family import Family
from vtc.adapters.multimodal.question import Question, Record, decide_all, two_d
from vtc.adapters.multimodal.standins import IntakeForward, LayerForward
from vtc.errors import InputError
from vtc.functional import check_finite
from vtc.methods.base import Method


@dataclass(eq=False)
class Thinning:
    """One decoder whose layers from `method.layer` on see fewer tokens, and the call in progress."""

    family: Family
    inner: Any
    method: Method
    ear: Listening | None = None
    question: Question | None = None
    call: dict[str, Any] = field(default_factory=dict)
    entries: Entries | None = None  # of the layers behind; None = like those before
    columns: Tensor | None = None  # [B, S] of this call
    record: Record | None = None

    @property
    def first(self) -> int:
        return self.method.layer  # type: ignore[attr-defined]

    def install(self) -> list[LayerForward]:
        layers = getattr(self.inner, self.family.decoder).layers
        self.ear = listen(layers[self.first - 1].self_attn)
        patches = [LayerForward(self, i, layer) for i, layer in enumerate(layers) if i >= self.first]
        for patch in patches:
            patch.install()
        return patches

    def forward(
        self, patch: IntakeForward, call: dict[str, Any], question: Question | None
    ) -> tuple[Any, Record | None]:
        """Run the model. Returns its output, and what happened if there were images."""
        given = call["input_ids"] if "input_ids" in call else call["inputs_embeds"]
        batch, length = given.shape[:2]
        cache = call.get("past_key_values")
        if getattr(cache, "is_compileable", False):
            raise InputError(
                f"{self.method.name} leaves layers with caches of different lengths, which a static cache cannot hold: "
                "use the default one, or a method that works at the decoder's input"
            )
        if isinstance(cache, Shortened):
            past: Entries | None = cache.vtc_entries
        else:
            past = None if question is None else Entries.whole(batch, _length(cache), given.device)
        self.question, self.call, self.record = question, call, None
        self.entries = None if past is None else past
        self.columns = torch.arange(length, device=given.device).expand(batch, length)
        assert self.ear is not None
        self.ear.heard = [] if question is not None else None
        if past is not None and question is None:
            self.entries = past.extend(self.columns, length, False)
        try:
            output = patch.original(**call)
            cache = getattr(output, "past_key_values", None)
            if cache is not None and self.entries is not None:
                shorten(cache, self.entries)
            return output, self.record
        finally:
            self.ear.heard, self.question, self.call, self.entries = None, None, {}, None

    def run(self, patch: LayerForward, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.entries is None:  # nothing has gone, and nothing will
            return patch.original(x, *args, **kwargs)
        if args or (self.question is not None and torch.is_grad_enabled() and _checkpoints(patch.module)):
            raise InputError(
                f"{self.method.name} cannot take tokens out between layers that are checkpointed: switch gradient "
                "checkpointing off, or use a method that works at the decoder's input"
            )
        columns = self.columns
        assert columns is not None
        if self.question is not None and self.record is None:
            columns = self.decide(x)
            x = x.gather(1, columns.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))
        return patch.original(x, **self.narrowed(kwargs, columns, x))

    def decide(self, x: Tensor) -> Tensor:
        """Choose by what the layer before has seen; returns the columns that stay, and notes the cache's entries."""
        question, method = self.question, self.method
        assert question is not None and self.entries is not None and self.ear is not None and self.ear.heard
        query, key, _, scale = self.ear.heard[-1]
        self.ear.heard = None
        past = self.entries.length
        mask = two_d(self.call.get("attention_mask"), question.batch, past + question.length)
        real = None if mask is None else mask[:, -question.length :].bool()
        rows = torch.tensor(question.prompts, device=x.device)[:, None]
        places = question.places.clamp(min=0)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            hidden = x.detach()
            keys = key.transpose(1, 2)  # [B, past + L, heads, D]
            fields: dict[str, Any] = {"features": question.padded(hidden[rows, places])}
            chosen = keys[rows, places + past]
            if "attention" in method.needs:
                last = self.last_words(question, real)
                asking = query.transpose(1, 2)[rows[:, 0], last[rows[:, 0]]]
                fields["attention"] = scores.last_query_attention(
                    asking, chosen.transpose(1, 2), scale=scale, mask=question.mask
                )
            if "keys" in method.needs:
                fields["keys"] = question.padded(chosen.flatten(2))
            if "text" in method.needs:
                fields["text"], fields["text_mask"] = self.text(question, hidden, keys[:, past:], real)
            check_finite(fields["features"], f"hidden states before layer {self.first} of {type(self.inner).__name__}")
            tokens = question.tokens(method, **fields)
            token_map = decide_all(method, tokens, question.removals(method.keep))
            notes = method.notes(tokens)
        _, self.record = question.answered(token_map, real, notes, self.first)
        columns = self.record.columns
        self.columns = columns
        self.entries = self.entries.extend(columns, question.length, bool((columns < 0).any()))
        return columns

    def words(self, question: Question, real: Tensor | None) -> Tensor:
        """[B, L] bool, the columns with text."""
        visual = torch.zeros(question.batch * question.length, dtype=torch.bool, device=question.columns.device)
        visual[question.columns] = True
        text = ~visual.view(question.batch, question.length)
        return text if real is None else text & real

    def last_words(self, question: Question, real: Tensor | None) -> Tensor:
        """[B], the last column with text."""
        text = self.words(question, real)
        place = torch.arange(question.length, device=text.device)
        return torch.where(text, place, -1).amax(1).clamp(min=0)

    def text(self, question: Question, hidden: Tensor, keys: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Hidden states [U, T, C] of the text in every unit's prompt by falling L1 norm of the keys; which are real."""
        text = self.words(question, real)
        norm = keys.float().abs().sum((2, 3)).masked_fill(~text, -1.0)
        order = norm.argsort(dim=1, descending=True, stable=True)[:, : int(text.sum(1).max())]
        states = hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))
        return states[question.prompts], text.gather(1, order)[question.prompts]

    def narrowed(self, kwargs: dict[str, Any], columns: Tensor, x: Tensor) -> dict[str, Any]:
        """A layer's arguments for the tokens that are left: rows at `columns`, keys at the entries of its cache."""
        entries = self.entries
        assert entries is not None
        kwargs, at = dict(kwargs), columns.clamp(min=0)
        batch, rows = columns.shape
        tables = kwargs.get("position_embeddings")
        if tables is not None:
            kwargs["position_embeddings"] = tuple(
                t.expand(batch, -1, -1).gather(1, at[..., None].expand(-1, -1, t.shape[-1])) for t in tables
            )
        first = entries.columns.shape[1] - rows
        if kwargs.get("position_ids") is not None:  # counted, so that no gap passes for a border
            kwargs["position_ids"] = torch.arange(first, first + rows, device=x.device).expand(batch, -1)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2:
            kwargs["attention_mask"] = entries.take(mask)
        elif mask is not None:
            keys = entries.columns.clamp(min=0)
            mask = mask.expand(batch, *mask.shape[1:])
            mask = mask.gather(2, at[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
            mask = mask.gather(3, keys[:, None, None].expand(-1, mask.shape[1], rows, -1))
            absent = (entries.columns < 0)[:, None, None]
            shut = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            kwargs["attention_mask"] = mask.masked_fill(absent, shut)
        elif entries.padded or (rows > 1 and first > 0):
            kwargs["attention_mask"] = self.mask(entries, columns, x)
        return kwargs

    def mask(self, entries: Entries, columns: Tensor, x: Tensor) -> Tensor:
        """A causal mask where the model made none, because nothing was padded. [B, E], or [B, 1, S, E] for sdpa."""
        real = entries.columns >= 0
        if "flash" in str(getattr(self.inner, self.family.decoder).config._attn_implementation):
            return real.long()
        count, rows = entries.columns.shape[1], columns.shape[1]
        place = torch.arange(count, device=x.device)
        causal = place <= place[-rows:, None]
        seen = causal & real[:, None]
        return (seen | (place == place[-rows:, None]))[:, None]  # padding sees itself, so that no row is empty


def _length(cache: Any) -> int:
    return 0 if cache is None else cache.get_seq_length()


def _checkpoints(layer: Any) -> bool:
    return bool(getattr(layer, "gradient_checkpointing", False)) and layer.training
