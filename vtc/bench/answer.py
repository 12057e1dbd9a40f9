"""One question about some images, answered by a multimodal LLM unmodified and with fewer visual tokens."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from vtc.adapters.multimodal.patch import MultimodalPatch
from vtc.adapters.report import Report
from vtc.bench.prefill import cache_bytes, watched
from vtc.bench.timing import Tick, interleave, settle, shared_copy
from vtc.handle import install
from vtc.methods import Method
from vtc.models.encoders import quiet
from vtc.models.llms import ChatError, prepared
from vtc.token_map import TokenMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Side:
    """One of the two answers and what it cost.

    Attributes:
        visual, prompt: numbers of image tokens and of all tokens that the decoder received.
        first_seconds: from pixels on the device to the first token of the answer, median.
        decode_rate: tokens per second after the first; None = the answer is too short to measure.
        kv_bytes: size of the cache at the first token.
    """

    answer: str
    generated: int
    visual: int
    prompt: int
    first_seconds: float
    decode_rate: float | None
    kv_bytes: int


@dataclass(frozen=True)
class AnswerComparison:
    """Dense against compressed. `faster`: speed-up to the first token, the median of the rounds' ratios.
    `method_seconds`: vtc's own part of `first_seconds`; None if the method works inside the tower. `groups`, `grids`,
    `slots`: the token map, the rows and columns of its images, and how many members' positions a merged token
    carries."""

    method: Method
    report: Report
    dense: Side
    less: Side
    faster: float
    method_seconds: float | None
    groups: TokenMap
    grids: tuple[tuple[int, int] | None, ...]
    slots: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method.name,
            "options": self.method.options(),
            "dense": asdict(self.dense),
            "compressed": asdict(self.less),
            "speedup_first_token": self.faster,
            "method_seconds": self.method_seconds,
            "report": self.report.to_dict(),
        }


def compare(
    model: Any,
    processor: Any,
    inputs: dict[str, Tensor],
    method: Method,
    new_tokens: int = 64,
    repeats: int = 3,
    *,
    tick: Tick | None = None,
) -> AnswerComparison:
    """Both answers, decoded greedily, and what they cost. The model stays as it was."""
    ready, small = prepared(model, inputs), shared_copy(model)
    with install(small, method) as handle, watched(handle) as watch, quiet():
        sides = {"dense": model, "less": small}
        shares: list[float] = []
        caches: dict[str, int] = {}

        def first(name: str) -> None:
            output = _generate(sides[name], ready, 1)
            caches[name] = cache_bytes(output)
            if name == "less":
                shares.append(watch.read())

        took = interleave({name: partial(first, name) for name in sides}, repeats, 1, tick=tick)
        report, kept = handle.report, int(handle.kept.sum())
        parent = next(part for part in handle.patches if isinstance(part, MultimodalPatch))
        drawn = (handle.token_map, handle.grids, parent.positions.slots)
        counts = {"dense": (sum(report.before), sum(report.prompts)), "less": (sum(report.after), kept)}
        done: dict[str, Side] = {}
        for name, each in sides.items():
            stamps = Stamps()
            with torch.inference_mode():
                ids = _generate(each, ready, new_tokens, streamer=stamps).sequences[0, ready["input_ids"].shape[1] :]
            answer = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
            visual, prompt = counts[name]
            done[name] = Side(answer, len(ids), visual, prompt, median(took[name]), stamps.rate(), caches[name])
            if tick is not None:
                tick()
    faster = median(d / s for d, s in zip(took["dense"], took["less"], strict=True))
    own = None if method.where == "tower" else median(shares[-repeats:])
    return AnswerComparison(method, report, done["dense"], done["less"], faster, own, *drawn)


def remains(image: Image.Image, found: AnswerComparison, height: int) -> tuple[int, Image.Image, Image.Image] | None:
    """The row of the token map that is drawn, the picture that the model sees, and what is left of it: groups, dropped
    tokens dark, and with PPE the positions that merged tokens carry. None if the image's tokens do not fill a
    rectangle."""
    from vtc.viz import carried, overlay

    item = next((i for i, grid in enumerate(found.grids) if grid is not None), None)
    if item is None:
        return None
    rows, columns = found.grids[item]  # type: ignore[misc]
    seen = ImageOps.fit(image, (max(1, round(height * columns / rows)), height))
    if found.slots > 1:
        return item, seen, carried(seen, found.groups, found.slots, (rows, columns), item=item)
    return item, seen, overlay(seen, found.groups, (rows, columns), item=item)


def picture(image: Image.Image, found: AnswerComparison) -> Figure:
    """The pictures of `remains` side by side, with a note.

    Raises:
        ChatError: the image's tokens fill no rectangle (any-resolution models cut it to its shape).
    """
    from vtc.viz import sheet

    drawn = remains(image, found, image.height)
    if drawn is None:
        raise ChatError("no picture: the tokens of these images fill no rectangle, or share one budget (pooled)")
    item, seen, left = drawn
    rows, columns = found.grids[item]  # type: ignore[misc]
    note = f"{rows * columns} image tokens became {int((found.groups.anchor[item] >= 0).sum())}"
    if found.slots > 1:
        note += f"; dot: the anchor, rings: the other members whose positions it carries, up to {found.slots} in all"
    panels = [(seen, "what the model is shown", f"{rows} x {columns} tokens"), (left, "what is left", "")]
    return sheet(panels, type(found.method).__name__, note, height=5.0)


class Stamps:
    """Records when each token of an answer came; a streamer for `generate`."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.prompt = True

    def put(self, value: Tensor) -> None:
        if self.prompt:  # the prompt comes first
            self.prompt = False
            return
        settle()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def rate(self) -> float | None:
        """Tokens per second after the first, from the median step."""
        steps = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        return 1 / median(steps) if len(steps) > 1 else None


def _generate(model: Any, inputs: dict[str, Tensor], count: int, **more: Any) -> Any:
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    return model.generate(**inputs, **greedy, **more, max_new_tokens=count, return_dict_in_generate=True)
