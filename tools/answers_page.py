"""The tables and figures of docs/answers.md, from what the runs of tools/answers_runs.py wrote.

    python tools/answers_page.py out/answers        # the folder of `make answers`

The rows are kept in benchmarks/results/answers-NAME.csv, and the page is made of these: without a folder, anew.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import answers_runs  # noqa: E402

from vtc.eval import answers, common
from vtc.eval.answers import Summary
from vtc.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results"
MODELS = ("tiny_qwen", "tiny_llava")


def named(*begin: str) -> tuple[str, ...]:
    """The runs whose names begin so."""
    return tuple(name for name in answers_runs.RUNS if name.startswith(begin))


PICTURES, CHOICES = named(*MODELS), named("validation")  # what was chosen was chosen on the latter
RUNS = (*PICTURES, *named("clips"))
FRAMES, POSITIONS, VIDEOS = named("frame"), named("ppe"), named("video")

# Qwen2.5-VL-7B: the mean over eleven tasks, in percent of the dense model's, at a quarter and at a tenth of the tokens
# (AngelSlim, docs/source/features/token_compressor/idpruner.md); with our names. Its IDPruner has a trained scorer,
# and VisionSelector is that scorer alone.
PUBLISHED = {
    "idpruner+scorer": (95.18, 86.47),
    "idpruner+scorer 1": (94.22, 85.39),
    "scope": (92.51, 79.35),
    "divprune": (89.26, 76.09),
    "vispruner": (88.31, 72.60),
    "hiprune": (87.80, 72.22),
    "visionzip": (87.55, 71.84),
    "fastv": (87.16, 68.07),
    "dart": (85.74, 69.80),
}
IN_THE_DECODER = ("fastv", "dart")  # the first of six layers see all tokens here: another budget than the published

# What was said of a method, whose answers should then be better, and on which questions
CLAIMS = (
    ("IDPruner above DivPrune", "idpruner", "divprune", "all"),
    ("IDPruner above importance alone", "idpruner", "idpruner 1", "all"),
    ("IDPruner with its trained scorer above DivPrune", "idpruner+scorer", "divprune", "all"),
    ("IDPruner above random", "idpruner", "random", "all"),
    ("ZOO-Prune above random", "zoo_prune", "random", "all"),
    ("IDPruner with a frame above IDPruner", "idpruner+frame", "idpruner", "all"),
    ("DivPrune with a frame above DivPrune", "divprune+frame", "divprune", "all"),
    ("the trained scorer above attention or sensitivity", "idpruner+scorer", "idpruner", "all"),
    ("ZOO-Prune above the norm", "zoo_prune", "norm", "all"),
    ("attention by size, with ToMe", "tome+proportional", "tome", "all"),
    ("attention by size, with PiToMe", "pitome+proportional", "pitome", "all"),
    ("attention by size, with VisionZip", "visionzip+proportional", "visionzip", "all"),
    ("PiToMe above ToMe", "pitome", "tome", "all"),
    ("PiToMe above downsample, both by size", "pitome+proportional", "downsample+proportional", "all"),
)

Row = dict[str, Any]
Candidates = list[tuple[str, list[tuple[float, float]]]]


def rows(path: Path) -> list[Row]:
    """The rows of a file, numbers as numbers."""
    kinds: dict[str, Any] = {"method": str, "kind": str, "seed": int, "n": int}
    with path.open(newline="", encoding="utf-8") as file:
        return [{k: kinds.get(k, float)(v) for k, v in row.items()} for row in csv.DictReader(file)]


def read(name: str) -> list[Row]:
    """What was kept of a run."""
    return rows(KEPT / f"answers-{name}.csv")


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


def signed(found: tuple[float, float] | None) -> str:
    """A difference with its interval, bold where that leaves out zero."""
    if found is None:
        return "–"
    middle, half = found
    text = f"{middle:+.3f} ± {half:.3f}"
    return f"**{text}**" if abs(middle) > half else text


def claims(runs: dict[str, list[Row]], best: dict[str, Candidates], levels: Sequence[float] = (0.25, 0.1, 0.05)) -> str:
    """Every claim on every model at every budget: the difference, bold where its interval leaves out zero."""

    def line(said: str, ours: str, theirs: str, kind: str, name: str) -> list[str]:
        return [said, name, *(signed(gap(runs[name], ours, theirs, kind, keep)) for keep in levels)]

    body = [line(*claim, name) for claim in CLAIMS for name in runs]
    for theirs in answers.ALWAYS:
        for name in runs:
            ours = best[name.partition("-")[0]][0][0]
            body.append(line(f"{ours}, the best of the validation split, above {theirs}", ours, theirs, "all", name))
    return table(["claim", "model", *(f"keep {k:g}" for k in levels)], body)


def candidates(model: str) -> Candidates:
    """Every method's accuracy on the validation split at keep 0.25 and 0.1, over all its sizes; the best of both
    together first."""
    runs = [answers.summarise(read(name)) for name in CHOICES if name.removeprefix("validation-").startswith(model)]
    each: Candidates = []
    for label in dict.fromkeys(method for method, keep in runs[0] if keep < 1):
        cells = [[found[label, keep]["all"]["accuracy"] for found in runs] for keep in (0.25, 0.1)]
        each.append((label, [(mean(m for m, _ in cell), max(half for _, half in cell)) for cell in cells]))
    return sorted(each, key=lambda one: -sum(middle for middle, _ in one[1]))


def choices(best: dict[str, Candidates], count: int = 8) -> str:
    """The best few of the validation split."""
    body = [
        [model, label, *(f"{middle:.3f} ± {half:.3f}" for middle, half in found)]
        for model, each in best.items()
        for label, found in each[:count]
    ]
    return table(["model", "method", "keep 0.25", "keep 0.1"], body)


def ranking(found: dict[str, Summary]) -> str:
    """The published means beside ours, and how alike the orders are: Spearman's rho, of all, and of those that reduce
    before the decoder."""
    from scipy.stats import spearmanr

    levels = (0.25, 0.1)
    ours = {
        (n, k): {m: found[n][m, k]["all"]["accuracy"][0] for m in PUBLISHED if (m, k) in found[n]}
        for n in PICTURES
        for k in levels
    }
    body = []
    for m, said in PUBLISHED.items():
        body.append([m])
        for i, k in enumerate(levels):
            each = (ours[n, k].get(m) for n in PICTURES)
            body[-1] += [f"{said[i]:.1f}", *("" if x is None else f"{x:.3f}" for x in each)]
    before = [m for m in PUBLISHED if m not in IN_THE_DECODER]
    for label, some in (("Spearman, all", list(PUBLISHED)), ("Spearman, before the decoder", before)):
        line = [label]
        for i, k in enumerate(levels):
            line.append("")
            for n in PICTURES:
                both = [(PUBLISHED[m][i], ours[n, k][m]) for m in some if m in ours[n, k]]
                line.append(f"{spearmanr(both).statistic:.2f}")
        body.append(line)
    return table(["", *(f"{n}, {k:g}" for k in levels for n in ("Qwen2.5-VL-7B", *PICTURES))], body)


def frames(levels: Sequence[float] = (0.25, 0.1)) -> str:
    """What each frame brings each method, on the validation split: accuracy, and the mean over the methods."""
    body = []
    for name in FRAMES:
        found = answers.summarise(read(name))
        for kind in answers_runs.KINDS:
            line = [name.removeprefix("frame-"), kind.removeprefix("+frame=") or "none"]
            for keep in levels:
                each = [found[method + kind, keep]["all"]["accuracy"][0] for method in answers_runs.FRAMED]
                line += [*(f"{x:.3f}" for x in each), f"**{mean(each):.3f}**"]
            body.append(line)
    methods = (*answers_runs.FRAMED, "mean")
    return table(["model", "frame", *(f"{m}, {k:g}" for k in levels for m in methods)], body)


def places(levels: Sequence[float] = (0.25, 0.1, 0.05)) -> str:
    """What PPE's positions change, by kind of question; bold where the interval leaves out zero."""
    body = []
    for name in POSITIONS:
        rows = read(name)
        for method in dict.fromkeys(r["method"] for r in rows if r["method"].endswith("+ppe")):
            for kind in ("position", "relation", "reading", "all"):
                each = [gap(rows, method, method.removesuffix("+ppe"), kind, keep) for keep in levels]
                body.append([name.removeprefix("ppe-"), method, kind, *map(signed, each)])
    return table(["model", "method", "questions", *(f"keep {k:g}" for k in levels)], body)


def videos(rows: Sequence[Row], levels: Sequence[float] = (0.25, 0.1)) -> str:
    """Accuracy on clips, by kind of question at the lowest budget; and the differences to the same share for every
    frame (of DivPrune), and to fewer frames; bold where the interval leaves out zero."""
    found = answers.summarise(rows)
    kinds = [kind for kind in found["dense", 1.0] if kind != "all"]
    head = ["method", *(f"keep {k:g}" for k in levels), *(f"{kind}, {levels[-1]:g}" for kind in kinds)]
    others = {"uniform": "divprune+shares=uniform", "fewer frames": answers.FEWER}
    head += [f"above {name}, {k:g}" for name in others for k in levels]
    body = []
    for method, level in [("dense", 1.0), *((m, levels[-1]) for m in ranked(found))]:
        each = [found[method, 1.0 if method == "dense" else k]["all"]["accuracy"] for k in levels]
        line = [method, *(f"{middle:.3f} ± {half:.3f}" for middle, half in each)]
        line += [f"{found[method, level][kind]['accuracy'][0]:.2f}" for kind in kinds]
        for other in others.values():
            line += ["" if method in ("dense", other) else signed(gap(rows, method, other, "all", k)) for k in levels]
        body.append(line)
    return table(head, body)


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


def short(found: dict[str, Summary], best: dict[str, Candidates], levels: Sequence[float] = (0.25, 0.1)) -> str:
    """Five lines for the front page: dense, the best of the validation split that merges and that selects, and what
    every method has to beat."""
    labels = [label for label, _ in best["tiny_qwen"] if label not in answers.ALWAYS]
    total = {label: sum(sum(m for m, _ in dict(each)[label]) for each in best.values()) for label in labels}
    merging = {label for label in labels if METHODS[re.split("[ +]", label)[0]].merges}
    chosen = [max(some, key=total.__getitem__) for some in (merging, set(labels) - merging)]

    def cells(method: str, keep: float | None = None) -> list[str]:
        return [f"{found[n][method, keep or k]['all']['accuracy'][0]:.2f}" for n in found for k in levels]

    head = [f"{name}, keep {keep:g}" for name in found for keep in levels]
    rows = [["dense", *cells("dense", 1.0)], *([name, *cells(name)] for name in (*chosen, *answers.ALWAYS))]
    return table(["", *head], rows)


def write(root: Path) -> None:
    """All of it, into the pages in and below the folder `root`."""
    docs = root / "docs"
    runs = {name: read(name) for name in RUNS}
    found = {name: answers.summarise(rows) for name, rows in runs.items()}
    clips = {name: answers.summarise(read(name)) for name in VIDEOS}
    best = {model: candidates(model) for model in MODELS}
    for name, summary in found.items():
        about = (KEPT / f"answers-{name}.txt").read_text(encoding="utf-8")
        common.put(docs / "answers.md", name, f"{about}\n{by_keep(summary)}")
        if name in PICTURES:
            common.put(docs / "answers.md", f"{name}, kinds", by_kind(summary, 0.1))
        if name in MODELS:
            draw(summary, name).savefig(docs / "img" / f"answers-{name}.png", dpi=110, metadata={"Software": None})
    commands = "\n".join(answers_runs.command(name) for name in (*RUNS, *CHOICES, *FRAMES, *POSITIONS))
    common.put(docs / "answers.md", "commands", f"```bash\n{commands}\n```")
    common.put(docs / "answers.md", "choices", choices(best))
    common.put(docs / "answers.md", "claims", claims({name: runs[name] for name in PICTURES}, best))
    common.put(docs / "answers.md", "ranking", ranking(found))
    common.put(docs / "answers.md", "places", places())
    common.put(docs / "frame.md", "shares", frames())
    for name in VIDEOS:
        about = (KEPT / f"answers-{name}.txt").read_text(encoding="utf-8")
        common.put(docs / "video.md", name, f"{about}\n{videos(read(name))}")
    common.put(root / "README.md", "answers", short({name: found[name] for name in MODELS}, best))
    asked = (name for name, cls in METHODS.items() if cls.budgeted and not cls.rectangle)
    for method in asked:
        common.put(docs / "methods" / f"{method}.md", "answers", card(found | clips, method))


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parse.add_argument("folder", type=Path, nargs="?", help="take the results of the runs in it")
    args = parse.parse_args()
    for name in answers_runs.RUNS if args.folder else ():
        if (args.folder / name / "scenes.csv").exists():  # of some methods not every run is asked
            take(name, args.folder / name)
    write(ROOT)


if __name__ == "__main__":
    main()
