"""vLLM's models with a method behind their towers. Its registry is given names in this module, whose classes are made
when it asks for one."""

from __future__ import annotations

import importlib

from vtc.vllm.families import family
from vtc.vllm.model import reduced


def __getattr__(name: str) -> type:
    found = family(name)
    if found is None:
        raise AttributeError(name)
    from vllm.model_executor.models.registry import _VLLM_MODELS

    module, own = _VLLM_MODELS[name][:2]
    made = reduced(getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), own), found)
    globals()[name] = made
    return made
