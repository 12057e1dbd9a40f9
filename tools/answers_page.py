"""The tables and figures of docs/answers.md, from what `vtc eval scenes` wrote.

    python tools/answers_page.py out/answers        # a folder with tiny_llava/, tiny_qwen/, clips-2/, clips-8/

The rows are kept in benchmarks/results/answers-NAME.csv, and the page is made of these: without a folder, anew.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtc.eval import answers, common
from vtc.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results"
RUNS = ("tiny_llava", "tiny_qwen", "clips-2", "clips-8")
# The best on the validation split, keep 0.25 and 0.1 together
CHOSEN = {"tiny_llava": "pitome+proportional", "tiny_qwen": "visionzip+proportional"}
SHORT = ("visionzip+proportional", "pitome+proportional", "fastv", "dart", "pitome", "tome", "divprune", "idpruner")
SHORT += ("zoo_prune", "downsample", "random")

# What was said of a method, whose answers should then be better, and on which questions
CLAIMS = (
    ("IDPruner above DivPrune", "idpruner", "divprune", "all"),
    ("IDPruner above importance alone", "idpruner", "idpruner 1", "all"),
    ("IDPruner with its trained scorer above DivPrune", "idpruner+scorer", "divprune", "all"),
    ("the trained scorer above attention or sensitivity", "idpruner+scorer", "idpruner", "all"),
    ("ZOO-Prune above the norm", "zoo_prune", "norm", "all"),
    ("PPE, with ToMe, on positions", "tome+ppe", "tome", "position"),
    ("PPE, with PiToMe, on positions", "pitome+ppe", "pitome", "position"),
    ("PPE, with DPC-KNN, on positions", "dpc_knn+ppe", "dpc_knn", "position"),
    ("attention by size, with ToMe", "tome+proportional", "tome", "all"),
    ("attention by size, with PiToMe", "pitome+proportional", "pitome", "all"),
    ("attention by size, with VisionZip", "visionzip+proportional", "visionzip", "all"),
    ("PiToMe above ToMe", "pitome", "tome", "all"),
    ("PiToMe above downsample, both by size", "pitome+proportional", "downsample+proportional", "all"),
)

Row = dict[str, Any]


def read(name: str) -> list[Row]:
    """The rows of one run, numbers as numbers."""
    kinds: dict[str, Any] = {"method": str, "kind": str, "seed": int, "n": int}
    with (KEPT / f"answers-{name}.csv").open(newline="", encoding="utf-8") as file:
        return [{k: kinds.get(k, float)(v) for k, v in row.items()} for row in csv.DictReader(file)]


def take(name: str, folder: Path) -> None:
    """Keep what a run gave. Methods that it did not ask stay as they are, if dense answered the same: so a new method
    needs a run of its own only."""
    target = KEPT / f"answers-{name}.csv"
    before = read(name) if target.exists() else []
    shutil.copyfile(folder / "scenes.csv", target)
    new = read(name)
    dense = [[(r["seed"], r["kind"], r["accuracy"]) for r in rows if r["method"] == "dense"] for rows in (before, new)]
    asked = {r["method"] for r in new}
    if dense[0] == dense[1]:
        common.write_csv(target, new + [r for r in before if r["method"] not in asked])
    about = (folder / "scenes.md").read_text(encoding="utf-8").split("\n\n")[0]
    (KEPT / f"answers-{name}.txt").write_text(about + "\n", encoding="utf-8")


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in body])


def ranked(rows: Sequence[Row]) -> list[str]:
    """The methods, best first at keep 0.25 (and 0.1 between equals)."""
    found = answers.summarise(rows)
    labels = dict.fromkeys(method for method, keep in found if keep < 1)
    return sorted(labels, key=lambda m: [-found[m, keep]["all"]["accuracy"][0] for keep in (0.25, 0.1)])


def by_keep(rows: Sequence[Row]) -> str:
    """Accuracy of every method at every budget, and loyalty at a quarter."""
    found, levels = answers.summarise(rows), sorted({r["keep"] for r in rows if r["keep"] < 1}, reverse=True)

    def cell(method: str, keep: float) -> str:
        middle, half = found[method, keep]["all"]["accuracy"]
        return f"{middle:.3f} ± {half:.3f}"

    body = [["dense", cell("dense", 1.0), *[""] * len(levels)]]
    for method in ranked(rows):
        loyal = found[method, 0.25]["all"]["loyalty"][0]
        body.append([method, *(cell(method, keep) for keep in levels), f"{loyal:.3f}"])
    return table(["method", *(f"keep {k:g}" for k in levels), "loyalty at 0.25"], body)


def by_kind(rows: Sequence[Row], keep: float) -> str:
    """Accuracy by question kind at one budget."""
    found, kinds = answers.summarise(rows), [k for k in dict.fromkeys(r["kind"] for r in rows) if k != "all"]
    body = [
        [method, *(f"{found[method, level][kind]['accuracy'][0]:.2f}" for kind in kinds)]
        for method, level in [("dense", 1.0), *((m, keep) for m in ranked(rows))]
    ]
    return table(["method", *kinds], body)


def gap(rows: Sequence[Row], ours: str, theirs: str, kind: str, keep: float) -> tuple[float, float] | None:
    """The mean difference over the seeds, each of which asked both the same, and half its 95 % interval."""
    first, second = (
        {r["seed"]: r["accuracy"] for r in rows if (r["method"], r["kind"], r["keep"]) == (method, kind, keep)}
        for method in (ours, theirs)
    )
    return answers.spread([first[s] - second[s] for s in first]) if first and second else None


def claims(runs: dict[str, list[Row]], levels: Sequence[float] = (0.25, 0.1, 0.05)) -> str:
    """Every claim on every model at every budget: the difference, bold where its interval leaves out zero."""

    def cell(found: tuple[float, float] | None) -> str:
        if found is None:
            return "–"
        middle, half = found
        text = f"{middle:+.3f} ± {half:.3f}"
        return f"**{text}**" if abs(middle) > half else text

    def line(said: str, ours: str, theirs: str, kind: str, name: str) -> list[str]:
        return [said, name, *(cell(gap(runs[name], ours, theirs, kind, keep)) for keep in levels)]

    body = [line(*claim, name) for claim in CLAIMS for name in runs]
    for theirs in answers.ALWAYS:
        body += [
            line(f"{ours}, the best of the validation split, above {theirs}", ours, theirs, "all", name)
            for name, ours in CHOSEN.items()
        ]
    return table(["claim", "model", *(f"keep {k:g}" for k in levels)], body)


def draw(rows: Sequence[Row], title: str) -> Any:
    """Accuracy against what stays: methods that select on the left, methods that merge on the right."""
    from matplotlib.figure import Figure

    found = answers.summarise(rows)
    merging = {m for m in ranked(rows) if METHODS[m.split()[0].partition("+")[0]].merges}
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axis, name, group in zip(
        figure.subplots(1, 2, sharey=True),
        ("select", "merge"),
        ({m for m in ranked(rows) if m not in merging}, merging),
        strict=True,
    ):
        labels = [m for m in ranked(rows) if (m in group or m in answers.ALWAYS) and not re.search(r" |\+ppe", m)]
        answers.plot(axis, found, labels)
        axis.set_title(f"{title}: methods that {name}", fontsize=10)
        axis.legend(fontsize=7, ncols=2)
    figure.axes[0].set_ylabel("accuracy")
    return figure


def card(runs: dict[str, list[Row]], name: str) -> str:
    """What one method reached, as it is and with options, for its own page."""
    body = []
    for run, rows in runs.items():
        found = answers.summarise(rows)
        levels = sorted({keep for _, keep in found if keep < 1}, reverse=True)
        dense = f"{found['dense', 1.0]['all']['accuracy'][0]:.3f}"
        for label in dict.fromkeys(method for method, _ in found):
            if re.split("[ +]", label)[0] == name:
                each = [f"{found[label, keep]['all']['accuracy'][0]:.3f}" for keep in levels]
                body.append([run, label, dense, *each])
    return table(["answers of", "method", "dense", *(f"keep {k:g}" for k in levels)], body)


def short(runs: dict[str, list[Row]], levels: Sequence[float] = (0.25, 0.1)) -> str:
    """Some methods on the small models, for the front page."""
    found = {name: answers.summarise(rows) for name, rows in runs.items()}

    def cells(method: str, keep: float | None = None) -> list[str]:
        return [f"{found[n][method, keep or k]['all']['accuracy'][0]:.2f}" for n in found for k in levels]

    head = [f"{name}, keep {keep:g}" for name in found for keep in levels]
    return table(["", *head], [["dense", *cells("dense", 1.0)], *([name, *cells(name)] for name in SHORT)])


def write(root: Path) -> None:
    """All of it, into the pages in and below the folder `root`."""
    docs = root / "docs"
    runs = {name: read(name) for name in RUNS}
    pictures = {name: rows for name, rows in runs.items() if name in CHOSEN}
    for name, rows in runs.items():
        about = (KEPT / f"answers-{name}.txt").read_text(encoding="utf-8")
        common.put(docs / "answers.md", name, f"{about}\n{by_keep(rows)}")
        if name in CHOSEN:
            common.put(docs / "answers.md", f"{name}, kinds", by_kind(rows, 0.25))
            draw(rows, name).savefig(docs / "img" / f"answers-{name}.png", dpi=110, metadata={"Software": None})
    common.put(docs / "answers.md", "claims", claims(pictures))
    common.put(root / "README.md", "answers", short(pictures))
    for method in METHODS:
        common.put(docs / "methods" / f"{method}.md", "answers", card(runs, method))


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parse.add_argument("folder", type=Path, nargs="?", help="take the results of the runs in it")
    args = parse.parse_args()
    for name in RUNS if args.folder else ():
        take(name, args.folder / name)
    write(ROOT)


if __name__ == "__main__":
    main()
