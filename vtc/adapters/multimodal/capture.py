"""What methods may ask for beyond the image tokens: attention and keys of the vision tower, the projector's input.

Attention is recorded where transformers passes queries and keys to its attention function, so this works with every
implementation (sdpa, eager, flash) and nothing is computed twice. The full attention map is never built here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtc import scores
from vtc.adapters.attention_tap import AttentionTap, listen
from vtc.adapters.hooks import Hook
from vtc.adapters.multimodal import masks
from vtc.adapters.multimodal.families.base import Family, Modality
from vtc.errors import InputError, VTCError
from vtc.layout import Layout
from vtc.scores.attention import head_mean

# For large images, the attention from all patches would cost more than a layer of the decoder: only the queries of each
# _EVERYth patch are used (with 2x2 patches to a token, one per token).
_ALL, _EVERY = 1024, 4
_ATTENDED = {"attention", "middle", "keys"}
_PROJECTED = {"inputs", "projector"}


@dataclass(eq=False)
class Capture:
    """Records what one model's tower and projector compute while they encode, for the fields of `Tokens` in `needs`."""

    family: Family
    inner: Any
    needs: frozenset[str]
    taps: dict[str, AttentionTap] = field(default_factory=dict)
    projected: Tensor | None = None
    hidden: Tensor | None = None  # the projector's hidden values, before its activation
    listening: bool = False
    note: str = ""  # what a report should say about the recording

    def install(self) -> None:
        attentions = self.family.attentions(self.inner) if self.needs & _ATTENDED else []
        if not attentions:
            self.needs -= _ATTENDED
        if self.needs & {"attention", "keys"}:
            self.taps["attention"] = listen(attentions[-1])
        if "middle" in self.needs:
            self.taps["middle"] = listen(attentions[round(self.family.middle * len(attentions))])
        if self.needs & _PROJECTED:
            projector = self.family.projector(self.inner)
            projector.register_forward_pre_hook(Hook("saw_projected", self), with_kwargs=True)
            entrance = scores.entrance(projector) if "projector" in self.needs else None
            if entrance is not None:
                entrance.register_forward_hook(Hook("saw_hidden", self))

    def saw_projected(self, hook: Hook, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.listening:
            self.projected = (args or tuple(kwargs.values()))[0].detach()

    def saw_hidden(self, hook: Hook, args: tuple, output: Tensor) -> None:
        if self.listening and output.dtype == torch.float32:  # decisions are made in float32, so halves are no help
            self.hidden = output.detach()

    def start(self) -> None:
        self.listening, self.projected, self.hidden = True, None, None
        for tap in self.taps.values():
            tap.calls = []

    def stop(self) -> dict[str, list]:
        """Stop recording; returns the recorded calls by tap."""
        self.listening = False
        heard = {name: tap.calls or [] for name, tap in self.taps.items()}
        for tap in self.taps.values():
            tap.calls = None
        return heard

    def gather(
        self,
        heard: dict[str, list],
        modality: Modality,
        layout: Layout,
        tokens: int,
        call: dict,
        lengths: list[int] | None = None,
    ) -> dict[str, Tensor]:
        """The evidence for each of the modality's tokens: [tokens, ...] by field name of `Tokens`. lengths: of the
        packed images or frames, if the tower did not run on all of their patches."""
        found: dict[str, Tensor] = {}
        lengths = lengths or self.family.segments(self.inner, modality, call)
        members = None if lengths is None else self.family.members(self.inner, modality, call, sum(lengths))
        for name in self.needs & {"attention", "middle"}:
            query, key, mask, scale, prefix = self.states(heard[name], lengths, call)
            if prefix:
                received = scores.cls_attention(query, key, prefix=prefix, scale=scale)
            else:
                every = 1 if query.shape[2] <= _ALL else _EVERY
                received = scores.attention_received(query, key, scale=scale, mask=mask, every=every)
                self.note = "" if every == 1 else f"attention asked of every {every}th patch"
            found[name] = self.to_tokens(received[..., None], mask, members, layout, tokens, total=True)[:, 0]
        if "keys" in self.needs:
            _, key, mask, _, prefix = self.states(heard["attention"], lengths, call)
            mean = head_mean(key, key.shape[1])[:, prefix:]
            found["keys"] = self.to_tokens(mean, mask, members, layout, tokens, total=False)
        if "pixels" in self.needs:
            found["pixels"] = self.family.pixels(modality, call).float().view(tokens, -1)
        if self.needs & _PROJECTED:
            if self.projected is None:
                raise VTCError(
                    f"{type(self.inner).__name__}: its projector did not run as a module, so vtc did not see what it "
                    "reads; use a method that reads the tokens alone, such as divprune"
                )
            blocks = self.family.blocks(self.inner, self.projected, modality, call)
            found["inputs"] = _at(blocks.float(), layout.source, tokens)
            if self.hidden is not None and self.hidden[..., 0].numel() == len(blocks):
                found["hidden"] = _at(self.hidden.flatten(0, -2), layout.source, tokens)
            self.projected = self.hidden = None
        return found

    def states(
        self, calls: list, lengths: list[int] | None, call: dict
    ) -> tuple[Tensor, Tensor, Tensor | None, float | None, int]:
        """Queries and keys [F, H, P, D], one row per image, frame or window, the mask of real patches, the scaling
        and the prefix."""
        if not calls:
            raise VTCError(
                f"{type(self.inner).__name__}: its tower attended past transformers' attention interface, where vtc "
                "listens; use a method that reads the tokens alone, such as divprune"
            )
        query = torch.cat([c[0] for c in calls], dim=2 if len(calls) > 1 else 0)
        key = torch.cat([c[1] for c in calls], dim=2 if len(calls) > 1 else 0)
        if lengths is not None:  # all images or frames packed in one row, or padded
            if len(calls) > 1:  # the tower parted them itself: in images, frames or windows
                lengths = [c[0].shape[2] for c in calls]
            query, key = (_pad(x, lengths) for x in (query, key))
            longest = torch.arange(max(lengths), device=query.device)
            mask = longest < torch.tensor(lengths, device=query.device)[:, None]
            return query, key, None if len(set(lengths)) == 1 else mask, calls[0][3], 0
        mask = calls[0][2]
        if mask is not None:  # [B, 1, P, P]: columns that any query may attend to are real
            seen = mask if mask.dtype == torch.bool else mask >= 0
            mask = seen.any(dim=2)[:, 0].expand(query.shape[0], -1)
        return query, key, mask, calls[0][3], self.family.prefix(self.inner, call)

    def to_tokens(
        self, x: Tensor, mask: Tensor | None, members: Tensor | None, layout: Layout, tokens: int, total: bool
    ) -> Tensor:
        """[F, P, C] of every patch -> [tokens, C], summed or averaged over the patches of each token. members: [rows,
        P] of packed or padded images, -1 = none."""
        if members is not None:
            x = x.flatten(0, 1) if mask is None else x[mask]
            members = members.to(x.device)
            there = (members >= 0)[..., None]
            x = x[members.clamp(min=0)] * there
            return _at(x.sum(1) if total else x.sum(1) / there.sum(1), layout.source, tokens)
        per_image = self.family.rows_per_image(self.inner, x.shape[1])
        own = self.family.patches(self.inner, x.shape[1], per_image).to(x.device)
        x = x[:, own].flatten(0, 1)
        return _at(x.sum(1) if total else x.mean(1), layout.source, tokens)


def _pad(x: Tensor, lengths: list[int]) -> Tensor:
    """[1, H, sum(lengths), D], or [F, H, more, D] -> [F, H, max(lengths), D]."""
    if len(x) == len(lengths):
        return x[:, :, : max(lengths)]
    parts = x[0].transpose(0, 1).split(lengths)
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True).transpose(1, 2)


def _at(rows: Tensor, source: Tensor | None, tokens: int) -> Tensor:
    """The rows that the tokens come from; a token without a source (a newline) gets 0, one made of several rows their
    mean."""
    if source is None:
        if rows.shape[0] != tokens:
            raise VTCError(
                f"{rows.shape[0]} rows of the tower for {tokens} image tokens: this model arranges its patches as "
                "vtc does not know them; use a method that reads the tokens alone, such as divprune"
            )
        return rows
    source = source.to(rows.device)
    taken = rows[source.clamp(min=0)]
    absent = (source < 0).reshape(*source.shape, *([1] * (taken.ndim - source.ndim)))
    taken = taken.masked_fill(absent, 0)
    return taken if source.ndim == 1 else taken.mean(1)


def text(name: str, family: Family, inner: Any, call: dict[str, Any], prompts: list[int]) -> tuple[Tensor, Tensor]:
    """Embeddings [U, T, C] of the text tokens of every unit's prompt, and which are real."""
    ids = call.get("input_ids")
    if ids is None:
        raise InputError(f"{name} reads the prompt's words: pass input_ids, not inputs_embeds")
    visual = torch.zeros_like(ids, dtype=torch.bool)
    for modality in family.modalities:
        visual |= ids == getattr(inner.config, modality.token)
    real = masks.words(call.get("attention_mask"), ids.shape[1])
    words = ~visual if real is None else ~visual & real
    embeds = inner.get_input_embeddings()(torch.where(visual, 0, ids))
    return embeds[prompts].detach(), words[prompts]
