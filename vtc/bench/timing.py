"""How much faster a compressed model really is, compared with what its multiply-adds promise."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from vtc.bench.sliced import sliced
from vtc.errors import OptionError
from vtc.handle import Handle, install
from vtc.methods import Method

Tick = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One method in one measurement. Ratios are medians over rounds, each against the dense run of its own round.

    Attributes:
        tokens: image tokens at the entry and at the end of the encoder.
        macs_ratio: the fraction of multiply-adds that remains; ideal: the speed-up that this promises.
        seconds, dense_seconds: medians of one forward pass.
        realised: the measured speed-up; low, high: its quartiles over the rounds.
        efficiency: realised / ideal.
        overhead: how much longer than dense the patched model takes at keep=1.0 (0.01 = one per cent).
        limit: the speed-up of the same model whose tokens are cut by plain slicing to the same counts at the same
            places; of_limit: the median over the rounds of realised / limit. None where tokens cannot be cut so.
    """

    method: str
    options: dict[str, Any]
    tokens: tuple[int, int]
    macs_ratio: float
    seconds: float
    dense_seconds: float
    ideal: float
    realised: float
    low: float
    high: float
    efficiency: float
    overhead: float
    limit: float | None = None
    of_limit: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    model: nn.Module,
    inputs: Any,
    methods: Sequence[Method],
    repeats: int = 9,
    warmup: int = 2,
    *,
    call: Callable[[nn.Module, Any], Any] | None = None,
    tick: Tick | None = None,
) -> list[Row]:
    """Time `model` without and with each method, with each at keep=1.0, and with its tokens cut by plain slicing,
    in turns. The model is not changed.

    Args:
        inputs: what the model is called with; a dict gives keyword arguments.
        methods: ready methods with their budgets, such as `[vtc.ToMe(flops=0.55)]`.
        repeats, warmup: rounds that count, and rounds before them that do not.
        call: how to run it, (model, inputs); default: call it.
        tick: called after every single run, for progress bars.
    """
    if not methods:
        raise OptionError("methods is empty: give at least one, such as vtc.ToMe(flops=0.55)")
    run = call or _call
    calls: dict[str, Callable[[], Any]] = {"dense": partial(run, model, inputs)}
    handles: list[Handle] = []
    for index, method in enumerate(methods):
        for key, budget in (("", method), ("keep=1.0", replace(method, keep=1.0, r=None, flops=None))):
            handle = install(shared_copy(model), budget)
            calls[f"{index} {key}"] = partial(run, handle.model, inputs)
            handles += [] if key else [handle]
        copied = shared_copy(model)
        with torch.inference_mode():
            calls[f"{index} "]()  # to know its counts
        if sliced(copied, handles[-1], partial(run, copied, inputs)):
            calls[f"{index} sliced"] = partial(run, copied, inputs)
    took = interleave(calls, repeats, warmup, tick=tick)
    dense = took["dense"]
    rows = []
    for index, (method, handle) in enumerate(zip(methods, handles, strict=True)):
        faster = sorted(d / s for d, s in zip(dense, took[f"{index} "], strict=True))
        slower = [s / d for d, s in zip(dense, took[f"{index} keep=1.0"], strict=True)]
        report = handle.report
        ideal = 1 / report.macs_ratio
        cut = took.get(f"{index} sliced")
        rows.append(
            Row(
                method=method.label,
                options=method.options(),
                tokens=(report.before[0], report.after[0]),
                macs_ratio=report.macs_ratio,
                seconds=median(took[f"{index} "]),
                dense_seconds=median(dense),
                ideal=ideal,
                realised=median(faster),
                low=faster[len(faster) // 4],
                high=faster[-1 - len(faster) // 4],
                efficiency=median(faster) / ideal,
                overhead=median(slower) - 1,
                limit=None if cut is None else median(d / s for d, s in zip(dense, cut, strict=True)),
                of_limit=None if cut is None else median(c / s for c, s in zip(cut, took[f"{index} "], strict=True)),
            )
        )
    return rows


def runs(methods: int, repeats: int, warmup: int) -> int:
    """How many single runs `measure` makes at most."""
    return (1 + 3 * methods) * (repeats + warmup)


def interleave(
    calls: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1, *, tick: Tick | None = None
) -> dict[str, list[float]]:
    """Seconds of every call in each of `repeats` rounds. Every round has an order of its own, the same in every run, so
    that other load on the machine, and what the call before left in the caches, affect all calls equally."""
    for name, value, least in (("repeats", repeats, 1), ("warmup", warmup, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name}={value!r}: it takes a whole number >= {least}")
    took: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for number in range(warmup + repeats):
            for name in random.Random(number).sample(list(calls), len(calls)):
                settle()
                start = time.perf_counter()
                calls[name]()
                settle()
                if number >= warmup:
                    took[name].append(time.perf_counter() - start)
                if tick is not None:
                    tick()
    return took


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy that can be patched separately but shares the weights: no extra memory."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def settle() -> None:
    """Wait until the device has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
