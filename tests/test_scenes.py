"""Scenes: the same from the same number, no picture in two splits, and every answer checked against what is drawn."""

import re

import numpy as np
import pytest

from vtc.errors import OptionError
from vtc.eval import scenes

MANY = 150


def test_a_number_is_a_scene():
    a, b = scenes.scene("test", 5), scenes.scene("test", 5)
    assert a == b and a.image.tobytes() == b.image.tobytes()
    assert a.image.size == (scenes.SIDE, scenes.SIDE) and a != scenes.scene("test", 6)
    assert a.things != scenes.scene("validation", 5).things


def test_no_picture_is_in_two_splits():
    seen = {}
    for split in scenes.SPLITS:
        for scene in scenes.scenes(split, MANY):
            assert scenes._bucket(scene.things) in scenes.SPLITS[split]
            key = tuple(sorted((t.name, t.colour, round(16 * t.x), round(16 * t.y)) for t in scene.things))
            assert seen.setdefault(key, split) == split


def matching(scene, text):
    """The things that a description such as "red digit" means."""
    *colour, noun = text.split()
    return [t for t in scene.things if noun in (t.noun, "thing") and (not colour or t.colour == colour[0])]


def test_answers_are_what_is_there():
    kinds = set()
    for scene in scenes.scenes("train", MANY):
        for q in scene.questions:
            kinds.add(q.kind)
            if q.kind == "relation":
                a, word, b = re.fullmatch(r"Is the (.+) (left of|above) the (.+)\?", q.text).groups()
                (one,), (two,) = matching(scene, a), matching(scene, b)
                gap = two.x - one.x if word == "left of" else two.y - one.y
                assert abs(gap) > 0.1 and q.answer == ("yes" if gap > 0 else "no")
            elif q.kind == "count":
                noun = re.fullmatch(r"How many (.+) are there\?", q.text)[1]
                singular = {v: k for k, v in scenes.PLURAL.items()} | {"digits": "digit", "things": "thing"}
                assert q.answer == str(len(matching(scene, singular[noun])))
            elif q.kind == "digit":
                colour = re.fullmatch(r"Which digit is (.+)\?", q.text)[1]
                (one,) = matching(scene, "digit" if colour == "there" else f"{colour} digit")
                assert q.answer == one.name
            else:
                (one,) = matching(scene, re.fullmatch(r"(?:What|Where) .*?the (.+)\?", q.text)[1])
                place = ["top", "", "bottom"][int(3 * one.y)], ["left", "", "right"][int(3 * one.x)]
                where = " ".join(filter(None, place)) or "middle"
                assert q.answer == {"colour": one.colour, "shape": one.name, "position": where}[q.kind]
    assert kinds == set(scenes.KINDS)


def test_things_are_drawn_where_they_are_and_do_not_touch():
    checked = 0
    for scene in scenes.scenes("test", 40):
        pixels = np.asarray(scene.image).astype(int)
        for t in scene.things:
            assert t.side / 2 <= t.x <= 1 - t.side / 2 and t.side / 2 <= t.y <= 1 - t.side / 2
            for other in scene.things:
                assert other is t or np.hypot(other.x - t.x, other.y - t.y) > 0.7 * (t.side + other.side) - 1e-9
            if t.name in ("circle", "square", "triangle", "star", "cross"):
                middle = pixels[int(t.y * scenes.SIDE), int(t.x * scenes.SIDE)]
                assert np.abs(middle - scenes.COLOURS[t.colour]).max() < 12
                checked += 1
    assert checked > 40


@pytest.mark.parametrize("frames", [2, 8])
def test_clips(frames):
    """A thing's colour is at its centre in the frames that the answer names, and in no other."""
    answers, count = set(), 2 if frames == 2 else 4
    times = (*scenes.TIMES[: count - 1], "last")
    for number in range(20):
        clip = scenes.clip("test", number, frames)
        assert len(clip.frames) == frames and {q.kind for q in clip.questions} == {"when"}
        assert len({(t.colour, t.noun) for t in clip.things}) == len(clip.things)
        pixels = np.stack([np.asarray(f) for f in clip.frames]).astype(int)
        asked = {q.text: q.answer for q in clip.questions}
        for t, part in zip(clip.things, clip.parts, strict=True):
            if t.noun in ("circle", "square", "cross"):
                at = pixels[:, int(t.y * scenes.SIDE), int(t.x * scenes.SIDE)]
                there = np.abs(at - scenes.COLOURS[t.colour]).max(1) < 12
                assert there.tolist() == [part in (None, i * count // frames) for i in range(frames)]
            text = f"When is the {t.colour} {t.noun} there?"
            assert asked.pop(text, None) == (None if part is None else times[part])
            answers.add(None if part is None else times[part])
        assert not asked
    assert answers == {None, *times}


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: scenes.scene("exam", 0), "choose one of train, validation, test"),
        (lambda: scenes.scene("test", -1), "numbered from 0"),
        (lambda: scenes.clip("test", 0, 3), "clips have 2 or 8"),
        (lambda: scenes.Level(things=(3, 9)), "two numbers from 1 to 7"),
        (lambda: scenes.Level(kinds=("taste",)), "choose from colour"),
    ],
)
def test_refusals(call, why):
    with pytest.raises(OptionError, match=why):
        call()


def test_every_background_is_drawn():
    for background in scenes.BACKGROUNDS:
        scene = scenes.scene("train", 1, scenes.Level(backgrounds=(background,)))
        assert scene.background == background and np.asarray(scene.image).std() > 2
