"""Pages and queries as embeddings, late interaction between them, and how alike two rankings of the pages are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from vtc.errors import OptionError
from vtc.eval import common

TOP = 5
QUERIES = 500  # unless told
DRAWN = 4  # vectors of a query that is taken from a page


@dataclass(frozen=True)
class Corpus:
    """Vectors [n, width] of every page and query, and what is known of the queries.

    Attributes:
        relevant: [Q] the one relevant page of each query; None = unknown.
        source: [Q] the page that each query's vectors were taken from, which it must not find; None = not from pages.
    """

    pages: list[Tensor]
    queries: list[Tensor]
    relevant: Tensor | None = None
    source: Tensor | None = None
    about: str = ""

    @cached_property
    def scores(self) -> Tensor:
        """[Q, P] of the pages as they are."""
        return maxsim(self.queries, self.pages)

    def ranked(self, scores: Tensor) -> Tensor:
        """[Q, P] -> the columns that count: without a query's own page [Q, P - 1] if it was taken from one."""
        if self.source is None:
            return scores
        others = torch.arange(scores.shape[1]) != self.source[:, None]
        return scores[others].view(len(scores), -1)


def load(path: Path, queries: int | None, fewest: int) -> Corpus:
    """The corpus of a safetensors file, as `vtc.eval.retrieval.run` describes it; `queries` are taken from the pages if
    it has none of its own, else at most so many of these by the order of their names.

    Raises:
        OptionError: no such file or not readable, fewer than `fewest` pages, a tensor that is not of vectors [n, width]
            of one width, has NaN or nothing but zeros.
    """
    with common.needs("safetensors", "pip install safetensors"):
        from safetensors.torch import load_file
    try:
        held = dict(sorted(load_file(path).items()))
    except Exception as error:  # safetensors has its own error, and the system's come through
        raise OptionError(
            f"embeddings={str(path)!r} cannot be read ({error}): it takes a safetensors file with a tensor "
            "[vectors, width] per page"
        ) from error
    asked = {name: tensor for name, tensor in held.items() if name.startswith("query")}
    pages = {name: tensor for name, tensor in held.items() if name not in asked}
    if len(pages) < fewest:
        raise OptionError(
            f"embeddings={str(path)!r} has {len(pages)} pages and {len(asked)} queries; it takes at least {fewest} "
            "pages, one tensor each, whose names do not begin with 'query'"
        )
    width = Counter(tensor.shape[-1:] for tensor in pages.values()).most_common(1)[0][0]  # the odd one is to blame
    sheets, own = ([_unit(path, name, tensor, width) for name, tensor in part.items()] for part in (pages, asked))
    about = f"{len(sheets)} pages of {path.name}, {describe(sheets)}"
    if own := own[:queries]:
        return Corpus(sheets, own, about=f"{about} {len(own)} queries of the file.")
    taken, source = draw(sheets, queries or QUERIES)
    about += f" {len(taken)} queries of {DRAWN} vectors taken from the pages, each ranking the other pages."
    return Corpus(sheets, taken, source=source, about=about)


def _unit(path: Path, name: str, tensor: Tensor, width: torch.Size) -> Tensor:
    """The rows that are not zero, in float32, of length 1."""
    where = f"embeddings={str(path)!r}: the tensor {name!r}"
    if tensor.ndim != 2 or tensor.shape[1:] != width or not tensor.is_floating_point():
        wanted = f"[vectors, {', '.join(map(str, width))}]"
        raise OptionError(
            f"{where} is {tensor.dtype} {list(tensor.shape)}; pages and queries are floats {wanted}, all of one width"
        )
    rows = tensor.float()
    if not bool(rows.isfinite().all()):
        raise OptionError(f"{where} has NaN or infinity: leave that page out, or encode it again")
    rows = rows[(rows != 0).any(1)]
    if not len(rows):
        raise OptionError(f"{where} has no row that is not zero: leave it out")
    return functional.normalize(rows, dim=-1)


def draw(pages: Sequence[Tensor], count: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """`count` queries of `DRAWN` vectors of a page each, and the pages that they are from, which take turns.

    They are drawn from the half of the page that is least like the mean of all vectors: most of a page is alike, mostly
    blank paper, and a query for that says nothing of a ranking.
    """
    mean = torch.stack([page.mean(0) for page in pages]).mean(0)
    generator = torch.Generator().manual_seed(seed)
    source = torch.arange(count) % len(pages)
    out = []
    for number in source.tolist():
        page = pages[number]
        odd = (page @ mean).argsort(stable=True)[: max(1, len(page) // 2)]
        some = torch.randperm(len(odd), generator=generator)[:DRAWN]
        out.append(page[odd[some]])
    return out, source


def describe(pages: Sequence[Tensor]) -> str:
    """How redundant the pages' vectors are, by their nearest neighbours on their own page."""
    near = []
    for page in pages:
        if len(page) > 1:
            unit = functional.normalize(page, dim=-1)
            near.append((unit @ unit.mT).fill_diagonal_(-2).amax(1))
    if not near:
        return "one vector each."
    each = torch.cat(near)
    mean = sum(map(len, pages)) / len(pages)
    return (
        f"{mean:.0f} vectors each: mean cosine to the nearest {each.mean():.3f}, "
        f"{100 * (each > 0.95).double().mean():.0f} % above .95."
    )


# -- rankings -------------------------------------------------------------------------------------------------------


def maxsim(queries: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
    """[queries, pages]: late interaction of every query [words, width] with every page [vectors, width]."""
    lengths = torch.tensor([len(query) for query in queries])
    owner = torch.arange(len(queries)).repeat_interleave(lengths)
    words = torch.cat(list(queries))
    out = torch.zeros(len(queries), len(vectors))
    for i, page in enumerate(vectors):
        best = torch.cat([(part @ page.mT).amax(1) for part in words.split(4096)])  # 16 MB for a page of 1,024
        out[:, i].index_add_(0, owner, best)
    return out


def ndcg(scores: Tensor, relevant: Tensor, top: int = TOP) -> float:
    """Mean nDCG@top where one page is relevant to each query: 1 / log2(1 + its rank), or 0 behind `top`. Of equal
    scores the page with the lower number comes first. scores [Q, P]; relevant [Q]."""
    mine = scores.gather(1, relevant[:, None])
    earlier = torch.arange(scores.shape[1]) < relevant[:, None]
    rank = 1 + ((scores > mine) | (scores == mine) & earlier).sum(1)
    return torch.where(rank <= top, 1 / (1 + rank).double().log2(), 0.0).mean().item()


def spearman(one: Tensor, other: Tensor) -> float:
    """Mean over the queries of the correlation of two rankings of the pages; equal scores share their mean rank. A
    query whose scores are all equal has no ranking and counts 0. [Q, P] both."""
    ranks = [_ranks(scores) for scores in (one, other)]
    a, b = (rank - rank.mean(1, keepdim=True) for rank in ranks)
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)).mean().item()


def _ranks(scores: Tensor) -> Tensor:
    """Of every value in its row, from 1 on; equal ones get their mean."""
    order = scores.sort(1).values.contiguous()
    scores = scores.contiguous()
    return (torch.searchsorted(order, scores) + torch.searchsorted(order, scores, right=True) + 1).double() / 2


def overlap(one: Tensor, other: Tensor, top: int = TOP) -> float:
    """Mean over the queries of the share of the `top` best pages that are the same. [Q, P] both."""
    first, second = (scores.sort(dim=1, stable=True, descending=True).indices[:, :top] for scores in (one, other))
    return (first[:, :, None] == second[:, None]).any(2).double().mean().item()
