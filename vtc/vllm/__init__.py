"""Fewer image tokens in vLLM: `vtc.vllm.enable("divprune", keep=0.25)` before `LLM(...)`, or the environment variable
`VTC_VLLM=divprune:keep=0.25` for a server. Requests may name their own budget:
`mm_processor_kwargs={"vtc": {"keep": 0.5}}`. Nothing here imports vLLM until it is asked to.
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from vtc.errors import UnsupportedModelError
from vtc.methods import Method, make
from vtc.vllm.plugin import register, unregister
from vtc.vllm.settings import VARIABLE, Settings

__all__ = ["disable", "enable", "register"]


def enable(method: str | Method, *, positions: str = "keep", **options: Any) -> None:
    """Serve with fewer image tokens, in every `LLM(...)` that this process makes from here on.

    Args:
        method: its name, with options such as keep=0.25; or a ready method.
        positions: "keep", or "compact" for models whose positions vLLM counts by itself.

    Raises:
        OptionError: the method cannot run in vLLM, or an option is wrong.
        UnsupportedModelError: vLLM is not installed, is not one of the versions tested, or does not load vtc.
    """
    settings = Settings(make(method, **options), positions)
    if find_spec("vllm") is None:
        raise UnsupportedModelError("vLLM is not installed: pip install vllm")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "vtc" not in allowed.split(","):
        raise UnsupportedModelError(f"VLLM_PLUGINS={allowed!r} keeps vtc out of vLLM's processes: add vtc to it")
    if not any(point.name == "vtc" for point in entry_points(group="vllm.general_plugins")):
        raise UnsupportedModelError(
            "vLLM's processes would not find vtc, which is not installed: pip install vtc-torch"
        )
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = settings.text()
    try:
        register()
    except BaseException:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before
        raise


def disable() -> None:
    """Serve dense again, in every `LLM(...)` that this process makes from here on."""
    os.environ.pop(VARIABLE, None)
    unregister()
