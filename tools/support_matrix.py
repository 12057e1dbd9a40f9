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

Written by `tools/support_matrix.py` from the models that the tests build (`tests/zoo.py`): every "yes" is a model on
which every promise of [the architecture](architecture.md#promises) is tested. Your own model: `vtc.explain(model)`, or
`vtc explain --model timm:vit_base_patch16_224`.

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
    return HEAD + "\n".join(covers) + "\n\n" + "\n".join(lines) + "\n\n" + "\n".join(notes) + "\n"


def main() -> int:
    page, text = ROOT / "docs" / "models.md", table()
    if "--check" in sys.argv:
        return 0 if page.exists() and page.read_text() == text else 1
    page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
