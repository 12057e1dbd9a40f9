"""Where importance comes from: pure functions on tensors, every score [B, N] float32."""

from vtc.scores.attention import attention_received, cls_attention, last_query_attention
from vtc.scores.projector_form import entrance
from vtc.scores.scorer import Selector, diff_top_k, load_selector, save_selector
from vtc.scores.sensitivity import sensitivity
from vtc.scores.simple import norm, relevance

__all__ = [
    "Selector",
    "attention_received",
    "cls_attention",
    "diff_top_k",
    "entrance",
    "last_query_attention",
    "load_selector",
    "norm",
    "relevance",
    "save_selector",
    "sensitivity",
]
