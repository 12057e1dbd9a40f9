"""`vtc eval retrieval`: pages, measures against values by hand, the small retriever, and a corpus of one's own."""

from __future__ import annotations

import csv
import math
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")
from vtc.errors import OptionError, VTCError
from vtc.eval import common, corpus, pages, retrieval
from vtc.eval.corpus import maxsim, ndcg, overlap, spearman

# -- pages ----------------------------------------------------------------------------------------------------------


def test_a_page_is_the_same_every_time_and_another_number_another_page():
    one, again, other = pages.page(3), pages.page(3), pages.page(4)
    assert one.image.tobytes() == again.image.tobytes() and one.words == again.words
    assert one.image.size == (512, 512) and one.image.mode == "RGB"
    assert one.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("size", [(512, 512), (256, 256), (256, 320)])
def test_words_are_where_they_are_said_to_be(size: tuple[int, int]):
    blank = []
    for number in range(6):
        page = pages.page(number, size)
        assert page.words and all(word.text in pages.WORDS for word in page.words)
        for left, top, right, bottom in (word.box for word in page.words):
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
            ink = page.image.convert("L").crop((left, top, right, bottom)).getextrema()
            assert ink[0] < 120 < ink[1]  # letters on paper
        for a, b in combinations((word.box for word in page.words), 2):
            assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])
        assert all(a.line < b.line or a.box[2] < b.box[0] for a, b in pairwise(page.words))  # in reading order
        blank += [cell < 0 for row in page.cells for cell in row]
    assert 0.4 < sum(blank) / len(blank) < 0.8


def test_cells_name_the_word_that_covers_them():
    page = pages.page(0)
    for row, line in enumerate(page.cells):
        for column, number in enumerate(line):
            if number >= 0:
                left, top, right, bottom = page.words[number].box
                assert left < 16 * (column + 1) and right > 16 * column and top < 16 * (row + 1) and bottom > 16 * row
    assert {number for line in page.cells for number in line} - {-1} == set(range(len(page.words)))


def test_queries_are_neighbours_on_their_page():
    sheets = [pages.page(number, (256, 256)) for number in range(5)]
    asked = pages.queries(sheets, 23)
    assert asked == pages.queries(sheets, 23) != pages.queries(sheets, 23, seed=1)
    assert [query.page for query in asked] == [i % 5 for i in range(23)]
    for query in asked:
        assert 3 <= len(query.words) <= 5
        assert any(f" {query.text} " in f" {' '.join(line)} " for line in sheets[query.page].runs)


@pytest.mark.parametrize(("number", "size"), [(-1, (512, 512)), (1.5, (512, 512)), (0, (500, 512)), (0, (128, 256))])
def test_pages_refuse(number: int, size: tuple[int, int]):
    with pytest.raises(OptionError, match=r"number=|size="):
        pages.page(number, size)


# -- measures -------------------------------------------------------------------------------------------------------


def test_late_interaction_by_hand():
    queries = [torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[1.0, 1]])]
    vectors = [torch.tensor([[3.0, 0], [0, 1]]), torch.tensor([[1.0, 1]])]
    torch.testing.assert_close(maxsim(queries, vectors), torch.tensor([[5.0, 3.0], [3.0, 2.0]]))


def test_ndcg_by_hand():
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4], [4, 5, 6, 7, 8, 9], [1, 1, 1, 0, 0, 0], [3, 2, 1, 0, 0, 0]])
    relevant = torch.tensor([0, 0, 2, 1])  # ranks 1, 6, 3 (after two equal ones) and 2
    expected = (1 + 0 + 1 / math.log2(4) + 1 / math.log2(3)) / 4
    assert ndcg(scores, relevant) == pytest.approx(expected)


def test_spearman_is_scipys_also_with_ties():
    stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    one, other = torch.randn(6, 30), torch.randn(6, 30).round(decimals=0)
    expected = sum(stats.spearmanr(a, b).statistic for a, b in zip(one, other, strict=True)) / 6
    assert spearman(one, other) == pytest.approx(expected, abs=1e-9)
    assert spearman(one, 2 * one + 1) == pytest.approx(1.0)
    assert spearman(one, -one) == pytest.approx(-1.0)
    assert spearman(one, torch.ones(6, 30)) == 0


def test_overlap_by_hand():
    one = torch.tensor([[6.0, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1]])
    other = torch.tensor([[2.0, 3, 4, 5, 6, 1], [1, 2, 3, 4, 5, 6]])  # the same five; four of them
    assert overlap(one, other) == pytest.approx((5 + 4) / 10)


def test_a_query_does_not_rank_the_page_it_was_taken_from():
    held = corpus.Corpus([], [], source=torch.tensor([1, 0]))
    scores = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    assert held.ranked(scores).tolist() == [[1.0, 3.0], [5.0, 6.0]]


# -- the small retriever --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def retriever():
    pytest.importorskip("transformers")
    from vtc.checkpoints.tiny import tiny_colqwen

    return tiny_colqwen()


def test_the_retriever_finds_pages(retriever):
    sheets = [pages.page(number, (256, 256)) for number in range(20)]
    asked = pages.queries(sheets, 40)
    vectors, seconds = retrieval.encode(*retriever, sheets)
    assert seconds > 0 and {tuple(page.shape) for page in vectors} == {(258, 64)}
    torch.testing.assert_close(vectors[0].norm(dim=1), torch.ones(258))
    queries = retrieval.ask(*retriever, asked)
    assert [len(query) for query in queries] == [len(query.words) for query in asked]
    found = ndcg(maxsim(queries, vectors), torch.tensor([query.page for query in asked]))
    assert found > 0.6  # by chance .15


def test_the_retriever_is_a_colqwen2_of_transformers(retriever):
    model, processor = retriever
    assert type(model).__name__ == "ColQwen2ForRetrieval" and not model.training
    page = pages.page(0, (256, 256))
    inputs = processor.process_images([page.image])
    queries = processor.process_queries([page.words[0].text])
    with torch.inference_mode():
        scores = processor.score_retrieval(model(**queries).embeddings, model(**inputs).embeddings)
    assert scores.shape == (1, 1) and bool(scores.isfinite().all())


def test_the_measurement(retriever, tmp_path, monkeypatch):
    import vtc.checkpoints.tiny as tiny

    small = pages.page
    monkeypatch.setattr(tiny, "tiny_colqwen", lambda: retriever)
    monkeypatch.setattr(pages, "page", lambda number: small(number, (256, 256)))
    results = retrieval.run(pages=6, queries=12, methods=["tome", "random"], factors=[2, 4], keep=[0.5], out=tmp_path)
    stages = [(row["stage"], row["method"]) for row in results.rows]
    assert stages[:5] == [("dense", "dense"), *[("pooled", name) for name in ("tome", "tome", "random", "random")]]
    assert stages[5:] == [(stage, name) for name in ("tome", "random") for stage in ("encoded", "encoded, pooled")]
    dense = results.rows[0]
    assert dense["vectors"] == 258 and dense["spearman"] == pytest.approx(1) and dense["ndcg_dense"] == 1
    assert [row["vectors"] for row in results.rows[1:5]] == [129, 64, 129, 64]
    assert results.rows[5]["vectors"] == 130 and results.rows[6]["vectors"] == 43
    assert all(0 < row["ms"] and -1 <= row["spearman"] <= 1 and 0 <= row["overlap"] <= 1 for row in results.rows)
    with (tmp_path / "retrieval.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(results.rows)
    assert (tmp_path / "retrieval.png").stat().st_size > 1000
    assert "| pooled | tome |" in str(results)


# -- a corpus of one's own ------------------------------------------------------------------------------------------


def written(path, **more: torch.Tensor):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    held = {f"page {i}": torch.randn(20 + i, 8) for i in range(8)}
    save_file({name: tensor for name, tensor in (held | more).items() if tensor is not None}, path)
    return path


def test_a_corpus_without_queries(tmp_path):
    path = written(tmp_path / "corpus.safetensors")
    results = retrieval.run(embeddings=path, queries=10, methods=["tome", "random"], factors=[2], out=tmp_path)
    assert [row["method"] for row in results.rows] == ["tome", "random"]
    assert "ndcg" not in results.rows[0] and "nDCG" not in str(results)
    assert "taken from the pages" in results.about
    assert all(0 < row["spearman"] < 1 and 0 < row["overlap"] <= 1 for row in results.rows)
    again = retrieval.run(embeddings=path, queries=10, methods=["tome", "random"], factors=[2])
    kept = ("spearman", "overlap", "score", "vectors")
    assert [[row[k] for k in kept] for row in results.rows] == [[row[k] for k in kept] for row in again.rows]


def test_the_peer_has_a_row_where_it_is_installed(tmp_path, monkeypatch):
    class Every:
        def __init__(self, pool_factor: float, num_protected_tokens: int) -> None:
            assert num_protected_tokens == 0
            self.step = int(pool_factor)

        def pool(self, embeddings: list[torch.Tensor]) -> list[torch.Tensor]:
            return [page[:: self.step] for page in embeddings]

    path = written(tmp_path / "corpus.safetensors")
    monkeypatch.setattr(retrieval, "_peer", lambda: None)
    with pytest.raises(common.MissingDataError, match="pip install 'sentence-transformers"):
        retrieval.run(embeddings=path, methods=[retrieval.PEER])
    monkeypatch.setattr(retrieval, "_peer", lambda: Every)
    results = retrieval.run(embeddings=path, queries=4, factors=[2])
    assert [row["method"] for row in results.rows] == [*retrieval.METHODS, retrieval.PEER]


def test_a_corpus_with_queries_and_padding(tmp_path):
    padded = torch.cat([torch.randn(9, 8), torch.zeros(5, 8)]).half()
    path = written(tmp_path / "corpus.safetensors", extra=padded, query_a=torch.randn(3, 8), query_b=torch.randn(2, 8))
    held = corpus.load(path, None, 6)
    assert len(held.pages) == 9 and [len(query) for query in held.queries] == [3, 2] and held.source is None
    assert sorted(map(len, held.pages)) == [9, *range(20, 28)]
    assert all(page.dtype == torch.float32 for page in held.pages)
    results = retrieval.run(embeddings=path, methods=["random"], factors=[2])
    assert "2 queries of the file" in results.about
    assert len(corpus.load(path, 1, 6).queries) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"bad": torch.randn(4, 9)}, "'bad' is torch.float32 .* all of one width"),
        ({"bad": torch.randn(2, 4, 8)}, r"'bad' is torch.float32 \[2, 4, 8\]"),
        ({"bad": torch.ones(4, 8, dtype=torch.long)}, "'bad' is torch.int64"),
        ({"bad": torch.full((4, 8), math.nan)}, "'bad' has NaN"),
        ({"query": torch.zeros(4, 8)}, "'query' has no row that is not zero"),
        ({f"page {i}": None for i in range(4)}, "4 pages and 0 queries; it takes at least 6"),
    ],
)
def test_a_corpus_that_is_none(tmp_path, more: dict[str, torch.Tensor], message: str):
    with pytest.raises(OptionError, match=message):
        retrieval.run(embeddings=written(tmp_path / "corpus.safetensors", **more))


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "text.safetensors").write_text("no tensors here")
    for name in ("text.safetensors", "missing.safetensors"):
        with pytest.raises(OptionError, match=f"{name}.*cannot be read"):
            retrieval.run(embeddings=tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pages": 5}, "pages=5"),
        ({"queries": 0}, "queries=0"),
        ({"queries": True}, "queries=True"),
        ({"factors": [1]}, r"factors=\[1\]"),
        ({"factors": []}, r"factors=\[\]"),
        ({"methods": []}, r"methods=\[\]"),
        ({"methods": ["wards"]}, "wards"),
        ({"keep": [0]}, r"levels=\[0\]"),
        ({"embeddings": "corpus.safetensors", "pages": 160}, "pages=160 is for drawn pages"),
        ({"embeddings": "corpus.safetensors", "keep": [0.5]}, r"keep=\[0.5\] is for drawn pages"),
    ],
)
def test_options_out_of_range(options: dict, message: str):
    with pytest.raises(VTCError, match=message):
        retrieval.run(**options)


def test_the_page_says_what_the_results_say(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "tools"))
    import retrieval_page

    shown = retrieval_page.PAGE.read_text().split("<!-- retrieval -->\n")[1].split("\n<!-- /retrieval -->")[0]
    assert shown.split("\n") == retrieval_page.lines(), "run tools/retrieval_page.py"
