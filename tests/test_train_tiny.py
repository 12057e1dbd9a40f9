"""The training of the small models sees what the models see when they are asked."""

import sys
from pathlib import Path

import pytest
import torch

from vtc.eval import answers, scenes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import train_tiny  # noqa: E402


@pytest.mark.parametrize(("name", "frames"), [("qwen", 1), ("llava", 1), ("qwen", 2), ("qwen", 8)])
def test_training_and_asking_are_one(name, frames):
    """Several questions behind one picture, each under the block mask, have the logits that each has alone."""
    torch.manual_seed(0)
    learner = train_tiny.Learner(name).eval()
    about = scenes.scene("validation", 3) if frames == 1 else scenes.clip("validation", 2, frames)
    pictures = train_tiny.Pictures(learner, 0, 0, 1, 4)
    asked = list(about.questions[:4])
    values, *_, steps = pictures.make([about]) if frames == 1 else pictures.film([about])
    text = train_tiny.Text.of([asked], learner.processor.tokenizer)
    with torch.inference_mode():
        logits, target = learner.answers(learner.see(learner.features(values), steps), text, steps)
        place = 0
        for q in asked:
            inputs = answers.prompts(learner.processor, [answers.Asked(q.kind, q.text, q.answer, about)])
            alone = learner.model(**inputs).logits[0, -1]
            torch.testing.assert_close(logits[place], alone, atol=2e-4, rtol=1e-4)
            words = learner.processor.tokenizer(f"{q.answer} <eos>").input_ids
            assert target[place : place + len(words)].tolist() == words
            place += len(words)
    assert len(asked) > 1 and place == len(target)


def test_the_features_spread_goes_into_the_weights():
    torch.manual_seed(0)
    learner, x = train_tiny.Learner("llava"), 40 + 3 * torch.randn(2, 256, 384)
    learner.mean, learner.spread = x.mean((0, 1)), x.std((0, 1))
    before = learner.see(x)
    learner.fold()
    assert not learner.mean.any()
    torch.testing.assert_close(learner.see(x), before, atol=1e-4, rtol=1e-4)


def test_a_run_goes_on(tmp_path):
    learner = train_tiny.Learner("qwen")
    both = train_tiny.optimizers(learner, 1e-3)
    matrix = learner.model.model.visual.merger.mlp[0].weight
    learner.sharp.grad, matrix.grad = torch.ones(()), torch.ones_like(matrix)
    for optimizer in both:
        optimizer.step()
    train_tiny.save(tmp_path, learner, both, {"seed": 0}, 48)
    other = train_tiny.Learner("qwen")
    again = train_tiny.optimizers(other, 1e-3)
    assert train_tiny.resume(tmp_path, other, again, {"seed": 0}) == 48
    assert all(torch.equal(a, b) for a, b in zip(learner.parameters(), other.parameters(), strict=True))
    same = other.model.model.visual.merger.mlp[0].weight
    assert [len(optimizer.state) for optimizer in again] == [1, 1]
    assert torch.equal(again[0].state[same]["momentum_buffer"], both[0].state[matrix]["momentum_buffer"])
    assert again[1].state[other.sharp]["exp_avg"] == both[1].state[learner.sharp]["exp_avg"]
    with pytest.raises(SystemExit, match="another run"):
        train_tiny.resume(tmp_path, other, again, {"seed": 1})
