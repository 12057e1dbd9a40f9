"""DART: Stop Looking for Important Tokens, Duplication Matters More, https://arxiv.org/abs/2502.11494."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.checks import check_number
from vtc.methods.order import joined, marked
from vtc.methods.ranked import checked, require
from vtc.methods.selector import Selector
from vtc.tokens import Tokens


@dataclass(frozen=True)
class DART(Selector):
    """Inside the LLM: keeps the image tokens that are least similar to a few pivots.

    Pivots are the `min(pivots, K)` image tokens and up to `pivots` text tokens whose keys (all heads side by side) have
    the largest L1 norm. Image pivots stay. Then each pivot, image pivots first, by falling norm, keeps the
    `ceil((K - kept) / all pivots)` tokens not kept yet whose hidden states have the lowest cosine to its own, until K
    are kept.

    The adapter provides, from the decoder after `layer` layers: hidden states of the image tokens as `Tokens.features`,
    their keys [B, N, heads x width] as `decoder_keys`, and the hidden states of the prompt's text tokens as
    `decoder_text`, **by falling L1 norm of their keys**, real ones first (`text_mask`).

    Args:
        layer: how many decoder layers see all tokens.
        pivots: maximum number of pivots of each kind (image, text).
    """

    layer: int = 2
    pivots: int = 4

    name: ClassVar[str] = "dart"
    summary: ClassVar[str] = "keeps the tokens least like a few pivots, inside the LLM"
    needs: ClassVar[frozenset[str]] = frozenset({"decoder_keys", "decoder_text"})
    in_decoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("layer", self.layer, 0, whole=True)
        check_number("pivots", self.pivots, 1, whole=True)

    def pick(self, tokens: Tokens, count: int | Tensor) -> Tensor:
        keys, text = (require(tokens, field, self.name) for field in ("decoder_keys", "decoder_text"))
        batch, total, width = tokens.features.shape
        free = torch.ones(batch, total, dtype=torch.bool, device=keys.device) if tokens.mask is None else tokens.mask
        left = torch.as_tensor(count, device=keys.device).expand(batch)
        unit = ops.normalize(tokens.features)
        length = checked(keys.float().abs().sum(-1), "attention keys", tokens)
        first = ops.top_select(length, left.clamp(max=self.pivots), free)
        text = ops.normalize(text[:, : self.pivots])
        known = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        if tokens.text_mask is not None:
            known = tokens.text_mask[:, : self.pivots]
        image = unit.gather(1, first.clamp(min=0)[..., None].expand(-1, -1, width))
        pivots, real = torch.cat([image, text], 1), torch.cat([first >= 0, known], 1)
        left = left - (first >= 0).sum(1)
        quota = -(-left // real.sum(1).clamp(min=1))
        free, order = free & ~marked(first, total), [first]
        for place in range(pivots.shape[1]):
            cosine = (unit @ pivots[:, place, :, None])[..., 0]
            picked = ops.top_select(-cosine, torch.minimum(quota, left).where(real[:, place], 0), free)
            free, left = free & ~marked(picked, total), left - (picked >= 0).sum(1)
            order.append(picked)
        return joined(*order)[:, : count if isinstance(count, int) else int(count.max())]
