"""The tables and figures of docs/answers.md, from what `vtc eval scenes` wrote.

    python tools/answers_page.py out/answers        # the folder of `make answers`

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
from vtc.eval.answers import Summary
from vtc.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results"
MODELS = ("tiny_llava", "tiny_qwen")
RUNS = (*MODELS, "clips-2", "clips-8")
CHOICES = tuple(f"validation-{model}" for model in MODELS)  # what was chosen was chosen on these
SHORT = ("pitome+proportional", "divprune", "downsample", "random")  # on the front page

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
Candidates = list[tuple[str, list[tuple[float, float]]]]


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


def ranked(found: Summary) -> list[str]:
    """The methods, best first at keep 0.25 (and 0.1 between equals)."""
    labels = dict.fromkeys(method for method, keep in found if keep < 1)
    return sorted(labels, key=lambda m: [-found[m, keep]["all"]["accuracy"][0] for keep in (0.25, 0.1)])


def budgets(found: Summary) -> list[float]:
    return sorted({keep for _, keep in found if keep < 1}, reverse=True)


def by_keep(found: Summary) -> str:
    """Accuracy of every method at every budget, and fidelity at a quarter."""
    levels = budgets(found)

    def cell(method: str, keep: float) -> str:
        middle, half = found[method, keep]["all"]["accuracy"]
        return f"{middle:.3f} ± {half:.3f}"

    body = [["dense", cell("dense", 1.0), *[""] * len(levels)]]
    for method in ranked(found):
        faithful = found[method, 0.25]["all"]["fidelity"][0]
        body.append([method, *(cell(method, keep) for keep in levels), f"{faithful:.3f}"])
    return table(["method", *(f"keep {k:g}" for k in levels), "fidelity at 0.25"], body)


def by_kind(found: Summary, keep: float) -> str:
    """Accuracy by question kind at one budget."""
    kinds = [kind for kind in found["dense", 1.0] if kind != "all"]
    body = [
        [method, *(f"{found[method, level][kind]['accuracy'][0]:.2f}" for kind in kinds)]
        for method, level in [("dense", 1.0), *((m, keep) for m in ranked(found))]
    ]
    return table(["method", *kinds], body)


def gap(rows: Sequence[Row], ours: str, theirs: str, kind: str, keep: float) -> tuple[float, float] | None:
    """The mean difference over the seeds, each of which asked both the same, and half its 95 % interval."""
    first, second = (
        {r["seed"]: r["accuracy"] for r in rows if (r["method"], r["kind"], r["keep"]) == (method, kind, keep)}
        for method in (ours, theirs)
    )
    return common.spread([first[s] - second[s] for s in first]) if first and second else None


def claims(runs: dict[str, list[Row]], best: dict[str, Candidates], levels: Sequence[float] = (0.25, 0.1, 0.05)) -> str:
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
        for name in runs:
            ours = best[name][0][0]
            body.append(line(f"{ours}, the best of the validation split, above {theirs}", ours, theirs, "all", name))
    return table(["claim", "model", *(f"keep {k:g}" for k in levels)], body)


def candidates(model: str) -> Candidates:
    """Every method's accuracy on the validation split at keep 0.25 and 0.1, the best of both together first."""
    found = answers.summarise(read(f"validation-{model}"))
    labels = dict.fromkeys(method for method, keep in found if keep < 1)
    each = [(label, [found[label, keep]["all"]["accuracy"] for keep in (0.25, 0.1)]) for label in labels]
    return sorted(each, key=lambda one: -sum(middle for middle, _ in one[1]))


def choices(best: dict[str, Candidates], count: int = 5) -> str:
    """The best few of the validation split."""
    body = [
        [model, label, *(f"{middle:.3f} ± {half:.3f}" for middle, half in found)]
        for model, each in best.items()
        for label, found in each[:count]
    ]
    return table(["model", "method", "keep 0.25", "keep 0.1"], body)


def draw(found: Summary, title: str) -> Any:
    """Accuracy against what stays: methods that select on the left, methods that merge on the right."""
    from matplotlib.figure import Figure

    order = ranked(found)
    merging = {m for m in order if METHODS[m.split()[0].partition("+")[0]].merges}
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axis, name, group in zip(
        figure.subplots(1, 2, sharey=True),
        ("select", "merge"),
        (set(order) - merging, merging),
        strict=True,
    ):
        labels = [m for m in order if (m in group or m in answers.ALWAYS) and not re.search(r" |\+ppe", m)]
        answers.plot(axis, found, labels)
        axis.set_title(f"{title}: methods that {name}", fontsize=10)
        axis.legend(fontsize=7, ncols=2)
    figure.axes[0].set_ylabel("accuracy")
    return figure


def card(runs: dict[str, Summary], name: str) -> str:
    """What one method reached, as it is and with options, for its own page."""
    body = []
    for run, found in runs.items():
        levels = budgets(found)
        dense = f"{found['dense', 1.0]['all']['accuracy'][0]:.3f}"
        for label in dict.fromkeys(method for method, _ in found):
            if re.split("[ +]", label)[0] == name:
                each = [f"{found[label, keep]['all']['accuracy'][0]:.3f}" for keep in levels]
                body.append([run, label, dense, *each])
    return table(["answers of", "method", "dense", *(f"keep {k:g}" for k in levels)], body)


def short(found: dict[str, Summary], levels: Sequence[float] = (0.25, 0.1)) -> str:
    """Some methods on the small models, for the front page."""

    def cells(method: str, keep: float | None = None) -> list[str]:
        return [f"{found[n][method, keep or k]['all']['accuracy'][0]:.2f}" for n in found for k in levels]

    head = [f"{name}, keep {keep:g}" for name in found for keep in levels]
    return table(["", *head], [["dense", *cells("dense", 1.0)], *([name, *cells(name)] for name in SHORT)])


def write(root: Path) -> None:
    """All of it, into the pages in and below the folder `root`."""
    docs = root / "docs"
    runs = {name: read(name) for name in RUNS}
    found = {name: answers.summarise(rows) for name, rows in runs.items()}
    best = {model: candidates(model) for model in MODELS}
    for name, summary in found.items():
        about = (KEPT / f"answers-{name}.txt").read_text(encoding="utf-8")
        common.put(docs / "answers.md", name, f"{about}\n{by_keep(summary)}")
        if name in MODELS:
            common.put(docs / "answers.md", f"{name}, kinds", by_kind(summary, 0.25))
            draw(summary, name).savefig(docs / "img" / f"answers-{name}.png", dpi=110, metadata={"Software": None})
    common.put(docs / "answers.md", "choices", choices(best))
    common.put(docs / "answers.md", "claims", claims({name: runs[name] for name in MODELS}, best))
    common.put(root / "README.md", "answers", short({name: found[name] for name in MODELS}))
    for method in METHODS:
        common.put(docs / "methods" / f"{method}.md", "answers", card(found, method))


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parse.add_argument("folder", type=Path, nargs="?", help="take the results of the runs in it")
    args = parse.parse_args()
    for name in (*CHOICES, *RUNS) if args.folder else ():
        take(name, args.folder / name)
    write(ROOT)


if __name__ == "__main__":
    main()
