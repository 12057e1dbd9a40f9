"""docs/answers.md says what its results say, and its results are what the command gives."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

import vtc
from vtc.eval import answers, common, scenes
from vtc.eval.asking import View
from vtc.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("answers_page", ROOT / "tools" / "answers_page.py")
answers_page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(answers_page)
LIMIT = 18  # scenes a seed, of tools/answers_runs.py


def test_pages_say_what_the_results_say(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    answers_page.write(tmp_path)
    pages = [Path("README.md"), *(Path(f"docs/{name}.md") for name in ("answers", "frame", "video"))]
    pages += [Path(f"docs/methods/{name}.md") for name in METHODS]
    for page in pages:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), f"{page}: run tools/answers_page.py"


@pytest.mark.parametrize("run", answers_page.RUNS)
def test_every_method_is_there(run):
    rows = answers_page.read(run)
    model = answers.load("tiny_llava" if run == "tiny_llava" else "tiny_qwen")[0]
    fits = {name for name in answers_page.answers_runs.STILLS if vtc.explain(model, name).ok}
    assert fits <= {r["method"] for r in rows} and len({r["seed"] for r in rows}) == 5
    some = re.search(r"--keep ([\d. ]+)", answers_page.answers_runs.RUNS[run])
    assert {r["keep"] for r in rows} == {1, *(map(float, some[1].split()) if some else answers.KEEP)}
    assert min(r["n"] for r in rows if r["kind"] == "all") >= (40 if run.startswith("clips") else 80)  # of five seeds


@pytest.mark.parametrize("run", answers_page.VIDEOS)
def test_videos_were_asked_enough(run):
    rows = answers_page.read(run)
    asked = {*answers_page.answers_runs.BUDGETED} - {*answers_page.answers_runs.STILLS}
    assert asked | {"random", answers.FEWER, *answers_page.answers_runs.OVER_FRAMES} <= {r["method"] for r in rows}
    for cell in {(r["method"], r["keep"]) for r in rows}:
        assert sum(r["n"] for r in rows if (r["method"], r["keep"]) == cell and r["kind"] == "all") >= 200


@pytest.mark.parametrize("model", answers_page.MODELS)
def test_the_command_gives_the_results(model):
    """One seed's cells again. On another processor a question at the edge may fall to the other side."""
    rows = [r for r in answers_page.read(model) if r["seed"] == 0 and r["kind"] == "all"]
    network, processor = answers.load(model)
    asked = answers.questions(0, LIMIT, View(level=scenes.FULL))
    for cell in (answers.Cell("dense", "random", 1.0, 0), answers.Cell("tome", "tome", 0.25, 0)):
        row = next(r for r in rows if (r["method"], r["keep"]) == (cell.label, cell.keep))
        said = answers._ask(network, processor, cell, asked, 16)["said"]
        right = sum(word == q.answer for word, q in zip(said, asked, strict=True))
        assert row["n"] == len(asked) and abs(right - row["n"] * row["accuracy"]) < 1.5


@pytest.mark.parametrize("model", answers_page.MODELS)
def test_the_scenes_need_the_tokens_and_some_method_keeps_the_answers(model):
    found = answers.summarise(answers_page.read(model))
    dense = {kind: each["accuracy"][0] for kind, each in found["dense", 1.0].items()}
    chance = {kind: each["accuracy"][0] for kind, each in found["random", 0.25].items()}
    assert sum(dense[kind] - chance[kind] >= 0.15 for kind in dense if kind != "all") >= 2
    for keep, share in ((0.25, 0.95), (0.1, 0.85)):
        assert max(found[m, k]["all"]["accuracy"][0] for m, k in found if k == keep) >= share * dense["all"]


def test_a_new_method_leaves_the_others(tmp_path, monkeypatch):
    """Rows of methods that a run did not ask stay, but not beside another model's."""
    monkeypatch.setattr(answers_page, "KEPT", tmp_path)
    (tmp_path / "scenes.md").write_text("About.\n\n| a table |")

    def run(**accuracy):
        row = {"keep": 0.5, "tokens": 8.0, "kind": "all", "seed": 0, "n": 4, "fidelity": 1.0, "seconds": 1.0}
        common.write_csv(tmp_path / "scenes.csv", [row | {"method": m, "accuracy": a} for m, a in accuracy.items()])
        answers_page.take("some", tmp_path)
        return {r["method"]: r["accuracy"] for r in answers_page.read("some")}

    assert run(dense=1.0, tome=0.5, norm=0.25) == {"dense": 1.0, "tome": 0.5, "norm": 0.25}
    assert run(dense=1.0, tome=0.75) == {"dense": 1.0, "tome": 0.75, "norm": 0.25}
    assert run(dense=0.75, tome=0.5) == {"dense": 0.75, "tome": 0.5}
