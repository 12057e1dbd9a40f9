"""The training of the small models sees what the models see when they are asked."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vtc.eval import asking, scenes
from vtc.eval.asking import View

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import tiny_data  # noqa: E402
import train_tiny  # noqa: E402
from tiny_learner import MODELS, Learner  # noqa: E402

VIEWS = {
    "square": View(),
    "narrow": View(((128, 336),)),  # windows at two borders have fewer patches
    "odd": View(((150, 205),)),  # no whole tokens
    "small": View(((64, 80),)),  # as every processor that has a least
    "padded": View(((288, 192),), canvas=(320, 320)),
    "resized": View(resized=(304, 224)),
    "two": View(((256, 192), (128, 160))),
    "three": View(((128, 128), (192, 128), (144, 208))),
}
CLIPS = {f"clip{n}": View((size,), frames=n) for n, size in enumerate([(128, 128), (192, 96), (256, 256)] * 2, 2)}


@pytest.fixture(scope="module", params=["qwen", "llava"])
def pair(request):
    """What learns, and the model as Transformers has it, with the same weights."""
    torch.manual_seed(0)
    learner = Learner(request.param).eval()
    model, _ = MODELS[request.param]()
    model.load_state_dict(learner.model.state_dict())
    return learner, model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*VIEWS, *CLIPS])
def test_training_and_asking_are_one(pair, name):
    """Several questions behind one prompt, each under its mask, have the logits that each has alone."""
    learner, model = pair
    if learner.name == "llava" and name in CLIPS:
        pytest.skip("the LLaVA learns no clips")
    view = replace({**VIEWS, **CLIPS}[name], level=scenes.FULL)
    about = view.draw("validation", 3)
    asked = tiny_data.choose(about.questions, 4)
    values, shown, text, prompt = tiny_data.Pictures(learner.name, learner.processor).of(view, "validation", [3], 4)
    with torch.inference_mode():
        tokens = learner.see(learner.features(values), prompt)
        logits, target = learner.answers(tokens, text, prompt)
        assert shown.shape == (1, prompt.tokens, 6) and tokens.shape[:2] == (1, prompt.tokens)
        place = 0
        for q in asked:
            inputs = asking.prompts(learner.processor, [asking.Asked(q.kind, q.text, q.answer, about, view)])
            alone = model(**inputs).logits[0, -1]
            torch.testing.assert_close(logits[place], alone, atol=2e-4, rtol=1e-4)
            words = learner.processor.tokenizer(f"{q.answer} <eos>").input_ids
            assert target[place : place + len(words)].tolist() == words
            assert asking.plain(learner.processor.tokenizer.decode(words, skip_special_tokens=True)) == q.answer
            place += len(words)
    assert asked and place == len(target)


def test_a_row_of_a_batch_is_as_alone():
    torch.manual_seed(0)
    learner = Learner("qwen").eval()
    pictures, view = tiny_data.Pictures("qwen", learner.processor), View(((128, 144), (160, 128)))
    with torch.inference_mode():
        many, one = (pictures.of(view, "train", numbers, 3) for numbers in (range(5, 8), [6]))
        both = [learner.answers(learner.see(v, prompt), text, prompt) for v, _, text, prompt in (many, one)]
    row = many[2].block.new_tensor(range(3))[:, None].expand_as(many[2].block)[many[2].target >= 0] == 1
    torch.testing.assert_close(both[0][0][row], both[1][0], atol=1e-4, rtol=1e-4)


def test_labels_say_what_is_there():
    """Of every token whose middle is on a thing's: that thing, its colour, its numerals; padding shows nothing."""
    pictures, numerals = tiny_data.Pictures("qwen", Learner("qwen").processor), 0
    for view in (View(((448, 224),)), View(((192, 288),), canvas=(320, 320)), View(resized=(320, 192))):
        view = replace(view, level=scenes.FULL)
        for n in range(12):
            scene = view.draw("train", n)
            shown, prompt = (pictures.of(view, "train", [n], 1)[i] for i in (1, 3))
            grid = shown[0].view(*prompt.grids[0][1:], 6)
            left, top, right, bottom = (v / w for v, w in zip(scene.box, (scene.canvas or scene.size) * 2, strict=True))
            for t in scene.things:
                x, y = left + (right - left) * t.x, top + (bottom - top) * t.y
                row, column = int(y * len(grid)), int(x * grid.shape[1])
                thing, colour, *halves = grid[row, column, :4].tolist()
                assert tiny_data.THINGS[thing - 1] == (t.noun if t.number else t.name)
                assert list(scenes.COLOURS)[colour - 1] == t.colour
                assert all(h == 0 or (t.number and str(h - 1) in t.name) for h in halves)
                numerals += sum(h > 0 for h in halves)
            if scene.canvas:
                assert not grid[-1, 0, :4].any() or not grid[0, -1, :4].any()
    assert numerals > 20


def test_batches_are_of_every_kind_and_size():
    """A batch's number says how it looks; sides are those that the model is to know, the tokens about as many."""
    seen, sides = set(), set()
    for at in range(300):
        view = tiny_data.view("qwen", np.random.default_rng([7, at]), at // 100)
        assert view == tiny_data.view("qwen", np.random.default_rng([7, at]), at // 100)
        seen |= {("canvas", view.canvas is not None), ("resized", view.resized is not None), len(view.sizes)}
        seen.add(("frames", view.frames))
        if view.frames == 1:
            whole = [view.resized or view.canvas or size for size in view.sizes]
            assert all(128 <= n <= 448 and n % 16 == 0 for size in whole for n in size)
            sides |= {n for size in whole for n in size}
        assert tiny_data.tokens(view) <= 1024
    assert seen >= {("canvas", True), ("resized", True), 1, 2, 3, *(("frames", n) for n in range(1, 9))}
    assert {128, 448} <= sides and len(sides) > 18


def test_the_features_spread_goes_into_the_weights():
    torch.manual_seed(0)
    learner, x = Learner("llava"), 40 + 3 * torch.randn(2, 256, 384)
    learner.centre(x)
    before = learner.see(x, tiny_data.Prompt())
    learner.fold()
    assert not learner.mean.any()
    torch.testing.assert_close(learner.see(x, tiny_data.Prompt()), before, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_exactly(tmp_path):
    """Three batches in a row are what one, a stop and two more are; another run's state is refused."""
    view = View(((128, 128),), level=scenes.FULL)
    batches = [tiny_data.Pictures("qwen", Learner("qwen").processor).of(view, "train", [n], 2) for n in range(3)]

    def begin():
        torch.manual_seed(0)
        learner = Learner("qwen")
        return learner, train_tiny.optimizers(learner, 1e-3)

    learner, both = begin()
    train_tiny.step(learner, both, batches[0], 1e-3, True)  # the decoder has no optimizer's state yet
    train_tiny.save(tmp_path, learner, both, {"seed": 0}, 1)
    for batch in batches[1:]:
        train_tiny.step(learner, both, batch, 1e-3, False)
    torch.manual_seed(1)
    other = Learner("qwen")
    again = train_tiny.optimizers(other, 1e-3)
    path = tmp_path / "state.safetensors"
    assert train_tiny.resume(path, other, again, {"seed": 0}) == 1
    for batch in batches[1:]:
        train_tiny.step(other, again, batch, 1e-3, False)
    for (name, a), b in zip(learner.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(SystemExit, match="another run"):
        train_tiny.resume(path, other, again, {"seed": 1})
    train_tiny.pack(path, tmp_path / "packed.safetensors")  # the weights alone
    anew = train_tiny.optimizers(other, 1e-3)
    assert train_tiny.resume(tmp_path / "packed.safetensors", other, anew, {"seed": 0}) == 1
    assert not any(optimizer.state for optimizer in anew)
    torch.testing.assert_close(other.sharp, learner.sharp, atol=0.1, rtol=0.01)


def test_what_is_exported_is_what_learned(tmp_path):
    import transformers

    torch.manual_seed(0)
    learner = Learner("qwen").eval()
    train_tiny.export(tmp_path, learner)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    view = View(((160, 128),), level=scenes.FULL)
    (q,) = asking.questions(0, 1, view, "validation")[:1]
    with torch.inference_mode():
        alone = model(**asking.prompts(processor, [q])).logits[0, -1]
        values, _, text, prompt = tiny_data.Pictures("qwen", processor).of(view, "validation", [0], 1)
        mine = learner.answers(learner.see(values, prompt), tiny_data.Text.of([[q]], processor.tokenizer), prompt)[0][0]
    torch.testing.assert_close(alone, mine, atol=0.05, rtol=0.05)  # bfloat16
    assert list(asking.replies(model, processor, [q], 1))


def test_a_check_leaves_nothing_that_cannot_be_trained_with():
    """A prompt that was first seen in a check is learned from afterwards."""
    learner = Learner("qwen")
    view = View(((128, 128),))
    train_tiny.check(learner, 2, {"small": view})
    values, _, text, prompt = tiny_data.Pictures("qwen", learner.processor).of(view, "train", [0], 2)
    learner.loss(learner.see(values, prompt), text, prompt).backward()
