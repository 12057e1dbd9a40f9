"""Pictures: which patches were merged or dropped, maps over an image, films of videos, and measurements as curves."""

from vtc.viz.figures import check_target, curve, save, sheet
from vtc.viz.film import film
from vtc.viz.tokens import carried, groups, heatmap, overlay

__all__ = ["carried", "check_target", "curve", "film", "groups", "heatmap", "overlay", "save", "sheet"]
