"""What tools/train_tiny.py learns from: scenes, albums and clips as tensors, of many sizes and shapes.

A batch is drawn from its number alone: first how its pictures are shown (`view`), the same for all of its rows, so that
nothing is padded; then scene after scene of the training split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tiny_models import GRID
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info

from vtc.eval import scenes
from vtc.eval.asking import View

THINGS = (*scenes.SHAPES, *scenes.DIGITS, "number")
TOKEN = 16  # pixels of a side, of the Qwen
CROWD = replace(scenes.FULL, things=(5, 7), digits=4, sides=(0.1, 0.22))  # a tower learns most from what is full


@dataclass(frozen=True)
class Prompt:
    """What stands before the questions: the grids (steps, rows, columns of tokens) of pictures, or of one clip."""

    grids: tuple[tuple[int, int, int], ...] = ((1, GRID, GRID),)
    clip: bool = False

    @property
    def tokens(self) -> int:
        return sum(steps * rows * columns for steps, rows, columns in self.grids)


@dataclass
class Text:
    """The words of a batch behind the pictures: [B, L] each. `block`: which question a word is of, from 1; 0 = none."""

    ids: Tensor
    block: Tensor
    offset: Tensor  # from the question's first word
    target: Tensor  # the next word where it is of the answer, else -100
    hint: Tensor  # the answer's first word at the question's last three, which name the thing; else -100
    kinds: list[list[str]]

    def to(self, device: Any) -> Text:
        fields = (self.ids, self.block, self.offset, self.target, self.hint)
        return Text(*(field.to(device) for field in fields), self.kinds)

    @classmethod
    def of(cls, batch: list[list[scenes.Question]], words: Any) -> Text:
        rows = []
        for questions in batch:
            row: list[tuple[int, ...]] = []
            for number, q in enumerate(questions, 1):
                ask, answer = (
                    words(t, add_special_tokens=False).input_ids for t in (f"{q.text} <bot>", f"{q.answer} <eos>")
                )
                following = [-100] * (len(ask) - 1) + answer
                hints = [-100] * (len(ask) - 4) + answer[:1] * 3 + [-100] * len(answer)
                words_of = zip(ask + answer[:-1], following, hints, strict=True)
                row += [(i, number, at, t, hint) for at, (i, t, hint) in enumerate(words_of)]
            rows.append(torch.tensor(row, dtype=torch.long).view(-1, 5))
        full = nn.utils.rnn.pad_sequence([r + torch.tensor([0, 0, 0, 100, 100]) for r in rows], True, 0)
        kinds = [[q.kind for q in questions] for questions in batch]
        return cls(full[..., 0], full[..., 1], full[..., 2], full[..., 3] - 100, full[..., 4] - 100, kinds)


def choose(questions: Sequence[scenes.Question], most: int) -> list[scenes.Question]:
    """Up to `most` questions, of all kinds in turn: those that are rare are not left out."""
    by: dict[str, list[scenes.Question]] = {}
    for q in questions:
        by.setdefault(q.kind, []).append(q)
    queue, out = list(by.values()), []
    while queue and len(out) < most:
        out += [group.pop() for group in queue][: most - len(out)]
        queue = [group for group in queue if group]
    return out


# -- how pictures are shown -----------------------------------------------------------------------------------------


def tokens(view: View) -> int:
    """About how many a prompt has, of the Qwen."""
    sizes = [view.resized or view.canvas or size for size in view.sizes]
    return -(-view.frames // 2) * sum(round(w / TOKEN) * round(h / TOKEN) for w, h in sizes)


def sides(rng: np.random.Generator, least: float, most: float, low: int = 8, high: int = 28) -> scenes.Size:
    """Width and height in pixels, whole tokens: so many of these from `least` to `most`, the logarithm even."""
    area, turn = np.exp(rng.uniform(np.log(least), np.log(most))), rng.random()
    aspect = rng.uniform(-0.7, 0.7) if turn < 0.6 else rng.uniform(-1.25, 1.25) if turn < 0.7 else 0.0
    width, height = (int(np.clip(round(np.sqrt(area * np.exp(a))), low, high)) for a in (aspect, -aspect))
    return TOKEN * width, TOKEN * height


def view(name: str, rng: np.random.Generator, age: int) -> View:
    """One of those that the model is to know; as the training goes on (age 0, 1, 2) more of what is large, of clips and
    of several pictures, and at last (3) of what is padded: where a picture ends on a canvas as grey as itself is
    learned last. Many small pictures teach more than a few large ones in the same time, and what is learned of them
    holds for these. The LLaVA's pictures all become one size: what differs is what is drawn and stands around it."""
    level, turn = scenes.FULL if age else CROWD, rng.random()
    clips, several = ((0.2, 0.0), (0.1, 0.1), (0.2, 0.2), (0.1, 0.2))[age] if name == "qwen" else (0.0, 0.1)
    if turn < clips:
        size = sides(rng, 36, 144, 6, 16) if rng.random() < 0.75 else (scenes.SIDE, scenes.SIDE)
        return View((size,), frames=int(rng.integers(2, 9)), level=level)
    if turn < clips + several:
        count = int(rng.integers(2, 4))
        return View(tuple(sides(rng, 64, 900 / count) for _ in range(count)), level=level)
    most = 324 if age == 0 else 256 if age == 1 and rng.random() < 0.7 else 784
    size, turn = sides(rng, 64, most), rng.random()
    padded = 0.5 if age == 3 else 0.2
    if turn < padded:
        inner = [max(96, round(n * part)) for n, part in zip(size, rng.uniform(0.5, 1, 2), strict=True)]
        if rng.random() < (0.4 if age == 3 else 0.6):  # as wide or as high as the canvas
            full = int(rng.integers(2))
            inner[full] = size[full]
        return View(((inner[0], inner[1]),), canvas=size, level=level)
    if turn < padded + 0.2:
        return View(resized=size, level=level)
    return View((size,), level=level)


# -- what the tokens show -------------------------------------------------------------------------------------------


def labels(
    things: Sequence[scenes.Thing], grid: tuple[int, int], shown: scenes.Size, box: Sequence[float], stretched: bool
) -> Tensor:
    """What every image token shows: [rows * columns, 6] thing, colour, the numerals in its left and right half (0 =
    none), third from above, third from the left.

    grid: rows and columns. shown: width and height of what they cover, and box the picture's place in it, in pixels.
    """
    rows, columns = grid
    across, down = columns / shown[0], rows / shown[1]  # tokens per pixel
    left, top, width, height = box[0] * across, box[1] * down, (box[2] - box[0]) * across, (box[3] - box[1]) * down
    unit = (width, height) if stretched else (min(box[2] - box[0], box[3] - box[1]) * n for n in (across, down))
    wide, high = unit
    row, column = np.meshgrid(np.arange(rows) + 0.5, np.arange(columns) + 0.5, indexing="ij")
    out, nearest = np.zeros((6, rows, columns), np.int64), np.full((rows, columns), np.inf)
    for t in things:
        x, y, half = left + width * t.x, top + height * t.y, wide * t.side / 2
        tall = high * t.side / 2 / (scenes.NARROW * len(t.name) if t.number else 1)
        mine = (abs(column - x) < max(half + 0.1, 0.5)) & (abs(row - y) < max(tall + 0.1, 0.5))
        away = np.maximum(abs(column - x), abs(row - y))
        mine &= away < nearest
        nearest[mine] = away[mine]
        out[0][mine], out[1][mine] = 1 + THINGS.index(t.noun if t.number else t.name), 1 + COLOURS.index(t.colour)
        for i, shift in ((2, -0.25), (3, 0.25)):
            out[i][mine] = 0
            if t.number:
                at = np.floor((column + shift - x + half) / (2 * half) * len(t.name)).astype(int)
                for place, numeral in enumerate(t.name):
                    out[i][mine & (at == place)] = 1 + int(numeral)
    for i, at, low, size in ((4, row, top, height), (5, column, left, width)):
        out[i] = np.clip((at - low) * 3 // size, 0, 2)
    return torch.from_numpy(out).flatten(1).T


COLOURS = list(scenes.COLOURS)


def over_time(clip: scenes.Clip, grid: tuple[int, int, int]) -> Tensor:
    """`labels` of a clip's tokens, step after step; a step of two frames shows what is in either."""
    count, size = scenes.PARTS[len(clip.frames)], clip.frames[0].size
    parts = [i * count // len(clip.frames) for i in range(len(clip.frames))]
    out = []
    for step in range(grid[0]):
        now = {None, *parts[2 * step : 2 * step + 2]}
        things = [t for t, part in zip(clip.things, clip.parts, strict=True) if part in now]
        out.append(labels(things, grid[1:], size, (0, 0, *size), False))
    return torch.cat(out)


# -- batches --------------------------------------------------------------------------------------------------------

Batch = tuple[Tensor, Tensor, Text, Prompt]  # what is seen, labels, questions, what stands before them
ROWS = 64  # of a batch, at most


class Pictures(IterableDataset):
    """Batches `start` to `stop` of the training split. ages: the batches at which the second, third and fourth age
    begin. part: which of how many processes; each takes its rows of every batch."""

    def __init__(
        self,
        name: str,
        processor: Any,
        start: int = 0,
        stop: int = 0,
        ages: tuple[int, int, int] = (0, 0, 1 << 30),
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.name, self.processor, self.start, self.stop = name, processor, start, stop
        self.ages, self.part = ages, part

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        torch.set_num_threads(1)
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for at in range(self.start + first, self.stop, step):
            yield self.batch(at)

    def batch(self, at: int) -> Batch:
        """Batch number `at`: of about 4,096 image tokens, whatever their pictures' size."""
        chosen = view(self.name, np.random.default_rng([7, at]), sum(at >= age for age in self.ages))
        each = tokens(chosen) if self.name == "qwen" else GRID * GRID * len(chosen.sizes)
        rows = max(2, min(ROWS, round(4096 / each)))
        mine = range(ROWS * at, ROWS * at + rows)[self.part[0] :: self.part[1]]
        return self.of(chosen, "train", mine, min(20, max(6, 256 // rows)))

    def of(self, chosen: View, split: str, numbers: Sequence[int], questions: int) -> Batch:
        """Scenes by their numbers, shown in one way, with so many questions each at most."""
        drawn = [chosen.draw(split, n) for n in numbers]
        text = Text.of([choose(one.questions, questions) for one in drawn], self.processor.tokenizer)
        if chosen.frames > 1:
            frames = [np.stack([np.asarray(f) for f in clip.frames]) for clip in drawn]
            seen = self.processor.video_processor(frames, do_sample_frames=False, return_tensors="pt")
            prompt = Prompt((self.grid(seen["video_grid_thw"][0]),), True)
            shown = torch.stack([over_time(clip, prompt.grids[0]) for clip in drawn])
            return seen["pixel_values_videos"], shown, text, prompt
        every = [one.scenes if isinstance(one, scenes.Album) else (one,) for one in drawn]
        images = [image for one in drawn for image in chosen.images(one)]
        seen = self.processor.image_processor(images, return_tensors="pt")
        if self.name == "qwen":
            prompt = Prompt(tuple(self.grid(grid) for grid in seen["image_grid_thw"][: len(every[0])]))
        else:
            prompt = Prompt(((1, GRID, GRID),) * len(every[0]))
        stretched = self.name != "qwen" or chosen.resized is not None
        shown = torch.stack(
            [
                torch.cat(
                    [
                        labels(s.things, grid[1:], s.canvas or s.size, s.box, stretched)
                        for s, grid in zip(row, prompt.grids, strict=True)
                    ]
                )
                for row in every
            ]
        )
        return seen["pixel_values"], shown, text, prompt

    @staticmethod
    def grid(patches: Tensor) -> tuple[int, int, int]:
        steps, rows, columns = patches.tolist()
        return steps, rows // 2, columns // 2
