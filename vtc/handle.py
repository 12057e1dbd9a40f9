"""The handle of a compressed model: its method, what it did last, and how to remove it."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor, nn

from vtc.adapters.encoders.patch import EncoderPatch
from vtc.adapters.encoders.pixel_patch import PixelPatch
from vtc.adapters.encoders.rectangle_patch import RectanglePatch
from vtc.adapters.encoders.site import EncoderSite
from vtc.adapters.multimodal.patch import MultimodalPatch
from vtc.adapters.multimodal.stream import VideoStream
from vtc.adapters.multimodal.token_batch import CallRecord
from vtc.adapters.patch import strip
from vtc.adapters.report import Report
from vtc.errors import OptionError, UnsupportedModelError, VTCError
from vtc.methods import Method, make
from vtc.plan import explain
from vtc.token_map import TokenMap


def install(model: nn.Module, method: str | Method, **options: Any) -> Handle:
    """`vtc.compress` for a given budget (not "auto")."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is a {type(model).__name__}: compress takes a torch.nn.Module")
    chosen = make(method, **options)
    plan = explain(model, chosen)
    if not plan.ok:
        raise UnsupportedModelError(str(plan))
    remove(model)
    patches: list[EncoderPatch | MultimodalPatch] = []
    try:
        for site in plan._sites:
            if isinstance(site, EncoderSite):
                by_pixels = PixelPatch if chosen.entrance is chosen else EncoderPatch
                patches.append((RectanglePatch if site.rectangle else by_pixels)(site, chosen))
            else:
                patches.append(MultimodalPatch.at(site, chosen))
            patches[-1].install(model)
    except BaseException:
        remove(model)
        raise
    return Handle(model, chosen, tuple(patches))


def remove(model: nn.Module) -> None:
    """Remove every patch of vtc from `model`. Does nothing if there are none."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is a {type(model).__name__}: remove takes a torch.nn.Module")
    for module in model.modules():
        strip(module)


class Handle:
    """A compressed model's method, what it did last, and how to remove it. `choice`: what keep="auto" measured."""

    choice: Any = None

    def __init__(self, model: nn.Module, method: Method, patches: tuple[EncoderPatch | MultimodalPatch, ...]) -> None:
        self.model, self.method, self.patches = model, method, patches

    def remove(self) -> None:
        """Restore the model. Does nothing if it is restored already, or if another method has replaced this one."""
        if any(patch.installed for patch in self.patches):
            remove(self.model)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _ran(self) -> list[EncoderPatch | MultimodalPatch]:
        """The patches that have run, the one that ran last at the end."""
        ran = [patch for patch in self.patches if patch.last is not None]
        if not ran:
            raise VTCError("nothing to report yet: no call with an image has gone through the compressed model")
        return sorted(ran, key=lambda patch: patch.turn)

    def _prompts(self, name: str) -> CallRecord:
        last = self._ran()[-1].last
        if not isinstance(last, CallRecord):
            raise VTCError(f"{name} speaks of prompts, and this model is a vision encoder: see token_map")
        return last

    @property
    def token_map(self) -> TokenMap:
        """The map from image tokens (without CLS and other prefix tokens) to the tokens at the end, for the last call
        with images; in a multimodal LLM one row per image (crop, frame) in prompt order, newlines not counted."""
        return self.layer_maps[-1]

    @property
    def layer_maps(self) -> list[TokenMap]:
        """The maps from image tokens to the tokens after each layer that reduced, for the last call; at least one."""
        return self._ran()[-1].maps

    @property
    def grids(self) -> tuple[tuple[int, int] | None, ...]:
        """(rows, columns) of the image tokens in each row of `token_map`, for drawing; None if they do not fill a
        rectangle (crops cut to the image's shape) or the grid is unknown."""
        return self._ran()[-1].grids

    @property
    def kept(self) -> Tensor:
        """[B, L] bool: which columns of the prompt a multimodal LLM's decoder received in the last call with images. A
        forward's logits and hidden states are for these columns, in order."""
        return self._prompts("kept").kept

    def take(self, values: Tensor, fill: float = 0) -> Tensor:
        """[B, L], one value per column of the prompt (labels, a mask) -> [B, S], one per logit of the last call with
        images; `fill` on padding. For code that compares logits with labels itself, such as label smoothing; in a
        batch, set the labels of the first column to -100, since padding may precede it."""
        return self._prompts("take").take(values, fill)

    def stream(self, tokens: int) -> VideoStream:
        """A long video in pieces of frames: `feed` them, then `generate`, with at most `tokens` of all frames so far.

        Raises:
            UnsupportedModelError: a family whose towers see more than a frame (or pair) at a time; a method whose picks
                depend on their number, or on the question.
        """
        for patch in self.patches:
            if isinstance(patch, MultimodalPatch):
                return VideoStream(patch, self.model, tokens)
        raise UnsupportedModelError(f"{type(self.model).__name__} is no multimodal LLM: there is nothing to ask")

    @property
    def report(self) -> Report:
        """What the last call did: tokens per layer and image, MACs before and after. In a model with several encoders,
        of the one that ran last; see `reports`."""
        return self._report(self._ran()[-1])

    @property
    def reports(self) -> tuple[Report, ...]:
        """The latest report of every encoder that has run, the most recent at the end."""
        return tuple(map(self._report, self._ran()))

    def _report(self, patch: EncoderPatch | MultimodalPatch) -> Report:
        count = len(self.patches)
        return patch.report(f", one of {count}: handle.reports has all" if count > 1 else "")

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.method.options().items())
        where = ", ".join(patch.where for patch in self.patches)
        try:
            last = "; last call " + " | ".join(map(str, self.reports))
        except VTCError:
            last = "; no call yet"
        return f"Handle({self.method.name}({options}) in {where}{last})"
