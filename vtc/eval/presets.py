"""How PiToMe's preset was chosen: options compared without labels, on photographs and on ELPV images.

`run(split="search")` is what the choice was made on, `run(split="held-out")` what it was checked on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import vtc
from vtc.eval import common, elpv, photos
from vtc.eval.common import Candidate, Results

LEVELS = (0.55, 0.40)


def candidates() -> list[Candidate]:
    """The published presets, and one change at a time."""
    changes: dict[str, dict[str, Any]] = {
        "paper": {},
        "head": {"preset": "head"},
        "text": {"preset": "text"},
        "nearest": {"preset": "nearest"},
        "nearest, hidden states": {"preset": "nearest", "metric": "hidden"},
        "paper, unprotected": {"protect": False},
        "elu": {"energy": "elu"},
        "elu, hidden states": {"energy": "elu", "metric": "hidden"},
        "elu, protected in layers 0-5": {"energy": "elu", "protect": (0.0, 0.5)},
        "elu, protected in layers 6-11": {"energy": "elu", "protect": (0.5, 1.0)},
        "elu, protected in layers 9-11": {"energy": "elu", "protect": (0.75, 1.0)},
        "elu, unprotected": {"energy": "elu", "protect": False},
        "elu, unprotected, hidden states": {"energy": "elu", "protect": False, "metric": "hidden"},
        "elu, unprotected, margin 0.9": {"energy": "elu", "protect": False, "margin": (0.9, 0.9)},
        "elu, unprotected, margin 0": {"energy": "elu", "protect": False, "margin": (0.0, 0.0)},
        "gaussian": {"energy": "gaussian", "margin": (0.9, 0.25)},
        "gaussian, unprotected": {"energy": "gaussian", "margin": (0.9, 0.25), "protect": False},
    }
    for margin in (0.8, 0.9, 0.95, 0.98):
        options = {"energy": "gaussian", "margin": (margin, margin), "protect": False}
        changes[f"gaussian, unprotected, margin {margin:g}"] = options
    fixed = [Candidate(f"PiToMe {label}", "pitome", {"preset": "paper"} | o) for label, o in changes.items()]
    return [Candidate("ToMe", "tome"), *fixed, Candidate("random", "random")]


def compare(dense: Tensor, reduced: Tensor, tome: Tensor, name: str) -> dict[str, float]:
    """CLS and patch cosine to dense, and the paired difference to ToMe with its standard error over images."""
    row: dict[str, float] = {}
    ours, theirs = common.agreement(dense, reduced), common.agreement(dense, tome)
    for what, mine, other in zip(("cls", "patch"), ours, theirs, strict=True):
        gap = mine - other
        error = gap.std().item() / len(gap) ** 0.5
        row |= {f"{name}_{what}": mine.mean().item(), f"{name}_{what}_gap": gap.mean().item()}
        row[f"{name}_{what}_gap_se"] = error
    return row


def run(
    images: int | None = 48,
    out: str | Path | None = None,
    levels: Sequence[float] = LEVELS,
    progress: bool = False,
    split: str = "search",
    methods: Sequence[Candidate] | None = None,
    dtype: str = "bfloat16",
) -> Results:
    """Compare `methods` (ToMe is added in front) on `images` ELPV images and 6 crops of each of 8 photographs."""
    levels = common.check_levels(levels)
    chosen = [Candidate("ToMe", "tome"), *(m for m in methods or candidates() if m.label != "ToMe")]
    files, _ = elpv.dataset()
    cells = elpv.load([files[i] for i in elpv.chosen(len(files), images, split)])
    sets = {"photos": photos.load(split, 6)[0], "elpv": cells}
    model = common.load_model(dtype)
    bar = common.bar(sum(map(len, sets.values())) * (1 + len(levels) * len(chosen)), "presets", progress)
    dense = {name: common.features(model, pixels, bar=bar) for name, pixels in sets.items()}
    rows = []
    for level in levels:
        tome: dict[str, Tensor] = {}
        for method in chosen:
            row: dict[str, Any] = {"split": split, "flops": level, "method": method.label}
            for name, pixels in sets.items():
                with vtc.compress(model, method.make(level)):
                    reduced = common.features(model, pixels, bar=bar)
                row |= compare(dense[name], reduced, tome.setdefault(name, reduced), name)
            rows.append(row)
    bar.close()
    columns = {"method": "method", "flops": "flops=", "photos_cls": "photographs: CLS", "photos_patch": "patches"}
    columns |= {"elpv_cls": "ELPV: CLS", "elpv_patch": "patches"}
    about = (
        f"Cosine to the dense DINOv2-S/14 ({dtype}), {len(sets['photos'])} crops of photographs and {len(cells)} ELPV "
        f"images ({split}). {common.environment()}."
    )
    results = Results("presets", rows, columns, about)
    if out is not None:
        results.write(out)
    return results
