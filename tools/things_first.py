"""Would a perfect choice of tokens help? Keeps those that lie on the things of a scene, before any others.

    python tools/things_first.py tiny_qwen      # beside random, which keeps as many

No method can know what this one is told. Where it is below random, the decoder misses the background itself: it has
learned from pictures that are mostly background, and answers by the share that a thing has of what it sees.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import vtc
from vtc import ops
from vtc.checkpoints import tiny
from vtc.eval import answers, scenes
from vtc.methods import Tokens
from vtc.methods.selector import Selector

SIDE, MARGIN = 16, 0.02  # tokens a row; how far around a thing, in parts of the picture


def on_things(scene: scenes.Scene) -> Tensor:
    """[SIDE^2] bool: the tokens whose middle is on a thing, or nearly."""
    middle = (torch.arange(SIDE) + 0.5) / SIDE
    found = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    for thing in scene.things:
        reach = thing.side / 2 + MARGIN
        found |= ((middle - thing.y).abs() <= reach)[:, None] & ((middle - thing.x).abs() <= reach)
    return found.flatten()


@dataclass(frozen=True)
class ThingsFirst(Selector):
    """Keeps what lies on things, then others by chance."""

    name: ClassVar[str] = "things_first"
    summary: ClassVar[str] = "keeps the tokens on things"
    about: tuple[scenes.Scene, ...] = ()
    seed: int = 0

    def pick(self, tokens: Tokens, count: int | Tensor) -> Tensor:
        draws = torch.rand(tokens.features.shape[:2], generator=torch.Generator().manual_seed(self.seed))
        return ops.top_select(draws + torch.stack([on_things(s) for s in self.about]).float(), count, tokens.mask)


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parse.add_argument("model", choices=tiny.TINY)
    parse.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25])
    parse.add_argument("--limit", type=int, default=8)
    parse.add_argument("--seeds", type=int, default=5)
    parse.add_argument("--batch", type=int, default=16)
    args = parse.parse_args()
    model, processor = answers.load(args.model)
    for keep in args.keep:
        for label in ("random", "things_first"):
            right: dict[str, list[bool]] = {}
            for seed in range(args.seeds):
                asked = answers.questions(seed, args.limit)
                for at in range(0, len(asked), args.batch):
                    some = asked[at : at + args.batch]
                    about = tuple(q.about for q in some if isinstance(q.about, scenes.Scene))
                    told = ThingsFirst(keep=keep, about=about, seed=seed)
                    with vtc.compress(model, told if label == told.name else vtc.Random(keep=keep, seed=seed)):
                        for q, said in zip(some, answers.replies(model, processor, some, args.batch), strict=True):
                            for kind in (q.kind, "all"):
                                right.setdefault(kind, []).append(said == q.answer)
            shares = "  ".join(f"{kind} {sum(r) / len(r):.2f}" for kind, r in right.items())
            print(f"keep {keep:g}  {label:12s}  {shares}", flush=True)


if __name__ == "__main__":
    main()
