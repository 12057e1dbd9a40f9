"""keep="auto": measure methods and budgets on this machine, on the user's own inputs, and choose one, with the
reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from vtc.checks import check_number, renamed
from vtc.errors import OptionError
from vtc.methods import Method, make

if TYPE_CHECKING:
    from vtc.bench.fidelity import Checked

FASTER = 1.02  # below this a speed-up is noise, and compression is not worthwhile


@dataclass(frozen=True)
class Choice:
    """What was chosen and why; prints as a sentence. `method` None: the model is best left unchanged. `rows`: all
    measurements, the dense model first."""

    method: Method | None
    why: str
    rows: tuple[Checked, ...]

    def __str__(self) -> str:
        return self.why


def choose(
    model: nn.Module,
    inputs: Any,
    methods: str | Method | Sequence[str | Method] = "auto",
    *,
    ttft: float | None = None,
    tokens: int | None = None,
    fidelity: float | None = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
    repeats: int = 3,
    **options: Any,
) -> Choice:
    """Measure, and choose method and budget for one target. No labels are needed; the model is not changed.

    Args:
        inputs: the model's inputs for your own images: a tensor, keyword arguments, or a list of these.
        methods: names, or methods whose budgets are ignored; "auto" = a few that work without options.
        ttft: maximum seconds to the first token (an encoder: for one call), all inputs together; of the methods within
            this limit the most faithful is taken.
        tokens: how many tokens of every image stay; the most faithful method is taken.
        fidelity: minimum agreement with the dense model, 0 to 1 (see `vtc.bench.fidelity`); the fastest is taken.
        call: how an encoder is run, (model, inputs); default: calling it.
        options: options of the methods.

    Raises:
        OptionError: not exactly one target, or one out of range. UnsupportedModelError: nothing can be reduced.
    """
    from vtc.bench.fidelity import check, fitting, is_llm

    if "loyalty" in options:
        renamed("loyalty=", "fidelity=")
        fidelity = options.pop("loyalty")
    given = {"ttft": ttft, "tokens": tokens, "fidelity": fidelity}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise OptionError(
            f"keep='auto' takes one target: ttft=, tokens= or fidelity=, not {' and '.join(named) or 'none'}"
        )
    if ttft is not None and not (isinstance(ttft, (int, float)) and ttft > 0):
        raise OptionError(f"ttft={ttft!r}: it takes seconds, above 0")
    if fidelity is not None and not (isinstance(fidelity, (int, float)) and 0 < fidelity <= 1):
        raise OptionError(f"fidelity={fidelity!r}: it takes a share above 0 and at most 1")
    if tokens is not None:
        check_number("tokens", tokens, 1, whole=True)
    wanted: Sequence[str | Method] = [methods] if isinstance(methods, (str, Method)) else methods
    if "auto" in wanted:
        wanted = fitting(model)
    budgets: list[dict[str, Any]] = [{"keep": k} for k in (0.75, 0.5, 0.25, 0.1)]
    if tokens is not None:
        budgets = [{"keep": tokens}]
    elif not is_llm(model):
        budgets = [{"flops": f} for f in (0.8, 0.65, 0.5)]
    tried = []
    for each in wanted:
        one_layer = (each if isinstance(each, Method) else make(each, keep=1.0, **options)).rectangle
        for budget in [{"keep": k} for k in (0.75, 0.5, 0.3)] if one_layer and tokens is None else budgets:
            if isinstance(each, Method):
                lines = {"rows": None, "columns": None} if one_layer else {}
                tried.append(replace(each, **({"keep": None, "r": None, "flops": None} | lines | budget)))
            else:
                tried.append(make(each, **budget, **options))
    rows = check(model, inputs, tried, repeats, call=call)
    return _choice(rows, named[0], ttft, fidelity)


def _choice(rows: Sequence[Checked], target: str, ttft: float | None, fidelity: float | None) -> Choice:
    dense, *tried = rows
    faster = [row for row in tried if row.faster > FASTER]
    if not faster:
        best = max(tried, key=lambda row: row.faster)
        why = f"nothing is faster than the dense model here (the best, {best}), so it stays as it is"
        return Choice(None, why, tuple(rows))
    if target == "fidelity":
        fit = [row for row in faster if row.fidelity >= fidelity]  # type: ignore[operator]
        if not fit:
            best = max(faster, key=lambda row: row.fidelity)
            why = f"nothing that is faster reaches a fidelity of {fidelity:g} (the best, {best}), so it stays dense"
            return Choice(None, why, tuple(rows))
        row = max(fit, key=lambda row: row.faster)
        return Choice(row.method, f"{row}: the fastest whose fidelity is at least {fidelity:g}", tuple(rows))
    if target == "ttft":
        assert ttft is not None
        if dense.seconds <= ttft:
            return Choice(None, f"the dense model takes {dense.seconds:.3f} s, within {ttft:g} s", tuple(rows))
        fit = [row for row in faster if row.seconds <= ttft]
        if not fit:
            row = min(faster, key=lambda row: row.seconds)
            return Choice(row.method, f"{row}: nothing keeps to {ttft:g} s; this is the fastest", tuple(rows))
        row = max(fit, key=lambda row: (row.fidelity, -row.seconds))
        return Choice(row.method, f"{row}: the most faithful within {ttft:g} s", tuple(rows))
    row = max(faster, key=lambda row: (row.fidelity, row.faster))
    return Choice(row.method, f"{row}: the most faithful at this number of tokens", tuple(rows))
