"""The table of docs/retrieval.md, from what `vtc eval retrieval --out FOLDER` wrote.

    python tools/retrieval_page.py FOLDER

Its rows are kept in benchmarks/results/retrieval.csv; without a folder the table is made anew of these.
"""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

from vtc.eval import common

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results" / "retrieval.csv"
PAGE = ROOT / "docs" / "retrieval.md"
SHOWN = {
    "ndcg_dense": "nDCG@5 / all",
    "ndcg_signs": "with sign bits",
    "spearman": "Spearman",
    "overlap": "overlap",
    "score": "score / all",
}


def lines() -> list[str]:
    """What is pooled, and what is encoded with fewer tokens: a table for each."""
    with KEPT.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    dense = next(row for row in rows if row["stage"] == "dense")
    out = [f"All vectors: {dense['vectors']} a page, nDCG@5 {float(dense['ndcg']):.3f}.", ""]
    tables = (("pooled",), ("method", "factor")), (("encoded", "encoded, pooled"), ("method", "keep", "factor"))
    for stages, heads in tables:
        out.append("| " + " | ".join([*heads, "vectors a page", *SHOWN.values()]) + " |")
        out.append("|---" * (len(heads) + 1 + len(SHOWN)) + "|")
        for row in rows:
            if row["stage"] in stages:
                cells = [*(row[head].removesuffix(".0") for head in heads), row["vectors"]]
                out.append("| " + " | ".join([*cells, *(f"{float(row[name]):.3f}" for name in SHOWN)]) + " |")
        out.append("")
    return out[:-1]


def main(argv: list[str]) -> None:
    if argv:
        shutil.copy(Path(argv[0]) / "retrieval.csv", KEPT)
    common.put(PAGE, "retrieval", "\n".join(lines()))


if __name__ == "__main__":
    main(sys.argv[1:])
