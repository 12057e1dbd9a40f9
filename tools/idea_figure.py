#!/usr/bin/env python3
"""Draw docs/img/idea.svg, the picture of docs/idea.md: `.venv/bin/python tools/idea_figure.py` (a few seconds).

The photograph and its groups are real (DINOv2 ViT-S/14, PiToMe); the nine tokens are drawn, decided on by vtc.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from PIL import Image

import vtc
from vtc import viz
from vtc.checkpoints import dinov2_small
from vtc.models.images import example_photo, load_image, preprocess
from vtc.viz.figures import COLOURS, FAINT, INK, PAPER

OUT = Path(__file__).resolve().parent.parent / "docs" / "img" / "idea.svg"
SIDE = 448


def cropped(photo: Image.Image) -> Image.Image:
    """What the encoder sees: the middle square."""
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


@torch.no_grad()
def merged(photo: Image.Image) -> tuple[Image.Image, int]:
    model = dinov2_small()
    with vtc.compress(model, "pitome", keep=0.9) as handle:
        model(preprocess(photo))
        return viz.overlay(cropped(photo), handle.token_map), handle.report.after[0]


def maps() -> tuple[vtc.TokenMap, vtc.TokenMap]:
    """Nine tokens: three pairs are alike. Merged to six, and pruned to five."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(9, 12, generator=generator)
    for a, b in ((0, 1), (2, 5), (6, 7)):
        features[b] = features[a] + 0.2 * torch.randn(12, generator=generator)
    return vtc.functional.tome(features[None], r=3), vtc.functional.max_min(features[None], keep=5)


def draw_map(axes, token_map: vtc.TokenMap, top: float, title: str) -> None:
    group, anchor = token_map.group[0].tolist(), token_map.anchor[0].tolist()
    size = [f"{s:g}" for s in token_map.size[0].tolist()]
    box, drop = 0.8, 1.9
    for token, slot in enumerate(group):
        colour = "#c9cdd4" if slot < 0 else COLOURS[slot % len(COLOURS)]
        axes.add_patch(Rectangle((token, top), box, box, color=colour, lw=0))
        axes.text(token + box / 2, top + box / 2, str(token), ha="center", va="center", color=PAPER, fontsize=10)
        if slot >= 0:
            shift = (9 - len(anchor)) / 2
            ends = (token + box / 2, top), (slot + shift + box / 2, top - drop + box)
            arrow = FancyArrowPatch(
                *ends, arrowstyle="-|>", mutation_scale=8, color=colour, lw=1.4, shrinkA=1, shrinkB=1
            )
            axes.add_patch(arrow)
    for slot in range(len(anchor)):
        left = slot + (9 - len(anchor)) / 2
        axes.add_patch(Rectangle((left, top - drop), box, box, color=COLOURS[slot % len(COLOURS)], lw=0))
        axes.text(
            left + box / 2, top - drop + box / 2, f"×{size[slot]}", ha="center", va="center", color=PAPER, fontsize=10
        )
    axes.text(0, top + box + 0.18, title, color=INK, fontsize=11, fontweight="bold", va="bottom")
    arrays = f"group  {group}\nanchor {anchor}\nsize   [{', '.join(size)}]"
    axes.text(0, top - drop - 0.25, arrays, family="monospace", color=INK, fontsize=8.5, va="top", linespacing=1.35)


def main() -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "vtc", "svg.fonttype": "path"})
    photo = load_image(example_photo())
    picture, left = merged(photo)
    figure = Figure(figsize=(12.4, 5.3), facecolor=PAPER)
    FigureCanvasSVG(figure)

    def shown(image: Image.Image, at: float, title: str, note: str) -> None:
        axes = figure.add_axes((at, 0.24, 0.245, 0.245 * 12.4 / 5.3))
        axes.imshow(image)
        axes.set_axis_off()
        figure.text(at, 0.90, title, color=INK, fontsize=12, fontweight="bold")
        figure.text(at, 0.845, note, color=FAINT, fontsize=10)

    gridded = cropped(photo)
    for line in range(0, SIDE + 1, SIDE // 16):
        gridded.paste("#ffffff", (line, 0, line + 1, SIDE))
        gridded.paste("#ffffff", (0, line, SIDE, line + 1))
    shown(gridded, 0.02, "An image is tokens", "224 × 224 pixels, 16 × 16 = 256 patches")
    shown(picture, 0.735, "Fewer reach the end", f"{left} tokens; patches of one colour are one")

    middle = figure.add_axes((0.36, 0.21, 0.285, 0.66))
    middle.set(xlim=(-0.1, 9.1), ylim=(-4.9, 5.4))
    middle.set_axis_off()
    figure.text(0.36, 0.90, "A TokenMap says which went where", color=INK, fontsize=12, fontweight="bold")
    merge, prune = maps()
    draw_map(middle, merge, 3.5, "merging: 9 to 6")
    draw_map(middle, prune, -1.9, "pruning: 9 to 5, grey ones are dropped")

    for at, end, verb, who in ((0.275, 0.345, "decides", "a method"), (0.65, 0.72, "places", "an adapter")):
        arrow = FancyArrowPatch(
            (at, 0.56), (end, 0.56), transform=figure.transFigure, arrowstyle="-|>", mutation_scale=16
        )
        arrow.set(color=INK, lw=1.8)
        figure.add_artist(arrow)
        figure.text((at + end) / 2, 0.595, who, ha="center", color=FAINT, fontsize=10)
        figure.text((at + end) / 2, 0.505, verb, ha="center", color=INK, fontsize=11, fontweight="bold")
    bar = Rectangle((0.02, 0.045), 0.96, 0.085, transform=figure.transFigure, facecolor="#eef1f6", edgecolor="none")
    figure.add_artist(bar)
    figure.text(0.035, 0.087, "operators speed up", color=INK, fontsize=11, fontweight="bold", va="center")
    what = "energy, matching, merging, gathering, selecting: once in plain torch, again in C++ and CUDA"
    figure.text(0.185, 0.087, what, color=FAINT, fontsize=10, va="center")
    figure.savefig(OUT, metadata={"Date": None, "Creator": "tools/idea_figure.py"})


if __name__ == "__main__":
    main()
