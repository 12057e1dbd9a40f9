"""Pages whose words are known, and queries of a few neighbouring words: headings, paragraphs, rules, boxes, figures and
white space, drawn from a number alone with the font that comes with Pillow.

    page = vtc.eval.pages.page(7)
    page.image, page.words[0].text, page.words[0].box
    vtc.eval.pages.queries([page], 3)[0].text        # three to five words that stand beside each other on the page
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from PIL import Image, ImageDraw, ImageFont

from vtc.errors import OptionError

WORDS = tuple(
    """able acid also arch area army atom aunt away baby back ball band bank barn base bath beam bean bear belt bird
    blue boat body bone book born bowl brick bread bridge brown brush butter cabin cake calm camp candle card care
    castle cause chain chair chalk cheese child circle city clay clean clock cloth cloud coal coast coffee cold copper
    corn cotton cover cow crown cycle dance dark date dawn deep desert desk dinner doctor dog door double dress drum
    dust eagle early earth east edge eight empty engine equal even every extra fabric face farm feather fence field
    figure finger fish flag flat flower focus forest fox frame fresh fruit full garden gate ghost gift glass goat
    gold grain green group guitar half hammer harbor hat hazel heavy help hill honey horse hotel house ice idea inch
    iron island ivory jacket jelly jewel judge jump jury kettle key kind king kitchen knife ladder lake lamp large
    leaf lemon letter level light lily linen lion liquid local loud lucky lunch magic major map marble market
    mask meadow metal middle milk minor mirror money month motor mouse museum music narrow needle nest night nine
    north novel number oak object ocean office olive onion open orange orbit order oven owl oxygen paint palace
    paper parent path pearl pencil pepper piano pilot plain planet plate pocket poem pond potato powder prize
    proof public puzzle queen quick quiet rabbit radio rain ranch rapid red rice ring river rocket roof rope rose
    round royal rural saddle salt sand scale school seed seven shadow shelf shirt shoe silver simple sister sky
    sleep smoke snow soap solid south spoon spring square stage star steam stone storm sugar summer sun table tea
    temple tent thin tiger timber tower travel tree truth tulip tunnel uncle union upper urban valley value velvet
    village violin visit voice volume wagon wall water wave wheat wheel white wild window winter wolf wood wool
    yard year yellow young zebra zero""".split()
)
CELL = 16  # pixels: lines of text stand on this grid, and a token of the small retriever is one cell
BODY, HEADING = 14, 24  # pixels of the font; a line takes one row of cells, a heading two
_POOL = 70  # different words on a page at most: a page repeats itself, as texts do


@dataclass(frozen=True)
class Word:
    """A word of a page. box: left, top, right, bottom of its ink, right and bottom exclusive; line: which line of text
    it stands in, counted over the page."""

    text: str
    box: tuple[int, int, int, int]
    line: int


@dataclass(frozen=True)
class Page:
    """A page and its words in reading order."""

    image: Image.Image
    words: tuple[Word, ...]

    @cached_property
    def runs(self) -> tuple[tuple[str, ...], ...]:
        """The words of every line of text."""
        lines: dict[int, list[str]] = {}
        for word in self.words:
            lines.setdefault(word.line, []).append(word.text)
        return tuple(tuple(line) for line in lines.values())

    @cached_property
    def cells(self) -> list[list[int]]:
        """[rows][columns]: which of `words` covers most of each cell of `CELL` pixels; -1 where none covers a quarter
        of its width."""
        width, height = self.image.size
        out = [[-1] * (width // CELL) for _ in range(height // CELL)]
        most = [[CELL // 4 - 1] * (width // CELL) for _ in range(height // CELL)]
        for number, word in enumerate(self.words):
            left, top, right, bottom = word.box
            # the rows that a line stands in, not one into which it reaches by a pixel or two
            for row in range((top + 3) // CELL, (bottom - 4) // CELL + 1):
                for column in range(left // CELL, (right - 1) // CELL + 1):
                    covered = min(right, (column + 1) * CELL) - max(left, column * CELL)
                    if covered > most[row][column]:
                        most[row][column], out[row][column] = covered, number
        return out


@dataclass(frozen=True)
class Query:
    """Neighbouring words, and the number of the page that they were taken from: the one relevant page."""

    words: tuple[str, ...]
    page: int

    @property
    def text(self) -> str:
        return " ".join(self.words)


def page(number: int, size: tuple[int, int] = (512, 512)) -> Page:
    """Page `number`: the same picture and words every time. size: width and height in pixels, multiples of 16.

    Raises:
        OptionError: a size that is not so, or below 256 pixels; a number that is not a whole one from 0 on.
    """
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise OptionError(f"number={number!r}: pages are numbered 0, 1, 2 ...")
    if len(size) != 2 or any(not isinstance(v, int) or v < 256 or v % CELL for v in size):
        raise OptionError(f"size={size!r}: width and height of a page are multiples of {CELL} from 256 on")
    return _Sheet(random.Random(f"page {number} {size[0]} {size[1]}"), size).fill()


def queries(pages: Sequence[Page], count: int, seed: int = 0) -> list[Query]:
    """`count` queries of 3 to 5 words that stand side by side in a line of one of the `pages`, which take turns.

    Raises:
        OptionError: a page has no line of three words, or `count` is not a whole number from 1 on.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise OptionError(f"queries={count!r}: it takes a whole number of queries >= 1")
    draw, out = random.Random(f"queries {seed}"), []
    for i in range(count):
        number = i % len(pages)
        lines = [line for line in pages[number].runs if len(line) >= 3]
        if not lines:
            raise OptionError(f"page {number} has no line of three words to ask for; draw larger pages")
        line = draw.choice(lines)
        length = draw.randint(3, min(5, len(line)))
        start = draw.randint(0, len(line) - length)
        out.append(Query(line[start : start + length], number))
    return out


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise OptionError("this Pillow has no FreeType and draws text at one size only: pip install -U pillow")
    return font


@cache
def _ink(word: str, size: int) -> tuple[int, int, int, int]:
    """The box of a word's ink about the left end of its baseline."""
    left, top, right, bottom = _font(size).getbbox(word, anchor="ls")
    return math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)


class _Sheet:
    """A page in the making: `top` is the row of cells that comes next."""

    def __init__(self, draw: random.Random, size: tuple[int, int]) -> None:
        self.draw = draw
        self.columns, self.rows = size[0] // CELL, size[1] // CELL
        self.image = Image.new("L", size, 255)
        self.pen = ImageDraw.Draw(self.image)
        self.words: list[Word] = []
        self.pool = draw.sample(WORDS, _POOL)
        self.top = draw.randint(1, 2)
        self.line = 0

    def fill(self) -> Page:
        while self.top < self.rows - 1:
            kind = self.draw.choices(("text", "heading", "figure", "rule", "list"), (5, 1.5, 1, 0.5, 1.5))[0]
            getattr(self, f"_{kind}")()
            self.top += self.draw.choice((0, 0, 1, 1, 2))
        if not any(len(run) >= 3 for run in Page(self.image, tuple(self.words)).runs):
            # a small page may have come to figures only
            self.top = self.rows - 2
            self.pen.rectangle((0, self.top * CELL, *self.image.size), fill=255)
            self.words = [word for word in self.words if word.box[3] <= self.top * CELL]
            self._write(self.top, 1, self.columns, BODY)
        return Page(self.image.convert("RGB"), tuple(self.words))

    def _write(self, row: int, first: int, last: int, size: int, most: int = 99) -> None:
        """A line of up to `most` words between two columns of cells, whose letters stand in the row's cells."""
        font, tall = _font(size), CELL if size <= CELL else 2 * CELL
        shade = self.draw.choice((0, 0, 0, 40, 80))
        base = row * CELL + round(0.75 * tall) - self.draw.randint(0, 1)
        x, wrote = first * CELL, 0
        while wrote < most:
            word = self.draw.choice(self.pool)
            start = x + self.draw.randint(0, 1)
            left, top, right, bottom = _ink(word, size)
            box = (start + left, base + top, start + right, base + bottom)
            if box[2] > last * CELL:
                break
            self.pen.text((start, base), word, font=font, fill=shade, anchor="ls")
            self.words.append(Word(word, box, self.line))
            x, wrote = -(-(box[2] + 4) // 8) * 8, wrote + 1  # words start at every half cell: there is less to learn
        self.line += 1

    def _text(self) -> None:
        first = self.draw.randint(1, 3)
        last = self.draw.randint(max(first + 5, self.columns * 5 // 6), self.columns)
        for _ in range(min(self.draw.randint(3, 6), self.rows - 1 - self.top)):
            self._write(self.top, first, last, BODY)
            self.top += 1
        if self.draw.random() < 0.5:  # the last line of a paragraph is often short
            short = [word for word in self.words if word.line == self.line - 1]
            self._forget(short[self.draw.randint(3, max(3, len(short))) :])

    def _forget(self, words: Sequence[Word]) -> None:
        for word in words:
            left, top, right, bottom = word.box
            self.pen.rectangle((left, top, right - 1, bottom - 1), fill=255)
            self.words.remove(word)

    def _heading(self) -> None:
        if self.top + 2 < self.rows:
            self._write(self.top, self.draw.randint(1, 2), self.columns, HEADING, self.draw.randint(2, 5))
            self.top += 2

    def _list(self) -> None:
        first = self.draw.randint(2, 4)
        for _ in range(min(self.draw.randint(2, 4), self.rows - 1 - self.top)):
            x, y = (first - 1) * CELL + 6, self.top * CELL + 6
            self.pen.ellipse((x, y, x + 4, y + 4), fill=0)
            self._write(self.top, first, self.columns, BODY, self.draw.randint(3, 6))
            self.top += 1

    def _rule(self) -> None:
        y = self.top * CELL + 8
        self.pen.line((CELL, y, (self.columns - 1) * CELL, y), fill=self.draw.choice((0, 120)))
        self.top += 1

    def _figure(self) -> None:
        """A frame with bars or a flat grey: neither has words."""
        tall = min(self.draw.randint(3, 6), self.rows - 1 - self.top)
        first = self.draw.randint(1, self.columns // 3)
        last = self.draw.randint(first + 4, self.columns - 1)
        box = (first * CELL, self.top * CELL + 4, last * CELL, (self.top + tall) * CELL - 4)
        if self.draw.random() < 0.3:
            self.pen.rectangle(box, fill=self.draw.choice((200, 225)), outline=80)
        else:
            self.pen.rectangle(box, outline=80)
            for column in range(first, last - 1, 2):
                high = self.draw.randint(4, max(5, box[3] - box[1] - 8))
                x = column * CELL + 10
                self.pen.rectangle((x, box[3] - high, x + 12, box[3]), fill=self.draw.choice((60, 140, 190)))
        self.top += tall
