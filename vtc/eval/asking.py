"""Asks multimodal LLMs about `vtc.eval.scenes`: prompts through a model's own processor, replies from its own
`generate`."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from vtc.adapters.multimodal.cache import cache_name
from vtc.errors import OptionError
from vtc.eval import scenes

USUAL = (scenes.SIDE, scenes.SIDE)


@dataclass(frozen=True)
class View:
    """How pictures are shown, without changing their contents.

    Args:
        sizes: width and height in pixels of every picture in a prompt.
        canvas: size of the canvas that a single picture is letterboxed on.
        resized: size to which a single picture is resized, regardless of its aspect ratio.
        frames: 1 = pictures; 2 to 8, 16 or 32 = a clip of that many frames, of the first size. changes: ask of a clip
            also what it is that comes and goes.
        level: how difficult the scenes are.

    Raises:
        OptionError: several pictures together with a canvas, resizing or a clip.
    """

    sizes: tuple[scenes.Size, ...] = (USUAL,)
    canvas: scenes.Size | None = None
    resized: scenes.Size | None = None
    frames: int = 1
    level: scenes.Level = scenes.Level()
    changes: bool = False

    def __post_init__(self) -> None:
        several = [bool(self.canvas), bool(self.resized), self.frames > 1, len(self.sizes) > 1]
        if not self.sizes or sum(several) > 1:
            raise OptionError("several pictures, a canvas, resizing, and clips do not go together: take one of them")
        if self.changes and self.frames == 1:
            raise OptionError("changes=True asks of clips: give frames=")

    @property
    def unusual(self) -> dict[str, Any]:
        """What differs from the default view, as plain JSON data."""
        out: dict[str, Any] = {"size": list(self.sizes[0])} if self.sizes[0] != USUAL else {}
        out |= {"canvas": list(self.canvas)} if self.canvas else {}
        out |= {"pictures": len(self.sizes)} if len(self.sizes) > 1 else {}
        out |= {"changes": True} if self.changes else {}
        return out | ({"full": True} if self.level == scenes.FULL else {})

    def draw(self, split: str, number: int) -> scenes.Scene | scenes.Album | scenes.Clip:
        """Scene, album or clip `number` of a split; its image is drawn on first access.

        Raises:
            OptionError: as `scenes.scene`.
        """
        if self.frames != 1:
            return scenes.clip(split, number, self.frames, self.level, self.sizes[0])
        if len(self.sizes) > 1:
            return scenes.album(split, number, self.sizes, self.level)
        return scenes.scene(split, number, self.level, self.sizes[0], self.canvas)

    def images(self, about: scenes.Scene | scenes.Album) -> list[Image.Image]:
        """The pictures that the model receives."""
        if self.resized is None:
            return about.images
        return [image.resize(self.resized, Image.Resampling.BICUBIC) for image in about.images]


@dataclass(frozen=True)
class Asked:
    """One question and what it is about. Pictures are drawn only when the question is asked."""

    kind: str
    text: str
    answer: str
    about: scenes.Scene | scenes.Album | scenes.Clip
    view: View = View()


def questions(seed: int, limit: int, view: View | None = None, split: str = "test") -> list[Asked]:
    """The questions of seed `seed`: for each of `limit` scenes, albums or clips, one question of every kind it has."""
    rng, view = np.random.default_rng(seed), view or View()
    out = []
    for number in range(seed * limit, (seed + 1) * limit):
        about = view.draw(split, number)
        asked = (*about.questions, *(about.changes if view.changes and isinstance(about, scenes.Clip) else ()))
        for kind in scenes.EVERY:
            some = [q for q in asked if q.kind == kind]
            if some:
                q = some[int(rng.integers(len(some)))]
                out.append(Asked(q.kind, q.text, q.answer, about, view))
    return out


def replies(model: nn.Module, processor: Any, asked: Sequence[Asked], batch: int) -> Iterator[str]:
    """The model's answers, greedy, in batches."""
    weights = next(model.parameters())
    for start in range(0, len(asked), batch):
        some = asked[start : start + batch]
        inputs = prompts(processor, some).to(weights.device, weights.dtype)
        with torch.inference_mode():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=6)  # type: ignore[operator]
        for text in processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True):
            yield plain(text)


def shared_replies(model: Any, processor: Any, asked: Sequence[Asked], batch: int) -> Iterator[str]:
    """The same answers with a fraction of the work, if the kept tokens of a picture do not depend on the question: a
    picture is processed once, and all its questions continue from its cache. batch: number of pictures. See
    `shares`."""
    by: dict[int, list[int]] = {}
    for i, q in enumerate(asked):
        by.setdefault(id(q.about), []).append(i)
    said: dict[int, str] = {}
    groups = list(by.values())
    for start in range(0, len(groups), batch):
        some = [[asked[i] for i in mine] for mine in groups[start : start + batch]]
        parts = _apart(model, processor, some)
        if parts is None:
            answers = [list(replies(model, processor, mine, len(mine))) for mine in some]
        else:
            answers = _going_on(model, processor, *parts)
        for mine, each in zip(groups[start : start + batch], answers, strict=True):
            said |= zip(mine, each, strict=True)
    yield from (said[i] for i in range(len(asked)))


def _apart(
    model: Any, processor: Any, groups: list[list[Asked]]
) -> tuple[dict[str, Any], list[list[list[int]]]] | None:
    """The inputs up to the last picture, one row per group, and the tokens after it for every question; None if the
    tokenizer joins words across pictures, or the prompts differ in length."""
    weights, mark = next(model.parameters()), _mark(processor, groups[0][0])
    read = prompts(processor, [mine[0] for mine in groups]).to(weights.device, weights.dtype)
    texts = [[_words(processor, q, mark) for q in mine] for mine in groups]
    ids, first = read["input_ids"], [words[0] for words in texts]
    if any(row[len(row) - len(words) :] != words for row, words in zip(ids.tolist(), first, strict=True)):
        return None
    width = int(read["attention_mask"].sum(1)[0]) - len(first[0])
    ends = torch.tensor([ids.shape[1] - len(words) for words in first])
    columns = (ends[:, None] + torch.arange(-width, 0)).to(ids.device)
    before = {k: x.gather(1, columns) if x.shape == ids.shape else x for k, x in read.items()}
    return (before, texts) if bool(before["attention_mask"].all()) else None


def _going_on(model: Any, processor: Any, before: dict[str, Any], texts: list[list[list[int]]]) -> list[list[str]]:
    """Answers to the questions that follow every row of `before`; questions of one length run together, so nothing is
    padded."""
    inner, said = getattr(model, "model", model), [[""] * len(row) for row in texts]
    places = [(row, j) for row, words in enumerate(texts) for j in range(len(words))]
    with torch.inference_mode():
        cache = model(**before, use_cache=True)[cache_name()]
        deltas = getattr(inner, "rope_deltas", None)
        for length in sorted({len(texts[row][j]) for row, j in places}):
            mine = [(row, j) for row, j in places if len(texts[row][j]) == length]
            rows = torch.tensor([row for row, _ in mine], device=before["input_ids"].device)
            on = copy.deepcopy(cache)
            on.batch_select_indices(rows)
            if deltas is not None:  # Qwen models store those of the last prompt in the model
                inner.rope_deltas = deltas[rows]
            behind = torch.tensor([texts[row][j] for row, j in mine], device=rows.device)
            given = torch.cat([before["input_ids"][rows], behind], 1)
            more = {cache_name(): on, "attention_mask": torch.ones_like(given)}
            new = model.generate(given, **more, do_sample=False, max_new_tokens=6)[:, given.shape[1] :]
            for (row, j), text in zip(mine, processor.batch_decode(new, skip_special_tokens=True), strict=True):
                said[row][j] = plain(text)
    return said


def shares(model: Any, processor: Any, asked: Sequence[Asked]) -> bool:
    """Whether `shared_replies` gives the same answers as `replies` on some questions: not if a model counts positions
    outside its cache, or its processor names no image token."""
    try:
        return list(shared_replies(model, processor, asked, 2)) == list(replies(model, processor, asked, len(asked)))
    except Exception:  # a foreign model or processor may raise anything
        return False


def _mark(processor: Any, asked: Asked) -> str:
    return processor.video_token if isinstance(asked.about, scenes.Clip) else processor.image_token


def _words(processor: Any, asked: Asked, mark: str) -> list[int]:
    """The tokens behind the last picture."""
    text = processor.apply_chat_template(_turns(asked), add_generation_prompt=True, tokenize=False)
    return processor.tokenizer(text.rpartition(mark)[2], add_special_tokens=False).input_ids


def plain(answer: str) -> str:
    """An answer, normalised for comparison: digits that are separate words are joined into one number."""
    return re.sub(r"(?<=\d) (?=\d)", "", answer.strip().strip(".").lower())


def _turns(q: Asked) -> list[dict[str, Any]]:
    kind, count = ("video", 1) if isinstance(q.about, scenes.Clip) else ("image", len(q.view.sizes))
    return [{"role": "user", "content": [*[{"type": kind}] * count, {"type": "text", "text": q.text}]}]


def prompts(processor: Any, asked: Sequence[Asked], closed: bool = False) -> Any:
    """The inputs of a batch, padded on the left; closed: including the answers."""
    texts, images, clips = [], [], []
    for q in asked:
        if isinstance(q.about, scenes.Clip):
            clips.append(np.stack([np.asarray(f) for f in q.about.frames]))
        else:
            images.append(q.view.images(q.about))
        turns = _turns(q)
        if closed:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": q.answer}]})
        texts.append(processor.apply_chat_template(turns, add_generation_prompt=not closed, tokenize=False))
    seen: dict[str, Any] = {"videos": clips, "do_sample_frames": False} if clips else {"images": images}
    return processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **seen)
