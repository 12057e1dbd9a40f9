"""One photograph through a real encoder, dense and compressed, in numbers and in a picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vtc.adapters.report import Report
from vtc.bench.timing import Tick, interleave, shared_copy
from vtc.checkpoints import SaliencyModel
from vtc.handle import install
from vtc.methods import Method
from vtc.token_map import TokenMap


@dataclass(frozen=True, eq=False)
class PhotoComparison:
    """Dense against compressed.

    Attributes:
        token_map: image tokens to the tokens at the encoder's end.
        seconds: median of the encoder, (dense, compressed); speedup: the median of the rounds' ratios.
        cosine_cls, cosine_patches: cosines of the last hidden states to the dense ones; for patches, the mean.
        saliency: the two maps [H, W], 0 to 1; correlation: Pearson's, of the two.
    """

    method: Method
    report: Report
    token_map: TokenMap
    seconds: tuple[float, float]
    speedup: float
    cosine_cls: float
    cosine_patches: float
    correlation: float
    saliency: tuple[Tensor, Tensor]

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method.name,
            "options": self.method.options(),
            "tokens_per_layer": [list(pair) for pair in self.report.tokens],
            "image_tokens": [self.report.before[0], self.report.after[0]],
            "macs": [self.report.macs_before, self.report.macs_after],
            "macs_ratio": self.report.macs_ratio,
            "seconds": list(self.seconds),
            "speedup": self.speedup,
            "cosine_cls": self.cosine_cls,
            "cosine_patches": self.cosine_patches,
            "saliency_correlation": self.correlation,
        }


def compare(
    model: SaliencyModel, pixels: Tensor, method: Method, repeats: int = 5, warmup: int = 1, *, tick: Tick | None = None
) -> PhotoComparison:
    """Run `pixels` [1, 3, H, W] through the saliency model unmodified and with `method` in its encoder. The model stays
    as it was; only the encoder is timed."""
    small = shared_copy(model)
    encoders: list[Any] = [model.backbone, small.backbone]
    with install(small, method) as handle, torch.inference_mode():
        features, maps = [], []
        for whole, encoder in zip((model, small), encoders, strict=True):
            maps.append(whole(pixels)[0, 0].float())
            features.append(encoder(pixels).last_hidden_state.float())
        calls = {name: partial(encoder, pixels) for name, encoder in zip(("dense", "less"), encoders, strict=True)}
        took = interleave(calls, repeats, warmup, tick=tick)
        report, token_map = handle.report, handle.token_map
    alike = torch.nn.functional.cosine_similarity(features[0], features[1], dim=-1)[0]
    pair = torch.stack([each.flatten().double() for each in maps])
    return PhotoComparison(
        method,
        report,
        token_map,
        (median(took["dense"]), median(took["less"])),
        median(d / s for d, s in zip(took["dense"], took["less"], strict=True)),
        alike[0].item(),
        alike[1:].mean().item(),
        torch.corrcoef(pair)[0, 1].item(),
        (maps[0], maps[1]),
    )


def picture(photo: Image.Image, found: PhotoComparison, grid: tuple[int, int], side: int = 480) -> Any:
    """The sheet of `vtc run`: photograph, groups, both saliency maps. `photo` is cropped as the encoder's input was."""
    from vtc.viz import heatmap, overlay, sheet

    cell = max(8, round(side / max(grid)))
    shown = photo.resize((grid[1] * cell, grid[0] * cell), Image.Resampling.LANCZOS)
    report, name = found.report, type(found.method).__name__
    before, after = report.before[0], report.after[0]
    note = "one colour, one token" if found.method.merges else "dark: dropped"
    dense, less = found.saliency
    return sheet(
        [
            (shown, "Photograph", f"{before} patches, {grid[0]} x {grid[1]}"),
            (overlay(shown, found.token_map, grid), f"{before} patches become {after} tokens", note),
            (heatmap(shown, dense), "Saliency, dense", f"{report.macs_before / 1e9:.2f} billion multiply-adds"),
            (
                heatmap(shown, less),
                f"Saliency, {name}",
                f"{report.macs_after / 1e9:.2f} billion multiply-adds, correlation {found.correlation:.3f}",
            ),
        ],
        f"{name}: the same encoder with {report.macs_ratio:.0%} of the arithmetic",
        f"DINOv2 ViT-S/14. Features against dense: cosine {found.cosine_cls:.3f} (CLS), "
        f"{found.cosine_patches:.3f} (mean patch). Encoder {found.seconds[0] * 1e3:.0f} ms dense, "
        f"{found.seconds[1] * 1e3:.0f} ms compressed.",
    )
