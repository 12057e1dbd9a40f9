"""PiToMe's own claim, measured: does merging keep the spectrum of the token graph?

The graph of a layer's n patch tokens is complete, with weights W_uv = max(0, cosine of the keys), W_uu = 1. Merging the
tokens of each group gives a coarse graph, lifted back to n nodes (Loukas 2019, Jin et al. 2020, PiToMe's appendix):
W'_uv = W_c(group u, group v) / (|group u| |group v|), W_c = the sum over both groups. The spectral distance is sum_i
|lambda_i - lambda'_i| over the ascending eigenvalues of the two normalised Laplacians I - D^-1/2 W D^-1/2. All methods
decide on the same keys (of the dense encoder) with the same r, so only the decisions differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import vtc
from vtc import ops
from vtc.adapters.encoders.site import EncoderSite
from vtc.budget import per_layer
from vtc.eval import common, elpv, photos
from vtc.eval.common import Results
from vtc.methods import Method
from vtc.methods.pitome import PRESETS
from vtc.scores.attention import head_mean
from vtc.token_map import TokenMap
from vtc.tokens import Tokens

LEVELS = (0.55, 0.40)
MEASURES = ("distance", "pair_cosine", "worst_pair_cosine")


@dataclass(frozen=True)
class RandomPairs(Method):
    """Merges r random tokens into r other random tokens. Stands in for random pruning, which has no coarse graph."""

    name: ClassVar[str] = "random pairs"

    def decide(self, tokens: Tokens, r: int | Tensor) -> TokenMap:
        assert isinstance(r, int)
        batch, count = tokens.features.shape[:2]
        draw = ops.seeded_uniform(tokens.layer, count - tokens.prefix, tokens.features.device)
        order = (draw.argsort() + tokens.prefix).expand(batch, -1)
        pairs = (order[:, :r], order[:, r : 2 * r], draw.new_zeros(batch, r))
        return TokenMap.from_pairs(count, pairs, weight=tokens.size)


# -- the distance ---------------------------------------------------------------------------------------------------


def graph(keys: Tensor) -> Tensor:
    """[B, n, D] -> weights [B, n, n] float64: cosines, negative ones cut to 0, 1 on the diagonal."""
    unit = ops.normalize(keys).double()
    weights = (unit @ unit.mT).clamp(min=0)
    weights.diagonal(dim1=1, dim2=2).fill_(1.0)
    return weights


def lift(weights: Tensor, group: Tensor) -> Tensor:
    """The coarse graph lifted back to n nodes: every weight becomes the mean over its two groups. group: [B, n]."""
    same = (group[:, :, None] == group[:, None, :]).double()
    average = same / same.sum(-1, keepdim=True)
    return average @ weights @ average


def spectrum(weights: Tensor) -> Tensor:
    """[B, n] ascending eigenvalues of the normalised Laplacian."""
    scale = weights.sum(-1).clamp(min=1e-12).rsqrt()
    normal = scale[:, :, None] * weights * scale[:, None, :]
    eye = torch.eye(weights.shape[1], dtype=weights.dtype)
    return torch.linalg.eigvalsh(eye - normal)


def spectral_distance(weights: Tensor, group: Tensor, before: Tensor | None = None) -> Tensor:
    """[B]: sum of |differences| between the eigenvalues before and after merging `group`."""
    before = spectrum(weights) if before is None else before
    return (before - spectrum(lift(weights, group))).abs().sum(-1)


def pair_similarity(keys: Tensor, token_map: TokenMap) -> Tensor:
    """[2, B]: mean and smallest cosine between the merged tokens and the tokens that they were merged into."""
    unit = ops.normalize(keys)
    anchor = token_map.anchor.gather(1, token_map.group)
    cosine = (unit * unit.gather(1, anchor[..., None].expand_as(unit))).sum(-1)
    moved = anchor != torch.arange(anchor.shape[1])
    mean = (cosine * moved).sum(1) / moved.sum(1).clamp(min=1)
    return torch.stack([mean, cosine.masked_fill(~moved, 1.0).amin(1)]).double()


def judge(weights: Tensor, before: Tensor, keys: Tensor, token_map: TokenMap) -> Tensor:
    """[3, B]: spectral distance, mean and smallest cosine of the merged pairs."""
    distance = spectral_distance(weights, token_map.group, before)
    return torch.cat([distance[None], pair_similarity(keys, token_map)])


# -- running --------------------------------------------------------------------------------------------------------


def methods(level: float) -> dict[str, Method]:
    """What is compared: ToMe, every preset, the published method without its protection, and random pairs."""
    found: dict[str, Method] = {"ToMe": vtc.ToMe(flops=level)}
    found |= {f"PiToMe {preset}": vtc.PiToMe(flops=level, preset=preset) for preset in PRESETS}
    found["PiToMe paper, unprotected"] = vtc.PiToMe(flops=level, preset="paper", protect=False)
    return found | {"random pairs": RandomPairs(flops=level)}


def dense_keys(model: nn.Module, pixels: Tensor) -> list[Tensor]:
    """Per layer [B, N, D], the mean over heads of the attention keys of the unpatched model, CLS included."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "k_proj")]
    heard: list[Tensor] = []
    hooks = [
        m.k_proj.register_forward_hook(
            lambda _, __, out, m=m: heard.append(head_mean(out, m.k_proj.out_features // m.head_dim))
        )
        for m in layers
    ]
    try:
        common.features(model, pixels, batch=len(pixels))
    finally:
        for hook in hooks:
            hook.remove()
    return heard


def run(
    images: int | None = 64,
    out: str | Path | None = None,
    levels: Sequence[float] = LEVELS,
    progress: bool = False,
    batch: int = 16,
) -> Results:
    """Spectral distance and mean cosine of the merged pairs, layer by layer.

    Args:
        images: how many, half crops of photographs and half ELPV images (photographs alone where ELPV is missing).
        out: folder for spectral.csv, .md, .png; None = write nothing.
        levels: fractions of the MACs that remain; they set r (that of the first layer, with 256 tokens) for all layers.
    """
    levels = common.check_levels(levels)
    pixels, what = _images(common.check_images(images, 128))
    model = common.load_model()
    (site,) = vtc.explain(model)._sites
    assert isinstance(site, EncoderSite)
    macs = site.macs
    compared = [(level, label, method) for level in levels for label, method in methods(level).items()]
    bar = common.bar(len(pixels), "spectral", progress)
    found: dict[tuple[float, str, Any], list[Tensor]] = {}
    for part in pixels.split(batch):
        keys = dense_keys(model, part)
        for layer, seen in enumerate(keys):
            weights = graph(seen[:, 1:])
            before = spectrum(weights)
            for level, label, method in compared:
                r = per_layer(method, seen.shape[1] - 1, len(keys), macs)[0]
                tokens = Tokens(features=seen, keys=seen, prefix=1, layer=layer, depth=len(keys))
                step = method.decide(tokens, r).drop_prefix(1)
                found.setdefault((level, label, layer), []).append(judge(weights, before, seen[:, 1:], step))
        for level, label, method in compared:  # the whole encoder: its final groups, on the last layer's graph
            with vtc.compress(model, method) as handle:
                common.features(model, part, batch)
                total = handle.token_map
            found.setdefault((level, label, "end"), []).append(judge(weights, before, keys[-1][:, 1:], total))
        bar.update(len(part))
    bar.close()
    rows = [_row(*key, torch.cat(parts, dim=1)) for key, parts in sorted(found.items(), key=_order)]
    means = [_mean(rows, level, label) for level, label, _ in compared]
    columns = {"method": "method", "flops": "flops=", "distance": "spectral distance, mean of layers"}
    columns |= {"pair_cosine": "cosine of merged pairs", "worst_pair_cosine": "worst merged pair"}
    columns |= {"end_distance": "spectral distance, whole encoder"}
    about = (
        f"Spectral distance of the token graph (256 patches, keys of the dense DINOv2-S/14) before and after one "
        f"merge, mean of 12 layers; smaller is nearer. {what}. {common.environment()}."
    )
    results = SpectralResults("spectral", rows, columns, about, 4, {"means": means, "draw": draw})
    if out is not None:
        results.write(out)
    return results


class SpectralResults(Results):
    """The rows are per layer; the table shows the means over the layers."""

    def table(self, rows: Any = None) -> str:
        return super().table(self.notes["means"] if rows is None else rows)


def _images(count: int) -> tuple[Tensor, str]:
    photo, _ = photos.load("held-out")
    try:
        files, _ = elpv.dataset()
    except common.MissingDataError:
        pixels = photo[torch.arange(min(count, len(photo))) * len(photo) // min(count, len(photo))]
        return pixels, f"{len(pixels)} crops of photographs"
    half = min(len(photo), count - count // 2)
    photo = photo[torch.arange(half) * len(photo) // half]
    if count // 2 == 0:
        return photo, f"{half} crops of photographs"
    cells = elpv.load([files[i] for i in elpv.chosen(len(files), count // 2)])
    return torch.cat([photo, cells]), f"{half} crops of photographs and {len(cells)} ELPV images (held-out)"


def _order(item: tuple[tuple[float, str, Any], Any]) -> tuple:
    level, _, layer = item[0]
    return -level, isinstance(layer, str), layer


def _row(level: float, label: str, layer: Any, values: Tensor) -> dict[str, Any]:
    error = (values.std(dim=1) / values.shape[1] ** 0.5).tolist()
    mean = values.mean(1).tolist()
    row = {"method": label, "flops": level, "layer": layer, "distance": mean[0], "distance_se": error[0]}
    row |= {"pair_cosine": mean[1], "pair_cosine_se": error[1], "worst_pair_cosine": mean[2]}
    return row | {"images": values.shape[1]}


def _mean(rows: list[dict[str, Any]], level: float, label: str) -> dict[str, Any]:
    own = [row for row in rows if row["flops"] == level and row["method"] == label]
    layers = [row for row in own if row["layer"] != "end"]
    row = {key: sum(r[key] for r in layers) / len(layers) for key in MEASURES}
    end = next(r["distance"] for r in own if r["layer"] == "end")
    return {"method": label, "flops": f"{level:g}", **row, "end_distance": end}


def draw(rows: list[dict[str, Any]]) -> Any:
    """Distance (above) and 1 - cosine of the merged pairs (below) over the layers, one column per level."""
    with common.needs("matplotlib"):
        from matplotlib.figure import Figure
    levels = sorted({row["flops"] for row in rows}, reverse=True)
    figure = Figure(figsize=(4.2 * len(levels) + 1.5, 6), layout="constrained")
    panels = figure.subplots(2, len(levels), sharex=True, squeeze=False)
    for column, level in enumerate(levels):
        own = [row for row in rows if row["flops"] == level and row["layer"] != "end"]
        apart = [{**row, "apart": 1 - row["pair_cosine"]} for row in own]
        common.lines(panels[0, column], own, "distance", "layer")
        common.lines(panels[1, column], apart, "apart", "layer")
        panels[0, column].set(title=f"{1 - level:.0%} of the MACs saved", ylabel="spectral distance", yscale="log")
        panels[1, column].set(xlabel="layer", ylabel="1 - cosine of merged pairs", yscale="log")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    return figure


__all__ = ["graph", "lift", "pair_similarity", "run", "spectral_distance", "spectrum"]
