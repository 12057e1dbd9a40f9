"""The embeddings of pages as callers hold them: a list of tensors of different lengths, or one padded tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtc.checks import check_finite, check_mask
from vtc.errors import InputError
from vtc.token_map import TokenMap

LARGEST = 1 << 28  # bytes that the similarity matrices of one bucket may take


def pages_of(embeddings: Any, mask: Tensor | None) -> tuple[list[Tensor], list[Tensor] | None]:
    """The real tokens of every page, a list of [n, D].

    Returns:
        The pages, and for a padded tensor also the columns [n] that they were in.

    Raises:
        InputError: a wrong type, shape or dtype; pages of different widths, dtypes or devices; a mask that does not fit
            or is given beside a list; NaN or infinity in a real token.
    """
    columns = None
    if isinstance(embeddings, Tensor):
        if embeddings.ndim != 3 or not embeddings.is_floating_point():
            raise InputError(
                f"a tensor of embeddings must be float [B, n, D], not {embeddings.dtype} {tuple(embeddings.shape)}; "
                "give one page [n, D] as a list of one"
            )
        check_mask(mask, embeddings.shape[:2])
        real = (embeddings.detach() != 0).any(-1) if mask is None else mask.to(embeddings.device)
        columns = [row.nonzero()[:, 0] for row in real]
        pages = [row if len(at) == len(row) else row[at] for row, at in zip(embeddings, columns, strict=True)]
    elif isinstance(embeddings, (list, tuple)):
        if mask is not None:
            raise InputError("mask= is for a padded tensor [B, n, D]; the pages of a list have no padding")
        pages = list(embeddings)
        _check_list(pages)
    else:
        raise InputError(
            f"embeddings must be a list of tensors [n, D] or one tensor [B, n, D], not {type(embeddings).__name__}"
        )
    for i, page in enumerate(pages):
        check_finite(page, f"embeddings of page {i}")
    return pages, columns


def _check_list(pages: list[Any]) -> None:
    for i, page in enumerate(pages):
        if not isinstance(page, Tensor):
            kind = type(page).__name__
            raise InputError(f"page {i} must be a tensor [n, D], not {kind}; torch.as_tensor(page) makes it one")
        if page.ndim != 2 or not page.is_floating_point():
            raise InputError(f"page {i} must be a float tensor [n, D], not {page.dtype} {tuple(page.shape)}")
        for what, mine, first in (
            ("vectors of width", page.shape[1], pages[0].shape[1]),
            ("dtype", page.dtype, pages[0].dtype),
            ("device", page.device, pages[0].device),
        ):
            if mine != first:
                raise InputError(f"page {i} has {what} {mine}, but page 0 {first}: pool them in separate calls")


def padded(pages: Sequence[Tensor], like: Tensor, side: str = "right") -> Tensor:
    """[B, M, D], with zero rows at the end, or at the start if the padding's side is "left"."""
    if not pages:
        return like.new_zeros(0, 0, like.shape[2])
    return torch.nn.utils.rnn.pad_sequence(list(pages), batch_first=True, padding_side=side)


def buckets(lengths: Sequence[int], which: Sequence[int], on_cpu: bool) -> list[list[int]]:
    """The pages `which`, in groups that are decided together.

    On a CPU a batch gains little and padding costs up to twice the time, so only pages of equal length share a bucket;
    elsewhere, those at most an eighth shorter than the longest.
    """
    out: list[list[int]] = []
    room = shortest = 0
    for i in sorted(which, key=lambda i: (-lengths[i], i)):
        if not room or lengths[i] < shortest:
            out.append([])
            room = max(1, LARGEST // (4 * lengths[i] ** 2))
            shortest = lengths[i] if on_cpu else lengths[i] - lengths[i] // 8
        out[-1].append(i)
        room -= 1
    return out


def maps_of(decided: TokenMap, lengths: Sequence[int], counts: Sequence[int]) -> list[TokenMap]:
    """One map of one row for each page of a bucket, without its padding."""
    rank, out = decided.rank, []
    for i, (n, m) in enumerate(zip(lengths, counts, strict=True)):
        group = decided.group[i : i + 1, :n]
        order = None if decided.order is None else decided.order[i : i + 1, :m]
        out.append(
            TokenMap(
                group,
                decided.anchor[i : i + 1, :m],
                decided.size[i : i + 1, :m],
                order=order,
                closeness=-rank[i : i + 1, :n].float(),
                complete=not bool((group < 0).any()),
            )
        )
    return out


def behind(token_map: TokenMap, protected: int) -> TokenMap:
    """The map with `protected` tokens before the others, each alone in a slot."""
    if not protected:
        return token_map
    alone = TokenMap.identity(1, protected, token_map.group.device)
    order = None if token_map.order is None else torch.cat([alone.anchor, token_map.order + protected], 1)
    assert token_map.closeness is not None
    return TokenMap(
        torch.cat([alone.group, torch.where(token_map.group < 0, -1, token_map.group + protected)], 1),
        torch.cat([alone.anchor, token_map.anchor + protected], 1),
        torch.cat([alone.size, token_map.size], 1),
        order=order,
        closeness=torch.cat([torch.zeros_like(alone.size), token_map.closeness], 1),
        complete=token_map.complete,
    )


def in_columns(token_map: TokenMap, columns: Tensor, width: int) -> TokenMap:
    """The map of a page's tokens as one of the `width` columns of a padded tensor; the tokens are in `columns` [n]."""

    def spread(values: Tensor, fill: float) -> Tensor:
        return values.new_full((1, width), fill).index_copy(1, columns, values)

    closeness = token_map.closeness
    return TokenMap(
        spread(token_map.group, -1),
        columns[token_map.anchor],
        token_map.size,
        order=None if token_map.order is None else columns[token_map.order],
        closeness=None if closeness is None else spread(closeness, float("-inf")),
        complete=token_map.complete and len(columns) == width,
    )
