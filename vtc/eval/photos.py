"""Without labels: how close a reduced encoder's features are to the dense ones, on photographs that come with
wheels."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import vtc
from vtc.eval import common
from vtc.eval.common import Candidate, Results
from vtc.models.images import load_image, preprocess

# Package and file of every photograph. All are inside installed packages; nothing is downloaded. Two disjoint splits:
# presets were searched only on "search".
PHOTOS: dict[str, tuple[tuple[str, str], ...]] = {
    "search": (
        ("skimage", "data/astronaut.png"),
        ("skimage", "data/coffee.png"),
        ("skimage", "data/motorcycle_left.png"),
        ("sklearn", "datasets/images/flower.jpg"),
        ("skimage", "data/brick.png"),
        ("skimage", "data/coins.png"),
        ("skimage", "data/retina.jpg"),
        ("skimage", "data/clock_motion.png"),
    ),
    "held-out": (
        ("skimage", "data/chelsea.png"),
        ("skimage", "data/camera.png"),
        ("skimage", "data/rocket.jpg"),
        ("sklearn", "datasets/images/china.jpg"),
        ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
        ("skimage", "data/grass.png"),
        ("skimage", "data/hubble_deep_field.jpg"),
        ("skimage", "data/ihc.png"),
    ),
}


def locate(package: str, file: str) -> Path:
    """The path of a file inside an installed package, which is not imported."""
    names = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
    spec = importlib.util.find_spec(package)
    path = None if spec is None or not spec.submodule_search_locations else Path(spec.submodule_search_locations[0])
    if path is None or not (path / file).is_file():
        raise common.MissingDataError(
            f"the photograph {file} of {names.get(package, package)} is not installed: pip install 'vtc-torch[eval]'"
        )
    return path / file


def crops(image: Image.Image, count: int, seed: int) -> list[Image.Image]:
    """The photograph's centre square, then random squares of half to all of its shorter side."""
    width, height = image.size
    draw = np.random.default_rng(seed)
    out = [image]
    while len(out) < count:
        side = int(min(width, height) * draw.uniform(0.5, 1.0))
        left, top = (int(draw.integers(0, full - side + 1)) for full in (width, height))
        out.append(image.crop((left, top, left + side, top + side)))
    return out[:count]


def load(split: str, per_photo: int = 8) -> tuple[Tensor, list[str]]:
    """Pixels [n, 3, 224, 224] of one split, and each crop's photograph."""
    pixels, names = [], []
    for seed, (package, file) in enumerate(PHOTOS[split]):
        for crop in crops(load_image(locate(package, file)), per_photo, seed):
            pixels.append(preprocess(crop, 224))
            names.append(Path(file).stem)
    return torch.cat(pixels), names


def per_photo(values: Tensor, names: Sequence[str]) -> Tensor:
    """Mean over the crops of each photograph: crops of one photograph are not independent."""
    return torch.stack([values[[n == name for n in names]].mean() for name in dict.fromkeys(names)])


def measure(
    model: Any,
    pixels: Tensor,
    names: Sequence[str],
    methods: Sequence[Candidate],
    levels: Sequence[float],
    progress: bool = False,
) -> list[dict[str, Any]]:
    """One row per method and level: cosine of CLS and patches to dense, and the difference to ToMe (if it comes first)
    with its paired 95 % interval over photographs."""
    bar = common.bar(len(pixels) * (1 + len(methods) * len(levels)), "photos", progress)
    dense = common.features(model, pixels, bar=bar)
    rows = []
    for level in levels:
        tome: tuple[Tensor, Tensor] | None = None
        for method in methods:
            with vtc.compress(model, method.make(level)) as handle:
                cls, patch = common.agreement(dense, common.features(model, pixels, bar=bar))
                left = handle.report.macs_ratio
            tome = (cls, patch) if method.name == "tome" else tome
            row = {"method": method.label, "flops": level, "macs_saved": 1 - left, "images": len(pixels)}
            for index, (what, values) in enumerate((("cls", cls), ("patch", patch))):
                row[f"{what}_cosine"] = values.mean().item()
                if tome is not None:
                    row[f"{what}_tome"] = (values - tome[index]).mean().item()
                    low, high = common.interval(per_photo(values - tome[index], names))
                    row |= {f"{what}_tome_low": low, f"{what}_tome_high": high}
            rows.append(row)
    bar.close()
    return rows


def run(
    images: int | None = None,
    out: str | Path | None = None,
    levels: Sequence[float] = common.LEVELS,
    progress: bool = False,
    split: str = "held-out",
    methods: Sequence[Candidate] | None = None,
    dtype: str = "float32",
) -> Results:
    """Measure `methods` on crops of photographs.

    Args:
        images: how many crops, at most 8 per photograph; None = all.
        out: folder for photos.csv, .md and .png; None = write nothing.
        levels: fractions of the MACs that remain.
        split: "held-out", or "search" (on which presets were chosen).
    """
    levels = common.check_levels(levels)
    pixels, names = load(split)
    count = common.check_images(images, len(pixels))
    index = [i * len(pixels) // count for i in range(count)]
    pixels, names = pixels[index], [names[i] for i in index]
    rows = measure(common.load_model(dtype), pixels, names, methods or common.candidates(), levels, progress)
    columns = {"method": "method", "macs_saved": "MACs saved", "cls_cosine": "CLS cosine"}
    columns |= {"cls_tome_low": "- ToMe, from", "cls_tome_high": "to", "patch_cosine": "patch cosine"}
    columns |= {"patch_tome_low": "- ToMe, from", "patch_tome_high": "to"}
    about = (
        f"Cosine to the dense DINOv2-S/14 ({dtype}) on {len(pixels)} crops of {len(PHOTOS[split])} photographs "
        f'({split}), 224x224; "from" and "to" are the paired 95 % interval over photographs. {common.environment()}.'
    )
    results = Results("photos", rows, columns, about)
    if out is not None:
        results.write(out)
    return results
