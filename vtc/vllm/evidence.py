"""What methods read of a tower of vLLM beside its tokens: the attention that each received, and its keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtc import scores
from vtc.errors import InputError
from vtc.scores.attention import head_mean

READ = frozenset({"attention", "middle", "keys"})  # fields of Tokens that are found here
_ALL, _EVERY = 1024, 4  # of more patches than these, the queries of every fourth, as in Transformers


@dataclass
class Tap:
    """Listens to one attention of a tower, while `heard` is a list: (query, key) [images, patches, heads, width], or
    [1, all patches, ...] with the borders between what attends to itself alone."""

    module: Any
    heard: list[tuple[Tensor, Tensor, Tensor | None]] | None = None

    def __post_init__(self) -> None:
        self.hook = self.module.register_forward_pre_hook(self.hear, with_kwargs=True)

    def hear(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.heard is None:
            return
        given = dict(zip(("query", "key"), args, strict=False)) | kwargs
        query, key = (
            x if x.ndim == 4 else x.unflatten(-1, (heads, module.head_size))
            for x, heads in ((given["query"], module.num_heads), (given["key"], module.num_kv_heads))
        )
        self.heard.append((query.detach(), key.detach(), given.get("cu_seqlens")))


@dataclass
class Evidence:
    """The taps that a method's `needs` want on a tower, and what they heard.

    Args:
        tower: of a model of vLLM, with attentions of its `MMEncoderAttention`.
        needs: some of `READ`.
        middle: depth of the layer for "middle", as a share. prefix: class tokens in front of every image's patches.
    """

    tower: nn.Module
    needs: frozenset[str]
    middle: float = 0.5
    prefix: int = 0
    taps: dict[str, Tap] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from vllm.model_executor.layers.attention import MMEncoderAttention

        found = [m for m in self.tower.modules() if isinstance(m, MMEncoderAttention)]
        if self.needs & {"attention", "keys"}:
            self.taps["attention"] = Tap(found[-1])
        if "middle" in self.needs:
            self.taps["middle"] = Tap(found[round(self.middle * len(found))])

    def listen(self, on: bool) -> None:
        for tap in self.taps.values():
            tap.heard = [] if on else None

    def of(self, patches: Sequence[int], orders: Sequence[Tensor | None], unit: int) -> list[dict[str, Tensor]]:
        """By field, [n] or [n, D] for the n tokens of each image that was encoded since `listen(True)`.

        Args:
            patches: of each image. orders: where a window attention has put its tokens, None = as they are. unit:
                patches of a token.
        """
        found: list[dict[str, Tensor]] = [{} for _ in patches]
        for name, tap in self.taps.items():
            parts = self._parts(tap, patches)
            for each, part, order in zip(found, parts, orders, strict=True):
                each |= self._fields(name, *part, tap.module.scale, unit, order)
        return found

    def _parts(self, tap: Tap, patches: Sequence[int]) -> list[tuple[Tensor, Tensor, list[int]]]:
        """Of every image queries and keys [patches, heads, width], and how many of them attend to each other."""
        assert tap.heard is not None
        out: list[tuple[Tensor, Tensor, list[int]]] = []
        for query, key, borders in tap.heard:
            if borders is None:
                out += [(q, k, [len(q)]) for q, k in zip(query, key, strict=True)]
                continue
            edges = borders.tolist()
            if edges[-1] != query.shape[1]:
                raise InputError("vLLM's attention for this tower counts in a way that vtc cannot read: use divprune")
            at = 0
            while at < query.shape[1]:
                end = at + patches[len(out)]
                inside = [e for e in edges if at <= e <= end]
                lengths = [b - a for a, b in zip(inside, inside[1:], strict=False) if b > a]
                out.append((query[0, at:end], key[0, at:end], lengths))
                at = end
        if [len(q) for q, _, _ in out] != [n + self.prefix for n in patches]:
            raise InputError(f"the tower attended over {[len(q) for q, _, _ in out]} patches, not {list(patches)}")
        return out

    def _fields(
        self, name: str, query: Tensor, key: Tensor, lengths: list[int], scale: float, unit: int, order: Tensor | None
    ) -> dict[str, Tensor]:
        out = {}
        if name in self.needs:
            out[name] = _received(query, key, lengths, scale, self.prefix).view(-1, unit).sum(1)
        if name == "attention" and "keys" in self.needs:
            mean = head_mean(key.transpose(0, 1)[None], key.shape[1])[0, self.prefix :]
            out["keys"] = mean.unflatten(0, (-1, unit)).mean(1)
        if order is not None:
            back = order.argsort().to(query.device)
            out = {name: x[back] for name, x in out.items()}
        return {name: _over_ranks(x) for name, x in out.items()}


def _received(query: Tensor, key: Tensor, lengths: list[int], scale: float, prefix: int) -> Tensor:
    """The attention that each patch received [patches] from the class token, or from all that attend to it."""
    pad = torch.nn.utils.rnn.pad_sequence
    q, k = (pad(list(x.split(lengths)), batch_first=True).transpose(1, 2) for x in (query, key))
    if prefix:
        return scores.cls_attention(q, k, prefix=prefix, scale=scale)[0]
    real = torch.arange(q.shape[2]) < torch.tensor(lengths)[:, None]
    mask = None if bool(real.all()) else real.to(q.device)
    found = scores.attention_received(q, k, scale=scale, mask=mask, every=1 if q.shape[2] <= _ALL else _EVERY)
    return found[real.to(q.device)]


def _over_ranks(x: Tensor) -> Tensor:
    """The mean over the ranks of tensor parallelism, each of which has some of the heads."""
    from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

    ranks = get_tensor_model_parallel_world_size()
    return x if ranks == 1 else tensor_model_parallel_all_reduce(x.contiguous()) / ranks
