"""PiToMe: Protect Informative Tokens before Merging, Tran et al., NeurIPS 2024, https://arxiv.org/abs/2405.16148."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.errors import OptionError
from vtc.methods.base import Method
from vtc.ops.definitions import ENERGIES
from vtc.token_map import TokenMap
from vtc.tokens import Tokens

# The options that each name stands for. `margin` runs linearly from the first value (first layer) to the second (one
# past the last); `protect` is the span of the depth, as fractions, in which informative tokens are protected.
PRESETS: dict[str, dict[str, Any]] = {
    # As in the paper: Eq. 4, Algorithm 1 in every layer.
    "paper": {"energy": "paper", "split": "alternate", "margin": (0.9, 0.0), "protect": (0.0, 1.0), "metric": "keys"},
    # As released for DeiT and ViT since 2024-11: ELU energy, protection in the second half of the layers.
    "head": {"energy": "elu", "split": "alternate", "margin": (0.75, 0.0), "protect": (0.5, 1.0), "metric": "keys"},
    # As released for BERT: Gaussian energy, high-energy half against low-energy half.
    "text": {"energy": "gaussian", "split": "half", "margin": (0.9, 0.25), "protect": (0.0, 1.0), "metric": "keys"},
    # Ours: energy = similarity to the nearest other token, no token protected. Mutual nearest neighbours get
    # neighbouring ranks, hence are on opposite sides of the split, so the best pairs can always merge. Chosen without
    # labels on crops of photographs and half of the ELPV images, confirmed on others: docs/results.md,
    # benchmarks/results.
    "nearest": {"energy": "nearest", "split": "alternate", "margin": (0.0, 0.0), "protect": False, "metric": "keys"},
}
DEFAULT_PRESET = "nearest"  # level with ToMe on the held-out sets, unlike the published presets: docs/results.md


@dataclass(frozen=True)
class PiToMe(Method):
    """Tokens with many similar neighbours (high energy) merge; tokens without them (informative) are protected.

    Args:
        preset: one of `PRESETS`; every other option left at None comes from it. None = "nearest", or "paper" if a
            margin is given, or an energy that has one.
        margin: similarity above which a neighbour counts as close: a pair (first layer, last layer), linear in between,
            or one number m for the paper's m - m l/L.
        energy: "elu", "paper" (Eq. 4), "gaussian", or "nearest" (similarity to the nearest other token; no margin).
        split: "alternate" (neighbouring energy ranks go to opposite sides) or "half".
        protect: True, False, or the span of the depth in which protection applies, e.g. (0.5, 1.0).
        alpha: weight of the tokens below the margin.
        metric: "keys" (attention keys, mean over heads) or "hidden" (the tokens after attention).
    """

    preset: str | None = None
    margin: float | tuple[float, float] | None = None
    energy: str | None = None
    split: str | None = None
    protect: bool | tuple[float, float] | None = None
    alpha: float = 1.0
    metric: str | None = None

    name: ClassVar[str] = "pitome"
    summary: ClassVar[str] = "merges redundant (high-energy) tokens, protects informative ones"
    each_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in list(PRESETS):
            raise OptionError(f"preset={self.preset!r} is unknown; choose one of {', '.join(PRESETS)}")
        super().__post_init__()
        for key in ("margin", "protect"):
            if isinstance(getattr(self, key), list):
                object.__setattr__(self, key, tuple(getattr(self, key)))
        if self.metric not in (None, "keys", "hidden"):
            raise OptionError(f'metric={self.metric!r} is unknown; choose "keys" or "hidden"')
        if self.option("energy") == "nearest" and (self.margin is not None or self.alpha != 1.0):
            raise OptionError('margin= and alpha= say nothing to energy="nearest": choose another energy or preset')
        if isinstance(self.margin, tuple) and len(self.margin) != 2:
            raise OptionError(f"margin={self.margin!r}: it takes a number, or a pair (first layer, last layer)")
        span = self.option("protect")
        if not isinstance(span, tuple) or len(span) != 2 or any(type(end) not in (int, float) for end in span):
            raise OptionError(f"protect={span!r}: it takes True, False, or a span of the depth such as (0.5, 1.0)")
        start, end = self.option("margin")
        check_pitome(start, self.alpha, self.option("energy"), self.option("split"))
        check_pitome(end, self.alpha, self.option("energy"), self.option("split"))

    def option(self, name: str) -> Any:
        """The effective value of an option: the one given, else the preset's. Margins and spans are returned as
        pairs."""
        preset = self.preset
        if preset is None:
            plain = self.margin is None and self.alpha == 1.0 and self.energy in (None, "nearest")
            preset = DEFAULT_PRESET if plain else "paper"
        value = getattr(self, name)
        value = PRESETS[preset][name] if value is None else value
        if name == "margin" and not isinstance(value, tuple):
            return (value, 0.0)
        if name == "protect" and isinstance(value, bool):
            return (0.0, 1.0) if value else (0.0, 0.0)
        return value

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"layer_keys"}) if self.option("metric") == "keys" else frozenset()

    @property
    def optional(self) -> frozenset[str]:  # type: ignore[override]
        return self.needs

    def decide(self, tokens: Tokens, r: int | Tensor) -> TokenMap:
        share = tokens.layer / tokens.depth
        start, end = self.option("margin")
        low, high = self.option("protect")
        metric = tokens.features if tokens.layer_keys is None or not self.needs else tokens.layer_keys
        return pitome_round(
            metric,
            r,
            tokens.prefix,
            tokens.mask,
            tokens.size,
            margin=start + (end - start) * share,
            alpha=self.alpha,
            form=self.option("energy"),
            split=self.option("split"),
            protect=low <= share < high,
        )


def check_pitome(margin: Any, alpha: Any, energy: str, split: str) -> None:
    if energy not in ENERGIES:
        raise OptionError(f"energy={energy!r} is unknown; choose one of {', '.join(ENERGIES)}")
    if split not in ("alternate", "half"):
        raise OptionError(f'split={split!r} is unknown; choose "alternate" or "half"')
    for name, value in (("margin", margin), ("alpha", alpha)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise OptionError(f"{name}={value!r}: it takes a finite number")
    if energy == "gaussian" and margin >= 1:
        raise OptionError(f"margin={margin!r}: the gaussian energy needs a margin below 1 (sigma = 1 - margin)")


def pitome_round(
    metric: Tensor,
    r: int | Tensor,
    prefix: int = 0,
    mask: Tensor | None = None,
    size: Tensor | None = None,
    *,
    margin: float,
    alpha: float = 1.0,
    form: str = "elu",
    split: str = "alternate",
    protect: bool = True,
) -> TokenMap:
    """One round: sort by energy, match redundant tokens among themselves, merge r of them. metric [B, N, D]; r is [B]
    exactly when there is a mask.

    With protection only the 2r tokens of highest energy take part, and every source merges (Algorithm 1); without it,
    all take part and the r most similar pairs merge.
    """
    if mask is None:
        assert isinstance(r, int)
        return TokenMap.from_round(metric, r, prefix, size, (form, margin, alpha), split == "half", protect)
    assert isinstance(r, Tensor)
    unit, some = ops.normalize(ops.over_heads(metric)), protect or split == "half"
    (a, a_valid), (b, b_valid) = _ragged_sets(unit, r, prefix, mask, (form, margin, alpha), split, some)
    pairs = ops.bipartite_match(unit, a, b, r, a_valid, b_valid)
    return TokenMap.from_pairs(metric.shape[1], pairs, mask=mask, weight=size)


def _ragged_sets(
    unit: Tensor, r: Tensor, prefix: int, mask: Tensor, energy: tuple[str, float, float], split: str, some: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two sets to match when every image has its own r: padded indices, ascending, and which are real."""
    inside = mask & (mask.long().cumsum(1) > prefix)
    order = ops.energy(unit, *energy, inside).argsort(dim=1, descending=True, stable=True)  # padding, prefix: last
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    taking = 2 * r if some else inside.sum(1)
    first = place < r[:, None] if split == "half" else place % 2 == 0
    sets = []
    for side in (first, ~first):
        chosen = (place < taking[:, None]) & side
        most = int(chosen.sum(1).max()) if chosen.numel() else 0
        index = order.masked_fill(~chosen, order.shape[1]).sort(dim=1).values[:, :most]
        sets.append((index.clamp(max=order.shape[1] - 1), index < order.shape[1]))
    return sets[0], sets[1]
