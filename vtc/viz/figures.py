"""Figures: curves of measurements, and sheets of pictures side by side. matplotlib's global state is not changed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from vtc.errors import InputError, OptionError

INK, FAINT, PAPER = "#1d2129", "#69707d", "#ffffff"
COLOURS = ("#2f6fdb", "#e0662f", "#2b9d6b", "#a24bc2", "#c9a227", "#38a6b8", "#d14a6f", "#7a7f87")
MARKERS = "osD^vPX*"


def curve(
    rows: Iterable[Mapping[str, Any]],
    x: str,
    y: str,
    by: str,
    *,
    title: str = "",
    labels: Mapping[str, str] | None = None,
) -> Figure:
    """One line per value of `by`, in the order of their first rows; points sorted by `x`.

    Args:
        rows: dicts, such as the rows of a measurement; rows without the three keys raise InputError.
        labels: axis labels to use instead of the keys' names.
    """
    lines: dict[Any, list[tuple[float, float]]] = {}
    for row in rows:
        absent = [key for key in (x, y, by) if key not in row]
        if absent:
            raise InputError(f"a row has no {', '.join(map(repr, absent))}; it has {', '.join(map(repr, row))}")
        lines.setdefault(row[by], []).append((row[x], row[y]))
    figure = _figure(6.4, 4.2)
    axes = figure.add_subplot()
    for i, (name, points) in enumerate(lines.items()):
        across, up = zip(*sorted(points), strict=True)
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.plot(across, up, color=colour, marker=marker, ms=5, lw=1.6, label=str(name))
    named = labels or {}
    axes.set_xlabel(named.get(x, x), color=INK)
    axes.set_ylabel(named.get(y, y), color=INK)
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.grid(color="#e6e8ec", lw=0.8)
    axes.tick_params(colors=FAINT, labelsize=9)
    for side in axes.spines.values():
        side.set_visible(False)
    if lines:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def sheet(
    panels: Sequence[tuple[Image.Image, str, str]], title: str, subtitle: str = "", *, height: float = 4.0
) -> Figure:
    """Pictures of equal height in a row, each (picture, title, note below the title), under a headline.

    `height`: height of the pictures in inches.
    """
    if not panels:
        raise InputError("a sheet takes at least one picture")
    widths = [height * picture.width / picture.height for picture, _, _ in panels]
    gap, edge, head = 0.28, 0.35, 1.62
    wide, high = sum(widths) + gap * (len(panels) - 1) + 2 * edge, height + head + edge
    figure = _figure(wide, high, layout=None)
    figure.text(edge / wide, 1 - 0.34 / high, title, color=INK, fontsize=17, fontweight="bold", va="top")
    figure.text(edge / wide, 1 - 0.72 / high, subtitle, color=FAINT, fontsize=11.5, va="top")
    left = edge
    for (picture, name, note), width in zip(panels, widths, strict=True):
        axes = figure.add_axes((left / wide, edge / high, width / wide, height / high))
        axes.imshow(picture, interpolation="antialiased", aspect="auto")
        axes.set_axis_off()
        place = left / wide
        figure.text(place, (edge + height + 0.30) / high, name, color=INK, fontsize=12, fontweight="bold", va="bottom")
        figure.text(place, (edge + height + 0.09) / high, note, color=FAINT, fontsize=10, va="bottom")
        left += width + gap
    return figure


def check_target(path: str | Path) -> Path:
    """`path`, if a picture may be written there: it does not exist, or is an earlier picture of vtc. Else
    OptionError."""
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise OptionError(f"{str(path)!r}: the picture is a PNG file, give a name that ends with .png")
    if not target.parent.is_dir():
        raise OptionError(f"{str(path)!r}: there is no folder {str(target.parent)!r}; make it first")
    if target.is_symlink() or (target.exists() and not _ours(target)):
        raise OptionError(f"{str(path)!r} exists and was not written by vtc, so it stays; choose another name")
    return target


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, marked as ours. Overwrites only earlier pictures of vtc; never leaves half a file."""
    target = check_target(path)
    handle, name = tempfile.mkstemp(suffix=".png", prefix=".vtc-", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            figure.savefig(file, format="png", metadata={"Software": "vtc"})
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp's files are private
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target


def _ours(path: Path) -> bool:
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get("Software") == "vtc"
    except Exception:  # not a picture of ours
        return False


def _figure(wide: float, high: float, layout: Any = "constrained") -> Figure:
    figure = Figure(figsize=(wide, high), dpi=120, facecolor=PAPER, layout=layout)
    FigureCanvasAgg(figure)
    return figure
