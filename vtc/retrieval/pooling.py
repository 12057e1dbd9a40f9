"""`pool`: fewer vectors per page."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from vtc.checks import check_flag, check_number
from vtc.decide import Units, decide
from vtc.errors import OptionError
from vtc.layout import Unit
from vtc.methods import METHODS, make
from vtc.methods.base import Method
from vtc.retrieval.pages import behind, buckets, in_columns, maps_of, padded, pages_of
from vtc.retrieval.ward import ToMeWard, Ward
from vtc.token_map import TokenMap
from vtc.tokens import FIELDS, Tokens

CLUSTERING: dict[str, type[Method]] = {cls.name: cls for cls in (Ward, ToMeWard)}


def pool(
    embeddings: Sequence[Tensor] | Tensor,
    factor: float | None = None,
    *,
    tokens: int | None = None,
    method: str | Method = "dpc_knn",
    protect: int = 0,
    normalize: bool = True,
    mask: Tensor | None = None,
    maps: bool = False,
) -> Any:
    """Fewer vectors per page, for an index of multi-vector embeddings (ColPali, ColQwen2, ColBERT and kin).

    A page of n vectors becomes one of `max(int(n // factor), 1)`: the means of similar vectors, in reading order.
    Decisions are made in float32 without gradients; the means are differentiable in the embeddings. A page gives the
    same alone as in any batch, to the bit, on a CPU; it is fastest in a list, which needs no padding.

    It takes what other libraries encode. PyLate returns arrays unless it is asked for tensors:
    `pool([torch.as_tensor(page) for page in model.encode(pages, is_query=False)], factor=3, protect=1)`. For
    sentence-transformers and colpali-engine there are `vtc.retrieval.TokenPooling` and `vtc.retrieval.TokenPooler`.

    Args:
        embeddings: a list of pages [n_i, D], or one padded tensor [B, n, D]. Its rows where `mask` is False are
            padding; without a mask those that are all zero, on whichever side, which is how ColPali marks padding.
        factor: how many times fewer vectors, >= 1; None = 3, unless `tokens` is given. 1 changes nothing.
        tokens: instead, the number of vectors of every page that has more.
        method: "dpc_knn"; another method that needs the features alone ("tome" up to factor 3; one that selects, such
            as "divprune", keeps vectors as they are); "ward", hierarchical clustering, the best beyond factor 10; or
            "tome+ward", nearly the same in half of the time. Or a ready method, `vtc.DPCKNN(keep=1.0, neighbors=9)`;
            what stays is said by `factor` or `tokens`, not by the method.
        protect: the first tokens of every page, to be kept as they are; they are not among the n above, and stay in
            addition.
        normalize: whether every row is scaled to length 1 at the end, which indexes with a dot product need.
        mask: [B, n] bool, True = real; for a padded tensor.
        maps: whether to also return where every token went.

    Returns:
        A list of [m_i, D], or for a padded tensor [B, M, D] with zero rows at the end. In the dtype of the embeddings.
        With `maps`, that and a list of `TokenMap`s, one per page, of one row each: over the page's tokens, or for a
        padded tensor over its columns.

    Raises:
        OptionError: an option out of range or unknown, both `factor` and `tokens`, a method that needs more than
            features, "ward" without fastcluster and scipy.
        InputError: embeddings of a wrong type or shape, with NaN, or that differ in width, dtype or device.
    """
    if tokens is None:
        factor = 3 if factor is None else factor
        check_number("factor", factor, 1)
    elif factor is None:
        check_number("tokens", tokens, 1, whole=True)
    else:
        raise OptionError(f"factor={factor!r} and tokens={tokens!r}: both say how many vectors stay, give one")
    check_number("protect", protect, 0, whole=True)
    check_flag("normalize", normalize)
    check_flag("maps", maps)
    chosen = ready(method)
    pages, columns = pages_of(embeddings, mask)

    rest = [page[protect:] for page in pages]
    lengths = [len(page) for page in rest]
    counts = [min(n, tokens) if tokens is not None else max(int(n // (factor or 1)), 1) for n in lengths]
    fewer = [i for i, (n, m) in enumerate(zip(lengths, counts, strict=True)) if m < n]
    out = list(pages)
    found = [TokenMap.identity(1, len(page), page.device) for page in pages] if maps else []
    for bucket in buckets(lengths, fewer, on_cpu=bool(pages) and pages[0].is_cpu):
        mine = [counts[i] for i in bucket]
        rows, decided = _reduced([rest[i] for i in bucket], mine, chosen)
        for i, row, m in zip(bucket, rows, mine, strict=True):
            out[i] = torch.cat([_wide(pages[i][:protect]), row[:m]]) if protect else row[:m]
        if maps:
            for i, token_map in zip(bucket, maps_of(decided, [lengths[i] for i in bucket], mine), strict=True):
                found[i] = behind(token_map, protect)
    if factor != 1:
        out = [_finished(page, normalize).to(given.dtype) for page, given in zip(out, pages, strict=True)]
    if not isinstance(embeddings, Tensor):
        return (out, found) if maps else out
    pooled, width = padded(out, embeddings), embeddings.shape[1]
    assert columns is not None
    return (pooled, [in_columns(*each, width) for each in zip(found, columns, strict=True)]) if maps else pooled


def ready(method: str | Method) -> Method:
    """The method, if it needs no more than the features. Raises OptionError."""
    if isinstance(method, str) and method in CLUSTERING:
        return CLUSTERING[method](keep=1.0)
    if isinstance(method, str) and method.split("+")[0] not in METHODS:
        near = difflib.get_close_matches(method, _names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise OptionError(f"unknown method {method!r}: {hint}choose one of {', '.join(_names())}")
    chosen = make(method) if isinstance(method, Method) else make(method, keep=1.0)
    if _lacks(chosen):
        raise OptionError(f"{chosen.name} reads {_lacks(chosen)}; choose one of {', '.join(_names())}")
    placing = [f.name for f in fields(Method) if f.name in chosen.options() and f.name != "keep"]
    if placing or not chosen.budget.everything or chosen.groups_frames:
        what = placing[0] if placing else "events" if chosen.groups_frames else f"keep={chosen.keep!r}"
        raise OptionError(
            f"{type(chosen).__name__} with {what}: embeddings know no model, layers or frames, and factor= or tokens= "
            f"says what stays; give {type(chosen).__name__}(keep=1.0) with the method's own options at most"
        )
    return chosen


def _names() -> list[str]:
    return [name for name in METHODS if not _lacks(make(name, keep=1.0))] + list(CLUSTERING)


def _lacks(method: Method) -> str:
    """What the method reads beyond the features, in words; "" = nothing."""
    missing = [FIELDS.get(field, field) for field in sorted(method.needs - method.optional)]
    missing += ["the decoder's rotary table"] if method.turned else []
    missing += ["the image's pixels"] if method.entrance is not None else []
    return f"{' and '.join(missing)}, which embeddings alone do not give" if missing else ""


def _reduced(pages: list[Tensor], counts: list[int], method: Method) -> tuple[Tensor, TokenMap]:
    """The pages of one bucket, reduced together: [B, M, D], wide, and the decision."""
    rows, start, units = torch.cat(pages), 0, []
    for i, page in enumerate(pages):
        units.append(Unit(torch.arange(start, start + len(page)), i))
        start += len(page)
    bucket = Units(rows, units)
    features = _wide(bucket.packed(rows))
    each = [len(page) - m for page, m in zip(pages, counts, strict=True)]
    gone = each[0] if bucket.mask is None else torch.tensor(each, device=rows.device)
    with torch.no_grad():
        decided = decide(method, Tokens(features.detach().float(), mask=bucket.mask), gone)
    return decided.merge(features) if method.merges else decided.gather(features), decided


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _finished(page: Tensor, normalize: bool) -> Tensor:
    return torch.nn.functional.normalize(_wide(page), dim=-1) if normalize else page
