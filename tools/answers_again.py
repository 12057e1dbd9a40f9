"""Does what docs/answers.md says come out of its commands? A third of the methods of every run, asked again.

    python tools/answers_again.py             # all runs, hours; or those whose names begin with the arguments

Every cell (method, budget, seed, kind) has to be within one question of what is kept in benchmarks/results: processors
differ in the last bit.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import answers_page  # noqa: E402
import answers_runs  # noqa: E402

from vtc import cli


def chosen(name: str) -> list[str]:
    """Every third method of a run; those whose names hold a space are options of the run."""
    labels = dict.fromkeys(row["method"] for row in answers_page.read(name))
    return [label for label in labels if label != "dense" and " " not in label][::3]


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parse.add_argument("names", nargs="*", help="only runs whose names begin so")
    args = parse.parse_args()
    far, count = [], 0
    for name in answers_runs.RUNS:
        if args.names and not name.startswith(tuple(args.names)):
            continue
        words = answers_runs.command(name, " ".join(chosen(name))).split()
        words = " ".join(words[3 : words.index("--out")]).replace(answers_runs.BALANCES, "").split()
        folder = Path(tempfile.mkdtemp(prefix="vtc-again-"))
        code = cli.main(["eval", "scenes", *words, "--out", str(folder)])
        if code:
            return code
        kept = {key(row): row for row in answers_page.read(name)}
        for row in answers_page.rows(folder / "scenes.csv"):
            count += 1
            before = kept[key(row)]
            if before["n"] != row["n"] or abs(before["accuracy"] - row["accuracy"]) * row["n"] > 1.001:
                far.append(f"{name}: {key(row)}: {row['accuracy']:.3f}, not {before['accuracy']:.3f}, of {row['n']}")
        shutil.rmtree(folder)
    print("\n".join([*far, f"{count} cells asked again, {len(far)} by more than one question off"]))
    return bool(far)


def key(row: answers_page.Row) -> tuple[str, float, int, str]:
    return row["method"], row["keep"], row["seed"], row["kind"]


if __name__ == "__main__":
    sys.exit(main())
