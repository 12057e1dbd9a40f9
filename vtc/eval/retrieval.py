"""Page retrieval with fewer vectors a page: late interaction over rendered pages, encoded by a small ColQwen2 that is
part of vtc, without a network. Or, without any model, over the embeddings of a corpus of your own.

    vtc eval retrieval --out out/retrieval
    vtc eval retrieval --embeddings corpus.safetensors

A page's score for a query is the sum, over the query's vectors, of the highest dot product with a vector of the page.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import vtc
from vtc.errors import OptionError
from vtc.eval import common, corpus
from vtc.eval import pages as drawn
from vtc.eval.common import Results
from vtc.eval.corpus import TOP, Corpus, maxsim, ndcg, overlap, spearman
from vtc.retrieval import pool

METHODS = ("dpc_knn", "ward", "tome+ward", "tome", "pitome", "divprune", "random")
FACTORS = (2, 3, 5, 10, 25)
KEEP = (0.5, 0.25)
ENCODERS = ("divprune", "dpc_knn", "tome", "random")  # of the methods, those that also reduce what the decoder reads
THEN = 3  # factor of the pooling behind an encoder with fewer tokens
PEER = "sentence-transformers"  # its own pooling by Ward's clustering, measured where it is installed
FEWEST = TOP + 1  # pages: of five, any order has the right top five


def run(
    pages: int | None = None,
    queries: int | None = None,
    methods: Sequence[str] | None = None,
    factors: Sequence[float] = FACTORS,
    keep: Sequence[float] | None = None,
    embeddings: str | Path | None = None,
    out: str | Path | None = None,
    progress: bool = False,
) -> Results:
    """Measure what retrieval loses: by pooling a page's vectors, by encoding it with fewer tokens, and by both.

    Args:
        pages: how many to draw, of 512 x 512 pixels and 1,024 tokens each; None = 160.
        queries: how many; None = 500. Each is 3 to 5 neighbouring words of a page. That page alone counts as relevant,
            although others may have the same words elsewhere: even a perfect reader gets some queries wrong.
        methods: of pooling; None = `METHODS`, and sentence-transformers' if it is installed. Those of `ENCODERS` also
            say which tokens the encoder's decoder reads.
        factors: how many times fewer vectors.
        keep: fractions of the tokens that the decoder reads; None = .5 and .25, () = poolings only.
        embeddings: instead of drawn pages, a safetensors file with one tensor [vectors, width] per page, under any
            names. Tensors whose names begin with "query" are queries (at most `queries` of them; None = all). Without
            any, `queries` queries are taken from the pages: four vectors of a page, of the half that is least like the
            mean of all vectors (which is mostly blank paper). The page itself is left out of the ranking, since it
            holds exactly these; so they ask which other pages have similar places, which is not how a text asks. Rows
            of zeros are padding; all others are scaled to length 1. Without labels there is no nDCG.
        out: folder for retrieval.csv, .md and .png; None = write nothing.

    Raises:
        OptionError: an option out of range, an unknown method, a file that is no such corpus.
    """
    named = _methods(methods)
    factors = _factors(factors)
    if queries is not None:
        _count("queries", queries, 1)
    if embeddings is not None:
        for name, value in (("pages", pages), ("keep", keep)):
            if value is not None:
                raise OptionError(f"{name}={value!r} is for drawn pages, and embeddings= replaces them: drop one")
        held = corpus.load(Path(embeddings), queries, FEWEST)
        with common.bar(len(named) * len(factors), "pooling", progress) as pooling:
            rows = list(_pooled(held, named, factors, pooling))
        return _results(rows, f"{held.about} {common.environment()}.", False, out)

    pages = _count("pages", 160 if pages is None else pages, FEWEST)
    keep = KEEP if keep is None else common.check_levels(keep) if len(keep) else ()
    from vtc.checkpoints.tiny import tiny_colqwen

    model, processor = tiny_colqwen()
    sheets = [drawn.page(number) for number in range(pages)]
    asked = drawn.queries(sheets, queries or corpus.QUERIES)
    encoders = [name for name in named if name in ENCODERS]
    with common.bar(pages * (1 + len(encoders) * len(keep)), "encoding", progress) as bar:
        vectors, seconds = encode(model, processor, sheets, bar)
        held = Corpus(vectors, ask(model, processor, asked), torch.tensor([query.page for query in asked]))
        rows = [{"stage": "dense", "method": "dense", **_row(held, vectors, seconds)}]
        with common.bar(len(named) * len(factors), "pooling", progress) as pooling:
            rows += _pooled(held, named, factors, pooling)
        for name in encoders:
            for level in keep:
                with vtc.compress(model, name, keep=level):
                    fewer, seconds = encode(model, processor, sheets, bar)
                budget = {"method": name, "keep": level}
                rows.append({"stage": "encoded", **budget, **_row(held, fewer, seconds)})
                again, more = _timed(lambda vectors: pool(vectors, factor=THEN), fewer)
                both = {"stage": "encoded, pooled", **budget, "factor": THEN}
                rows.append({**both, **_row(held, again, seconds + more)})
    about = (
        f"{pages} drawn pages of 1,024 tokens, {len(asked)} queries of 3 to 5 neighbouring words, late interaction, a "
        f"ColQwen2 of a million parameters; unpooled nDCG@5 {rows[0]['ndcg']:.3f}. {corpus.describe(vectors)} "
        '"pooled": ms is the time of the pooling; "encoded": of the model, whose decoder reads that fraction of the '
        f'tokens; "encoded, pooled": of the model, then of dpc_knn by {THEN}. {common.environment()}.'
    )
    return _results(rows, about, True, out)


def _results(rows: list[dict[str, Any]], about: str, labels: bool, out: str | Path | None) -> Results:
    columns = {"stage": "stage", "method": "method", "keep": "keep", "factor": "factor"}
    columns |= {"vectors": "vectors a page", "ms": "ms a page"}
    if labels:
        columns |= {"ndcg": "nDCG@5", "ndcg_dense": "/ dense", "ndcg_signs": "/ dense, sign bits"}
    else:
        columns = {k: v for k, v in columns.items() if k not in ("stage", "keep")}
    columns |= {"spearman": "Spearman", "overlap": "top-5 overlap", "score": "score / dense"}
    results = Results("retrieval", rows, columns, about, notes={"draw": draw})
    if out is not None:
        results.write(out)
    return results


# -- encoding -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def encode(
    model: nn.Module, processor: Any, sheets: Sequence[drawn.Page], bar: Any = None
) -> tuple[list[Tensor], float]:
    """The vectors of every page, and the seconds that the model took for all."""
    out, seconds = [], 0.0
    for sheet in sheets:
        inputs = processor.process_images([sheet.image])
        start = time.perf_counter()
        found = model(**inputs).embeddings[0]
        seconds += time.perf_counter() - start
        out.append(found[(found != 0).any(-1)].float())
        if bar is not None:
            bar.update()
    return out, seconds


@torch.inference_mode()
def ask(model: nn.Module, processor: Any, asked: Sequence[drawn.Query]) -> list[Tensor]:
    """The vectors of every query, one per word."""
    out = []
    for query in asked:
        ids = processor.tokenizer(processor.query_prefix + query.text, return_tensors="pt").input_ids
        out.append(model(input_ids=ids).embeddings[0, -len(query.words) :].float())
    return out


# -- pooling --------------------------------------------------------------------------------------------------------


def _pooled(held: Corpus, named: Sequence[str], factors: Sequence[float], bar: Any) -> Iterator[dict[str, Any]]:
    for name in named:
        for factor in factors:
            fewer, seconds = _timed(_pooling(name, factor), held.pages)
            yield {"stage": "pooled", "method": name, "factor": factor, **_row(held, fewer, seconds)}
            bar.update()


def _pooling(name: str, factor: float) -> Callable[[list[Tensor]], list[Tensor]]:
    if name != PEER:
        return lambda vectors: pool(vectors, factor=factor, method=name)
    peer = _peer()
    assert peer is not None
    clustering = peer(pool_factor=factor, num_protected_tokens=0)
    return lambda vectors: list(clustering.pool(vectors))


@cache
def _peer() -> Any:
    """sentence-transformers' pooling; None where it is not installed, or older than 6."""
    try:
        from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling
    except ImportError:
        return None
    return HierarchicalTokenPooling


def _timed(pooling: Callable[[list[Tensor]], list[Tensor]], vectors: list[Tensor]) -> tuple[list[Tensor], float]:
    start = time.perf_counter()
    fewer = pooling(vectors)
    return fewer, time.perf_counter() - start


# -- measures -------------------------------------------------------------------------------------------------------


def _row(held: Corpus, vectors: Sequence[Tensor], seconds: float) -> dict[str, Any]:
    """What pages with these vectors are worth, compared to the pages as they are."""
    scores = maxsim(held.queries, vectors)
    row: dict[str, Any] = {"vectors": round(sum(map(len, vectors)) / len(vectors))}
    row["ms"] = 1000 * seconds / len(vectors)
    if held.relevant is not None:
        signs = maxsim(held.queries, [functional.normalize(page.sign(), dim=-1) for page in vectors])
        row["ndcg"], whole = ndcg(scores, held.relevant), ndcg(held.scores, held.relevant)
        # of a reader that finds nothing nothing can be lost
        row["ndcg_dense"] = row["ndcg"] / whole if whole else None
        row["ndcg_signs"] = ndcg(signs, held.relevant) / whole if whole else None
    dense = held.ranked(held.scores)
    scores = held.ranked(scores)
    row["spearman"] = spearman(dense, scores)
    row["overlap"] = overlap(dense, scores)
    row["score"] = (scores.double().mean() / dense.double().mean()).item()
    return row


# -- options --------------------------------------------------------------------------------------------------------


def _methods(methods: Sequence[str] | None) -> tuple[str, ...]:
    if methods is None:
        methods = METHODS if _peer() is None else (*METHODS, PEER)
    if not methods:
        raise OptionError(f"methods={methods!r}: name at least one of {', '.join((*METHODS, PEER))}")
    for name in methods:
        if name != PEER:
            pool([torch.eye(4)], factor=2, method=name)  # refuses now what it would refuse after minutes of encoding
        elif _peer() is None:
            raise common.MissingDataError(f"{PEER} 6 is not installed: pip install 'sentence-transformers>=6'")
    return tuple(dict.fromkeys(methods))


def _factors(factors: Sequence[float]) -> tuple[float, ...]:
    if not factors or any(isinstance(f, bool) or not isinstance(f, (int, float)) or not f > 1 for f in factors):
        raise OptionError(f"factors={factors!r}: give numbers above 1, such as 2 3 10: how many times fewer vectors")
    return tuple(dict.fromkeys(int(f) if f == int(f) else float(f) for f in factors))


def _count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        why = "of five pages any order has the right top five" if least == FEWEST else "whole numbers"
        raise OptionError(f"{name}={value!r}: it takes a whole number >= {least} ({why})")
    return value


# -- figure ---------------------------------------------------------------------------------------------------------


def draw(rows: Sequence[dict[str, Any]]) -> Any:
    """Rank correlation, and nDCG where there are labels, else the top five, over the vectors that are left; a line per
    pooling."""
    with common.needs("matplotlib"):
        from matplotlib.figure import Figure
    own = [row for row in rows if row["stage"] == "pooled"]
    measures = {"spearman": "Spearman to unpooled"}
    measures |= {"ndcg_dense": "nDCG@5 / unpooled"} if own[0].get("ndcg_dense") else {"overlap": "top-5 overlap"}
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(measures))
    ticks = sorted({row["vectors"] for row in own})
    for axis, (key, label) in zip(panels, measures.items(), strict=True):
        common.lines(axis, own, key, "vectors")
        axis.set_xscale("log")
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set(xlabel="vectors a page", ylabel=label)
    panels[0].legend(fontsize=8)
    return figure


__all__ = ["ask", "draw", "encode", "run"]
