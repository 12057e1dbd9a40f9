"""Scenes: the same from the same number, no picture in two splits, and every answer checked against what is drawn."""

import hashlib
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


@pytest.mark.parametrize("level", [scenes.Level(), scenes.FULL])
def test_answers_are_what_is_there(level):
    kinds = set()
    for scene in scenes.scenes("train", MANY, level):
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
            elif q.kind in ("digit", "reading"):
                noun, colour = re.fullmatch(r"Which (digit|number) is (.+)\?", q.text).groups()
                (one,) = matching(scene, noun if colour == "there" else f"{colour} {noun}")
                assert q.answer == one.name
            else:
                (one,) = matching(scene, re.fullmatch(r"(?:What|Where) .*?the (.+)\?", q.text)[1])
                place = ["top", "", "bottom"][int(3 * one.y)], ["left", "", "right"][int(3 * one.x)]
                where = " ".join(filter(None, place)) or "middle"
                assert q.answer == {"colour": one.colour, "shape": one.name, "position": where}[q.kind]
    assert kinds == {*scenes.KINDS, *(["reading"] if level.numbers else [])}


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


# -- of any size ----------------------------------------------------------------------------------------------------

BEFORE = "829e8ff0ce21a4f6"  # of scenes and clips 0 to 4 of the test split, when they had one size only


def test_the_usual_questions_are_what_they_were():
    digest = hashlib.sha256()
    for number in range(5):
        for about in (scenes.scene("test", number), scenes.clip("test", number), scenes.clip("test", number, 2)):
            digest.update(repr([(q.kind, q.text, q.answer) for q in about.questions]).encode())
    assert digest.hexdigest()[:16] == BEFORE


@pytest.mark.parametrize("size", [(128, 128), (448, 224), (150, 333)])
def test_a_size_changes_no_question(size):
    """What is where stays; shapes keep their form, and the shorter side says how large they are."""
    for n in range(12):
        usual, scene = scenes.scene("test", n, scenes.FULL), scenes.scene("test", n, scenes.FULL, size)
        assert (scene.things, scene.questions, scene.image.size) == (usual.things, usual.questions, size)
        pixels = np.asarray(scene.image).astype(int)
        for t in scene.things:
            if t.name in ("square", "circle", "cross"):
                x, y, reach = size[0] * t.x, size[1] * t.y, 0.4 * t.side * min(size)
                for across, down in ((0, 0), (reach, 0), (0, reach), (-reach, 0), (0, -reach)):
                    there = pixels[int(y + down), int(x + across)]
                    assert np.abs(there - scenes.COLOURS[t.colour]).max() < 25


def test_letterboxed():
    """The picture is in its box, unchanged, and around it one plain colour."""
    boxes = set()
    for n in range(24):
        alone, scene = (scenes.scene("test", n, None, (192, 96), canvas) for canvas in (None, (320, 256)))
        assert scene.image.size == (320, 256) and scene.questions == alone.questions
        assert scene.image.crop(scene.box).tobytes() == alone.image.tobytes()
        left, top, right, bottom = scene.box
        around = np.asarray(scene.image).copy()
        mask = np.ones(around.shape[:2], bool)
        mask[top:bottom, left:right] = False
        assert len(np.unique(around[mask].reshape(-1, 3), axis=0)) == 1
        boxes.add(scene.box[:2])
    assert (64, 80) in boxes and len(boxes) == 5


def test_numbers_are_small_and_in_one_line():
    found = set()
    for scene in scenes.scenes("train", 200, scenes.FULL):
        for t in scene.things:
            if t.number:
                found.add(len(t.name))
                height = t.side / len(t.name) / scenes.NARROW
                assert 0.055 <= height <= 0.08 and t.name[0] != "0" and t.noun == "number"
    assert found == {2, 3, 4}


def test_flat_grounds_are_flat_and_leave_the_things_alone():
    """Cells that show nothing are equal to the bit, on one colour all to one another."""
    for n in range(5):
        plain = scenes.scene("test", n, scenes.Level(backgrounds=("plain",)))
        for ground, least, most in (("paper", 0.5, 1), ("screen", 0.2, 0.99)):
            about = scenes.scene("test", n, scenes.Level(backgrounds=(ground,)))
            assert about.things == plain.things and about.questions == plain.questions
            colours, counts = np.unique(np.asarray(about.image).reshape(-1, 3), axis=0, return_counts=True)
            assert least < counts.max() / counts.sum() < most
    assert not set(scenes.FLAT) & set(scenes.FULL.backgrounds)


def test_albums():
    """Every question names its picture, and is one of that picture's; no scene is in two albums."""
    sizes, numbers = ((128, 160), (256, 128), (144, 144)), set()
    for n in range(6):
        album = scenes.album("test", n, sizes, scenes.FULL)
        assert album == scenes.album("test", n, sizes, scenes.FULL) and [i.size for i in album.images] == list(sizes)
        numbers |= {scene.number for scene in album.scenes}
        own = [{(q.text.lower(), q.answer) for q in scene.questions} for scene in album.scenes]
        assert len(album.questions) == sum(len(scene.questions) for scene in album.scenes)
        for q in album.questions:
            which, text = re.fullmatch(r"In picture (\d), (.+)", q.text).groups()
            assert (text.lower(), q.answer) in own[int(which) - 1]
    assert len(numbers) == 18


@pytest.mark.parametrize("frames", range(2, 9))
def test_clips(frames):
    """A thing's colour is at its centre in the frames that the answer names, and in no other."""
    answers, count = set(), scenes.PARTS[frames]
    times = (*scenes.TIMES[: count - 1], "last")
    for number in range(24):
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
        (lambda: scenes.clip("test", 0, 9), "clips have 2 to 8"),
        (lambda: scenes.scene("test", 0, None, (256, 16)), "at least 32 pixels"),
        (lambda: scenes.scene("test", 0, None, (256, 256), (320, 200)), "as large as the picture"),
        (lambda: scenes.album("test", 0, [(256, 256)]), "an album has 2 to 9 pictures"),
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
