"""Train IDPruner's scorer for a small model of `vtc.checkpoints`, on scenes of the training split.

    python tools/train_scorers.py tiny_llava        # writes scorer/selector.safetensors beside its weights

Scenes of several sizes with everything in them; `vtc.train.train_scorer` trains under hard selection, which hides what
would be removed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import seal
from torch.utils.data import Dataset

from vtc import scores, train
from vtc.checkpoints import tiny
from vtc.eval import answers, scenes
from vtc.eval.asking import View

SIZES = ((256, 256), (192, 192), (320, 320), (256, 192), (224, 384), (256, 256))  # one for every batch, in turn


class Examples(Dataset[dict[str, Any]]):
    """Batches of scenes with one question each and its answer, as the model's keyword arguments with labels."""

    def __init__(self, processor: Any, batches: int, batch: int) -> None:
        self.processor, self.batches, self.batch = processor, batches, batch
        self.bot = processor.tokenizer.convert_tokens_to_ids("<bot>")

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng, asked = np.random.default_rng(index), []
        view = View((SIZES[index % len(SIZES)],), level=scenes.FULL)
        for number in range(index * self.batch, (index + 1) * self.batch):
            about = view.draw("train", number)
            by_kind: dict[str, list[scenes.Question]] = {}
            for q in about.questions:
                by_kind.setdefault(q.kind, []).append(q)
            some = list(by_kind.values())[int(rng.integers(len(by_kind)))]
            q = some[int(rng.integers(len(some)))]
            asked.append(answers.Asked(q.kind, q.text, q.answer, about, view))
        inputs = dict(answers.prompts(self.processor, asked, closed=True))
        ids = inputs["input_ids"]
        answer = (ids == self.bot).cumsum(1) - (ids == self.bot).long() > 0
        return inputs | {"labels": ids.masked_fill(~answer, -100)}


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parse.add_argument("model", choices=tiny.TINY)
    parse.add_argument("--keep", type=float, default=0.1)
    parse.add_argument("--steps", type=int, default=1000)
    parse.add_argument("--batch", type=int, default=8)
    parse.add_argument("--rate", type=float, default=1e-3)
    parse.add_argument("--selection", default="hard", help="hard or soft")
    parse.add_argument("--threads", type=int)
    args = parse.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model, processor = answers.load(args.model)
    folder = tiny.place(args.model)
    state = Path("out") / f"selector-{args.model}-{args.selection}.safetensors"
    state.parent.mkdir(exist_ok=True)
    data = Examples(processor, args.steps, args.batch)
    found = train.train_scorer(
        model, data, keep=args.keep, steps=args.steps, lr=args.rate, selection=args.selection, checkpoint=state
    )
    found.model = args.model
    (folder / "scorer").mkdir(exist_ok=True)
    scores.save_scorer(found, folder / "scorer" / "selector.safetensors")
    seal(folder)


if __name__ == "__main__":
    main()
