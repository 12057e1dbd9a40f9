"""A multimodal model's encoders: their output is kept with what a method needs to know about it, and returned again,
reduced, while the model runs on a shorter prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtc.adapters.encoders.patch import EncoderPatch
from vtc.adapters.multimodal.capture import Capture
from vtc.adapters.multimodal.entrance import Entrance
from vtc.adapters.multimodal.families.base import Family, Modality
from vtc.adapters.multimodal.guard import Guard
from vtc.adapters.multimodal.token_batch import EncodedFeatures, PlacedTokens
from vtc.adapters.patch import Patch
from vtc.errors import InputError
from vtc.layout import Layout


class Encode(Patch):
    """Replaces `get_image_features` and `get_video_features`: their output carries what a method needs to know about
    it. While the model runs on a shorter prompt, `output` is the earlier output, reduced."""

    output: Any = None

    def __init__(self, encoders: Encoders, modality: Modality) -> None:
        super().__init__(encoders.inner, modality.encode)
        self.encoders, self.modality = encoders, modality
        self.names = list(self.__signature__.parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.output is not None:
            self.encoders.guard.alone()
            return self.output
        return self.encoders.run(self, args, kwargs)


def arguments(encode: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """An encoder's call arguments, by name. encode: the patch on the encoder, with the `modality` that it encodes and
    its parameter `names`."""
    call = {**dict(zip(encode.names, args, strict=False)), **kwargs}
    call[encode.modality.pixels] = call[encode.names[0]]  # the name of the argument, except in old versions
    return call


def laid_out(
    family: Family, inner: Any, modality: Modality, pooled: Any, call: dict[str, Any]
) -> tuple[list[int], Layout]:
    """How many tokens each item of an encoder's output has, and their layout. pooled: a tensor for each item."""
    made = [x.numel() // x.shape[-1] for x in pooled]
    lengths = list(family.lengths(inner, modality, made, call))
    return lengths, family.layout(inner, modality, lengths, call)


def packed(features: Any) -> Tensor:
    """[n, C] of an encoder's features: one tensor for all items, or one for each."""
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in ([features] if isinstance(features, Tensor) else features)])


@dataclass(eq=False)
class Encoders:
    """The encoders of one model.

    Attributes:
        tower: the patched tower if merging happens inside it. capture: records what the method reads.
        entrance: what takes patches out before the tower.
        by: their patches by modality. latest: what was recorded last, by modality, with the first and the last row.
        running: whether one of them is running; it may call the other.
    """

    family: Family
    inner: Any
    guard: Guard
    tower: EncoderPatch | None = None
    capture: Capture | None = None
    entrance: Entrance | None = None
    by: dict[str, Encode] = field(init=False)
    latest: dict[str, tuple[EncodedFeatures, Tensor]] = field(default_factory=dict)
    running: bool = False

    def __post_init__(self) -> None:
        self.by = {modality.name: Encode(self, modality) for modality in self.family.modalities}

    def forget(self) -> None:
        """After a call: the encoders run normally again."""
        for encode in self.by.values():
            encode.output = None
        self.latest.clear()

    def run(self, encode: Encode, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run one of the model's encoders, recording what the method needs."""
        if self.running:  # one encoder calling the other
            return encode.original(*args, **kwargs)
        self.guard.enter(encode)
        if self.capture is not None:
            self.capture.start()
        self.running, left = True, None
        try:
            if self.entrance is not None:
                self.entrance.begin(encode.modality, arguments(encode, args, kwargs))
            output = encode.original(*args, **kwargs)
            left = None if self.entrance is None else self.entrance.end()
        finally:
            self.running = False
            if self.entrance is not None:
                self.entrance.left = None
            self.guard.leave(encode)
            heard = {} if self.capture is None else self.capture.stop()
        pooled = self.family.pooled(output)
        if pooled is None:  # return_dict=False: not for us
            return output
        call = arguments(encode, args, kwargs)
        if self.tower is not None and self.family.prefix(self.inner, call) != self.tower.site.prefix:
            given = call.get("vision_feature_select_strategy")
            raise InputError(
                f"vision_feature_select_strategy={given!r}: the model was compressed in its tower as its configuration "
                'says; call it without, or use where="llm"'
            )
        lengths, layout = laid_out(self.family, self.inner, encode.modality, pooled, call)
        found: dict[str, Tensor] = {}
        if self.capture is not None:
            with torch.no_grad(), torch.autocast(pooled[0].device.type, enabled=False):
                if left is None or left.all or left.shorter is None:
                    found = self.capture.gather(heard, encode.modality, layout, sum(lengths), call)
                else:
                    seen, short = Layout((), left.shorter.source), left.shorter.lengths
                    found = self.capture.gather(heard, encode.modality, seen, int(left.kept.sum()), call, short)
                    found = {name: left.spread(x) for name, x in found.items()}
        stage = None if self.tower is None else self.tower.stage
        merged = None if stage is None or stage.total is None else stage.total.drop_prefix(stage.prefix)
        output.vtc_encoded = EncodedFeatures(self, tuple(lengths), layout, found, merged, left)
        filled = [x.reshape(-1, x.shape[-1]) for x in pooled if x.numel()]  # a prompt without images has no rows
        if filled:
            ends = torch.stack([filled[0][0], filled[-1][-1]])
            self.latest[encode.modality.name] = (output.vtc_encoded, ends.detach())
        return output

    def known(self, modality: Modality, output: Any, rows: Tensor) -> EncodedFeatures:
        """What was recorded about an output when it was encoded."""
        encoded = getattr(output, "vtc_encoded", None)
        if encoded is not None and encoded.owner is self:
            return encoded
        # accelerate copies outputs between devices, and what was recorded on them is lost: is this the last output?
        if modality.name in self.latest:
            last, ends = self.latest[modality.name]
            fits = len(rows) > 0 and len(rows) % sum(last.lengths) == 0
            if fits and torch.equal(rows[[0, -1]].to(ends.device), ends):
                return last
        raise InputError(
            f"the {modality.name} was encoded before vtc compressed this model, or in chunks (prefill_chunk_size): "
            "pass the pixels, without chunks, or call vtc.remove(model)"
        )

    def placed(self, modality: Modality, output: Any, call: dict[str, Any]) -> PlacedTokens:
        """Find where an encoder's tokens go in the prompt."""
        pooled = self.family.pooled(output)
        rows = packed(pooled)
        encoded = self.known(modality, output, rows)
        token = self.family.token(self.inner, modality, call.get("input_ids"))
        if "input_ids" in call:
            placeholder = call["input_ids"] == token
        else:
            inputs = call["inputs_embeds"]
            embedded = self.inner.get_input_embeddings()(torch.tensor(token, device=inputs.device))
            placeholder = (inputs == embedded).all(-1)
        columns = placeholder.flatten().nonzero().flatten()
        behind = self.family.trailing(self.inner, modality)
        if behind:  # placeholders that the encoder does not fill: they stay
            own = torch.cat([torch.arange(n + behind, device=columns.device) < n for n in encoded.lengths])
            columns = columns[own] if len(own) == len(columns) else columns
        if len(columns) != len(rows):
            name, count = modality.name, len(pooled)
            raise InputError(
                f"the prompt has {len(columns)} {name} placeholders (id {token}), but the {count} {name}"
                f"{'s' * (count != 1)} given make {len(rows)} tokens: the number of {name}s does not match the prompt"
            )
        if len(rows) != sum(encoded.lengths):  # beams: `generate` repeats the images of every prompt
            times = len(rows) // sum(encoded.lengths)
            encoded = encoded.repeated(placeholder.sum(1).tolist(), times)
        return PlacedTokens(modality, output, encoded, rows, columns)
