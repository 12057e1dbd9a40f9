"""What takes the place of a model's own parts. Objects, not closures, so that deep copies refer to their own model."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vtc.adapters.multimodal.evidence import unlisten
from vtc.adapters.multimodal.family import IMAGE, VIDEO, Kind

if TYPE_CHECKING:
    from vtc.adapters.multimodal.intake import Intake
    from vtc.adapters.multimodal.layers import Thinning


class StandIn:
    """Takes the place of one attribute of a module."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.replaced = module.__dict__.get(name)
        method = getattr(type(module), name, None)
        if callable(method):  # `generate` looks at the arguments of what it calls
            self.__signature__ = inspect.signature(method.__get__(module))

    def install(self) -> None:
        self.module.__dict__[self.name] = self

    @property
    def installed(self) -> bool:
        return self.module.__dict__.get(self.name) is self

    def remove(self) -> None:
        if self.replaced is None:
            self.module.__dict__.pop(self.name, None)
        else:
            self.module.__dict__[self.name] = self.replaced

    def original(self, *args: Any, **kwargs: Any) -> Any:
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        name = "forward" if self.name == "_old_forward" else self.name  # accelerate's name for it
        return getattr(type(self.module), name)(self.module, *args, **kwargs)


class IntakeForward(StandIn):
    """For the `forward` of a multimodal model."""

    def __init__(self, intake: Intake, name: str) -> None:
        super().__init__(intake.inner, name)
        self.intake = intake

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = inspect.signature(type(self.module).forward).parameters
        return self.intake.run(self, {**dict(zip(list(names)[1:], args, strict=False)), **kwargs})


class Encode(StandIn):
    """For `get_image_features` and `get_video_features`: what they give carries what a method needs to know of it.
    While the model runs on a shorter prompt, `output` is what they have given already, reduced."""

    output: Any = None

    def __init__(self, intake: Intake, kind: Kind) -> None:
        super().__init__(intake.inner, kind.encode)
        self.intake, self.kind = intake, kind
        self.names = list(self.__signature__.parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.output is not None:
            self.intake.guard.alone()
            return self.output
        return self.intake.encode(self, args, kwargs)


class LayerForward(StandIn):
    """For the `forward` of a decoder layer behind which image tokens are fewer."""

    def __init__(self, thinning: Thinning, index: int, module: nn.Module) -> None:
        super().__init__(module, "_old_forward" if "_old_forward" in module.__dict__ else "forward")
        self.thinning, self.index = thinning, index

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.thinning.run(self, hidden_states, args, kwargs)


class OwnerForward(StandIn):
    """For the `forward` of a model around: says which columns of the prompt it will read of what comes back."""

    def __init__(self, intake: Intake, module: nn.Module, asked: str | None = None) -> None:
        super().__init__(module, "_old_forward" if "_old_forward" in module.__dict__ else "forward")
        self.intake, self.asked = intake, asked

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        asked: Any = self.asked
        if asked is None:
            names = list(inspect.signature(type(self.module).forward).parameters)[1:]
            asked = {**dict(zip(names, args, strict=False)), **kwargs}.get("logits_to_keep")
        self.intake.asked = None if isinstance(asked, int) and asked == 0 else asked
        try:
            return self.original(*args, **kwargs)
        finally:
            self.intake.asked = None


class MaskMaker(StandIn):
    """For a model's `create_masks_for_generate`, which makes 4-D masks in advance for static caches: the padding mask
    is handed on instead, for the shorter prompt to make its own of."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, "create_masks_for_generate")

    def __call__(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return attention_mask


class Loss(StandIn):
    """For a model's `loss_function`: labels of tokens that went away go with them."""

    def __init__(self, intake: Intake, module: nn.Module) -> None:
        super().__init__(module, "_loss_function")
        self.intake = intake

    def original(self, *args: Any, **kwargs: Any) -> Any:
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        self.remove()  # without ours the model finds its own
        try:
            own = self.module.loss_function
        finally:
            self.install()
        return own(*args, **kwargs)  # type: ignore[operator]

    def __call__(self, logits: Tensor, labels: Any = None, *args: Any, **kwargs: Any) -> Any:
        went = self.intake.went if self.intake.asked is None else None
        if went is not None:
            shape = went.kept.shape  # a loss of the caller's own may take other labels
            labels = went.labels(labels) if getattr(labels, "shape", None) == shape else labels
            if getattr(kwargs.get("shift_labels"), "shape", None) == shape:
                kwargs["shift_labels"] = went.shifted(kwargs["shift_labels"])
        if args:  # as the model gave them
            return self.original(logits, labels, *args, **kwargs)
        return self.original(logits=logits, labels=labels, **kwargs)


def strip(module: nn.Module) -> None:
    """Take our patches off one module."""
    makers = ("_loss_function", "create_masks_for_generate", IMAGE.encode, VIDEO.encode)
    for name in ("forward", "_old_forward", *makers):
        if isinstance(module.__dict__.get(name), StandIn):
            module.__dict__[name].remove()
    unlisten(module)
