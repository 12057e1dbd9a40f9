"""An encoder's output, reduced to the tokens that stay."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from vtc.adapters.multimodal.token_batch import PlacedTokens, TokenBatch
from vtc.token_map import TokenMap


def shrink(
    item: PlacedTokens, batch: TokenBatch, span: slice, stays: Tensor, means: TokenMap | None, trailing: bool
) -> None:
    """Reduce an encoder's output to the rows that stay: unchanged, or as the means of their groups.

    Args:
        span: where in `batch` the item's rows are; stays: [rows] bool. trailing: the model's forward fills placeholders
            behind every item itself.
    """

    def shorter(x: Tensor) -> Tensor:
        if means is not None:
            whole = x.new_zeros(len(batch.rows), x.shape[-1])
            whole = torch.cat([whole[: span.start], x, whole[span.stop :]])
            merged = means.merge(batch.packed(whole))[means.anchor >= 0]
            at = batch.anchors(means)
            inside = (at >= span.start) & (at < span.stop)
            x = x.index_copy(0, at[inside] - span.start, merged[inside].to(x.dtype))
        return x[stays]

    def plane(level: Any) -> Any:
        """Of DeepStack: one tensor of all items, one for each, or the layer and one for each."""
        if isinstance(level, tuple) and isinstance(level[0], int):
            return level[0], plane(level[1])
        return shorter(level) if isinstance(level, Tensor) else (shorter(torch.cat(list(level))),)

    output = item.output = copy.copy(item.output)
    small = shorter(item.rows)
    if getattr(output, "pooler_output", None) is None:  # then all features are planes
        pass
    elif not isinstance(output.pooler_output, Tensor):
        output.pooler_output = (small,)
    elif trailing:  # one row per item, for the model to add to
        output.pooler_output = small.view(len(item.encoded.lengths), -1, small.shape[-1])
    else:
        output.pooler_output = small[:, None]
    if getattr(output, "deepstack_features", None) is not None:
        output.deepstack_features = [plane(level) for level in output.deepstack_features]
