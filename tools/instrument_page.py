"""What a small model answers before anything is dropped, by size, aspect, padding, number of pictures, clip and kind of
question; and what dropping tokens at random costs. Through the processor and `generate`, as `vtc eval scenes` asks.

    python tools/instrument_page.py tiny_qwen --keep 1 0.25 0.1     # what docs/answers.md begins with; goes on
    python tools/instrument_page.py out/tiny_qwen --bars            # a folder; and the bars that must hold

Every row is a run of `vtc eval scenes` of its own, in a folder of its own below --out; the tables are in instrument.md,
and of the models that are shipped in benchmarks/results and docs/answers.md.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from vtc.checkpoints import tiny
from vtc.eval import answers, common, scenes

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results"

SIZES = ((192, 192), (224, 224), (256, 256), (320, 320), (384, 384), (448, 448), (256, 192), (448, 224))
CELLS: dict[str, dict[str, Any]] = {f"{w} x {h}": {"size": (w, h)} for w, h in SIZES}
CELLS |= {
    "288 x 192 on 320 x 320": {"size": (288, 192), "canvas": (320, 320)},
    "224 x 224 on 320 x 320": {"size": (224, 224), "canvas": (320, 320)},
    "two pictures": {"pictures": 2},
    "three pictures": {"pictures": 3, "size": (224, 224)},
    "clip of 2 frames": {"frames": 2},
    "clip of 4 frames, 192 x 128": {"frames": 4, "size": (192, 128)},
    "clip of 5 frames, 128 x 160": {"frames": 5, "size": (128, 160)},
    "clip of 8 frames": {"frames": 8},
}
LLAVA = ("256 x 256", "448 x 448", "448 x 224", "288 x 192 on 320 x 320", "224 x 224 on 320 x 320")
Row = dict[str, Any]


def bars(cell: str, found: dict[str, float]) -> list[str]:
    """What falls short: .95 over all kinds and .90 of each, of reading .80; .90 for several pictures."""
    least = 0.9 if "pictures" in cell else 0.95
    short = [f"{cell}: {found['all']:.3f} over all, not {least}"] if found["all"] < least else []
    kinds = {} if "pictures" in cell else {k: 0.8 if k == "reading" else 0.9 for k in found if k != "all"}
    return short + [f"{cell}: {found[k]:.3f} of {k}, not {bar}" for k, bar in kinds.items() if found[k] < bar]


def by_kind(rows: list[Row], method: str, keep: float) -> dict[str, float]:
    """Accuracy, mean over the seeds by their questions."""
    mine = [row for row in rows if (row["method"], row["keep"]) == (method, keep)]
    kinds = [k for k in (*scenes.EVERY, "all") if any(row["kind"] == k for row in mine)]
    total = {k: sum(row["n"] for row in mine if row["kind"] == k) for k in kinds}
    return {k: sum(r["accuracy"] * r["n"] for r in mine if r["kind"] == k) / total[k] for k in kinds}


def table(cells: dict[str, list[Row]], method: str, keep: float) -> str:
    """One line per cell."""
    kinds = ["all", *scenes.EVERY]
    lines = ["| shown | questions | " + " | ".join(kinds) + " |", "|" + " --- |" * (len(kinds) + 2)]
    for cell, rows in cells.items():
        found = by_kind(rows, method, keep)
        asked = sum(r["n"] for r in rows if (r["method"], r["keep"], r["kind"]) == (method, keep, "all"))
        each = [f"{found[k]:.3f}" if k in found else "" for k in kinds]
        lines.append(f"| {cell} | {asked} | " + " | ".join(each) + " |")
    return "\n".join(lines)


def read(model: str) -> dict[str, list[Row]]:
    """What was kept of a model's answers, by what was shown."""
    kinds: dict[str, Any] = {"shown": str, "method": str, "kind": str, "seed": int, "n": int}
    cells: dict[str, list[Row]] = {}
    with (KEPT / f"instrument-{model}.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            cells.setdefault(row["shown"], []).append({k: kinds.get(k, float)(v) for k, v in row.items()})
    return cells


def write(root: Path) -> None:
    """The tables of all models whose answers were kept, into docs/answers.md below `root`."""
    for model in tiny.TINY:
        if (KEPT / f"instrument-{model}.csv").exists():
            cells = read(model)
            levels = sorted({row["keep"] for rows in cells.values() for row in rows} - {1.0}, reverse=True)
            parts = [table(cells, "dense", 1.0)]
            parts += [f"Of the tokens {k:g}, drawn at random:\n\n{table(cells, 'random', k)}" for k in levels]
            common.put(root / "docs" / "answers.md", f"instrument, {model}", "\n\n".join(parts))


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parse.add_argument("model", help="tiny_qwen, tiny_llava, or the folder of a model")
    parse.add_argument("--out", type=Path, default=Path("out/instrument"))
    parse.add_argument("--cells", nargs="+", default=[], help="only these, by parts of their names")
    parse.add_argument("--keep", type=float, nargs="+", default=[1.0])
    parse.add_argument("--limit", type=int, default=70, help="scenes for every seed; each has five to six kinds")
    parse.add_argument("--seeds", type=int, default=1)
    parse.add_argument("--split", choices=("validation", "test"), default="test")
    parse.add_argument("--bars", action="store_true", help="fail where one is missed")
    args = parse.parse_args()
    some = {k: v for k, v in CELLS.items() if "llava" not in args.model or k in LLAVA}
    some = {k: v for k, v in some.items() if not args.cells or any(part in k for part in args.cells)}
    out = args.out / Path(args.model).name
    found: dict[str, list[Row]] = {}
    for cell, options in tqdm(some.items(), "cells"):
        folder = out / cell.replace(" ", "")
        more = {"limit": args.limit, "seeds": args.seeds, "split": args.split}
        run = answers.run(args.model, ("random",), args.keep, out=folder, full=True, **more, **options)
        found[cell] = run.rows
    parts = [f"# {args.model}, {args.split} split\n\nDense:\n\n{table(found, 'dense', 1.0)}"]
    for keep in sorted({k for k in args.keep if k < 1}, reverse=True):
        parts.append(f"Of the tokens {keep:g}, drawn at random:\n\n{table(found, 'random', keep)}")
    short = [line for cell, rows in found.items() for line in bars(cell, by_kind(rows, "dense", 1.0))]
    parts.append("Falls short:\n\n" + "\n".join(f"- {line}" for line in short) if short else "Every bar holds.")
    (out / "instrument.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print("\n\n".join(parts))
    if args.model in tiny.TINY and args.split == "test" and not args.cells:
        common.write_csv(
            KEPT / f"instrument-{args.model}.csv", [{"shown": cell, **row} for cell in found for row in found[cell]]
        )
        write(ROOT)
    if args.bars and short:
        sys.exit(1)


if __name__ == "__main__":
    main()
