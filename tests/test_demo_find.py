"""The demo's tab *Find* without a browser: the ranking, what answered each word, and where it lies on the page."""

from __future__ import annotations

import re
from html import unescape

import numpy as np
import pytest
import torch

from vtc.errors import OptionError, VTCError
from vtc.eval import retrieval
from vtc.viz.figures import COLOURS

gr = pytest.importorskip("gradio")
pytest.importorskip("transformers")

from vtc.demo import find  # noqa: E402


def _on(page: int, patch: int) -> str | None:
    """The word that covers a patch."""
    sheet = find.sheets()[page]
    number = sheet.cells[patch // 32][patch % 32]
    return sheet.words[number].text if number >= 0 else None


@pytest.fixture(scope="module")
def found() -> list[find.FoundPages]:
    return [find.run(text, keep=1) for text in find.examples()]


def test_a_page_answers_its_own_words(found):
    """The page is the first, before and after, and nearly every marked patch lies on the word that it answered."""
    assert len(found) == find.PAGES == len(set(find.examples()))
    right = []
    for page, one in enumerate(found):
        assert " ".join(one.words) == find.examples()[page]
        assert one.best == page == one.orders[0][0] == one.orders[1][0] and one.ranks(page) == (1, 1)
        for word, answer in zip(one.words, one.answers[0], strict=True):
            assert answer.word == word and len(answer.patches) == 1 and not answer.texts
            right.append(_on(page, answer.patches[0]) == word)
        for side in (0, 1):  # a page's score is the sum of what its words were answered with
            total = sum(answer.score for answer in one.answers[side])
            assert one.scores[side][page].item() == pytest.approx(total, abs=1e-5)
    assert sum(right) > 0.9 * len(right)


def test_clusters_hold_the_patches_that_answered(found):
    """Most clusters that answer have the patch that answered alone, and all have a patch on the word."""
    pairs = [(one, *pair) for one in found for pair in zip(*one.answers, strict=True)]
    assert sum(dense.patches[0] in less.patches for _, dense, less in pairs) > 0.8 * len(pairs)
    on = [less.word in {_on(one.best, patch) for patch in less.patches} for one, _, less in pairs]
    assert sum(on) > 0.9 * len(on)
    assert max(len(less.patches) for *_, less in pairs) > 1
    assert all(one.vectors == (1026, 342) and one.width == 64 and one.pooling > 0 < one.encoding for one in found)


@pytest.mark.parametrize("method", retrieval.METHODS)
def test_every_method(method):
    if "ward" in method:
        pytest.importorskip("scipy")
    one = find.run(find.examples()[1], method, 10)
    assert one.vectors == (1026, 102) and all(answer.patches or answer.texts for answer in one.answers[1])
    for number in (1, find.PAGES - 1):
        assert {*one.ranks(number)} <= {*range(1, find.PAGES + 1)}


def test_nothing_less_is_the_same():
    one = find.run(find.examples()[2], factor=1)
    assert one.answers[0] == one.answers[1] and one.scores[0].equal(one.scores[1]) and one.vectors == (1026, 1026)


@pytest.mark.parametrize("keep, left", [(0.5, 514), (0.25, 258)])
def test_encoded_with_fewer_tokens(keep, left):
    """Every patch is in a vector, text columns are alone, and the model before is as it was."""
    page = find.encoded(4, keep)
    image = find.patches() >= 0
    assert len(page.vectors) == left and image.sum() == 1024 and not image[0] and not image[-1]
    assert page.row.unique().tolist() == [*range(left)]  # each vector has a column, and each column a vector
    assert (page.row[~image][:, None] == page.row).sum() == 2
    _, _, handle = find.reader(keep)
    (again,), _ = retrieval.encode(*find.reader(keep)[:2], [find.sheets()[4]])
    assert again.equal(page.vectors)
    kept = handle.kept[0].nonzero()[:, 0]
    assert page.row[kept].tolist() == [*range(left)]  # a column that stays is the vector of that place
    model, processor, _ = find.reader(1.0)
    (dense,), _ = retrieval.encode(model, processor, [find.sheets()[4]])
    assert dense.equal(find.encoded(4, 1.0).vectors)
    one = find.run(find.examples()[4], keep=keep)
    assert one.best == 4 and one.vectors == (1026, left // 3) and one.ranks(4)[1] <= 2
    # a marked cluster holds whole groups of the encoder
    for answer in one.answers[1]:
        own = {int(page.row[1 + patch]) for patch in answer.patches}
        assert sum(int((page.row == row).sum()) for row in own) == len(answer.patches)


def test_text_of_the_prompt_is_said_and_not_drawn():
    """The prompt's first column answers a query that is its own vector."""
    page = find.encoded(0, 1.0)
    query = page.vectors[:1]
    (answer,) = find.answers(["text"], query, page.vectors, page.row)
    assert answer.patches == () and answer.texts == 1 and answer.score == pytest.approx(1, abs=1e-5)
    both = torch.where(page.row == 5, 0, page.row)  # as if a cluster had joined it and a patch
    (mixed,) = find.answers(["text"], query, page.vectors, both)
    assert mixed.patches == (4,) and mixed.texts == 1
    one = find.run(find.examples()[0])
    parts = ([answer, *one.answers[0][1:]], [mixed, *one.answers[1][1:]])
    one = find.FoundPages(one.words, one.scores, 0, parts, one.vectors, 64, 1.0, 1.0)
    said = find.legend(one)
    assert "text of the prompt, not the picture → a patch and text of the prompt" in said
    assert np.asarray(find.mark(one, False)).shape == (1024 + find.ROOM, 1024, 3)


def test_the_picture_is_marked_where_the_patch_is(found):
    """Outlines of a word's colour lie around its patches and nowhere else, but for the number."""
    one = found[3]
    for pooled in (False, True):
        drawn = np.asarray(find.mark(one, pooled)).astype(int)
        for number, answer in enumerate(one.answers[pooled]):
            colour = [int(COLOURS[number][i : i + 2], 16) for i in (1, 3, 5)]
            marked = (drawn == colour).all(-1)[find.ROOM :].reshape(32, 32, 32, 32).any((1, 3)).reshape(-1)
            assert marked[list(answer.patches)].all()
            near = {patch + dy * 32 + dx for patch in answer.patches for dy in (-2, -1, 0, 1) for dx in (-1, 0, 1)}
            assert {*marked.nonzero()[0].tolist()} <= near


def test_one_patch_for_two_words_is_striped():
    word = find.run("wolf crown wolf", factor=25)
    first, _, third = word.answers[0]
    assert first.patches == third.patches
    y, x = divmod(first.patches[0], 32)
    pixels = np.asarray(find.mark(word, False)).astype(int)[find.ROOM :]
    left, right = pixels[32 * y + 16, 32 * x + 8], pixels[32 * y + 16, 32 * x + 24]
    assert abs(left - right).max() > 20


def test_what_is_written(found):
    one = found[3]
    numbers, words, table = find.figures(one), unescape(find.legend(one)), unescape(find.ranking(one))
    for text in ("1,026 → 342", "131 → 44", "33% are left", "<strong>3</strong>"):
        assert text in numbers
    assert words.count("vtc-card") == len(one.words) and all(word in words for word in one.words)
    assert "1 → 1" in table and "all of the words" in table and 6 <= table.count("<tr>") <= 11
    low = find.run(find.examples()[3], "random", 25)
    assert re.search(r"\d+ → \d+ [↑↓]", find.ranking(low))


def test_queries_that_are_refused():
    assert find.words_of(" Brick, (brown)!") == ("brick", "brown")
    for text, said in (
        ("", "no query"),
        (" ?! ", "no query"),
        ("brick " * 9, "9 words; at most 8"),
        ("brick zzz brown Foo zzz", "unknown: zzz, foo. The small model knows only the 327"),
        ("<b>", "unknown: <b>"),
    ):
        with pytest.raises(OptionError, match=re.escape(said)):
            find.words_of(text)
    for options in ({"method": "visionzip"}, {"method": "tomme"}, {"factor": 0.5}, {"keep": 0.0}):
        with pytest.raises(VTCError):
            find.run("brick", **options)


def test_the_tab_builds_lazily_and_its_function_answers(monkeypatch):
    """Building it loads no model; the function behind the button gives all that is shown, and counts its progress."""
    find.reader.cache_clear()
    with gr.Blocks() as demo:
        find.build()
    assert find.reader.cache_info().currsize == 0
    (job,) = [fn for fn in demo.fns.values() if fn.concurrency_id == "model"]
    assert all(fn.api_visibility == "private" for fn in demo.fns.values()) and len(job.targets) == 2
    ticks = []
    shown = job.fn("puzzle wolf", "tome", 3, 0.5, lambda *given, **_: ticks.append(given[0]))
    assert ticks == [0, *((i + 1, 2 * find.PAGES) for i in range(2 * find.PAGES))]
    assert len(shown) == len(job.outputs) == 5 and "1,026 → 171" in shown[0]
    assert shown[2]["visible"] and "all vectors" in shown[2]["label"] and shown[3]["value"].width == 1024
    with pytest.raises(gr.Error, match="unknown: zzz"):
        job.fn("zzz", "tome", 3, 1.0, lambda *_, **__: None)
    (pick,) = [fn for fn in demo.fns.values() if fn.name == "pick"]
    event = type("Event", (), {"index": 5})
    assert pick.fn(event) == find.examples()[5]
