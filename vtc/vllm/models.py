"""vLLM's models with a method behind their towers. Its registry is given names in this module, whose classes are made
when it asks for one."""

from __future__ import annotations

import importlib

from vtc.vllm.families import GAPS, family
from vtc.vllm.model import reduced


def __getattr__(name: str) -> type:
    architecture = name.removesuffix(GAPS)
    found = family(architecture)
    if found is None:
        raise AttributeError(name)
    from vllm.model_executor.models.registry import _VLLM_MODELS

    module, own = _VLLM_MODELS[architecture][:2]
    whole = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), own)
    made = reduced(whole, found, gaps=name != architecture)
    globals()[name] = made
    return made
