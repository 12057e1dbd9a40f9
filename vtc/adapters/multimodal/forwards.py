"""Replacements for a model's own parts. Objects, not closures, so that deep copies refer to their own model."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from vtc.adapters.multimodal.columns import TYPES
from vtc.adapters.patch import Patch, forward_name


class ModelForward(Patch):
    """Replaces the `forward` of a multimodal model, or of the retrieval model around it."""

    def __init__(self, parent: Any) -> None:
        super().__init__(parent.outer, forward_name(parent.outer))
        self.parent = parent
        self.names = _named(type(parent.outer)) or _named(type(parent.inner))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.parent.run(self, {**dict(zip(self.names, args, strict=False)), **kwargs})


def _named(kind: type) -> list[str]:
    """The parameters of a class's forward, or of that of the nearest base which names them."""
    for base in kind.__mro__:
        if callable(forward := vars(base).get("forward")):
            taken = list(inspect.signature(forward).parameters.values())[1:]
            if not any(one.kind is one.VAR_POSITIONAL for one in taken):
                return [one.name for one in taken]
    return []


class CallerForward(Patch):
    """Replaces the `forward` of a module of sentence-transformers that calls the model: what it hands on with the
    model's output has a place for every column of the prompt, and is cut to those that stayed."""

    _CUT = ("attention_mask", "input_ids", "position_ids", *TYPES)

    def __init__(self, parent: Any, module: nn.Module) -> None:
        super().__init__(module, forward_name(module))
        self.parent = parent

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.parent.went = None
        features = self.original(*args, **kwargs)
        if self.parent.went is not None:
            cut = {name: features[name] for name in self._CUT if isinstance(features.get(name), Tensor)}
            features.update({name: self.parent.went.take(value) for name, value in cut.items()})
        return features


class OwnerForward(Patch):
    """Replaces the `forward` of a wrapping model: records which columns of the inner model's output it will read."""

    def __init__(self, parent: Any, module: nn.Module, asked: str | None = None) -> None:
        super().__init__(module, forward_name(module))
        self.parent, self.asked = parent, asked

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        asked: Any = self.asked
        if asked is None:
            names = list(inspect.signature(type(self.module).forward).parameters)[1:]
            asked = {**dict(zip(names, args, strict=False)), **kwargs}.get("logits_to_keep")
        self.parent.asked = None if isinstance(asked, int) and asked == 0 else asked
        try:
            return self.original(*args, **kwargs)
        finally:
            self.parent.asked = None


def word_readers(decoder: Any) -> list[nn.Module]:
    """The parts of a decoder's layers that are given words instead of hidden states: they read each word together with
    those before it (n-grams)."""

    def reads(kind: type) -> bool:
        forward = getattr(kind, "forward", None)  # a scripted part has none
        return callable(forward) and list(inspect.signature(forward).parameters)[1:2] == ["input_ids"]

    parts = list(decoder.layers.modules())
    reading = {kind for kind in set(map(type, parts)) if reads(kind)}  # a signature takes long, and experts are many
    return [part for part in parts if type(part) in reading]


class WordReader(Patch):
    """Replaces the `forward` of a part that reads words together with those before them. It is given all words of the
    prompt, and what it makes of those that stay goes on: the words before a token are those of the whole prompt.

    Attributes:
        prompt: [B, L] long, while the decoder runs on a shorter prompt: the words of the whole one, as far as they do
            not come with the call.
        columns: [B, S] long, which of its columns each row of the shorter one is, -1 = padding.
    """

    prompt: Tensor | None = None
    columns: Tensor | None = None

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, forward_name(module))

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.prompt is None or self.columns is None:
            return self.original(input_ids, *args, **kwargs)
        length = self.prompt.shape[1]
        spare = self.columns.masked_fill(self.columns < 0, length)
        words = nn.functional.pad(self.prompt, (0, 1)).to(input_ids).scatter(1, spare, input_ids)[:, :length]
        made = self.original(words, *args, **kwargs)
        return made.gather(1, self.columns.clamp(min=0)[..., None].expand(-1, -1, made.shape[-1]))


class MaskMaker(Patch):
    """Replaces a model's `create_masks_for_generate`, which makes 4-D masks in advance for static caches: the padding
    mask is passed on instead, and the masks are made from it for the shorter prompt."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, "create_masks_for_generate")

    def __call__(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return attention_mask


class Loss(Patch):
    """Replaces a model's `loss_function`: labels of removed tokens are removed too."""

    def __init__(self, parent: Any, module: nn.Module) -> None:
        super().__init__(module, "_loss_function")
        self.parent = parent

    def original(self, *args: Any, **kwargs: Any) -> Any:
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        self.remove()  # without ours the model uses its own
        try:
            own = self.module.loss_function
        finally:
            self.install()
        return own(*args, **kwargs)  # type: ignore[operator]

    def __call__(self, logits: Tensor, labels: Any = None, *args: Any, **kwargs: Any) -> Any:
        went = self.parent.went if self.parent.asked is None else None
        if went is not None:
            shape = went.kept.shape  # a custom loss may take other labels
            labels = went.labels(labels) if getattr(labels, "shape", None) == shape else labels
            if getattr(kwargs.get("shift_labels"), "shape", None) == shape:
                kwargs["shift_labels"] = went.shifted(kwargs["shift_labels"])
        if args:  # passed by position, as the model did
            return self.original(logits, labels, *args, **kwargs)
        return self.original(logits=logits, labels=labels, **kwargs)
