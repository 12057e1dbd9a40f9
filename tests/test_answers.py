"""`vtc eval scenes`: what it asks and scores, that it goes on where it stopped, and that processes share the work."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace

import mllm_processor
import mllm_zoo as zoo
import pytest
import torch

from vtc import scores
from vtc.checkpoints import CheckpointError, tiny
from vtc.errors import OptionError
from vtc.eval import answers, asking, scenes
from vtc.eval.asking import View

COLUMNS = ["method", "keep", "tokens", "kind", "seed", "n", "accuracy", "fidelity", "seconds"]
SMALL = {"methods": ("tome",), "keep": (1.0, 0.5), "limit": 1, "seeds": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A LLaVA with random weights, saved: it answers, never right."""
    return mllm_processor.save("llava", tmp_path_factory.mktemp("llava"))


def table(folder):
    with (folder / "scenes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    answers.run(model, out=folder, **SMALL)
    return folder


def test_rows_and_files(whole):
    rows = table(whole)
    assert {(r["method"], r["keep"]) for r in rows} == {
        ("dense", "1.0"), ("random", "0.5"), ("downsample", "0.5"), ("tome", "0.5")
    }  # fmt: skip
    assert {r["seed"] for r in rows} == {"0", "1"}
    assert {"all", "colour", "count"} <= {r["kind"] for r in rows} <= {"all", *scenes.KINDS}
    for row in rows:
        assert 0 <= float(row["accuracy"]) <= 1 and 0 <= float(row["fidelity"]) <= 1
        if row["method"] == "dense":
            assert row["fidelity"] == "1.0" and row["tokens"] == "25.0"
        elif row["method"] == "random":
            assert float(row["tokens"]) == pytest.approx(12.5, abs=0.5)
    total = [r for r in rows if r["kind"] == "all" and r["seed"] == "0" and r["method"] == "dense"]
    assert int(total[0]["n"]) == len(answers.questions(0, 1))
    assert (whole / "scenes.png").stat().st_size > 10_000
    assert "| tome | 0.5 |" in (whole / "scenes.md").read_text()


def test_goes_on_where_it_stopped(model, whole, tmp_path, monkeypatch):
    """A kill in the middle of a line loses that cell alone, and what is there is not asked again."""
    lines = (whole / "cells-0.jsonl").read_text().splitlines()
    (tmp_path / "run.json").write_text((whole / "run.json").read_text())
    (tmp_path / "cells-0.jsonl").write_text("\n".join([*lines[:5], lines[5][:30]]) + "\n")
    asked, ask = [], answers._ask
    monkeypatch.setattr(answers, "_ask", lambda *a: asked.append(a[2].key) or ask(*a))
    answers.run(model, out=tmp_path, **SMALL)
    assert sorted(asked) == sorted(json.loads(line)["key"] for line in lines[5:])
    assert table(tmp_path) == table(whole)


def test_another_run_is_refused_and_stays(model, whole):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    for other in ({"limit": 2}, {"keep": (0.25,)}, {"split": "validation"}):
        with pytest.raises(OptionError, match="results of another run"):
            answers.run(model, out=whole, **(SMALL | other))
    assert before == {path.name: path.read_bytes() for path in whole.iterdir()}


def test_what_is_unknown(model, tmp_path):
    with pytest.raises(OptionError, match="unknown method 'tomato'"):
        answers.run(model, out=tmp_path / "a", **(SMALL | {"methods": ("tomato",)}))
    for label, why in (
        ("tome+tea", r"after a \+ comes one of ppe, proportional"),
        ("idpruner+scorer", "a file of vtc.train"),
        ("tome+scorer", "goes with idpruner.scorer"),
    ):
        with pytest.raises(OptionError, match=why):
            answers.run(model, out=tmp_path / "a", **(SMALL | {"methods": (label,)}))
    with pytest.raises(OptionError, match="cannot be read"):
        answers.run(model, out=tmp_path / "a", scorer=str(tmp_path / "none"), **SMALL)
    with pytest.raises(OptionError, match="limit=0"):
        answers.run(model, out=tmp_path / "a", **(SMALL | {"limit": 0}))
    with pytest.raises(OptionError, match="balance=1.5"):
        answers.run(model, out=tmp_path / "a", balances=(0, 1.5), **SMALL)
    with pytest.raises(ValueError, match="no_such_model"):
        answers.run(str(tmp_path / "no_such_model"), out=tmp_path / "a", **SMALL)
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(model, whole, tmp_path):
    """With Accelerate's launcher, each with its own cells. --multi_gpu starts several on processors too."""
    arguments = ["--model", model, "--methods", "tome", "--keep", "1", "0.5", "--limit", "1", "--seeds", "2"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["-m", "vtc", "eval", "scenes", *arguments, "--out", str(tmp_path / "two")]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p.name for p in (tmp_path / "two").glob("cells-*")} == {"cells-0.jsonl", "cells-1.jsonl"}
    assert table(tmp_path / "two") == table(whole)


def test_positions_and_scorers_are_methods_of_their_own(model, tmp_path):
    path, network = str(tmp_path / "scorer.safetensors"), zoo.build("llava")
    torch.manual_seed(0)
    scores.save_scorer(scores.Scorer(network.config.text_config.hidden_size, 4), path)
    run = SMALL | {"methods": ("tome+ppe", "idpruner+scorer"), "seeds": 1}
    found = answers.run(model, out=tmp_path / "a", scorer=path, **run)
    assert {r["method"] for r in found.rows} == {"dense", "random", "downsample", "tome+ppe", "idpruner+scorer"}
    every = [label for label, *_ in answers._chosen(network, ("all",), (0.5,), path)]
    assert {"pitome", "pitome+ppe", "visionzip+proportional", "idpruner", "idpruner+scorer", "idpruner 0.5"} <= set(
        every
    )
    assert not {"random+ppe", "idpruner+proportional"} & set(every)


def test_scores():
    """Of invented replies: right answers, and answers that are the dense model's."""
    asked = {s: answers.questions(s, 3) for s in (0, 1)}
    right = {s: [q.answer for q in those] for s, those in asked.items()}
    wrong = {s: ["nonsense"] * len(those) for s, those in asked.items()}
    cells = [answers.Cell("dense", "random", 1.0, s) for s in (0, 1)]
    cells += [answers.Cell("tome", "tome", 0.5, s) for s in (0, 1)]
    said = [right[0], wrong[1], right[0], right[1]]
    done = {c.key: {"said": w, "tokens": 8.0, "before": 16.0, "seconds": 1.0} for c, w in zip(cells, said, strict=True)}
    setting = {"model": "m", "seeds": 2, "limit": 3, "frames": 1, "split": "test"}
    found = answers.summarise(answers._results(cells, done, setting, asked).rows)
    assert found["dense", 1.0]["all"]["accuracy"] == pytest.approx((0.5, 12.71 * 0.5), rel=1e-3)
    assert found["tome", 0.5]["all"]["accuracy"] == (1.0, 0.0)
    assert found["tome", 0.5]["all"]["fidelity"][0] == 0.5
    assert found["tome", 0.5]["colour"]["accuracy"][0] == 1.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": (160, 128), "full": True}, "(size 160x128, full True)"),
        ({"size": (128, 96), "canvas": (160, 160)}, "(size 128x96, canvas 160x160)"),
        ({"pictures": 2}, "(pictures 2)"),
    ],
)
def test_other_views(model, tmp_path, options, said):
    """They are asked, named in the text, and not mixed with others; dense alone is a run too."""
    run = {"methods": ("random",), "keep": (1.0,), "limit": 1, "seeds": 1, "out": tmp_path / "a"}
    found = answers.run(model, **run, **options)
    assert {r["method"] for r in found.rows} == {"dense"} and f"scenes {said} of the test" in found.about
    with pytest.raises(OptionError, match="results of another run"):
        answers.run(model, **run)
    with pytest.raises(OptionError, match="results of another run"):
        answers.run(model, **run, **(options | {"size": (192, 192)}))


def test_questions_of_every_view():
    """Of the same scenes the same questions, whatever their size; of an album with the picture's number."""
    usual = asking.questions(0, 3, View(level=scenes.FULL))
    for view in (View(((448, 224),)), View(((192, 128),), canvas=(256, 256)), View(resized=(128, 192))):
        some = asking.questions(0, 3, replace(view, level=scenes.FULL))
        assert [(q.text, q.answer) for q in some] == [(q.text, q.answer) for q in usual]
        assert view.images(some[0].about)[0].size == (view.resized or view.canvas or view.sizes[0])
    assert all(q.text.startswith("In picture ") for q in asking.questions(0, 2, View(((128, 128),) * 3)))
    assert {q.kind for q in asking.questions(0, 2, View(frames=5))} == {"when"}
    with pytest.raises(OptionError, match="do not go together"):
        View(((128, 128),) * 2, canvas=(256, 256))


def test_numerals_are_one_number():
    assert asking.plain(" 4 8 2 1 ") == asking.plain("4821.") == "4821"
    assert asking.plain("Top left.") == "top left"


def test_seeds_have_their_own_scenes_and_seeded_methods():
    assert answers.questions(0, 2) == answers.questions(0, 2) != answers.questions(1, 2)
    assert answers.Cell("random", "random", 0.5, 3).make().seed == 3
    assert answers.Cell("idpruner 0.25", "idpruner", 0.5, 3, (("balance", 0.25),)).make().balance == 0.25


def test_a_checkpoint_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "place", lambda name: tmp_path / name)
    with pytest.raises(CheckpointError, match="checkpoint tiny_qwen is incomplete .*SHA256.json"):
        answers.load("tiny_qwen")
