"""PixelPrune: pixels that say nothing new leave before the vision tower, https://arxiv.org/abs/2604.00886."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vtc.errors import OptionError
from vtc.layout import Grid
from vtc.methods.base import Method
from vtc.methods.pixels import check_rule, sources


@dataclass(frozen=True)
class PixelPrune(Method):
    """In front of the first layer: a token's patches leave if their pixels are those that its neighbours predict.

    The prediction of a cell (the patches that become one token; one patch in a plain vision encoder) is its left
    neighbour A; in column 0 the upper one, B; elsewhere B, if the cell at the upper left resembles A and not B. A cell
    stays unless it resembles its prediction; cells resemble each other if their distance is at most `tolerance`. At 0
    nothing is lost: the cells that stay and the rule give the image back. The picture decides how many stay, so there
    is no budget: keep= takes 1.0 alone. With a method behind the projector, as in "divprune+pixelprune" or
    vtc.DivPrune(keep=0.25, before=vtc.PixelPrune()), that method's keep= is of the tokens that are left. A plain
    encoder gives every patch that left the row of the one whose pixels stand for its own.

    Args:
        tolerance: the largest distance of two cells that are taken for one, in pixel values of [0, 1]. 0 = equal.
        metric: the distance: "max", "mean" or "rms" of the differences of a cell's pixel values.
        anchored: neighbours are as they are rebuilt from the cells that stay, so no cell's error is above `tolerance`.
            False: as they are in the image; errors add up along a gradient. At tolerance 0 both are the same.
        std: by what the processor divides each of the three channels (its image_std), to take differences back to
            [0, 1]; None = as the model says, or its family's own processor does.
    """

    keep: float | int | None = 1.0
    tolerance: float = 0.0
    metric: str = "max"
    anchored: bool = True
    std: tuple[float, float, float] | None = None

    name: ClassVar[str] = "pixelprune"
    summary: ClassVar[str] = "drops patches whose pixels are predicted by their neighbours, before the tower"
    merges: ClassVar[bool] = False
    halves: ClassVar[bool] = False
    one_shot: ClassVar[bool] = True
    budgeted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        given: dict[str, Any] = {"keep": None if self.keep == 1.0 and isinstance(self.keep, float) else self.keep}
        given |= {"r": self.r, "flops": self.flops}
        for option, value in given.items():
            if value is not None:
                raise OptionError(
                    f"{option}={value!r}: pixelprune has no budget, the picture decides how many of its patches stay: "
                    "leave it out, raise tolerance=, or give it to a method behind it (divprune+pixelprune, keep=0.25)"
                )
        if self.where == "tower":
            raise OptionError('where="tower": pixelprune works before the tower, on pixels: leave it out')
        super().__post_init__()
        check_rule(self.tolerance, self.metric, self.anchored)
        if self.std is not None:
            object.__setattr__(self, "std", _read_std(self.std))

    def _check_where(self) -> None:
        for option, unset in (("pooled", False), ("before", None)):
            if getattr(self, option) != unset:
                raise OptionError(f"{option}={getattr(self, option)!r}: pixelprune works before the tower, on pixels")

    @property
    def entrance(self) -> PixelPrune:
        return self

    def sources(self, cells: Tensor, grid: Grid) -> Tensor:
        """[B, h*w] long, which cell stands for each; one that stays is its own. cells [B, h*w, c], of values whose
        differences are those of pixels in [0, 1]."""
        return sources(cells, grid, self.tolerance, self.metric, self.anchored)


def _read_std(std: Any) -> tuple[float, float, float]:
    try:
        values = tuple(float(x) for x in std)
    except (TypeError, ValueError):
        values = ()
    if len(values) != 3 or not all(0 < x < float("inf") for x in values):
        raise OptionError(f"std={std!r}: it takes three numbers above 0, the processor's image_std")
    return values  # type: ignore[return-value]
