"""Sizes of tokens, where a block's attention takes no mask: they go in at transformers' attention interface."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

_NAME = "vtc_sizes"
_bias: ContextVar[Tensor | None] = ContextVar("vtc_bias", default=None)
noted: ContextVar[list[tuple[Tensor, Tensor]] | None] = ContextVar("vtc_noted", default=None)  # takes queries and keys


class _Config:
    """Stands for the config of an attention module: its attention function is ours."""

    _attn_implementation = _NAME

    def __init__(self, real: Any) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "real" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.real, name)


@contextmanager
def sized(attention: nn.Module, bias: Tensor | None) -> Iterator[None]:
    """While it runs, an attention adds `bias` [B, 1, 1, N] to its logits, at transformers' attention interface."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if _NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
    held = [m for m in attention.modules() if hasattr(m.__dict__.get("config"), "_attn_implementation")]
    real = [m.config for m in held]
    token = _bias.set(bias)
    try:
        for module, config in zip(held, real, strict=True):
            module.__dict__["config"] = _Config(config)
        yield
    finally:
        for module, config in zip(held, real, strict=True):
            module.__dict__["config"] = config
        _bias.reset(token)


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    taken, bias = noted.get(), _bias.get()
    if taken is not None:
        taken.append((query, key))
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config.real._attn_implementation, eager)
    if bias is not None:
        attention_mask = bias if attention_mask is None else attention_mask + bias
    return attend(module, query, key, value, attention_mask, **kwargs)
