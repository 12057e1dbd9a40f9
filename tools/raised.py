#!/usr/bin/env python3
"""Is every error of vtc/ raised by a test? Lists those that none raises, and fails if there are any.

    VTC_RAISED=/tmp/raised .venv/bin/python -m pytest
    .venv/bin/python tools/raised.py /tmp/raised    # without a folder: all of them, with their messages

tests/conftest.py notes the lines. A test in a process of its own notes nothing.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXCUSED = {  # (file, a part of the error): why no test can raise it in the development environment
    ("vtc/eval/clip.py", "UnsupportedModelError"): "needs clip_benchmark: make harness-check",
    ("vtc/eval/clip.py", "without weights"): "needs clip_benchmark: make harness-check",
    ("vtc/eval/clip.py", "open_clip cannot load it"): "needs clip_benchmark: make harness-check",
    ("vtc/eval/clip.py", "clip_benchmark finds no"): "needs clip_benchmark: make harness-check",
    ("vtc/eval/clip.py", "so nothing can be classified"): "needs clip_benchmark: make harness-check",
    ("vtc/harness/lmms_eval.py", "batch_size="): "needs lmms_eval: make harness-check",
    ("vtc/harness/lmms_eval.py", "without a method"): "needs lmms_eval: make harness-check",
}


def errors(trees: dict[str, ast.Module]) -> set[str]:
    """VTCError and the classes made from it, by name."""
    found = {"VTCError"}
    while True:
        more = {
            node.name
            for tree in trees.values()
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and found & {getattr(base, "id", "") for base in node.bases}
        }
        if more <= found:
            return found
        found |= more


def sites() -> Iterator[tuple[str, int, int, str]]:
    """Where an error is made: file, first and last line, and the error as it stands there."""
    paths = sorted((ROOT / "vtc").rglob("*.py"))
    trees = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}
    names = errors(trees)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in names:
                assert node.end_lineno is not None
                yield path, node.lineno, node.end_lineno, ast.unparse(node)


def main(folder: str | None) -> int:
    listed = sorted(sites())
    if folder is None:
        print(*(f"{path}:{first}: {text}" for path, first, _, text in listed), sep="\n")
        return 0
    noted = {line for file in Path(folder).glob("*.txt") for line in file.read_text().split()}
    silent = [site for site in listed if not any(f"{site[0]}:{line}" in noted for line in range(site[1], site[2] + 1))]
    excused = {site for site in silent for path, part in EXCUSED if path == site[0] and part in site[3]}
    missing = [site for site in silent if site not in excused]
    gone = [(path, part) for path, part in EXCUSED if not any(path == site[0] and part in site[3] for site in listed)]
    for path, first, _, text in missing:
        print(f"{path}:{first}: {text}")
    for path, part in gone:
        print(f"{path}: {part!r} is excused, and is not there")
    print(
        f"{len(listed)} errors: {len(listed) - len(silent)} raised by a test, {len(excused)} excused, "
        f"{len(missing)} by none"
    )
    return int(bool(missing or gone))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else None))
