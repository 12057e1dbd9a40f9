"""The effect of compression on a user's own model and images, without labels: tokens, time, fidelity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.multimodal.find import MultimodalSite
from vtc.adapters.multimodal.find import find as find_llms
from vtc.bench.timing import Tick, interleave, shared_copy
from vtc.checks import renamed
from vtc.errors import InputError
from vtc.handle import install
from vtc.methods import Method
from vtc.plan import explain

# Tried if no method is named: of a multimodal LLM the best of docs/answers.md's validation split, on both models and on
# the one whose tokens do not know their place, and two that need less
LLM = ("visionzip+proportional", "idpruner+frame", "idpruner", "divprune")
ENCODER = ("tome", "pitome")
WORDS = 16  # number of words of an answer that are compared


@dataclass(frozen=True)
class Checked:
    """One method at one budget; the dense model has no method.

    Attributes:
        tokens: image tokens of all inputs, (before, after).
        seconds: to the first token (an encoder: for the call), all inputs together, median.
        faster: dense over compressed, the median of the rounds' ratios.
        fidelity: for a multimodal LLM, the share of the dense model's answer that is repeated before the first
            differing word, mean over the inputs; for an encoder, the mean cosine between its outputs and the dense
            ones.
    """

    method: Method | None
    tokens: tuple[int, int]
    seconds: float
    faster: float
    fidelity: float

    @property
    def loyalty(self) -> float:
        """The old name of `fidelity`."""
        renamed("loyalty", "fidelity")
        return self.fidelity

    def __str__(self) -> str:
        if self.method is None:
            return f"dense: {self.tokens[0]} image tokens, {self.seconds:.3f} s"
        return (
            f"{self.method.label}, {self.tokens[1]} of {self.tokens[0]} image tokens, {self.faster:.2f} times as fast, "
            f"fidelity {self.fidelity:.3f}"
        )

    def to_dict(self) -> dict[str, Any]:
        named = {"method": "dense", "options": {}}
        if self.method is not None:
            named = {"method": self.method.name, "options": self.method.options()}
        return named | {
            "tokens_before": self.tokens[0],
            "tokens_after": self.tokens[1],
            "seconds": self.seconds,
            "faster": self.faster,
            "fidelity": self.fidelity,
        }


def is_llm(model: nn.Module) -> bool:
    return any(isinstance(found, MultimodalSite) for found in find_llms(model))


def fitting(model: nn.Module) -> list[str]:
    """What to try if no method is named: those of a few methods without required options that the model supports."""
    names = LLM if is_llm(model) else ENCODER
    return [name for name in names if explain(model, name).ok] or list(names)  # if none fits, each reports why


def check(
    model: nn.Module,
    inputs: Any,
    methods: Sequence[Method],
    repeats: int = 3,
    *,
    call: Callable[[nn.Module, Any], Any] | None = None,
    tick: Tick | None = None,
) -> list[Checked]:
    """Run `model` dense and with every method, in turns, on all inputs. The model is not changed.

    Args:
        inputs: a tensor, keyword arguments, or a list of these.
        call: how an encoder is run, (model, inputs); default: call it.
        tick: called after every run.

    Returns:
        The dense model, then the methods in the order given.

    Raises:
        InputError: no inputs. UnsupportedModelError: a method that cannot reduce the model.
    """
    some = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    if not some:
        raise InputError("inputs is empty: give some of what the model is called with")
    llm = is_llm(model)
    first: Callable[[nn.Module, Any], Any] = partial(_answer, count=1) if llm else call or _call
    whole = partial(_answer, count=WORDS) if llm else first
    near = _repeated if llm else _cosine
    networks = [model, *(shared_copy(model) for _ in methods)]
    handles = [install(network, method) for network, method in zip(networks[1:], methods, strict=True)]

    def run(network: nn.Module) -> None:
        for each in some:
            first(network, each)

    calls = {str(i): partial(run, network) for i, network in enumerate(networks)}
    took = interleave(calls, repeats, 1, tick=tick)
    rows = [Checked(None, (0, 0), median(took["0"]), 1.0, 1.0)]
    with torch.inference_mode():
        dense = [whole(model, each) for each in some]
        for i, (method, handle) in enumerate(zip(methods, handles, strict=True), 1):
            before, after, fidelity = 0, 0, []
            for each, wanted in zip(some, dense, strict=True):
                fidelity.append(near(whole(networks[i], each), wanted))
                before, after = before + sum(handle.report.before), after + sum(handle.report.after)
            faster = median(d / s for d, s in zip(took["0"], took[str(i)], strict=True))
            rows.append(Checked(method, (before, after), median(took[str(i)]), faster, mean(fidelity)))
            rows[0] = replace(rows[0], tokens=(before, before))
    return rows


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if hasattr(inputs, "items") else model(inputs)


def _answer(model: Any, inputs: Any, count: int) -> Tensor:
    given = dict(inputs)
    out = model.generate(**given, do_sample=False, num_beams=1, max_new_tokens=count)
    return out[:, given["input_ids"].shape[1] :]


def _repeated(said: Tensor, wanted: Tensor) -> float:
    """The share of the expected words that come before the first differing one, over the batch."""
    length = min(said.shape[1], wanted.shape[1])
    same = (said[:, :length] == wanted[:, :length]).long().cumprod(1).sum(1)
    return float((same / wanted.shape[1]).mean())


def _cosine(found: Any, wanted: Any) -> float:
    one, other = (_features(x).float().flatten(0, -2) for x in (found, wanted))
    return float(nn.functional.cosine_similarity(one, other, dim=-1).mean())


def _features(output: Any) -> Tensor:
    """An encoder's features: its output tensor, or the pooled features of a Transformers output, or its tokens."""
    if isinstance(output, Tensor):
        return output
    for name in ("pooler_output", "image_embeds", "logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    raise InputError(f"the model returns a {type(output).__name__}: give call=, a function that returns its features")


# -- a model by name, pictures from a folder ------------------------------------------------------------------------
