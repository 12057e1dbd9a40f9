"""Why a frame helps where it helps: what the image tokens know of their place, and frames that could show otherwise.

    python tools/frame_study.py tiny_qwen tiny_llava       # the tables of docs/frame.md

The probe: how much of their row and column does a linear map of the image tokens say (R^2, of pictures that it was not
fitted on)? Then DivPrune and IDPruner, with half of the budget on

    grid       an even grid, which is `frame=0.5`
    chance     tokens drawn by chance
    empty      the grid, but each of its tokens replaced by the picture's mean: only places are left of them
    shuffled   the grid, with its tokens' positions dealt out among them anew: only contents are left of them
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import vtc
from vtc import ops
from vtc.checkpoints import tiny
from vtc.eval import answers, common, scenes
from vtc.eval.asking import Asked, View, prompts, questions, shared_replies
from vtc.methods import METHODS, Tokens
from vtc.methods.frame import even
from vtc.methods.order import joined, marked
from vtc.methods.selector import Selector, each

ROOT = Path(__file__).resolve().parent.parent
FRAMES = ("none", "grid", "chance", "empty", "shuffled")
SIZES = {"tiny_qwen": ((256, 256), (384, 384)), "tiny_llava": ((256, 256),)}


# -- the probe ------------------------------------------------------------------------------------------------------


def probe(model: Any, processor: Any, count: int = 60) -> float:
    """R^2 of row and column by ridge regression on the image tokens of `count` pictures, asked of as many others."""
    parts = []
    for start in (0, count):
        rows = []
        for number in range(start, start + count):
            about = scenes.scene("train", number, scenes.FULL)
            read = prompts(processor, [Asked("", "what", "", about)])
            with torch.inference_mode():
                given = {k: v for k, v in read.items() if k in ("pixel_values", "image_grid_thw")}
                tokens = model.model.get_image_features(**given, return_dict=True).pooler_output
            rows.append(torch.cat([x.reshape(-1, x.shape[-1]) for x in tokens]))
        parts.append(torch.stack(rows).double())
    side = int(parts[0].shape[1] ** 0.5)
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    place = (place - place.mean(0)).repeat(count, 1)
    mean = parts[0].flatten(0, 1).mean(0)
    first, second = (x.flatten(0, 1) - mean for x in parts)
    weight = torch.linalg.solve(first.T @ first + 1e-2 * torch.eye(first.shape[1]), first.T @ place)
    return 1 - float((second @ weight - place).square().sum() / place.square().sum())


# -- the frames -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByChance(Selector):
    """A method with half of its budget on tokens that are drawn."""

    inner: Selector | None = None
    name: ClassVar[str] = "by_chance"

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        assert self.inner is not None
        return self.inner.needs

    def pick(self, tokens: Tokens, count: int | Tensor) -> Tensor:
        assert self.inner is not None
        order = self.inner.pick(tokens, count)
        total = tokens.features.shape[1]
        drawn = ops.seeded_uniform(0, total, order.device).expand(len(order), total)
        first = ops.top_select(drawn, torch.tensor([k // 2 for k in each(count, len(order))]), tokens.mask)
        rest = order.masked_fill(marked(first, total).gather(1, order.clamp(min=0)), -1)
        return joined(first, rest)[:, : order.shape[1]]


@contextmanager
def spoiled(handle: vtc.Handle, how: str) -> Iterator[None]:
    """The grid's tokens without their contents, or without their places, while the decoder reads a prompt."""
    intake: Any = handle.patches[0]
    decoder: nn.Module = getattr(intake.inner, intake.family.decoder)

    def spoil(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        record, x = intake.record, kwargs["inputs_embeds"].clone()
        if record is None or x.shape[1] != record.columns.shape[1] or intake.positions.ids is None:
            return args, kwargs
        ids = intake.positions.ids = intake.positions.ids.clone()
        for unit, order in enumerate(record.token_map.order):
            kept = order[order >= 0]
            row = record.rows[unit]
            at = record.at(record.places[unit, kept][None].expand(len(x), -1))[row]
            grid = even(record.lengths[unit], record.grids[unit], round(0.5 * len(kept)))
            frame = at[: len(grid)]
            assert kept[: len(grid)].tolist() == grid
            if how == "empty":
                x[row, frame] = x[row, at].mean(0)
            else:
                deal = torch.randperm(len(frame), generator=torch.Generator().manual_seed(unit))
                ids[..., row, frame] = ids[..., row, frame[deal]]
        return args, kwargs | {"inputs_embeds": x}

    hook = decoder.register_forward_pre_hook(spoil, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def asked_of(loaded: tuple[Any, Any], asked: list[Asked], method: str, frame: str, keep: float) -> dict[str, float]:
    """Accuracy by kind."""
    plain: Any = vtc.methods.make(method, keep=keep, **({} if frame in ("none", "chance") else {"frame": 0.5}))
    chosen = ByChance(keep=keep, inner=plain) if frame == "chance" else plain
    said: list[str] = []
    with vtc.compress(loaded[0], chosen) as handle:
        if frame in ("empty", "shuffled"):
            with spoiled(handle, frame):
                said = list(shared_replies(*loaded, asked, 16))
        else:
            said = list(shared_replies(*loaded, asked, 16))
    right = [s == q.answer for s, q in zip(said, asked, strict=True)]
    kinds = dict.fromkeys(q.kind for q in asked)
    found = {k: [r for r, q in zip(right, asked, strict=True) if q.kind == k] for k in kinds} | {"all": right}
    return {kind: sum(each) / len(each) for kind, each in found.items()}


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parse.add_argument("models", nargs="+", choices=tiny.TINY)
    parse.add_argument("--limit", type=int, default=60, help="scenes, of the validation split")
    args = parse.parse_args()
    METHODS.setdefault(ByChance.name, ByChance)
    known, body = [], []
    for name in args.models:
        loaded = answers.load(name)
        known.append([name, f"{probe(*loaded):.2f}"])
        for size in SIZES[name]:
            asked = questions(0, args.limit, View((size,), level=scenes.FULL), "validation")
            for method in ("divprune", "idpruner"):
                for keep in (0.25, 0.1):
                    line = [f"{name}, {size[0]}²", method, f"{keep:g}"]
                    for frame in FRAMES:
                        found = asked_of(loaded, asked, method, frame, keep)
                        line.append(f"{found['all']:.3f} ({found['position']:.2f})")
                    body.append(line)
                    print(" | ".join(line), flush=True)

    def table(head: list[str], rows: list[list[str]]) -> str:
        return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])

    text = table(["tokens of", "R² of their place"], known)
    common.put(ROOT / "docs" / "frame.md", "probe", text)
    common.put(ROOT / "docs" / "frame.md", "study", table(["model", "method", "keep", *FRAMES], body))


if __name__ == "__main__":
    sys.exit(main())
