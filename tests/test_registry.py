"""A sample of what `make registry` asks of all: one of every kind of answer in every library."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import registry  # noqa: E402
from support_matrix import _short  # noqa: E402

ANSWERS = {
    library: json.loads((ROOT / "benchmarks" / "results" / f"registry-{library}.json").read_text())
    for library in registry.CASES
}
PACKAGES = {"open_clip": "open_clip_torch"}


def sample(library):
    """Of every kind of answer the first name."""
    found = {}
    for name, record in ANSWERS[library]["answers"].items():
        if record["verdict"] not in ("multimodal", "not built"):
            found.setdefault(_short(record["verdict"]), name)
    return list(found.values())


@pytest.mark.parametrize("library", registry.CASES)
def test_nothing_in_the_whole_registry_is_wrong(library):
    answers = ANSWERS[library]["answers"]
    assert not [name for name, record in answers.items() if record["wrong"] or record["verdict"] == "raw exception"]
    assert sum(record["verdict"] == "supported" for record in answers.values()) > 10


@pytest.mark.slow
@pytest.mark.parametrize("library", registry.CASES)
def test_a_sample_answers_as_it_is_written(library):
    wanted = sample(library)
    cases = registry.transformers_cases(wanted) if library == "transformers" else registry.CASES[library]()
    same = metadata.version(PACKAGES.get(library, library)) == ANSWERS[library]["version"]
    asked = 0
    for case in cases:
        if case.names[0] in wanted:
            asked += 1
            now, before = registry.answer(case), ANSWERS[library]["answers"][case.names[0]]
            assert not now["wrong"], (case.names[0], now["wrong"])
            assert now["verdict"] == before["verdict"] or not same, case.names[0]
    assert asked == len(wanted) or not same
