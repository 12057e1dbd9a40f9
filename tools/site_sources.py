"""A hook of MkDocs, for what a page needs from outside of docs/.

Pages link to files of the repository (`../benchmarks/results/elpv.csv`), which a code host shows. For the site each of
these is copied to `files/` and the link led there; markdown becomes a page. A link to a folder keeps its text alone.

A line `<!-- all of vtc.scores -->` becomes the reference of every name in that module's `__all__`, from its docstring.
The cards of the methods stand below methods.md in the navigation, in the registry's order.
"""

from __future__ import annotations

import importlib
import inspect
import os
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
_ALL = re.compile(r"^<!-- all of (vtc[.\w]*)(?: but ([\w, ]+))? -->$", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+:)([^)#\s]+)(#[^)]*)?\)")


def on_config(config: Any) -> Any:
    from vtc.methods import METHODS

    for entry in config.nav:
        if "Methods" in entry:
            entry["Methods"] += [f"methods/{name}.md" for name in METHODS]
    return config


def leads_to(page: Path, target: str) -> Path | None:
    """The file or folder of the repository that `page` links to, unless both are in docs/."""
    path = Path(os.path.normpath(page.parent / target))
    if not path.exists() or not path.is_relative_to(ROOT):
        return None
    return None if page.is_relative_to(DOCS) and path.is_relative_to(DOCS) else path


def on_files(files: Files, config: Any) -> Files:
    wanted: dict[str, Path] = {}
    for page in sorted(DOCS.rglob("*.md")):
        todo = [page]
        while todo:
            source = todo.pop()
            for _, target, _ in _LINK.findall(source.read_text()):
                found = leads_to(source, target)
                if found and found.is_file() and not found.is_relative_to(DOCS) and _place(found) not in wanted:
                    wanted[_place(found)] = found
                    todo += [found] if found.suffix == ".md" else []
    for place, path in wanted.items():
        file = File.generated(config, place, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = Path(page.file.abs_src_path)
    here = posixpath.dirname(page.file.src_uri)

    def led(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        found = leads_to(source, target)
        if found is None:
            return match[0]
        if not found.is_file():
            return text
        return f"[{text}]({posixpath.relpath(_place(found), here or '.')}{anchor or ''})"

    return _LINK.sub(led, _ALL.sub(reference, markdown))


def reference(match: re.Match[str]) -> str:
    module, left_out = match[1], (match[2] or "").split(", ")
    names = [name for name in importlib.import_module(module).__all__ if name not in left_out]
    return "\n".join(f"::: {module}.{name}\n" for name in names)


class Docstrings(griffe.Extension):
    """The operators take their docstrings from their definitions, which only shows once the module ran."""

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring is None and func.path.startswith("vtc.ops.") and func.path.count(".") == 2:
            text = getattr(importlib.import_module("vtc.ops"), func.name, None).__doc__
            func.docstring = griffe.Docstring(inspect.cleandoc(text), parent=func) if text else None


def _place(path: Path) -> str:
    """Where a file of the repository is on the site."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"files/{path.relative_to(ROOT).as_posix()}"
