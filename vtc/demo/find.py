"""The tab *Find*: pages, a query, and which vectors answered it, before and after they became fewer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from html import escape
from statistics import median
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from torch import Tensor

import vtc
from vtc.bench.timing import Tick, shared_copy
from vtc.checkpoints.tiny import tiny_colqwen
from vtc.demo import look
from vtc.errors import OptionError
from vtc.eval import pages as drawn
from vtc.eval import retrieval
from vtc.eval.corpus import TOP, maxsim
from vtc.methods import METHODS
from vtc.retrieval import pool
from vtc.retrieval.pooling import CLUSTERING
from vtc.viz.figures import COLOURS

PAGES = 16
LONGEST = len(COLOURS)  # maximum words of a query: each has a colour of its own
ENCODER = "dpc_knn"  # which tokens the reader's decoder gets; it drops nothing, so every patch has a place
KEEP = (1.0, 0.5, 0.25)
LARGEST = 25  # factor of the pooling
SCALE = 2  # a page is drawn larger than it is, so that marks are fine
TINT, PALE = 0.42, 0.72
ROOM = 64  # pixels above a page for the label that Gradio lays over a picture

# Four small pages in a row, below the label: Gradio makes none narrower than 100 pixels, and cuts the last one off.
CSS = """
#find-pages .grid-wrap { padding-top: 34px; min-height: 0 !important; }
#find-pages .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)); grid-template-rows: none;
  grid-auto-rows: auto; }
"""


@dataclass(frozen=True, eq=False)
class EncodedPage:
    """A page's vectors [n, width]; `row` [columns]: in which of them each column of the page's prompt ended, -1 = in
    none; the seconds that the model took."""

    vectors: Tensor
    row: Tensor
    seconds: float


@dataclass(frozen=True)
class WordAnswer:
    """What answered a word on a page: the vector's score, the patches of the picture that it stands for, and how many
    columns of the prompt's own text."""

    word: str
    score: float
    patches: tuple[int, ...]
    texts: int = 0


@dataclass(frozen=True, eq=False)
class FoundPages:
    """The results for one query. Pairs are (before, after): `scores` of all pages; `answers` on page `best`, one per
    word; `vectors` per page. `width`: values of a vector. `encoding`, with fewer tokens if that was asked for, and
    `pooling`: seconds per page."""

    words: tuple[str, ...]
    scores: tuple[Tensor, Tensor]
    best: int
    answers: tuple[list[WordAnswer], list[WordAnswer]]
    vectors: tuple[float, float]
    width: int
    encoding: float
    pooling: float

    @cached_property
    def orders(self) -> tuple[list[int], list[int]]:
        """The pages, best first; of equals the lower number."""
        before, after = (scores.sort(descending=True, stable=True).indices.tolist() for scores in self.scores)
        return before, after

    def ranks(self, number: int) -> tuple[int, int]:
        """Of a page, from 1 on."""
        before, after = (order.index(number) + 1 for order in self.orders)
        return before, after


# -- the corpus -----------------------------------------------------------------------------------------------------


@cache
def sheets() -> list[drawn.Page]:
    return [drawn.page(number) for number in range(PAGES)]


@cache
def examples() -> list[str]:
    """For each page a query: a few neighbouring words of its own."""
    return [query.text for query in drawn.queries(sheets(), PAGES)]


@cache
def reader(keep: float) -> tuple[Any, Any, Any]:
    """The model, whose decoder reads this fraction of a page's tokens, its processor, and the handle (None = dense)."""
    if keep == 1:
        return *tiny_colqwen(), None
    model, processor, _ = reader(1.0)
    model = shared_copy(model)
    return model, processor, vtc.compress(model, ENCODER, keep=keep)


@cache
def patches() -> Tensor:
    """[columns] of a page's prompt: which patch of the picture each is, -1 = text."""
    processor = reader(1.0)[1]
    image = processor.process_images([sheets()[0].image])["input_ids"][0] == processor.image_token_id
    return torch.where(image, image.cumsum(0) - 1, -1)


@cache  # 300 kB a page
def encoded(number: int, keep: float) -> EncodedPage:
    model, processor, handle = reader(keep)
    (vectors,), seconds = retrieval.encode(model, processor, [sheets()[number]])
    if handle is None:
        return EncodedPage(vectors, torch.arange(len(vectors)), seconds)
    kept, token_map, patch = handle.kept[0], handle.token_map, patches()
    at = torch.where(kept, kept.cumsum(0) - 1, -1)  # of a column that is itself a vector; the others joined one
    group = token_map.group[0]
    column = (patch >= 0).nonzero()[:, 0][token_map.anchor[0, group.clamp(min=0)]]  # of the anchor of every patch
    joined = torch.where(group >= 0, at[column], -1)
    return EncodedPage(vectors, torch.where(patch >= 0, joined[patch.clamp(min=0)], at), seconds)


# -- a query --------------------------------------------------------------------------------------------------------


def words_of(text: str) -> tuple[str, ...]:
    """The words of a query, in small letters.

    Raises:
        OptionError: no words, more than LONGEST, or some that the model does not know.
    """
    words = tuple(filter(None, (word.strip(".,;:!?\"'()").lower() for word in text.split())))
    if not words:
        raise OptionError("there is no query: write words, or click on a page")
    if len(words) > LONGEST:
        raise OptionError(f"the query has {len(words)} words; at most {LONGEST} are taken here")
    unknown = list(dict.fromkeys(word for word in words if word not in drawn.WORDS))
    if unknown:
        raise OptionError(
            f"unknown: {', '.join(word[:40] for word in unknown)}. The small model knows only the {len(drawn.WORDS)} "
            "words that its pages are made of; click on a page for words that it has"
        )
    return words


def run(
    text: str, method: str = "dpc_knn", factor: float = 3, keep: float = 1.0, *, tick: Tick | None = None
) -> FoundPages:
    """The pages for a query: with all vectors, and with those that are left of a page which is encoded with `keep` of
    its tokens and then pooled. `tick` is called 2 PAGES times, once for each page in both ways.

    Raises:
        OptionError: as `words_of` and `vtc.retrieval.pool`.
    """
    words = words_of(text)
    pool([torch.eye(2)], factor, method=method)  # refuses now what it would refuse after seconds of encoding
    dense, fewer = _every(1.0, tick), _every(float(keep), tick)
    (query,) = retrieval.ask(*reader(1.0)[:2], [drawn.Query(words, 0)])
    whole, vectors = ([page.vectors for page in each] for each in (dense, fewer))
    pool(vectors[:1], factor, method=method)  # a first call is slower
    start = time.perf_counter()
    pooled, maps = pool(vectors, factor, method=method, maps=True)
    seconds = time.perf_counter() - start

    scores = [maxsim([query], each)[0] for each in (whole, pooled)]
    best = int(scores[0].argmax())
    row = fewer[best].row
    where = torch.where(row >= 0, maps[best].group[0, row.clamp(min=0)], -1)
    return FoundPages(
        words,
        (scores[0], scores[1]),
        best,
        (answers(words, query, whole[best], dense[best].row), answers(words, query, pooled[best], where)),
        (_mean(whole), _mean(pooled)),
        query.shape[1],
        median(page.seconds for page in fewer),
        seconds / PAGES,
    )


def answers(words: Sequence[str], query: Tensor, vectors: Tensor, row: Tensor) -> list[WordAnswer]:
    """Of every word, the vector of a page with the highest dot product, of equals the first. query [words, width];
    vectors [n, width]; row [columns]: the vector that each column of the page's prompt ended in, -1 = none."""
    found = []
    for word, products in zip(words, query @ vectors.mT, strict=True):
        best = int(products.argmax())
        columns = patches()[row == best]
        members = columns[columns >= 0].tolist()
        found.append(WordAnswer(word, float(products[best]), tuple(members), int((columns < 0).sum())))
    return found


def _every(keep: float, tick: Tick | None) -> list[EncodedPage]:
    out = []
    for number in range(PAGES):
        out.append(encoded(number, keep))
        if tick is not None:
            tick()
    return out


def _mean(vectors: Sequence[Tensor]) -> float:
    return sum(map(len, vectors)) / len(vectors)


# -- what is shown --------------------------------------------------------------------------------------------------


def mark(found: FoundPages, pooled: bool) -> Image.Image:
    """The best page with some room above, pale but for the patches that answered: each in the colour of its word, in
    stripes of several words. A word's number is at the patch that answers among all vectors, if it is still there."""
    sheet, said = sheets()[found.best], found.answers[pooled]
    cell, columns = SCALE * drawn.CELL, sheet.image.width // drawn.CELL
    large = [SCALE * side for side in sheet.image.size]
    clear = np.asarray(sheet.image.resize((large[0], large[1]), Image.Resampling.LANCZOS), dtype=np.float64)
    pixels = 255 * PALE + (1 - PALE) * clear
    words: dict[int, list[int]] = {}
    for word, answer in enumerate(said):
        for patch in answer.patches:
            words.setdefault(patch, []).append(word)
    lines = []
    for patch, own in words.items():
        top, left = (cell * at for at in divmod(patch, columns))
        bottom, right = top + cell, left + cell
        for i, word in enumerate(own):
            stripe = slice(left + i * cell // len(own), left + (i + 1) * cell // len(own))
            part, tint = (slice(top, bottom), stripe), np.array(ImageColor.getrgb(COLOURS[word]))
            pixels[part] = (1 - TINT) * clear[part] + TINT * tint
        # a line along every side where the next patch answered other words
        beside = {
            (left, top, left, bottom): patch - 1 if left else -1,
            (right, top, right, bottom): patch + 1 if right < large[0] else -1,
            (left, top, right, top): patch - columns,
            (left, bottom, right, bottom): patch + columns,
        }
        lines += [(side, COLOURS[own[0]]) for side, other in beside.items() if words.get(other) != own]
    picture = ImageOps.expand(Image.fromarray(pixels.round().astype(np.uint8)), (0, ROOM, 0, 0), "white")
    draw = ImageDraw.Draw(picture)
    for (left, top, right, bottom), colour in lines:
        draw.line((left, top + ROOM, right, bottom + ROOM), fill=colour, width=4)
    font, places = ImageFont.load_default(0.8 * cell), []
    for word, (dense, answer) in enumerate(zip(found.answers[0], said, strict=True)):
        places.append(next((at for at in dense.patches if at in answer.patches), min(answer.patches, default=-1)))
        if answer.patches:
            y, x = divmod(places[-1], columns)
            # above the patch, so that its letters stay readable; beside each other where it answers several words
            middle = (x + 0.5 + places[:-1].count(places[-1])) * cell, (y - 0.6) * cell + ROOM
            draw.circle(middle, 0.52 * cell, fill=COLOURS[word], outline="white", width=2)
            draw.text(middle, f"{word + 1}", fill="white", font=font, anchor="mm")
    return picture


def figures(found: FoundPages) -> str:
    """The numbers, as HTML."""
    before, after = found.vectors
    first, second = (order[:TOP] for order in found.orders)
    kilobytes = " → ".join(f"{2 * each * found.width / 1000:.0f}" for each in found.vectors)
    best = f"{first[0]}" if first[0] == second[0] else f"{first[0]} → {second[0]}"
    return look.tiles(
        [
            ("Vectors a page", f"{before:,.0f} → {after:,.0f}", f"{after / before:.0%} are left"),
            ("Kilobytes a page", kilobytes, f"float16, {found.width} values each"),
            ("Pooling a page", look.milliseconds(found.pooling), f"encoding it: {look.milliseconds(found.encoding)}"),
            ("Best page", best, f"{len(set(first) & set(second))} of the first {TOP} are the same"),
        ]
    )


def legend(found: FoundPages) -> str:
    """A card for each word: its colour, the scores of what answered it, and what that is; as HTML."""
    cards = []
    for number, (dense, less) in enumerate(zip(*found.answers, strict=True)):
        colour = COLOURS[number]
        disc = f'<b style="color: {colour}; font-weight: 700">{number + 1}</b>'
        cards.append(
            f'<div class="vtc-card" style="box-shadow: inset 0 3px {colour}"><h3>{disc} {escape(dense.word)}</h3>'
            f"<strong>{dense.score:.2f} → {less.score:.2f}</strong><small>{_what(dense)} → {_what(less)}</small></div>"
        )
    return f'<div class="vtc-tiles">{"".join(cards)}</div>'


def _what(answer: WordAnswer) -> str:
    count = len(answer.patches)
    if not count:
        return "text of the prompt, not the picture"
    what = "a patch" if count == 1 else f"a cluster of {count} patches"
    return what + (" and text of the prompt" if answer.texts else "")


def ranking(found: FoundPages) -> str:
    """The first pages before and after, and where each one moved, as HTML."""
    first, second = (order[:TOP] for order in found.orders)
    wanted = list(dict.fromkeys(found.words))
    rows = []
    for number in [*first, *(page for page in second if page not in first)]:
        before, after = found.ranks(number)
        own = {word.text for word in sheets()[number].words}
        has = [word for word in wanted if word in own]
        said = "all of the words" if len(has) == len(wanted) else ", ".join(has) or "none of the words"
        moved = f"{before} → {after}" + (" ↑" if after < before else " ↓" if after > before else "")
        rows.append((f"{number}", said, moved, " → ".join(f"{each[number]:.2f}" for each in found.scores)))
    return look.table(("Page", "It has", "Rank", "Score"), rows)


# -- the tab --------------------------------------------------------------------------------------------------------


def build() -> None:
    """Put the tab on the page. Its model is small and stays on the CPU, where its pages are kept: there is nothing to
    lend a GPU for."""
    about = {name: {**METHODS, **CLUSTERING}[name].summary for name in retrieval.METHODS}
    about = {name: f"{text[0].upper()}{text[1:]}." for name, text in about.items()}
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            shown: dict[str, Any] = {"allow_preview": False, "interactive": False, "buttons": [], "format": "png"}
            label = f"{PAGES} pages: click one for its words"
            small = [(sheet.image.resize((192, 192)), f"{number}") for number, sheet in enumerate(sheets())]
            gallery = gr.Gallery(small, label=label, columns=4, height="auto", elem_id="find-pages", **shown)
            info = f"Up to {LONGEST} words that may stand on the pages."
            text = gr.Textbox(examples()[0], label="Query", info=info, max_length=400, elem_id="find-query")
            info = about["dpc_knn"]
            method = gr.Dropdown(list(about), value="dpc_knn", label="Pooling", info=info, elem_id="find-method")
            factor = gr.Slider(1, LARGEST, 3, step=1, label="How many times fewer", elem_id="find-factor")
            keep = gr.Radio(
                list(zip(("all", "half", "a quarter"), KEEP, strict=True)),
                value=1.0,
                label="Tokens that stay when a page is encoded",
                info=f"Chosen by {ENCODER}, before the pooling.",
                elem_id="find-keep",
            )
            start = gr.Button("Find", variant="primary", elem_id="find-run")
        with gr.Column(scale=5, min_width=300):
            hint = "Click on a page or write words, and press Find: which pages answer, and by which of their vectors. "
            hint += "The first query takes some seconds: a small ColQwen2 reads the pages."
            numbers = gr.HTML(look.hint(hint), elem_id="find-numbers")
            words = gr.HTML(elem_id="find-words")
            drawing: dict[str, Any] = {"format": "png", "interactive": False, "buttons": ["fullscreen"]}
            drawing |= {"min_width": 260, "visible": False}
            with gr.Row():
                left = gr.Image(elem_id="find-left", **drawing)
                right = gr.Image(elem_id="find-right", **drawing)
            order = gr.HTML(elem_id="find-ranking")

    def pick(event: gr.SelectData) -> str:
        return examples()[event.index]

    def go(asked: str, how: str, times: float, part: float, progress: gr.Progress = look.PROGRESS) -> list[Any]:
        def tick() -> None:
            progress((next(done), 2 * PAGES), "encoding the pages", unit="pages")

        done = itertools.count(1)
        progress(0, "loading the model")
        with look.plainly():
            found = run(asked, how, times, part, tick=tick)
        return [
            figures(found),
            legend(found),
            *(
                gr.update(value=mark(found, bool(pooled)), label=f"Page {found.best}, {what} answered", visible=True)
                for pooled, what in enumerate(("all vectors: the patches that", "fewer vectors: the clusters that"))
            ),
            ranking(found),
        ]

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    gallery.select(pick, None, text, **quiet)
    method.change(lambda how: gr.update(info=about[how]), method, method, **quiet)
    gr.on(
        [start.click, text.submit],
        go,
        [text, method, factor, keep],
        [numbers, words, left, right, order],
        show_progress_on=numbers,
        api_visibility="private",
        concurrency_id="model",
    )
