"""tools/instrument_page.py: tables of invented answers, the bars, and a run that goes on."""

import sys
from pathlib import Path

import mllm_processor
import pytest

from vtc.eval import answers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import instrument_page  # noqa: E402


def row(kind, n, accuracy, seed=0, method="dense", keep=1.0):
    return {"method": method, "keep": keep, "kind": kind, "seed": seed, "n": n, "accuracy": accuracy}


def test_seeds_count_by_their_questions():
    rows = [row("colour", 10, 1.0), row("all", 10, 1.0), row("colour", 30, 0.6, 1), row("all", 30, 0.6, 1)]
    rows += [row("colour", 10, 0.1, method="random", keep=0.5), row("all", 10, 0.1, method="random", keep=0.5)]
    assert instrument_page.by_kind(rows, "dense", 1.0) == {"colour": pytest.approx(0.7), "all": pytest.approx(0.7)}
    table = instrument_page.table({"a cell": rows}, "dense", 1.0)
    assert "| a cell | 40 | 0.700 | 0.700 |" in table


def test_bars():
    good = {"all": 0.95, "colour": 0.9, "reading": 0.8}
    assert instrument_page.bars("256 x 256", good) == []
    short = instrument_page.bars("256 x 256", good | {"all": 0.94, "reading": 0.79})
    assert short == ["256 x 256: 0.940 over all, not 0.95", "256 x 256: 0.790 of reading, not 0.8"]
    assert instrument_page.bars("two pictures", {"all": 0.9, "colour": 0.5}) == []


def test_a_page_goes_on(tmp_path, monkeypatch, capsys):
    model = mllm_processor.save("llava", tmp_path / "model-llava")
    call = [
        "instrument_page.py",
        model,
        "--out",
        str(tmp_path / "out"),
        "--limit",
        "1",
        "--cells",
        "256 x 192",
        "448 x 224",
    ]
    monkeypatch.setattr(sys, "argv", [*call, "--keep", "1", "0.5"])
    instrument_page.main()
    written, asked = tmp_path / "out" / "model-llava" / "instrument.md", []
    page = written.read_text()
    assert "| 448 x 224 |" in page and "drawn at random" in page and "Falls short" in page
    monkeypatch.setattr(answers, "_ask", lambda *a: asked.append(a))
    instrument_page.main()
    assert written.read_text() == page and not asked
    monkeypatch.setattr(sys, "argv", [*call, "--keep", "1", "0.5", "--bars"])
    with pytest.raises(SystemExit):
        instrument_page.main()
