"""One question about some images to a multimodal LLM, as it is and with fewer visual tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from vtc import checkpoints
from vtc.adapters.multimodal.patch import MultimodalPatch
from vtc.adapters.report import Report
from vtc.bench.prefill import cache_bytes, watched
from vtc.bench.timing import Tick, interleave, settle, shared_copy
from vtc.checkpoints import tiny
from vtc.errors import OptionError, UnsupportedModelError, VTCError, first_line
from vtc.handle import install
from vtc.methods import Method
from vtc.models.configs import find_config, sketch
from vtc.models.encoders import quiet
from vtc.plan import explain
from vtc.token_map import TokenMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ChatError(VTCError, ValueError):
    """A model that cannot be asked, or a question that it cannot be given."""


@dataclass(frozen=True)
class Side:
    """One of the two answers and what it took.

    Attributes:
        visual, prompt: image tokens and tokens in all that the decoder was given.
        first_seconds: from the pixels on the device to the first token of the answer, median.
        decode_rate: tokens per second after the first; None = the answer is too short to tell.
        kv_bytes: of the cache when the first token is there.
    """

    answer: str
    generated: int
    visual: int
    prompt: int
    first_seconds: float
    decode_rate: float | None
    kv_bytes: int


@dataclass(frozen=True)
class Comparison:
    """Dense against compressed. `faster`: to the first token, the median of the rounds' ratios. `method_seconds`: what
    vtc itself takes of `first_seconds`; None where the method works inside the tower. `groups`, `grids`, `slots`: the
    token map, the rows and columns of its images, and how many members' positions a merged token carries."""

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


def load(
    name: str, method: Method, *, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False
) -> tuple[Any, Callable[[], Any]]:
    """The processor of tiny_qwen, tiny_llava, a folder or a model of the Hub, and a function that loads the model
    (which takes long).

    Raises:
        UnsupportedModelError: `method` cannot reduce this model, as far as its configuration tells.
        ChatError: there is no such model, it is no multimodal LLM, or something of it is missing.
    """
    place = _device(device)
    config = find_config(name, download=True, trust_remote_code=trust_remote_code)
    if config is None:
        raise ChatError(
            f"{name}: no multimodal LLM, so it answers no prompt; give the folder or the id of one, such as LLaVA or "
            "Qwen2.5-VL"
        )
    if not trust_remote_code:  # else only its own code knows
        plan = explain(sketch(config), method)
        if not plan.ok:
            raise UnsupportedModelError(f"{name}: {plan}")
    if name in tiny.TINY:
        small, processor = getattr(checkpoints, name)()
        small = small if dtype == "auto" else small.to(getattr(torch, dtype))
        return processor, lambda: small.to(place)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    path = name.removeprefix("hf:")
    with _says(f"{path}: its processor cannot be loaded"), _silent():
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    for part, file in (("image_processor", "preprocessor_config.json"), ("tokenizer", "tokenizer.json")):
        if getattr(processor, part, None) is None:
            raise ChatError(
                f"{path}: its processor ({type(processor).__name__}) has no {part.replace('_', ' ')}; the folder needs "
                f"processor_config.json or {file}, as `processor.save_pretrained` writes them"
            )

    def model() -> Any:
        with _says(f"{path}: its weights cannot be loaded"), _silent():
            found = AutoModelForImageTextToText.from_pretrained(
                path, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
            )
        return found.eval().to(place)

    return processor, model


def question(processor: Any, images: Sequence[Image.Image], prompt: str) -> dict[str, Tensor]:
    """The model's inputs for a prompt about images, as the processor wants them: by its chat template, if it has one,
    else with a placeholder for every image in front.

    Raises:
        ChatError: placeholders in the prompt that do not match the images, or a processor that cannot do it.
    """
    token = next((t for name in ("boi_token", "image_token") if (t := getattr(processor, name, None))), None)
    token = getattr(token, "content", token)
    marks = "" if token is None else token * len(images) + "\n"
    if token is not None and token in prompt:  # the user has said where the images go
        marks = ""
    tokenizer = processor.tokenizer
    with _says("the processor's chat template fails"):
        if getattr(processor, "chat_template", None):
            content: Any = [{"type": "image"} for _ in images if marks or token is None]
            content = [*content, {"type": "text", "text": prompt}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        elif token is None:
            raise ChatError(
                "the processor has no chat template and names no image token, so nobody knows how it wants its "
                "prompts: save it with a chat template (processor.chat_template = ...)"
            )
        elif getattr(tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": marks + prompt}]
            text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        else:
            text = marks + prompt
    if token is not None and text.count(token) != len(images):
        raise ChatError(
            f"the prompt has {text.count(token)} image placeholder{'s' * (text.count(token) != 1)} ({token}), but "
            f"{len(images)} image{'s are' if len(images) != 1 else ' is'} given: leave the placeholders out of the "
            "prompt, or write one for each image"
        )
    begins = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    with _says("the processor cannot turn the prompt and the images into tokens"):
        return dict(processor(images=list(images), text=text, return_tensors="pt", add_special_tokens=not begins))


def prepared(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs where the model is, pixels in its dtype."""
    weights = next(model.parameters())
    return {k: v.to(weights.device, weights.dtype if v.is_floating_point() else None) for k, v in inputs.items()}


def compare(
    model: Any,
    processor: Any,
    inputs: dict[str, Tensor],
    method: Method,
    new_tokens: int = 64,
    repeats: int = 3,
    *,
    tick: Tick | None = None,
) -> Comparison:
    """Both answers, greedy, and what they took. The model stays as it was."""
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
    return Comparison(method, report, done["dense"], done["less"], faster, own, *drawn)


def remains(image: Image.Image, found: Comparison, height: int) -> tuple[int, Image.Image, Image.Image] | None:
    """The row of the token map that is drawn, what the model is shown, and what is left of it: groups, dropped tokens
    dark, and with PPE the places that merged tokens carry. None if the image's tokens fill no rectangle."""
    from vtc.viz import carried, overlay

    item = next((i for i, grid in enumerate(found.grids) if grid is not None), None)
    if item is None:
        return None
    rows, columns = found.grids[item]  # type: ignore[misc]
    seen = ImageOps.fit(image, (max(1, round(height * columns / rows)), height))
    if found.slots > 1:
        return item, seen, carried(seen, found.groups, found.slots, (rows, columns), item=item)
    return item, seen, overlay(seen, found.groups, (rows, columns), item=item)


def picture(image: Image.Image, found: Comparison) -> Figure:
    """`remains` side by side, with a note.

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
    """When each token of an answer came; what `generate` calls a streamer."""

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


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # unknown names, drivers that are not there
        raise OptionError(f"device {name!r} cannot be used here ({first_line(error)}); cpu always can") from error
    return device


@contextmanager
def _silent() -> Iterator[None]:
    """Neither warnings nor the progress bars of transformers."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _says(what: str) -> Iterator[None]:
    """Other libraries' errors as one sentence."""
    try:
        yield
    except (VTCError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise ChatError(f"{what} ({first_line(error)})") from error
