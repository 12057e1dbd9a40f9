"""`vtc eval clip`: zero-shot classification by an open_clip model, dense and compressed, with clip_benchmark's own
code.

The text is embedded once; then every method sees the same images. Nothing is downloaded except the requested model, if
it is not available locally.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vtc
from vtc.errors import OptionError, UnsupportedModelError, first_line
from vtc.eval import common
from vtc.eval.common import Results

METHODS = ("tome", "pitome", "random", "downsample")
SCORES = {
    "acc1": "top-1",
    "acc5": "top-5",
    "mean_per_class_recall": "recall per class",
    "mean_average_precision": "mAP",
}
_needs = common.needs("clip-benchmark", "pip install 'vtc-torch[harness]'")


class Batches:
    """A data loader, cut after `most` images."""

    def __init__(self, loader: Any, most: int | None) -> None:
        self.loader, self.dataset, self.most = loader, loader.dataset, most

    def __iter__(self) -> Iterator[Any]:
        left = math.inf if self.most is None else self.most
        for images, target in self.loader:
            count = int(min(left, len(images)))
            yield images[:count], target[:count]
            left -= count
            if not left:
                return


def run(
    data: str | Path = "",
    model: str = "ViT-B-32",
    pretrained: str = "",
    dataset: str | None = None,
    split: str = "test",
    methods: Sequence[str] = METHODS,
    levels: Sequence[float] = common.LEVELS,
    images: int | None = None,
    out: str | Path | None = None,
    batch: int = 64,
    progress: bool = False,
) -> Results:
    """Zero-shot accuracy of the dense model and of every method at every level.

    Args:
        data: the folder of the data set.
        model, pretrained: open_clip's names (pretrained may be a file); "local-dir:FOLDER" gives both.
        dataset: clip_benchmark's name, such as "cifar10"; by default the folder is a webdataset as written by
            `clip_benchmark_export_wds`, with classnames.txt and zeroshot_classification_templates.txt.
        levels: fractions of the vision tower's MACs that remain.
        images: how many, from the start; None = all.
        out: folder for clip.csv, .md and .png.

    Raises:
        MissingDataError: clip_benchmark is not installed. UnsupportedModelError: a tower that cannot be reduced.
        OptionError: an option out of range; no such folder, data set or model.
    """
    levels = common.check_levels(levels)
    common.check_images(images, 1)
    todo = [vtc.methods.make(name, flops=level) for level in levels for name in methods]
    if not str(data) or not Path(data).is_dir():
        raise OptionError(f"data={str(data)!r}: no such folder; give that of a data set that clip_benchmark reads")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _needs:
        from clip_benchmark.metrics.zeroshot_classification import run_classification, zero_shot_classifier
    net, transform, tokenizer = _model(model, pretrained, device)
    for method in todo:
        plan = vtc.explain(net.visual, method)
        if not plan.ok:
            raise UnsupportedModelError(f"{model}: {plan}")
    batches = Batches(
        _loader(str(data), dataset or f"wds/{Path(data).resolve().name}", split, transform, batch), images
    )
    found = batches.dataset
    rows: list[dict[str, Any]] = []
    with nullcontext() if progress else redirect_stderr(io.StringIO()):
        texts = zero_shot_classifier(net, tokenizer, found.classes, found.templates, device, amp=False)
        dense = None
        for chosen in (None, *todo):
            start = time.perf_counter()
            with nullcontext() if chosen is None else vtc.compress(net.visual, chosen) as handle:
                logits, target = run_classification(net, texts, batches, device, amp=False)
                ratio = 1.0 if handle is None else handle.report.macs_ratio
            dense = logits if dense is None else dense
            row = {"method": "dense" if chosen is None else chosen.name, "flops": chosen.flops if chosen else 1.0}
            row |= {"macs_saved": 1 - ratio, "images": len(target), **score(logits, target)}
            row |= {"fidelity": (logits.argmax(1) == dense.argmax(1)).double().mean().item()}
            rows.append(row | {"seconds": time.perf_counter() - start})
    columns = {"method": "method", "macs_saved": "MACs saved", "images": "images"}
    columns |= {name: title for name, title in SCORES.items() if name in rows[0]} | {"fidelity": "as dense"}
    about = (
        f"Zero-shot classification by {model}{f' ({pretrained})' if pretrained else ''} on {data}, {split} split, "
        f"{len(found.classes)} classes, by clip_benchmark; MACs of the vision tower. {common.environment()}."
    )
    results = Results("clip", rows, columns, about, notes={"draw": draw})
    if out is not None:
        results.write(out)
    return results


def _model(name: str, pretrained: str, device: str) -> Any:
    with _needs:
        from clip_benchmark.models import load_clip
    if not pretrained and ":" not in name:
        raise OptionError(
            f"model={name!r} without weights: add pretrained=, a file or a name (open_clip.list_pretrained)"
        )
    try:
        net, transform, tokenizer = load_clip("open_clip", name, pretrained, None, device)  # type: ignore[arg-type]
    except Exception as error:  # open_clip and the Hub's client may raise anything
        raise OptionError(
            f"model={name!r}, pretrained={pretrained!r}: open_clip cannot load it ({first_line(error)})"
        ) from error
    return net.eval(), transform, tokenizer


def _loader(folder: str, name: str, split: str, transform: Any, batch: int) -> Any:
    with _needs:
        from clip_benchmark.datasets.builder import build_dataset, get_dataset_collate_fn
    try:
        found = build_dataset(name, folder, transform, split, download=False)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # each data set raises its own errors
        raise OptionError(
            f"{folder}: clip_benchmark finds no {split} split of {name} there ({first_line(error)})"
        ) from error
    if not getattr(found, "classes", None) or not getattr(found, "templates", None):
        raise OptionError(f"{folder}: {name} has no names of classes, or no templates, so nothing can be classified")
    if name.startswith("wds/"):
        return torch.utils.data.DataLoader(found.batched(batch), batch_size=None)
    return torch.utils.data.DataLoader(found, batch_size=batch, collate_fn=get_dataset_collate_fn(name))


def score(logits: Tensor, target: Tensor) -> dict[str, float]:
    """Scores as in clip_benchmark, whose own top-k needs a numpy older than 2.4. With several labels per image: mAP."""
    if target.ndim == 2:
        from clip_benchmark.metrics.zeroshot_classification import average_precision_per_class

        return {"mean_average_precision": average_precision_per_class(logits, target).mean().item()}
    with common.needs("scikit-learn"):
        from sklearn.metrics import balanced_accuracy_score
    right = (logits.topk(min(5, logits.shape[1])).indices == target[:, None]).double()
    found = {"acc1": right[:, 0].mean().item()}
    if logits.shape[1] >= 5:
        found["acc5"] = right.sum(1).mean().item()
    return found | {"mean_per_class_recall": float(balanced_accuracy_score(target, logits.argmax(1)))}


def draw(rows: Sequence[dict[str, Any]]) -> Any:
    """Accuracy over the MACs saved, one line per method; the band is dense's +- one standard error."""
    with common.needs("matplotlib"):
        from matplotlib.figure import Figure
    score = next(name for name in SCORES if name in rows[0])
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    error = (rows[0][score] * (1 - rows[0][score]) / rows[0]["images"]) ** 0.5
    axis.axhspan(rows[0][score] - error, rows[0][score] + error, color="0.9", label="dense ± s.e.")
    common.lines(axis, rows[1:], score)
    axis.set(xlabel="MACs saved", ylabel=SCORES[score])
    axis.legend(frameon=False, fontsize=8)
    return figure


__all__ = ["run"]
