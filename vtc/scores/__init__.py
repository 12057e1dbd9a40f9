"""Importance scores: pure functions on tensors, every score [B, N] float32."""

from typing import Any

from vtc.checks import renamed
from vtc.scores.attention import attention_received, cls_attention, last_query_attention
from vtc.scores.projector_form import entrance
from vtc.scores.registry import SCORES, Score
from vtc.scores.scorer import Scorer, diff_top_k, load_scorer, save_scorer
from vtc.scores.sensitivity import sensitivity
from vtc.scores.simple import norm, relevance

__all__ = [
    "SCORES",
    "Score",
    "Scorer",
    "attention_received",
    "cls_attention",
    "diff_top_k",
    "entrance",
    "last_query_attention",
    "load_scorer",
    "norm",
    "relevance",
    "save_scorer",
    "sensitivity",
]

_RENAMED: dict[str, Any] = {"Selector": Scorer, "load_selector": load_scorer, "save_selector": save_scorer}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    renamed(f"vtc.scores.{name}", _RENAMED[name].__name__)
    return _RENAMED[name]
