"""Fewer vectors per page for multi-vector retrieval (ColPali, ColQwen2 and kin).

`pool` is the function. `TokenPooling` is the same as a module for sentence-transformers, and `TokenPooler` as a pooler
for colpali-engine; each is imported when it is asked for, and needs its library.
"""

from __future__ import annotations

import importlib
from typing import Any

from vtc.retrieval.pooling import pool as pool

__all__ = ["pool"]

_LATER = {
    "TokenPooling": ("sentence_transformers", "sentence-transformers>=6"),
    "TokenPooler": ("colpali", "colpali-engine>=0.3.9"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, wanted = _LATER[name]
    try:
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    except ImportError as error:
        raise ImportError(f'vtc.retrieval.{name} could not be imported ({error}): pip install "{wanted}"') from error
