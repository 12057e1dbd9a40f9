#!/usr/bin/env python3
"""Write docs/models.md: every encoder of the test matrix against every method, as `vtc.explain` answers.

`.venv/bin/python tools/support_matrix.py` writes it, `--check` fails if it is out of date (a test runs that).
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

COLUMNS = {
    "pitome": ("pitome", {}),
    "tome": ("tome", {}),
    "random": ("random", {}),
    "downsample (pool)": ("downsample", {}),
    "downsample (resize)": ("downsample", {"mode": "resize"}),
}
HEAD = """# Models

Written by `tools/support_matrix.py` from the models that the tests build (`tests/zoo.py`, `tests/mllm_zoo.py`): every
"yes" is a model on which every promise of [the architecture](architecture.md#promises) is tested. Your own model:
`vtc.explain(model)`, or `vtc explain --model timm:vit_base_patch16_224`.

"""
LLM_HEAD = """
## Multimodal LLMs

Where the decoder takes its image tokens in (`fastv`, `dart`: from a layer of the decoder on), on transformers 5.17 and
5.24, with sdpa and eager attention, in batches, with several images, with video where the family has it.
`where="tower"` is PiToMe and ToMe inside the vision tower. The last four rows go with the methods that merge
(`events=` with `dpc_knn`).

"""


def table() -> str:
    from zoo import ZOO, model

    import vtc

    lines = ["| encoder | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    notes: list[str] = []
    for name in ZOO:
        cells = []
        for method, options in COLUMNS.values():
            plan = vtc.explain(model(name), method, **options)
            if plan.ok:
                cells.append("yes")
                continue
            reason = plan.encoders[0].refusal.removesuffix('; mode="pool" works').removeprefix('mode="resize": ')
            if reason not in notes:
                notes.append(reason)
            cells.append(f"no ({notes.index(reason) + 1})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(notes, 1)]
    covers = [f"- **{name}**: {families}" for name, families in vtc.list_adapters().items()]
    page = HEAD + "\n".join(covers) + "\n\n" + "\n".join(lines) + "\n\n" + "\n".join(notes) + "\n"
    return page + LLM_HEAD + "\n".join(multimodal()) + "\n"


def multimodal() -> list[str]:
    """Every method in every family of multimodal LLMs, methods down and families across."""
    from mllm_zoo import FAMILIES, build

    import vtc
    from vtc.methods import METHODS

    rows = {name: (name, {"keep": 0.5}) for name in METHODS}
    rows |= {f'{name}, where="tower"': (name, {"keep": 0.9, "where": "tower"}) for name in ("pitome", "tome")}
    rows |= {"PPE (`positions=`)": ("dpc_knn", {"keep": 0.5, "positions": "ppe"})}
    rows |= {"`cascade=`": ("dpc_knn", {"keep": 0.5, "cascade": {2: 0.5}})}
    rows |= {"`proportional=True`": ("dpc_knn", {"keep": 0.5, "proportional": True})}
    rows |= {"`events=`": ("dpc_knn", {"keep": 0.5, "events": 0.5})}
    lines, notes = ["| method | " + " | ".join(FAMILIES) + " |", "|---" * (len(FAMILIES) + 1) + "|"], []
    for label, (method, options) in rows.items():
        cells = []
        for name in FAMILIES:
            plan = vtc.explain(build(name), method, **options)
            if plan.ok:
                cells.append("yes")
                continue
            reason = plan.encoders[0].refusal.removesuffix('; where="llm" works').removeprefix('where="tower": ')
            if reason not in notes:
                notes.append(reason)
            cells.append(f"no ({notes.index(reason) + 1})")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return [*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(notes, 1))]


def main() -> int:
    page, text = ROOT / "docs" / "models.md", table()
    if "--check" in sys.argv:
        return 0 if page.exists() and page.read_text() == text else 1
    page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
