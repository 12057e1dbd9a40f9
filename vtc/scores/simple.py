"""Scores that need only the tokens and the text, and helpers shared by all scores."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops import normalize

# Float values of the largest intermediate that a score holds at one time (64 MiB in float32).
TILE = 1 << 24


def norm(features: Tensor) -> Tensor:
    """`|x_i|`, the L2 norm of every token. [B, N, D] -> [B, N] float32.

    On some models sensitivity follows it closely, so it is the baseline to compare ZOO-Prune with.
    """
    return torch.linalg.vector_norm(features, dim=-1, dtype=torch.float32)


def relevance(
    features: Tensor, text: Tensor, text_mask: Tensor | None = None, *, said: list[str] | None = None
) -> Tensor:
    """How close every token is to the prompt: its cosine to the mean of the unit text embeddings.

    The mean of the cosines to the individual text tokens is this value times a factor per image, so the ranking is the
    same.

    Args:
        features: [B, N, C] projected visual tokens.
        text: [B, T, C] text embeddings; text_mask: [B, T] bool, True = real.
        said: a list that receives a sentence if there is no text.

    Returns:
        [B, N] float32 in [-1, 1]; 0 where there is no text.
    """
    words = normalize(text)
    if said is not None and not (words.shape[1] and (text_mask is None or bool(text_mask.any(1).all()))):
        said.append("a prompt holds no text: there, every token is as relevant as any other")
    if text_mask is not None:  # where, not a product: padding may be NaN
        words = words.where(text_mask[..., None], 0.0)
    prompt = normalize(words.mean(1) if words.shape[1] else words.new_zeros(len(words), words.shape[2]))
    return (normalize(features) @ prompt[..., None])[..., 0]


def can_look(x: Tensor) -> bool:
    """Whether Python code may depend on values: not inside compiled graphs or CUDA graph capture."""
    return not (torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()))


def rank(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """The share of the other real tokens that score lower, in [0, 1]: robust to outliers. [B, N]"""
    scores = scores.float().contiguous()
    others = scores.new_full((len(scores), 1), scores.shape[1] - 1.0)
    if mask is not None:
        scores, others = scores.masked_fill(~mask, float("inf")), mask.sum(1, keepdim=True) - 1.0
    return torch.searchsorted(scores.sort(1).values, scores) / others.clamp(min=1)
