"""ELPV: does a classifier trained on dense features still work on reduced ones? Real images of solar cells.

The images are Deitsch et al.'s elpv-dataset (CC BY-NC-SA 4.0), used for measurement and not shipped with vtc.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vtc
from vtc.eval import common
from vtc.eval.common import Candidate, Results
from vtc.models.images import load_image, preprocess

FOLDS, NEIGHBOURS, BLOCK = 5, 5, 164
INSTALL = "pip install --no-deps elpv-dataset==1.0.0.post1"


def dataset() -> tuple[list[Path], np.ndarray]:
    """All image files, and for each whether the cell is defective (probability above 0.5)."""
    spec = importlib.util.find_spec("elpv_dataset")  # not imported: its loader decodes all images at once
    folder = None if spec is None or not spec.submodule_search_locations else Path(spec.submodule_search_locations[0])
    labels = None if folder is None else folder / "data" / "labels.csv"
    if labels is None or not labels.is_file():
        raise common.MissingDataError(f"the ELPV images are not installed: {INSTALL}")
    with labels.open(encoding="utf-8") as file:
        rows = [line.split() for line in file if line.strip()]
    return [labels.parent / row[0] for row in rows], np.array([float(row[1]) > 0.5 for row in rows])


def chosen(total: int, images: int | None = None, split: str = "held-out") -> np.ndarray:
    """Evenly spaced indices of one split. The file is cut into blocks of 164 neighbours (cells of one module are
    neighbours): even blocks are "search", on which presets were chosen without labels, odd ones "held-out"."""
    if split not in ("search", "held-out", "all"):
        raise vtc.OptionError(f'split={split!r} is unknown; choose "held-out", "search" or "all"')
    index = np.arange(total)
    if split != "all":
        index = index[(index // BLOCK) % 2 == (split == "held-out")]
    count = common.check_images(images, len(index))
    return index[np.arange(count) * len(index) // count]


def load(files: Sequence[Path]) -> Tensor:
    """[n, 3, 224, 224], normalised."""
    return torch.cat([preprocess(load_image(file), 224) for file in files])


# -- judging --------------------------------------------------------------------------------------------------------


def folds(labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Five stratified (train, test) splits, always the same."""
    with common.needs("scikit-learn"):
        from sklearn.model_selection import StratifiedKFold
    if min(labels.sum(), (~labels).sum()) < FOLDS:
        raise vtc.OptionError(f"{len(labels)} images hold fewer than {FOLDS} of a class: take more, such as images=100")
    return list(StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(np.zeros(len(labels)), labels))


class Judge:
    """A linear probe and a nearest-neighbour classifier per fold, fitted on dense features only."""

    def __init__(self, dense: np.ndarray, labels: np.ndarray) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self.dense, self.labels, self.folds = unit(dense), labels, folds(labels)
        self.probes = [
            make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=2000)).fit(dense[train], labels[train])
            for train, _ in self.folds
        ]

    def probe(self, features: np.ndarray) -> np.ndarray:
        """Per image: whether the probe, not trained on it, was right."""
        right = np.zeros(len(self.labels), dtype=bool)
        for (_, test), probe in zip(self.folds, self.probes, strict=True):
            right[test] = probe.predict(features[test]) == self.labels[test]
        return right

    def neighbours(self, features: np.ndarray) -> np.ndarray:
        """Per image: whether most of its five nearest dense training images (cosine) have its class."""
        right = np.zeros(len(self.labels), dtype=bool)
        for train, test in self.folds:
            near = (-(unit(features[test]) @ self.dense[train].T)).argsort(1, kind="stable")[:, :NEIGHBOURS]
            votes = self.labels[train][near].mean(1) > 0.5
            right[test] = votes == self.labels[test]
        return right


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def gap(right: np.ndarray, other: np.ndarray, name: str) -> dict[str, float]:
    """Difference in accuracy on the same images, and its paired 95 % bootstrap interval."""
    values = torch.from_numpy(right.astype(np.float64) - other)
    low, high = common.interval(values)
    return {name: values.mean().item(), f"{name}_low": low, f"{name}_high": high}


# -- running --------------------------------------------------------------------------------------------------------


def run(
    images: int | None = 200,
    out: str | Path | None = None,
    levels: Sequence[float] = common.LEVELS,
    progress: bool = False,
    split: str = "held-out",
    methods: Sequence[Candidate] | None = None,
    dtype: str = "float32",
    batch: int = 16,
) -> Results:
    """Probe and 5-nearest-neighbour accuracy of every method, trained on dense features, tested on reduced ones.

    Args:
        images: how many, evenly spaced; None = all of the split (1312). 200 take about 15 minutes on two cores.
        out: folder for elpv.csv, .md, .png, and for the features, from which an interrupted run continues.
        levels: fractions of the MACs that remain.
        split: "held-out" (no preset was chosen on it), "search" or "all".
    """
    levels = common.check_levels(levels)
    files, labels = dataset()
    index = chosen(len(files), images, split)
    files, labels = [files[i] for i in index], labels[index]
    folds(labels)
    cache = None if out is None else Path(out) / "features" / f"{split}-{len(index)}-{dtype}"
    chosen_methods = list(methods or common.candidates())
    pixels, model = load(files), common.load_model(dtype)
    bar = common.bar(len(index) * (1 + len(chosen_methods) * len(levels)), "elpv", progress)
    step = partial(_features, model, pixels, cache, bar, batch)
    dense = step("dense", None, None)
    judge = Judge(dense["cls"], labels)
    base = _rights(judge, dense)
    rows = [_row("dense", 1.0, dense, dense, {"dense": base}, base)]
    for level in levels:
        others = {"dense": base}  # what each method is compared with; also ToMe, if it comes first
        for method in chosen_methods:
            found = step(method.label, method, level)
            rights = _rights(judge, found)
            if method.name == "tome":
                others["tome"] = rights
            rows.append(_row(method.label, level, found, dense, others, rights))
    bar.close()
    columns = {"method": "method", "macs_saved": "MACs saved", "cls_cosine": "CLS cosine"}
    for name, title in (("probe", "probe"), ("knn", "5-NN")):
        columns |= {name: title, f"{name}_dense_low": f"{title} - dense, from", f"{name}_dense_high": "to"}
    about = (
        f"ELPV, defect or not, {len(index)} images ({split}), {labels.mean():.1%} defective, DINOv2-S/14 ({dtype}) at "
        f"224x224. Trained on dense features of the training folds, tested on reduced features of the test fold, "
        f'{FOLDS} folds; "from" and "to" are the paired 95 % interval over images. {common.environment()}.'
    )
    results = Results("elpv", rows, columns, about, notes={"draw": draw})
    if out is not None:
        results.write(out)
    return results


def _features(
    model: Any,
    pixels: Tensor,
    cache: Path | None,
    bar: Any,
    batch: int,
    label: str,
    method: Candidate | None,
    level: Any,
) -> dict[str, Any]:
    """CLS and mean patch features of all images, from the cache if it has them."""
    name = "".join(c if c.isalnum() else "-" for c in label) + ("" if level is None else f"-{level:g}") + ".npz"
    what = f"vtc {vtc.__version__} {None if method is None else method.make(level)!r}"  # what the file must contain
    if cache is not None and (cache / name).is_file():
        with np.load(cache / name, allow_pickle=False) as file:
            if str(file["what"]) == what:
                bar.update(len(pixels))
                return {key: file[key] for key in file.files}
    bar.set_postfix_str(label if level is None else f"{label} {level:g}")
    ratio = 1.0
    if method is None:
        tokens = _pooled(model, pixels, batch, bar)
    else:
        with vtc.compress(model, method.make(level)) as handle:
            tokens = _pooled(model, pixels, batch, bar)
            ratio = handle.report.macs_ratio
    found: dict[str, Any] = {
        "cls": tokens[0].numpy(),
        "patch": tokens[1].numpy(),
        "macs": np.array(ratio),
        "what": np.array(what),
    }
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        part = cache / f"{name}.{os.getpid()}.part"  # several runs may share the folder
        with part.open("wb") as file:
            np.savez(file, **found)
        part.replace(cache / name)
    return found


def _pooled(model: Any, pixels: Tensor, batch: int, bar: Any) -> tuple[Tensor, Tensor]:
    parts = [common.features(model, part, batch, bar) for part in pixels.split(batch)]
    return torch.cat([p[:, 0] for p in parts]), torch.cat([p[:, 1:].mean(1) for p in parts])


def _rights(judge: Judge, found: dict) -> dict[str, np.ndarray]:
    return {"probe": judge.probe(found["cls"]), "knn": judge.neighbours(found["cls"])}


def _row(label: str, level: float, found: dict, dense: dict, others: dict, rights: dict) -> dict[str, Any]:
    row: dict[str, Any] = {"method": label, "flops": level, "macs_saved": 1 - float(found["macs"])}
    for name, right in rights.items():
        row[name] = float(right.mean())
        for other, theirs in others.items():
            row |= gap(right, theirs[name], f"{name}_{other}")
    for name in ("cls", "patch"):
        row[f"{name}_cosine"] = float((unit(found[name]) * unit(dense[name])).sum(1).mean())
    return row | {"images": len(found["cls"])}


def draw(rows: list[dict[str, Any]]) -> Any:
    """Accuracy and cosine over the MACs saved, one line per method; the band is dense's +- one standard error."""
    with common.needs("matplotlib"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = {"probe": "linear probe, accuracy", "knn": "5-NN, accuracy", "cls_cosine": "cosine of CLS to dense"}
    for axis, (key, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        if key != "cls_cosine":
            mean, error = rows[0][key], (rows[0][key] * (1 - rows[0][key]) / rows[0]["images"]) ** 0.5
            axis.axhspan(mean - error, mean + error, color="0.9", label="dense ± s.e.")
        common.lines(axis, rows[1:], key)
        axis.set(title=title, xlabel="MACs saved")
    handles, labels = axis.figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    return figure


__all__ = ["Judge", "chosen", "dataset", "run"]
