"""`vtc.retrieval.pool` for sentence-transformers 6 and newer."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers.multi_vector_encoder.modules import BaseTokenPooling
from torch import Tensor

from vtc.errors import OptionError
from vtc.retrieval.pages import padded, pages_of
from vtc.retrieval.pooling import pool as pool_pages


class TokenPooling(BaseTokenPooling):
    """`vtc.retrieval.pool` as a token pooling: the last module of a `MultiVectorEncoder`, the argument `token_pooling=`
    of its `encode`, or by itself, `TokenPooling(factor=3).pool(embeddings)`.

    As a module it is saved with the pipeline. Loading that needs vtc, and `MultiVectorEncoder(path,
    trust_remote_code=True)`, which sentence-transformers asks for wherever a module is not its own.

    Args:
        factor, method, protect, normalize: as in `vtc.retrieval.pool`; the method by its name, which can be saved.
        tasks: the tasks whose embeddings are pooled; None = ["document"].

    Raises:
        OptionError: as `vtc.retrieval.pool`; `method` is not a name.
    """

    config_keys = ["factor", "method", "protect", "normalize", "tasks"]

    def __init__(
        self,
        factor: float = 3,
        *,
        method: str = "dpc_knn",
        protect: int = 0,
        normalize: bool = True,
        tasks: str | list[str] | None = None,
    ) -> None:
        super().__init__(tasks=tasks)
        if not isinstance(method, str):
            raise OptionError(f"method={method!r}: it takes a name, which is saved with the pipeline")
        self.factor, self.method, self.protect, self.normalize = factor, method, protect, normalize
        self._pooled([])  # checks the options

    def forward(self, features: dict[str, Any], task: str | None = None) -> dict[str, Any]:
        """Shortens token_embeddings [B, n, D] to [B, M, D] and attention_mask to [B, M] bool, padded on the right."""
        embeddings = features["token_embeddings"]
        if not self.applies_to(task) or self.factor == 1 or not len(embeddings):
            return features
        pages, _ = pages_of(embeddings, features["attention_mask"].bool())
        pooled = self._pooled(pages)
        features["token_embeddings"] = padded(pooled, embeddings)
        lengths = torch.tensor([len(page) for page in pooled], device=embeddings.device)
        index = torch.arange(features["token_embeddings"].shape[1], device=embeddings.device)
        features["attention_mask"] = index < lengths[:, None]
        return features

    def pool(
        self,
        embeddings: list[Tensor] | Tensor,
        *,
        task: str | None = None,
        attention_mask: Tensor | None = None,
        padding_side: str = "right",
    ) -> Any:
        """A list of [n, D], or [B, n, D] padded: by `attention_mask` [B, n], else rows that are all zero. Returns the
        same form, padded on `padding_side`."""
        if padding_side not in ("left", "right"):
            raise OptionError(f'padding_side={padding_side!r}: it takes "left" or "right"')
        if not self.applies_to(task):
            return embeddings
        if not isinstance(embeddings, Tensor):
            return self._pooled(embeddings)
        pages, _ = pages_of(embeddings, None if attention_mask is None else attention_mask.bool())
        return padded(self._pooled(pages), embeddings, padding_side)

    def pool_one(self, embedding: Tensor, **kwargs: Any) -> Tensor:
        """[n, D] -> [m, D]."""
        return self._pooled([embedding])[0]

    def _pooled(self, pages: list[Tensor]) -> list[Tensor]:
        return pool_pages(pages, self.factor, method=self.method, protect=self.protect, normalize=self.normalize)
