"""What fewer visual tokens save in a multimodal LLM before its first token, part by part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.multimodal.cache import cache_name
from vtc.adapters.multimodal.find import MultimodalSite
from vtc.adapters.multimodal.find import find as find_llms
from vtc.adapters.multimodal.patch import MultimodalPatch
from vtc.bench.timing import Tick, interleave, settle, shared_copy
from vtc.errors import UnsupportedModelError
from vtc.handle import Handle, install
from vtc.methods import Method


class Stopwatch:
    """Adds up the time of calls of some functions. Nested calls are counted once."""

    def __init__(self) -> None:
        self.seconds, self.depth, self.began = 0.0, 0, 0.0

    def start(self) -> None:
        if not self.depth:
            settle()
            self.began = time.perf_counter()
        self.depth += 1

    def stop(self) -> None:
        self.depth -= 1
        if not self.depth:
            settle()
            self.seconds += time.perf_counter() - self.began

    def read(self) -> float:
        """The seconds since the last reading."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.start()
            try:
                return function(*args, **kwargs)
            finally:
                self.stop()

        return timed


@dataclass(frozen=True)
class Prefill:
    """One method at one budget. Seconds are medians over rounds; ratios are medians of the rounds' own ratios.

    Attributes:
        visual, prompt: image tokens and prompt length, (dense, compressed).
        method_seconds: from the projector's output to the shorter prompt, including evidence (attention, keys).
        after_seconds: from the tower's output, projected, to the first token's logits: method and decoder.
        total_seconds: from the pixels to the first token's logits: tower, projector, method, decoder.
        layer_seconds: one decoder layer's prefill of the whole prompt, in the dense runs of the same rounds.
        kv_bytes: size of the cache after the prefill, (dense, compressed).
        ideal: dense over compressed multiply-adds of the decoder; realised: dense over compressed `after_seconds`.
        low, high: quartiles of realised; whole: dense over compressed `total_seconds`.
        of_short: the time of a prompt that was as short from the start (words, no image) over `after_seconds`.
    """

    method: str
    keep: float | int
    visual: tuple[int, int]
    prompt: tuple[int, int]
    method_seconds: float
    after_seconds: float
    total_seconds: float
    layer_seconds: float
    kv_bytes: tuple[int, int]
    ideal: float
    realised: float
    low: float
    high: float
    whole: float
    of_short: float
    notes: str = ""

    @property
    def efficiency(self) -> float:
        """Realised over ideal."""
        return self.realised / self.ideal

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "efficiency": self.efficiency, "layers": self.method_seconds / self.layer_seconds}


@dataclass(frozen=True)
class Dense:
    """The unpatched model: median seconds of its parts."""

    visual: int
    prompt: int
    tower_seconds: float
    layer_seconds: float
    after_seconds: float
    total_seconds: float
    kv_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Runner:
    """A model that is timed from pixels to the first token's logits, dense or compressed."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], method: Method | None = None) -> None:
        self.model, self.inputs = shared_copy(model), inputs
        self.watches = {name: Stopwatch() for name in ("tower", "method", "layers")}
        self.parts: dict[str, list[float]] = {name: [] for name in self.watches}
        self.kv_bytes = 0
        inner = site_of(self.model)
        self.watch_tower(inner)
        self.watch_layers(inner)
        self.handle = None if method is None else install(self.model, method)
        if self.handle is not None:
            watch_method(self.handle, self.watches["method"])

    def watch_tower(self, found: MultimodalSite) -> None:
        """Time the model's own encoder, inside any patch of vtc."""
        for modality in found.family.modalities:
            own = getattr(found.inner, modality.encode)
            found.inner.__dict__[modality.encode] = self.watches["tower"].around(own)

    def watch_layers(self, found: MultimodalSite) -> None:
        watch, layers = self.watches["layers"], getattr(found.inner, found.family.decoder).layers
        layers[0].register_forward_pre_hook(lambda *_: watch.start())
        layers[-1].register_forward_hook(lambda *_: watch.stop())
        self.depth = len(layers)

    def __call__(self) -> None:
        output: Any = self.model(**self.inputs, use_cache=True, logits_to_keep=1)
        settle()
        self.kv_bytes = cache_bytes(output)
        for name, watch in self.watches.items():
            self.parts[name].append(watch.read())

    def last(self, part: str, repeats: int) -> list[float]:
        """Seconds of the last `repeats` runs."""
        return self.parts[part][-repeats:]


def site_of(model: nn.Module) -> MultimodalSite:
    """The multimodal part of a model."""
    for found in find_llms(model):
        if isinstance(found, MultimodalSite):
            return found
        raise UnsupportedModelError(f"{found.type_name}: {found.reason}")
    raise UnsupportedModelError(f"{type(model).__name__} is no multimodal LLM that vtc knows")


def watch_method(handle: Handle, watch: Stopwatch) -> None:
    """Time what vtc itself does in a call: gathering evidence, deciding, shortening the prompt."""
    for owner, name in _timed(handle):
        owner.__dict__[name] = watch.around(getattr(owner, name))


def _timed(handle: Handle) -> Iterator[tuple[Any, str]]:
    for patch in handle.patches:
        if isinstance(patch, MultimodalPatch):
            places = (patch, "reduce"), (patch.encoders.capture, "gather"), (patch.decoder_patch, "reduce")
            yield from (place for place in places if place[0] is not None)


@contextmanager
def watched(handle: Handle) -> Iterator[Stopwatch]:
    """`watch_method` as a context manager."""
    watch = Stopwatch()
    watch_method(handle, watch)
    try:
        yield watch
    finally:
        for owner, name in _timed(handle):
            owner.__dict__.pop(name, None)


def cache_bytes(output: Any) -> int:
    """Bytes of the keys and values in the cache of a model's output."""
    layers = getattr(output, cache_name()).layers
    pairs = [(layer.keys, layer.values) for layer in layers if getattr(layer, "keys", None) is not None]
    return sum(x.numel() * x.element_size() for pair in pairs for x in pair)


def measure_prefill(
    model: nn.Module,
    inputs: dict[str, Tensor],
    methods: Sequence[Method],
    repeats: int = 3,
    warmup: int = 1,
    *,
    tick: Tick | None = None,
) -> tuple[Dense, list[Prefill]]:
    """Time `model` from the pixels in `inputs` to the first token's logits, without and with each method, in turns.
    The model is not changed."""
    dense = Runner(model, inputs)
    runners = [Runner(model, inputs, method) for method in methods]
    calls: dict[str, Callable[[], Any]] = {"dense": dense, **{str(i): runner for i, runner in enumerate(runners)}}
    for index, runner in enumerate(runners):
        with torch.inference_mode():
            runner()  # to know how long its prompt is
        assert runner.handle is not None
        calls[f"{index} short"] = partial(_words, shared_copy(model), inputs, int(runner.handle.kept.sum()))
    took = interleave(calls, repeats, warmup, tick=tick)

    def after(runner: Runner, name: str) -> list[float]:
        return [t - tower for t, tower in zip(took[name], runner.last("tower", repeats), strict=True)]

    base = after(dense, "dense")
    layer = median(dense.last("layers", repeats)) / dense.depth
    rows = []
    for index, (method, runner) in enumerate(zip(methods, runners, strict=True)):
        mine, handle = after(runner, str(index)), runner.handle
        assert handle is not None
        report = handle.report
        faster = sorted(d / s for d, s in zip(base, mine, strict=True))
        rows.append(
            Prefill(
                method=method.label,
                keep=1.0 if method.keep is None else method.keep,
                visual=(sum(report.before), sum(report.after)),
                prompt=(sum(report.prompts), int(handle.kept.sum())),
                method_seconds=median(runner.last("method", repeats)),
                after_seconds=median(mine),
                total_seconds=median(took[str(index)]),
                layer_seconds=layer,
                kv_bytes=(dense.kv_bytes, runner.kv_bytes),
                ideal=1 / report.macs_ratio,
                realised=median(faster),
                low=faster[len(faster) // 4],
                high=faster[-1 - len(faster) // 4],
                whole=median(d / s for d, s in zip(took["dense"], took[str(index)], strict=True)),
                of_short=median(w / s for w, s in zip(took[f"{index} short"], mine, strict=True)),
                notes=report.notes,
            )
        )
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())  # type: ignore[union-attr, operator]
    prompt = int(inputs["attention_mask"].sum())
    tower, total = median(dense.last("tower", repeats)), median(took["dense"])
    return Dense(visual, prompt, tower, layer, median(base), total, dense.kv_bytes), rows


def _words(model: nn.Module, inputs: dict[str, Tensor], length: int) -> None:
    """The first token's logits of a prompt of one word, `length` times."""
    word = inputs["input_ids"][:, -1:].expand(-1, length)
    model(input_ids=word, attention_mask=torch.ones_like(word), use_cache=True, logits_to_keep=1)


def methods_at(names: Sequence[str], budgets: Sequence[float | int], **options: Any) -> list[Method]:
    """Every method at every budget; one without budgets once."""
    from vtc.methods import budgeted, make

    budgets_of: dict[str, list[dict[str, Any]]] = {
        name: [{"keep": budget} for budget in budgets] if budgeted(name) else [{}] for name in names
    }
    return [make(name, **budget, **options) for name in names for budget in budgets_of[name]]
