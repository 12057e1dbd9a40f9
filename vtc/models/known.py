"""Models by name, and what `vtc.explain` says of them: assets/models.json, which tools/support_matrix.py writes of the
tests' models and of the registries of timm, open_clip and transformers."""

from __future__ import annotations

import difflib
import importlib.resources
import json
import re
from typing import Any

from vtc.errors import OptionError


def known(word: str = "") -> dict[str, Any]:
    """`versions` of the libraries, and `models`: all, or those with `word` in a name, however that is written
    (Qwen2.5-VL, qwen2_5_vl). A model's names are its class, its model type, and those of the registry; of the last, the
    ones without `word` are left out, unless the class has it.

    Raises:
        OptionError: no name has it.
    """
    data = json.loads((importlib.resources.files("vtc") / "assets" / "models.json").read_text(encoding="utf-8"))
    found = [row for row in (_named(row, word) for row in data["models"]) if row is not None]
    if not found:
        near = _near(data["models"], word)
        raise OptionError(
            f"no model that vtc was asked of has {word!r} in its name{near and f'; near are {near}'}; "
            "of any other, `vtc explain --model NAME` says what would be patched"
        )
    return {"versions": data["versions"], "models": found}


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def _own(row: dict[str, Any]) -> list[str]:
    return [row["class"], *([row["type"]] if "type" in row else [])]


def _named(row: dict[str, Any], word: str) -> dict[str, Any] | None:
    def has(name: str) -> bool:
        return _plain(word) in _plain(name) if _plain(word) else word in name

    names = row["names"] if any(map(has, _own(row))) else list(filter(has, row["names"]))
    return {**row, "names": names} if names else None


def _near(rows: list[dict[str, Any]], word: str) -> str:
    names = {_plain(name): name for row in rows for name in (*_own(row), *row["names"])}
    return ", ".join(names[name] for name in difflib.get_close_matches(_plain(word), names, n=3))
