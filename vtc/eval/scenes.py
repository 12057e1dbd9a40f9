"""Pictures whose contents are known, and questions about them: what, where, how many, and reading.

Every scene is drawn from its number alone: coloured shapes and digits of several sizes at random free places, on a
plain, textured or photographic background. The contents of a scene decide its split, so that no picture is in two
splits.

    scene = vtc.eval.scenes.scene("test", 7)
    scene.image, scene.questions[0].text, scene.questions[0].answer
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
from PIL import Image

from vtc.errors import OptionError
from vtc.eval.drawing import COLOURS, DIGITS, SIDE, Size, background, draw

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLURAL = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
PLACES = tuple(" ".join(filter(None, (v, h))) or "middle" for v in ("top", "", "bottom") for h in ("left", "", "right"))
TIMES = ("first", "second", "third", "last")
KINDS = ("colour", "shape", "position", "count", "digit", "relation")
EVERY = (*KINDS, "reading", "when")  # also for scenes with numbers, and for clips
SPLITS = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}
BACKGROUNDS = ("plain", "texture", "photo")
FLAT = ("paper", "screen")  # of exactly uniform areas, for PixelPrune; no model was trained on them
NARROW = 0.8  # width of a digit relative to its height
PARTS = {2: 2, 3: 3, 4: 4, 5: 4, 6: 3, 7: 4, 8: 4, 16: 4, 32: 4}  # parts of a clip, by its number of frames


@dataclass(frozen=True)
class Thing:
    """A shape, a digit or a number: its centre as fractions of the picture's width and height, its side (a number's
    width) as a fraction of the shorter."""

    name: str
    colour: str
    x: float
    y: float
    side: float

    @property
    def digit(self) -> bool:
        return self.name in DIGITS

    @property
    def number(self) -> bool:
        return len(self.name) > 1 and self.name.isdigit()

    @property
    def noun(self) -> str:
        return "digit" if self.digit else "number" if self.number else self.name

    @property
    def place(self) -> str:
        return PLACES[3 * min(2, int(3 * self.y)) + min(2, int(3 * self.x))]


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Level:
    """How difficult scenes are: how many things, how many of them digits and numbers (at most), their sides, the height
    of a number's digits, and the backgrounds."""

    things: tuple[int, int] = (2, 5)
    digits: int = 2
    sides: tuple[float, float] = (0.11, 0.22)
    backgrounds: tuple[str, ...] = ("plain", "texture")
    kinds: tuple[str, ...] = KINDS
    numbers: int = 0
    heights: tuple[float, float] = (0.055, 0.08)

    def __post_init__(self) -> None:
        low, high = self.things
        if not 1 <= low <= high <= 7:
            raise OptionError(f"things={self.things}: it takes two numbers from 1 to 7, the smaller first")
        for name, given, known in (("kinds", self.kinds, EVERY), ("backgrounds", self.backgrounds, BACKGROUNDS + FLAT)):
            if not given or any(one not in known for one in given):
                raise OptionError(f"{name}={given!r}: choose from {', '.join(known)}")


FULL = Level(numbers=2, backgrounds=BACKGROUNDS, kinds=EVERY)  # everything available


@dataclass(frozen=True)
class Scene:
    """Things on a background. `image` (RGB) is drawn on first access, in `size`, which changes neither things nor
    questions; or letterboxed on a `canvas`, which does not change them either."""

    split: str
    number: int
    things: tuple[Thing, ...]
    background: str
    seed: int = field(repr=False)
    questions: tuple[Question, ...] = field(repr=False)
    size: Size = (SIDE, SIDE)
    canvas: Size | None = None

    @cached_property
    def image(self) -> Image.Image:
        rng = np.random.default_rng(self.seed)
        picture = draw(self.things, background(self.background, rng, self.size))
        if self.canvas is None:
            return picture
        shown = Image.new("RGB", self.canvas, (self.seed % 3 * 127,) * 3)  # black, grey, white
        shown.paste(picture, self.box[:2])
        return shown

    @property
    def images(self) -> list[Image.Image]:
        return [self.image]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The picture's box on the canvas: left, top, right, bottom."""
        free = [whole - part for whole, part in zip(self.canvas or self.size, self.size, strict=True)]
        if self.seed // 3 % 2:  # centred; otherwise in a corner
            left, top = (n // 2 for n in free)
        else:
            left, top = (n * (self.seed // turn % 2) for n, turn in zip(free, (6, 12), strict=True))
        return left, top, left + self.size[0], top + self.size[1]


def scene(
    split: str, number: int, level: Level | None = None, size: Size = (SIDE, SIDE), canvas: Size | None = None
) -> Scene:
    """Scene `number` of a split; always the same one, with the same questions at every size.

    Args:
        size: width and height in pixels. canvas: size of the canvas it is letterboxed or padded to, at least as large.

    Raises:
        OptionError: an unknown split, a number below 0, a size below 32 pixels, a canvas smaller than the picture.
    """
    if split not in SPLITS:
        raise OptionError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}")
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise OptionError(f"number={number!r}: scenes are numbered from 0")
    if min(size) < 32:
        raise OptionError(f"size={size}: a picture has at least 32 pixels a side")
    if canvas is not None and (canvas[0] < size[0] or canvas[1] < size[1]):
        raise OptionError(f"canvas={canvas}: it is at least as large as the picture, {size}")
    level = level or Level()
    rng = np.random.default_rng([list(SPLITS).index(split), number])
    things = _things(rng, level)
    while _bucket(things) not in SPLITS[split]:
        things = _things(rng, level)
    background, seed = str(rng.choice(level.backgrounds)), int(rng.integers(1 << 32))
    asked = [q for q in ask(things, rng) if q.kind in level.kinds]
    return Scene(split, number, things, background, seed, tuple(asked), size, canvas)


def scenes(split: str, count: int, level: Level | None = None, start: int = 0) -> Iterator[Scene]:
    """Scenes `start` to `start + count` of a split."""
    return (scene(split, number, level) for number in range(start, start + count))


def _bucket(things: Sequence[Thing]) -> int:
    """One of ten buckets, by the things and their places."""
    content = sorted((t.name, t.colour, round(16 * t.x), round(16 * t.y)) for t in things)
    return hashlib.sha256(repr(content).encode()).digest()[0] % 10


# -- things ---------------------------------------------------------------------------------------------------------


def _things(rng: np.random.Generator, level: Level) -> tuple[Thing, ...]:
    """Things that do not touch one another, the picture's border, or the border between two places."""
    count = int(rng.integers(level.things[0], level.things[1] + 1))
    digits = int(rng.integers(0, min(level.digits, count) + 1))
    numbers = int(rng.integers(0, min(level.numbers, count - digits) + 1)) if level.numbers else 0
    made: list[Thing] = []
    while len(made) < count:
        if digits <= len(made) < digits + numbers:
            name = str(rng.integers(10, 10 ** int(rng.integers(2, 5))))
            side = NARROW * len(name) * float(rng.uniform(*level.heights))
        else:
            name = str(rng.choice(DIGITS)) if len(made) < digits else str(rng.choice(SHAPES))
            side = float(rng.uniform(*level.sides))
        for _ in range(50):
            x, y = (float(v) for v in rng.uniform(side / 2, 1 - side / 2, 2))
            inside = min(abs(v - border / 3) for v in (x, y) for border in (1, 2)) > 0.03
            if inside and all(math.hypot(x - t.x, y - t.y) > 0.7 * (side + t.side) for t in made):
                made.append(Thing(name, str(rng.choice(list(COLOURS))), x, y, side))
                break
        else:
            made.clear()
    return tuple(made)


def _only(things: Sequence[Thing], **what: str) -> bool:
    """Whether one of the things alone is so."""
    return sum(all(getattr(t, k) == v for k, v in what.items()) for t in things) == 1


def _looks(t: Thing, things: Sequence[Thing]) -> list[Question]:
    """The questions about how one of the things looks that have exactly one answer."""
    found = []
    if _only(things, noun=t.noun):
        found.append(Question("colour", f"What colour is the {t.noun}?", t.colour))
    if _only(things, colour=t.colour) and not t.digit and not t.number:
        found.append(Question("shape", f"What shape is the {t.colour} thing?", t.name))
    return found


def ask(things: Sequence[Thing], rng: np.random.Generator) -> list[Question]:
    """Every question with exactly one answer, in random order."""
    found = []
    only = partial(_only, things)
    for t in things:
        found += _looks(t, things)
        if only(colour=t.colour, noun=t.noun):
            found.append(Question("position", f"Where is the {t.colour} {t.noun}?", t.place))
            if t.digit:
                text = "Which digit is there?" if only(noun="digit") else f"Which digit is {t.colour}?"
                found.append(Question("digit", text, t.name))
            if t.number:
                text = "Which number is there?" if only(noun="number") else f"Which number is {t.colour}?"
                found.append(Question("reading", text, t.name))
    for noun in (*SHAPES, "digit"):
        number = sum(t.noun == noun for t in things)
        if number or rng.random() < 0.2:
            found.append(Question("count", f"How many {PLURAL.get(noun, 'digits')} are there?", str(number)))
    found.append(Question("count", "How many things are there?", str(len(things))))
    named = [t for t in things if only(colour=t.colour, noun=t.noun)]
    for a in named:
        for b in named:
            for word, gap in (("left of", b.x - a.x), ("above", b.y - a.y)):
                if a is not b and abs(gap) > 0.1 and rng.random() < 0.25:
                    text = f"Is the {a.colour} {a.noun} {word} the {b.colour} {b.noun}?"
                    found.append(Question("relation", text, "yes" if gap > 0 else "no"))
    return [found[i] for i in rng.permutation(len(found))]


# -- clips ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """Frames in which things appear and disappear, and questions about when. `parts`: the part (half, third or quarter)
    in which each thing is visible; None = in all."""

    frames: tuple[Image.Image, ...]
    things: tuple[Thing, ...]
    parts: tuple[int | None, ...]
    questions: tuple[Question, ...]

    @property
    def changes(self) -> tuple[Question, ...]:
        """Questions about the colours and shapes of what is there in one part only."""
        passing = (t for t, p in zip(self.things, self.parts, strict=True) if p is not None)
        return tuple(q for t in passing for q in _looks(t, self.things))

    def thinned(self, keep: float) -> Clip:
        """The same with evenly spaced frames, that share of them: an even number, at least two, as some models pair
        them."""
        count = max(2, 2 * round(keep * len(self.frames) / 2))
        return replace(self, frames=tuple(self.frames[i * len(self.frames) // count] for i in range(count)))


def clip(split: str, number: int, frames: int = 8, level: Level | None = None, size: Size = (SIDE, SIDE)) -> Clip:
    """Clip `number` of a split: 2 to 8 frames, 16 or 32, in halves, thirds or quarters. Most things are visible in only
    one of these.

    Raises:
        OptionError: as for `scene`; another number of frames.
    """
    if frames not in PARTS:
        raise OptionError(f"frames={frames!r}: clips have 2 to 8, 16 or 32")
    still = scene(split, number, replace(level or Level(), things=(2, 4)), size)
    rng = np.random.default_rng([still.seed, frames])
    things = tuple({(t.colour, t.noun): t for t in still.things}.values())  # of things that look alike, only the last
    count = PARTS[frames]
    parts = tuple(None if i and rng.random() < 0.25 else int(rng.integers(count)) for i in range(len(things)))
    back = background(still.background, np.random.default_rng(still.seed), size)
    looks = [draw([t for t, p in zip(things, parts, strict=True) if p in (None, now)], back) for now in range(count)]
    times = (*TIMES[: count - 1], TIMES[-1])
    asked = [
        Question("when", f"When is the {t.colour} {t.noun} there?", times[p])
        for t, p in zip(things, parts, strict=True)
        if p is not None
    ]
    return Clip(tuple(looks[i * count // frames] for i in range(frames)), things, parts, tuple(asked))


# -- several pictures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Album:
    """Scenes in one prompt, and questions that are each about one of them."""

    scenes: tuple[Scene, ...]

    @property
    def images(self) -> list[Image.Image]:
        return [scene.image for scene in self.scenes]

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        every = [
            Question(q.kind, f"In picture {i}, {q.text[0].lower()}{q.text[1:]}", q.answer)
            for i, scene in enumerate(self.scenes, 1)
            for q in scene.questions
        ]
        return tuple(every[i] for i in np.random.default_rng(self.scenes[0].seed).permutation(len(every)))


def album(split: str, number: int, sizes: Sequence[Size], level: Level | None = None) -> Album:
    """Album `number` of a split: one scene of each of these sizes; no other album with as many pictures has the same
    scenes.

    Raises:
        OptionError: as for `scene`; fewer than two pictures or more than nine.
    """
    count = len(sizes)
    if not 2 <= count <= 9:
        raise OptionError(f"sizes={sizes}: an album has 2 to 9 pictures")
    return Album(tuple(scene(split, count * number + i, level, size) for i, size in enumerate(sizes)))
