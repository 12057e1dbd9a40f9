"""Importance read off the attention of the vision tower or the LLM.

The caller hands over queries and keys (after rotary positions); the model itself keeps its SDPA or FlashAttention, and
no map of all queries by all keys exists at any time. Everything is float32. Shapes: B images, H query heads, Hk key
heads (H a multiple of Hk: grouped queries), N tokens, D width of a head. Images of different sizes are padded to a
batch, with `mask` [B, N] True = real; padding neither attends nor is attended to, and scores 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.errors import InputError
from vtc.scores.simple import check_mask

# Values of an attention map that exist at a time: 8 MiB, since a map that leaves the processor's cache costs double.
_MAP = 1 << 21


def attention_received(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    every: int = 1,
    tile: int = _MAP,
) -> Tensor:
    """What every token receives from all tokens, for towers without CLS.

        a_j = mean_heads sum_i softmax_j(q_i . k_j * scale)

    The scores of an image sum to its real tokens. Sum them over a merge unit to score the unit. This is the score of
    the selectors that IDPruner (arXiv 2602.13315) compares with on Qwen models.

    Args:
        query: [B, H, N, D]; key: [B, Hk, N, D].
        scale: None = 1 / sqrt(D).
        every: ask only each so-many-th query, and scale up: a fraction of the cost. With one patch in 4 of DINOv2-S on
            photographs (1,369 patches) that ranks as all do to Spearman 0.975 to 0.998, and 93 to 98 % of the best
            quarter stay the same.
        tile: how many float32 values of the attention map exist at one time.

    Returns:
        [B, N] float32. O(N^2 D) time, O(tile) memory.
    """
    batch, heads, tokens, _ = query.shape
    if key.shape[2] != tokens:
        raise InputError(f"{tokens} queries and {key.shape[2]} keys: every token needs both")
    check_mask(mask, (batch, tokens))
    total = torch.zeros(batch, tokens, device=query.device)
    asking = torch.ones(batch, tokens, dtype=torch.bool, device=query.device) if mask is None else mask
    real, asking, query = asking.sum(1, keepdim=True), asking[:, ::every], query[:, :, ::every]
    step = max(1, tile // max(1, batch * heads * tokens))
    for start in range(0, query.shape[2], step):
        block = slice(start, start + step)
        share = _shares(query[:, :, block], key, scale, mask)
        if mask is not None:
            share = share * asking[:, None, block, None]
        total += share.sum(2).mean(1)
    return total if every == 1 else total * real / asking.sum(1, keepdim=True).clamp(min=1)


def cls_attention(
    query: Tensor, key: Tensor, prefix: int = 1, *, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """How the attention of CLS is spread over the patches: softmax over the patch keys alone, mean over heads.

    Args:
        query: [B, H, N, D], of which only the first token, CLS, is read; key: [B, Hk, N, D].
        prefix: tokens before the patches (CLS and registers).
        mask: [B, N], prefix included.

    Returns:
        [B, N - prefix] float32, each row sums to 1.
    """
    if not 1 <= prefix <= key.shape[2]:
        raise InputError(f"prefix={prefix}: CLS attention needs at least the CLS token before {key.shape[2]} tokens")
    check_mask(mask, (key.shape[0], key.shape[2]))
    return last_query_attention(
        query[:, :, 0], key[:, :, prefix:], scale=scale, mask=None if mask is None else mask[:, prefix:]
    )


def last_query_attention(
    query: Tensor, key: Tensor, *, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """How one query per image spreads over the visual keys (FastV, arXiv 2403.06764, with the last text token's query).

    The softmax is over the visual keys alone, as AngelSlim does it; FastV's own is over all keys. The ranking of a
    head is the same, the heads' weights in the mean are not.

    Args:
        query: [B, H, D]; key: [B, Hk, N, D] of the visual tokens.

    Returns:
        [B, N] float32, each row sums to 1.
    """
    check_mask(mask, (key.shape[0], key.shape[2]))
    share = _shares(query[:, :, None], key, scale, mask)[:, :, 0].mean(1)
    return share if mask is None else share * mask


def _shares(query: Tensor, key: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
    """softmax(q k^T * scale) over the real keys. [B, H, Q, D], [B, Hk, N, D] -> [B, H, Q, N] float32."""
    if query.ndim != 4 or key.ndim != 4 or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise InputError(f"query {tuple(query.shape)} and key {tuple(key.shape)} do not fit together")
    if query.shape[1] % key.shape[1]:
        raise InputError(f"{query.shape[1]} query heads cannot share {key.shape[1]} key heads evenly")
    scale = query.shape[3] ** -0.5 if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):
        grouped = (query.float() * scale).unflatten(1, (key.shape[1], -1))  # [B, Hk, H / Hk, Q, D]
        logits = (grouped @ key.float()[:, :, None].mT).flatten(1, 2)
    if mask is not None:  # not -inf: a row without real keys would become NaN
        logits = logits.masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min)
    return logits.softmax(-1)
