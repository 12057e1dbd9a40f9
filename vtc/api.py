"""`compress` with all its arguments, and the names of the methods."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from vtc.auto import choose
from vtc.errors import OptionError
from vtc.handle import Handle, install
from vtc.methods import METHODS, Method


def list_methods() -> dict[str, str]:
    """Name and one-line description of every method."""
    return {name: cls.summary for name, cls in METHODS.items()}


def compress(model: nn.Module, method: str | Method, **options: Any) -> Handle:
    """Patch `model` in place so that it works on fewer visual tokens. Undone by `handle.remove()`, `vtc.remove(model)`
    or the end of a `with` block.

    Args:
        model: a vision encoder of timm, open_clip or transformers, or a model that contains one; or a multimodal LLM of
            transformers.
        method: a name (`vtc.list_methods()`) with its options, or a ready method: `vtc.PiToMe(keep=0.9)`. With
            keep="auto" the budget is chosen by measuring, as in `vtc.choose`, whose arguments are then accepted:
            inputs= and one of ttft=, tokens=, fidelity=. Method "auto" chooses the method too. If nothing is faster,
            the model keeps all its tokens.

    Returns:
        A `Handle`. An encoder's outputs keep their shape: merged tokens are copied back to the places they came from
        after the last block. A multimodal LLM is called as before (`generate`, `forward`, `pipeline`); its decoder and
        cache hold fewer tokens. If the model is already compressed, the new method replaces the old one. After
        keep="auto", `handle.choice` says why.

    Raises:
        OptionError: unknown method or option, a value out of range.
        UnsupportedModelError: nothing can be reduced; the message says why. The model is unchanged.
    """
    if options.get("keep") != "auto":
        return install(model, method, **options)
    del options["keep"]
    if "inputs" not in options:
        raise OptionError("keep='auto' measures on your own inputs: give inputs=, and ttft=, tokens= or fidelity=")
    choice = choose(model, options.pop("inputs"), method, **options)
    if choice.method is None:
        tried = next(row.method for row in choice.rows if row.method is not None)
        handle = install(model, replace(tried, keep=1.0, r=None, flops=None))
    else:
        handle = install(model, choice.method)
    handle.choice = choice
    return handle
