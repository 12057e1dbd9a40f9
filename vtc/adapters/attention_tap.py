"""Taps on transformers' attention interface, where every implementation (sdpa, eager, flash) is handed queries and
keys: what passes there is noted, and sizes of tokens go in there where an attention takes no mask."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from vtc.adapters.patch import Patch

_NAME = "vtc_tap"
_bias: ContextVar[Tensor | None] = ContextVar("vtc_bias", default=None)  # every thread has its own


class AttentionTap(Patch):
    """For the `config` of one attention module, and in all else that config. The module's attention function is ours
    while `calls` is a list, to which it adds (query, key, mask, scaling); inside `biased`; and if `plain`, when it
    attends by sdpa whatever the config names: copies of a block that are tried may lie where its kernels do not run."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, "config")
        self.real = module.config
        self.calls: list | None = None
        self.plain = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "real" not in self.__dict__:  # while being copied
            raise AttributeError(name)
        if name == "_attn_implementation" and (self.plain or self.calls is not None or _bias.get() is not None):
            return _NAME
        return getattr(self.real, name)


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    tap, bias = module.config, _bias.get()
    if tap.calls is not None:
        tap.calls.append((query.detach(), key.detach(), attention_mask, kwargs.get("scaling")))
    if bias is not None:
        attention_mask = bias if attention_mask is None else attention_mask + bias
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa" if tap.plain else tap.real._attn_implementation, eager)
    return attend(module, query, key, value, attention_mask, **kwargs)


def listen(module: Any) -> AttentionTap:
    """Put a tap on an attention module, or return the one that is there; `strip` takes it off."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if _NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
    tap = module.__dict__.get("config")
    if not isinstance(tap, AttentionTap):
        tap = AttentionTap(module)
        tap.install()
    return tap


@contextmanager
def tapped(modules: Iterable[nn.Module], plain: bool = False) -> Iterator[list[AttentionTap]]:
    """Taps on `modules` for a while; those that were there stay."""
    before = {module: module.__dict__["config"] for module in modules}
    taps = [listen(module) for module in before]
    try:
        for tap in taps:
            tap.plain = plain
        yield taps
    finally:
        for tap in taps:
            tap.plain, tap.calls = False, None
            if before[tap.module] is not tap:
                tap.remove()


@contextmanager
def biased(bias: Tensor | None) -> Iterator[None]:
    """Attentions with a tap add `bias` [B, 1, 1, N] to their logits, in this thread."""
    token = _bias.set(bias)
    try:
        yield
    finally:
        _bias.reset(token)


def interfaced(attention: nn.Module) -> list[nn.Module]:
    """The modules of an attention that may call transformers' attention interface: those with a configuration."""
    return [m for m in attention.modules() if hasattr(m.__dict__.get("config"), "_attn_implementation")]
