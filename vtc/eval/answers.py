"""`vtc eval scenes`: does a multimodal LLM still answer correctly with fewer visual tokens?

Every question about `vtc.eval.scenes` is asked of the dense model and of every method at every budget, over several
seeds, each with its own pictures of the test split. Accuracy is the share of correct answers, fidelity the share of
answers that agree with the dense model's. Work is split into cells (method, budget, seed); finished cells are stored in
the output folder, so that a stopped run can continue, and several processes of `accelerate launch` share the work.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

import vtc
from vtc.checkpoints import tiny
from vtc.errors import OptionError
from vtc.eval import common, scenes
from vtc.eval.asking import Asked, View, questions, replies, shared_replies, shares
from vtc.eval.asking import plain as plain
from vtc.eval.asking import prompts as prompts
from vtc.eval.common import Results
from vtc.methods import METHODS, PLUS, Method, make

KEEP = (0.5, 0.25, 0.1, 0.05)
ALWAYS = ("random", "downsample")  # what every method has to beat
FEWER = "fewer frames"  # what every method for videos has to beat: all tokens of some frames


@dataclass(frozen=True)
class Cell:
    """One piece of work for a process. `label`: the method's name in tables, with options that differ from the
    defaults."""

    label: str
    name: str
    keep: float
    seed: int
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        return f"{self.label}|{self.keep:g}|{self.seed}"

    def make(self) -> Method:
        options = dict(self.options)
        if "seed" in METHODS[self.name.partition("+")[0]].__dataclass_fields__:
            options["seed"] = self.seed
        return make(self.name, keep=self.keep, **options)


# -- the run --------------------------------------------------------------------------------------------------------


def run(
    model: str = "tiny_qwen",
    methods: Sequence[str] = ("all",),
    keep: Sequence[float] = KEEP,
    limit: int = 40,
    seeds: int = 5,
    out: str | Path = "out/scenes",
    balances: Sequence[float] = (),
    scorer: str | None = None,
    frames: int = 1,
    batch: int = 16,
    split: str = "test",
    size: scenes.Size = (scenes.SIDE, scenes.SIDE),
    canvas: scenes.Size | None = None,
    pictures: int = 1,
    full: bool = False,
    changes: bool = False,
    progress: bool = False,
) -> Results:
    """Ask, score, and write scenes.csv, .md and .png into `out`.

    Args:
        model: tiny_qwen, tiny_llava, or the folder or id of any multimodal LLM.
        methods: names, with +ppe for PPE's positions or +proportional for size-weighted attention; or "all" that the
            model supports, but for those that compare frames; random and downsample are always included.
        keep: fractions of the image tokens that stay; dense (1) is always included.
        limit: scenes per seed. seeds: how many sets of scenes, each also the seed of methods that draw random numbers.
        out: folder of the results and of finished cells: the same call continues where it stopped.
        balances: also run IDPruner at these balances (importance against diversity).
        scorer: path of a trained scorer (`vtc.train`) to run IDPruner with, too; tiny models have their own.
        frames: 1 = pictures; 2 to 8, 16 or 32 = clips, with the question when something is there. changes: clips, also
            with questions about what comes and goes; beside the methods the model is shown fewer frames.
        split: "validation" for choosing, "test" for reporting.
        size: width and height of the drawn picture, in pixels. canvas: size of the canvas it is letterboxed on.
            pictures: how many per prompt, with the question about one of them. full: also with numbers to read and
            photographs as backgrounds.

    Raises:
        OptionError: an option out of range; a folder that contains another run.
    """
    keep = sorted({k for k in common.check_levels(keep) if k < 1}, reverse=True)
    for name, number in (("limit", limit), ("seeds", seeds), ("batch", batch)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise OptionError(f"{name}={number!r}: it takes a whole number >= 1")
    view = View((size,) * pictures, canvas, None, frames, scenes.FULL if full else scenes.Level(), changes)
    lead, rank, world = _processes()
    network, processor = load(model)
    scorer = scorer or (tiny.scorer(model) if model in tiny.TINY else None)
    chosen = _chosen(network, methods, balances, scorer) + ([(FEWER, "random", ())] if changes else [])
    setting = {"model": model, "keep": keep, "limit": limit, "seeds": seeds, "frames": frames, "split": split}
    setting |= {"weights": _fingerprint(network), "scorer": scorer and _digest(scorer), **view.unusual}
    if lead:
        _folder(Path(out), setting)
    _wait(world)
    folder = _folder(Path(out), setting)
    cells = [Cell("dense", "random", 1.0, s) for s in range(seeds)]
    cells += [Cell(label, name, k, s, o) for s in range(seeds) for k in keep for label, name, o in chosen]
    done = _done(folder)
    mine = [c for i, c in enumerate(cells) if i % world == rank and c.key not in done]
    shared = bool(mine) and shares(network, processor, questions(0, 1, view, split))
    drawn: dict[int, list[Asked]] = {}  # for one seed at a time: its pictures are kept until the next seed
    with common.bar(len(mine), "cells", progress and lead) as bar:
        for cell in mine:
            if cell.seed not in drawn:
                drawn = {cell.seed: questions(cell.seed, limit, view, split)}
            found = _ask(network, processor, cell, drawn[cell.seed], batch, shared)
            with (folder / f"cells-{rank}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": cell.key, **found}) + "\n")
            bar.update()
    _wait(world)
    results = _results(cells, _done(folder), setting, {s: questions(s, limit, view, split) for s in range(seeds)})
    if lead:
        results.write(folder)
    return results


def load(name: str) -> tuple[nn.Module, Any]:
    """A model and its processor, as `vtc.models.llms.load` finds them."""
    from vtc.models.llms import load as find

    processor, model = find(name, make("random", keep=0.5))
    processor.tokenizer.padding_side = "left"
    return model(), processor


def _chosen(
    model: nn.Module, names: Sequence[str], balances: Sequence[float], scorer: str | None
) -> list[tuple[str, str, tuple]]:
    """(label, name, options) of every method to ask, baselines first; "idpruner+scorer": with the trained scorer."""
    trained = (("scorer", scorer),)
    scored = {"idpruner+scorer": ("idpruner", trained), "idpruner+scorer 1": ("idpruner", (*trained, ("balance", 1.0)))}
    scored = scored if scorer else {}
    plain = [n for n, kind in METHODS.items() if kind.budgeted and "frames" not in kind(keep=0.5).needs]
    after = ("", *(f"+{each}" for each in PLUS if each not in ("pixelprune", "shares")))  # with those, when named
    every = [name + plus for plus in after for name in plain]
    out: list[tuple[str, str, tuple]] = []
    for label in dict.fromkeys([*ALWAYS, *([*every, *scored] if "all" in names else names)]):
        if "+scorer" in label and label not in scored:
            raise OptionError(
                f"{label!r}: a trained scorer goes with idpruner+scorer, and scorer=, a file of vtc.train"
            )
        name, options = scored.get(label, (label, ()))
        try:
            plan: Any = vtc.explain(model, make(name, keep=0.5, **dict(options)))
        except OptionError:
            if label in names:
                raise
            continue  # a method that does not merge has no positions to carry, and no sizes
        if not plan.ok and label in names:
            raise OptionError(f"{label} cannot reduce this model: {plan}")
        if plan.ok:
            out.append((label, name, options))
    for balance in balances:
        make("idpruner", keep=0.5, balance=balance)  # refuses invalid values
        out.append((f"idpruner {balance:g}", "idpruner", (("balance", float(balance)),)))
    return out


def _ask(
    model: nn.Module, processor: Any, cell: Cell, asked: Sequence[Asked], batch: int, shared: bool = True
) -> dict[str, Any]:
    start = time.perf_counter()
    said: list[str] = []
    before: list[float] = []
    after: list[float] = []
    method = cell.make()
    whole = cell.label in ("dense", FEWER)
    asked, share = _thinned(asked, cell.keep) if cell.label == FEWER else (asked, None)
    says = not whole and (method.in_decoder or "text" in method.needs)  # does the question matter?
    ask, step = (
        (replies, batch) if says or not shared else (shared_replies, 4 * batch)
    )  # four or five questions per picture
    with nullcontext() if whole else vtc.compress(model, method) as handle:
        for first in range(0, len(asked), step):
            said += ask(model, processor, asked[first : first + step], batch)
            if handle is not None:
                report = handle.report
                before += map(float, report.before)
                after += map(float, report.after)
    seconds = time.perf_counter() - start
    counts = {"before": mean(before), "tokens": mean(after)} if after else {}
    return {"said": said, "seconds": seconds, **counts, **({} if share is None else {"share": share})}


def _thinned(asked: Sequence[Asked], keep: float) -> tuple[list[Asked], float]:
    """The same questions of clips with fewer frames, and which share of the frames is left."""
    clips = {id(q.about): q.about.thinned(keep) for q in asked if isinstance(q.about, scenes.Clip)}
    fewer = [replace(q, about=clips[id(q.about)]) for q in asked]
    return fewer, len(fewer[0].about.frames) / len(asked[0].about.frames)  # type: ignore[union-attr]


# -- finished cells -------------------------------------------------------------------------------------------------


def _processes() -> tuple[bool, int, int]:
    """Whether this process writes the results, its number, and how many there are."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True, 0, 1
    with common.needs("accelerate"):
        from accelerate import PartialState
    state = PartialState(cpu=not torch.cuda.is_available())
    return state.is_main_process, state.process_index, state.num_processes


def _wait(world: int) -> None:
    if world > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def _digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise OptionError(f"scorer={path!r} cannot be read: {error.strerror}") from None


def _fingerprint(model: nn.Module) -> str:
    """A fingerprint of the weights, so that results of two models are never mixed."""
    total = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
    return f"{total:.6e}"


def _folder(folder: Path, setting: dict[str, Any]) -> Path:
    """The folder, if its contents were made with the same setting; files of another run are not touched."""
    path, text = folder / "run.json", json.dumps(setting, indent=1)
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = {}
        differ = [k for k in {**setting, **before} if before.get(k) != setting.get(k)]
        if differ:
            what = ", ".join(f"{k}={before.get(k)!r}, not {setting.get(k)!r}" for k in differ)
            raise OptionError(f"{folder} holds the results of another run ({what}): choose another --out, or remove it")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def _done(folder: Path) -> dict[str, dict[str, Any]]:
    """The finished cells. An incomplete last line, of a killed process, is ignored."""
    out = {}
    for path in sorted(folder.glob("cells-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found = json.loads(line)
            except ValueError:
                continue
            out[found["key"]] = found
    return out


# -- scores ---------------------------------------------------------------------------------------------------------


def _results(
    cells: Sequence[Cell], done: dict[str, dict[str, Any]], setting: dict[str, Any], asked: dict[int, list[Asked]]
) -> Results:
    rows = []
    for cell in cells:
        found, dense, those = done[cell.key], done[f"dense|1|{cell.seed}"]["said"], asked[cell.seed]
        pruned = (done[c.key] for c in cells if c.seed == cell.seed)
        whole = next((found["before"] for found in pruned if "before" in found), math.nan)  # only dense: not counted
        for kind in [*dict.fromkeys(q.kind for q in those), "all"]:
            at = [i for i, q in enumerate(those) if kind in (q.kind, "all")]
            row = {
                "method": cell.label,
                "keep": cell.keep,
                "tokens": found.get("tokens", whole * found.get("share", 1.0)),
                "kind": kind,
            }
            row |= {"seed": cell.seed, "n": len(at)}
            row |= {"accuracy": mean(float(found["said"][i] == those[i].answer) for i in at)}
            row |= {"fidelity": mean(float(found["said"][i] == dense[i]) for i in at)}
            rows.append(row | {"seconds": found["seconds"] * len(at) / len(those)})
    what = ("clips" if setting["frames"] > 1 else "scenes") + _shown(setting)
    about = (
        f"Accuracy of {setting['model']} on {setting['seeds']} x {setting['limit']} {what} of the {setting['split']} "
        "split, mean of the seeds with its 95 % interval (Student's t); fidelity: answers that are the dense model's. "
        f"{common.environment()}."
    )
    return Scored("scenes", rows, {}, about, notes={"draw": draw})


def _shown(setting: dict[str, Any]) -> str:
    """How pictures differ from the default ones, in brackets."""
    said = [
        f"{name} {'x'.join(map(str, n)) if isinstance(n, list) else n}"
        for name, n in setting.items()
        if name in ("size", "canvas", "pictures", "full")
    ]
    return f" ({', '.join(said)})" if said else ""


class Scored(Results):
    """One row per method, budget, kind and seed; the table has one per method and budget."""

    def table(self, rows: Any = None) -> str:
        summary = summarise(self.rows if rows is None else list(rows))
        kinds = [k for k in dict.fromkeys(r["kind"] for r in self.rows) if k != "all"]
        head = ["method", "keep", "accuracy", *kinds, "fidelity", "seconds"]
        lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for (method, keep), found in summary.items():
            middle, half = found["all"]["accuracy"]
            each = [f"{found[k]['accuracy'][0]:.2f}" if k in found else "" for k in kinds]
            tail = [f"{found['all']['fidelity'][0]:.3f}", f"{found['all']['seconds'][0]:.1f}"]
            lines.append("| " + " | ".join([method, f"{keep:g}", f"{middle:.3f} ± {half:.3f}", *each, *tail]) + " |")
        return "\n".join(lines)


Summary = dict[tuple[str, float], dict[str, dict[str, tuple[float, float]]]]


def summarise(rows: Sequence[dict[str, Any]]) -> Summary:
    """(method, keep) -> kind -> accuracy, fidelity, seconds -> mean over the seeds and half its 95 % interval."""
    cells: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        cells.setdefault((row["method"], row["keep"]), {}).setdefault(row["kind"], []).append(row)
    names = ("accuracy", "fidelity", "seconds")
    return {
        cell: {
            kind: {name: common.spread([row[name] for row in mine]) for name in names} for kind, mine in kinds.items()
        }
        for cell, kinds in cells.items()
    }


def draw(rows: Sequence[dict[str, Any]]) -> Any:
    """Accuracy against the tokens that stay, a line per method, and a horizontal line for the dense model."""
    with common.needs("matplotlib"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    axis = figure.subplots()
    summary = summarise(rows)
    plot(axis, summary, [method for method, _ in summary if method != "dense"])
    axis.set_ylabel("accuracy")
    axis.legend(fontsize=8, ncols=2)
    return figure


def plot(axis: Any, summary: Summary, labels: Iterable[str]) -> None:
    """Plot these methods' lines and the dense level from what `summarise` returns."""
    ticks = sorted({keep for _, keep in summary if keep < 1})
    flat: list[dict[str, Any]] = [
        {"method": method, "keep": keep, "accuracy": summary[method, keep]["all"]["accuracy"][0]}
        for method in dict.fromkeys(labels)
        for keep in ticks
    ]
    common.lines(axis, flat, "accuracy", "keep")
    axis.axhline(summary["dense", 1.0]["all"]["accuracy"][0], color="#000000", linewidth=1, label="dense")
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    axis.set_xlabel("image tokens that stay")
