"""How a scorer's selection is applied in the model during training.

DiffTopK turns scores into weights s in [0, 1] that sum to the budget. **Soft**: a token x becomes a mixture of itself
and its picture's mean token, at the same place. **Hard**: only the K best are seen, as when the model is compressed,
`m = [chosen] + s - sg(s)`; a token's weight m multiplies the attention that every query pays to it,

    a_j = m_j exp(q . k_j) / sum_i m_i exp(q . k_i),

so that hidden tokens also get a gradient: the effect that seeing them would have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtc import ops
from vtc.adapters.multimodal.encode import arguments, laid_out
from vtc.adapters.multimodal.families.base import Modality
from vtc.adapters.multimodal.find import MultimodalSite
from vtc.adapters.patch import Patch
from vtc.errors import InputError, UnsupportedModelError
from vtc.methods.order import marked
from vtc.scores.scorer import Scorer, diff_top_k

SELECTIONS = ("soft", "hard")
_HIDDEN = 1e-6  # the weight of a hidden token: at 0 there would be no gradient


class Selection:
    """Applies a scorer's selection between the encoders and the decoder of one model.

    Attributes:
        keep: the fraction of the tokens that stays now.
        weights: for "hard", the weight of every image token of this call, by modality.
    """

    keep = 1.0
    busy = False  # one encoder may call the other
    seen = False  # this call had image tokens

    def __init__(self, site: MultimodalSite, scorer: Scorer, how: str, fill: str) -> None:
        self.site, self.scorer, self.how, self.fill = site, scorer, how, fill
        self.weights: dict[str, Tensor] = {}
        self.ids: Tensor | None = None
        if how == "hard":
            config = getattr(site.inner, site.family.decoder).config
            if config._attn_implementation not in ("sdpa", "eager"):
                raise UnsupportedModelError(
                    f'selection="hard" weighs tokens inside attention, which {config._attn_implementation} does not '
                    'take: load the model with attn_implementation="sdpa"'
                )

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        if not hasattr(batch, "items"):
            raise InputError(f"a batch is a {type(batch).__name__}: it takes the keyword arguments of model(...)")
        self.seen = False
        place = self.scorer.query.weight.device
        ready = {name: x.to(place) if isinstance(x, Tensor) else x for name, x in batch.items()}
        self.ids = ready.get("input_ids")
        if self.ids is None and self.how == "hard":
            raise InputError(f'selection="hard" needs input_ids in every batch; one holds {", ".join(batch)}')
        try:
            loss = model(**{"use_cache": False} | ready).loss
        finally:
            self.weights.clear()
        if loss is None or not self.seen:
            missing = "labels" if loss is None else "images"
            raise InputError(f"a batch has no {missing}; it holds {', '.join(batch)}")
        return loss

    def encode(self, encode: _Encode, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.busy:
            return encode.original(*args, **kwargs)
        self.busy = True
        try:
            with torch.no_grad():
                output = encode.original(*args, **kwargs)
        finally:
            self.busy = False
        self.seen = True
        call, pooled = arguments(encode, args, kwargs), output.pooler_output
        lengths, layout = laid_out(self.site.family, self.site.inner, encode.modality, pooled, call)
        index = nn.utils.rnn.pad_sequence([unit.rows for unit in layout.units], True, -1)
        index = index.to(pooled[0].device)
        mask, at = index >= 0, index.clamp(min=0)
        scores = self.scorer.score(_rows(pooled)[at], mask)
        soft = diff_top_k(scores, self.keep, mask)
        if self.how == "hard":
            counts = torch.tensor([max(1, round(n * self.keep)) for n in mask.sum(1).tolist()], device=index.device)
            chosen = marked(ops.top_select(scores.detach(), counts, mask), mask.shape[1])
            weight = chosen + soft - soft.detach()
            every = torch.ones(sum(lengths), device=index.device)  # tokens in no unit (newlines) are always seen
            self.weights[encode.modality.name] = every.index_copy(0, index[mask], weight[mask])
            return output

        def weigh(x: Any) -> Any:
            """Weight features as returned by a model, one tensor or one per item. Tokens in no unit (newlines) stay
            unchanged."""
            rows = _rows(x)
            token = rows[at].float().masked_fill(~mask[..., None], 0)
            new = soft[..., None] * token
            if self.fill == "mean":
                new = new + (1 - soft[..., None]) * token.sum(1, keepdim=True) / mask.sum(1).view(-1, 1, 1)
            rows = rows.index_copy(0, index[mask], new[mask].to(rows))
            return rows.view(x.shape) if isinstance(x, Tensor) else rows.split([part.shape[:-1].numel() for part in x])

        output.pooler_output = weigh(output.pooler_output)
        if getattr(output, "deepstack_features", None) is not None:
            output.deepstack_features = [weigh(plane) for plane in output.deepstack_features]
        return output

    def bias(self) -> Tensor:
        """[B, L], the logarithm of every column's weight."""
        assert self.ids is not None
        weight = torch.ones(self.ids.numel(), device=self.ids.device)
        for modality in self.site.family.modalities:
            if modality.name in self.weights:
                columns = (self.ids == getattr(self.site.inner.config, modality.token)).flatten().nonzero().flatten()
                weights = self.weights[modality.name]
                if len(columns) != len(weights):
                    raise InputError(
                        f"the prompt has {len(columns)} {modality.name} placeholders for {len(weights)} "
                        f'tokens: selection="hard" cannot tell which is which in {type(self.site.inner).__name__}'
                    )
                weight = weight.index_copy(0, columns, weights)
        return (weight + _HIDDEN).log().view(self.ids.shape)


class _Encode(Patch):
    """Replaces `get_image_features` and `get_video_features`."""

    def __init__(self, selection: Selection, modality: Modality) -> None:
        super().__init__(selection.site.inner, modality.encode)
        self.selection, self.modality, self.names = selection, modality, list(self.__signature__.parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.selection.encode(self, args, kwargs)


class _Decode(Patch):
    """Replaces the decoder's `forward`: adds the weights to its mask."""

    def __init__(self, selection: Selection) -> None:
        super().__init__(getattr(selection.site.inner, selection.site.family.decoder), "forward")
        self.selection = selection

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.selection.weights:
            x = kwargs.get("inputs_embeds")
            if args or x is None:
                raise InputError("the decoder was called otherwise than by its own model")
            kwargs["attention_mask"] = _weighed(kwargs.get("attention_mask"), self.selection.bias(), x.dtype)
        return self.original(*args, **kwargs)


def _weighed(mask: Any, bias: Tensor, dtype: torch.dtype) -> Any:
    """An attention mask with `bias` [B, L] added to its columns; if there is one per kind of layer, for each."""
    if isinstance(mask, dict):
        return {name: _weighed(each, bias, dtype) for name, each in mask.items()}
    batch, length = bias.shape
    if mask is None or mask.ndim == 2:
        causal = torch.ones(length, length, dtype=torch.bool, device=bias.device).tril()
        real = torch.ones_like(bias, dtype=torch.bool) if mask is None else mask.bool()
        mask = causal & real[:, None] | torch.eye(length, dtype=torch.bool, device=bias.device)
        mask = mask[:, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=bias.device).masked_fill(~mask, torch.finfo(dtype).min)
    return (mask + bias[:, None, None].to(dtype)).clamp(min=torch.finfo(dtype).min)


def _rows(x: Any) -> Tensor:
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in x])


@contextmanager
def selecting(model: nn.Module, selection: Selection) -> Iterator[None]:
    """In this context the model is frozen, and its encoders, and for "hard" its decoder, are replaced."""
    inner = selection.site.inner
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = {k: v for k, v in inner.__dict__.items() if k == "rope_deltas"}  # Qwen models store those of the last prompt
    patches: list[Patch] = [_Encode(selection, modality) for modality in selection.site.family.modalities]
    patches += [_Decode(selection)] if selection.how == "hard" else []
    try:
        for p in trained:
            p.requires_grad_(False)
        for patch in patches:
            patch.install()
        yield
    finally:
        for patch in patches:
            patch.remove()
        for p in trained:
            p.requires_grad_(True)
        inner.__dict__.update(kept)
