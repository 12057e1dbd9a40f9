"""What tools/train_tiny.py learns from: scenes and clips of the training split as tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tiny_models import CLIP, GRID
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info
from tqdm.auto import tqdm

from vtc.eval import scenes

if TYPE_CHECKING:
    from train_tiny import Learner

THINGS = (*scenes.SHAPES, *scenes.DIGITS)


@dataclass
class Text:
    """The words of a batch behind the pictures: [B, L] each. `block`: which question a word is of, from 1; 0 = none."""

    ids: Tensor
    block: Tensor
    offset: Tensor  # from the question's first word
    target: Tensor  # the next word where it is of the answer, else -100
    hint: Tensor  # the answer's first word at the question's last three, which name the thing; else -100
    kinds: list[list[str]]

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


EASY, FAIR = 6_000, 16_000  # pictures, after which scenes get harder
CROWD = scenes.Level(things=(5, 7), digits=4)  # a tower learns most from what is full


def stage(done: int) -> scenes.Level:
    """What a scene holds, by how many were learned from."""
    if done < EASY:
        kinds = ("colour", "shape", "position", "digit")
        return scenes.Level((1, 2), 1, (0.15, 0.25), ("plain",), kinds)
    if done < FAIR:
        return scenes.Level((1, 4), 2, (0.12, 0.25), ("plain", "texture"), scenes.KINDS[:-1])
    return scenes.Level()


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


def labels(things: Sequence[scenes.Thing], side: int = GRID) -> Tensor:
    """What every image token shows: [side * side, 4] thing, colour (0 = none), third from above, from the left."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    thing, colour = torch.zeros(side, side, dtype=torch.long), torch.zeros(side, side, dtype=torch.long)
    nearest = torch.full((side, side), math.inf)
    for t in things:
        away = torch.maximum((column + 0.5 - side * t.x).abs(), (row + 0.5 - side * t.y).abs())
        mine = (away < side * t.side / 2 + 0.1) & (away < nearest)
        nearest = torch.where(mine, away, nearest)
        thing[mine] = 1 + THINGS.index(t.name)
        colour[mine] = 1 + list(scenes.COLOURS).index(t.colour)
    thirds = ((at + 0.5) * 3 / side for at in (row, column))
    return torch.stack([thing, colour, *(third.long() for third in thirds)], -1).flatten(0, 1)


def over_time(clip: scenes.Clip, steps: int) -> Tensor:
    """`labels` of a clip's tokens, step after step; one step of two frames shows what is in either."""
    now = [
        [t for t, part in zip(clip.things, clip.parts, strict=True) if steps == 1 or part in (None, step)]
        for step in range(steps)
    ]
    return torch.cat([labels(things, CLIP // 16) for things in now])


Batch = tuple[Tensor, Tensor, Text, int]  # what is seen, labels, questions, steps of time


class Pictures(IterableDataset):
    """Batches of scene after scene of the training split from number `start` on; for the Qwen, a quarter clips."""

    def __init__(self, learner: Learner, start: int, total: int, batch: int, questions: int, crowded: int = 0) -> None:
        self.processor, self.name, self.crowded = learner.processor, learner.name, crowded
        self.start, self.total, self.batch, self.questions = start, total, batch, questions

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        torch.set_num_threads(1)
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for at in range(self.start + first * self.batch, self.total, step * self.batch):
            level, numbers, turn = stage(at), range(at, at + self.batch), at // self.batch % 12
            level = CROWD if at < self.crowded else level
            if self.name == "qwen" and turn % 4 == 3:
                yield self.film([scenes.clip("train", n, 2 if turn == 3 else 8, level) for n in numbers])
            else:
                yield self.make([scenes.scene("train", n, level) for n in numbers])

    def make(self, batch: list[scenes.Scene]) -> Batch:
        values = self.processor.image_processor([s.image for s in batch], return_tensors="pt")["pixel_values"]
        values = values.view(len(batch), -1, values.shape[-1]) if self.name == "qwen" else values
        text = Text.of([choose(s.questions, self.questions) for s in batch], self.processor.tokenizer)
        return values, torch.stack([labels(s.things) for s in batch]), text, 0

    def film(self, batch: list[scenes.Clip]) -> Batch:
        frames = [np.stack([np.asarray(f) for f in clip.frames]) for clip in batch]
        seen = self.processor.video_processor(frames, do_sample_frames=False, return_tensors="pt")
        text = Text.of([choose(clip.questions, self.questions) for clip in batch], self.processor.tokenizer)
        steps = int(seen["video_grid_thw"][0, 0])
        shown = torch.stack([over_time(clip, steps) for clip in batch])
        return seen["pixel_values_videos"].unflatten(0, (len(batch), -1)), shown, text, steps


class Features:
    """As `Pictures`, but a fixed number of scenes over and over, seen by DINOv2 once: 200 KB each, kept in a file."""

    def __init__(self, learner: Learner, folder: Path, count: int, pictures: Pictures) -> None:
        self.pictures, self.count = pictures, count
        folder.mkdir(parents=True, exist_ok=True)
        path, note = folder / f"last-{count}.f16", folder / f"last-{count}.txt"
        done = int(note.read_text()) if path.exists() and note.exists() else 0
        self.values = np.memmap(path, np.float16, "r+" if done else "w+", shape=(count, GRID * GRID, 384))
        size = 16
        for at in tqdm(range(done, count, size), "DINOv2", initial=done // size, total=-(-count // size)):
            drawn = [self.scene(n).image for n in range(at, min(at + size, count))]
            with torch.inference_mode():
                seen = learner.features(learner.processor.image_processor(drawn, return_tensors="pt")["pixel_values"])
            self.values[at : at + size] = seen.half().numpy()
            if at // size % 50 == 49:
                self.values.flush()
                note.write_text(str(at + size))
        note.write_text(str(count))
        some = torch.from_numpy(self.values[:: max(1, count // 100)]).float().flatten(0, 1)
        learner.mean, learner.spread = some.mean(0), some.std(0)

    def scene(self, number: int) -> scenes.Scene:
        return scenes.scene("train", number, stage(number * 10 * EASY // self.count))  # a tenth of them easy

    def __iter__(self) -> Iterator[Batch]:
        p = self.pictures
        for at in range(p.start, p.total, p.batch):
            low, high = (0.0, 0.1) if at < EASY else (0.0, 0.25) if at < FAIR else (0.1, 1.0)
            chosen = np.random.default_rng(at).integers(int(low * self.count), int(high * self.count), p.batch)
            batch = [self.scene(int(n)) for n in chosen]
            text = Text.of([choose(s.questions, p.questions) for s in batch], p.processor.tokenizer)
            yield torch.from_numpy(self.values[chosen]).float(), torch.stack([labels(s.things) for s in batch]), text, 0
