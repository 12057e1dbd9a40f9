"""`vtc.retrieval.pool` for colpali-engine 0.3.9 and newer."""

from __future__ import annotations

from colpali_engine.compression.token_pooling import BaseTokenPooler
from torch import Tensor

from vtc.methods.base import Method
from vtc.retrieval.pooling import pool
from vtc.token_map import TokenMap


class TokenPooler(BaseTokenPooler):
    """`vtc.retrieval.pool` as a token pooler:
    `TokenPooler().pool_embeddings(embeddings, pool_factor=3, padding=True, padding_side="left")`.

    Args:
        pool_factor: the factor where `pool_embeddings` gets none.
        method, protect, normalize: as in `vtc.retrieval.pool`.

    Raises:
        OptionError: as `vtc.retrieval.pool`.
    """

    def __init__(
        self, pool_factor: float = 3, *, method: str | Method = "dpc_knn", protect: int = 0, normalize: bool = True
    ) -> None:
        self.pool_factor, self.method, self.protect, self.normalize = pool_factor, method, protect, normalize
        self._pool_embeddings_impl([])  # checks the options

    def _pool_embeddings_impl(
        self, embeddings: list[Tensor], num_workers: int | None = None, pool_factor: float | None = None
    ) -> tuple[list[Tensor], list[dict[int, tuple[Tensor]]]]:
        """The pooled pages, and for each which tokens every row is the mean of: {row: (indices [k],)} on the CPU.
        num_workers is not used: pages of equal length are pooled together, by torch's threads."""
        pooled, maps = pool(
            embeddings,
            self.pool_factor if pool_factor is None else pool_factor,
            method=self.method,
            protect=self.protect,
            normalize=self.normalize,
            maps=True,
        )
        return pooled, [_members(each) for each in maps]


def _members(token_map: TokenMap) -> dict[int, tuple[Tensor]]:
    group = token_map.group[0].cpu()
    order = group.argsort(stable=True)[int((group < 0).sum()) :]
    found = order.split(group[order].bincount(minlength=token_map.slots).tolist())
    return {row: (indices,) for row, indices in enumerate(found)}
