"""What `vtc list-models` says is what `vtc.explain` says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import mllm_classes
import mllm_zoo
import pytest
import zoo
from mllm_classes import others

import vtc
from vtc.adapters.multimodal.families.generic import PROVEN, UNFIT
from vtc.cli import command as cli
from vtc.models.known import known

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import support_matrix  # noqa: E402

ROWS = known()["models"]
LLMS = {row["names"][0]: row for row in ROWS if row["kind"] == "multimodal"}


@pytest.fixture
def listed(capsys):
    def call(*words):
        code = cli.main(["list-models", *words])
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


def test_every_class_is_there_with_its_status():
    assert list(LLMS) == [*mllm_zoo.FAMILIES, *mllm_classes.CLASSES, *mllm_zoo.RETRIEVERS, *others.REFUSED]
    supported = {row["type"] for row in LLMS.values() if not row["reason"]}
    assert supported >= PROVEN and {row["type"] for row in LLMS.values() if row["tests"] == "mllm_zoo"} <= supported
    for name, reason in UNFIT.items():
        assert [row["reason"] for row in LLMS.values() if row["type"] == name and reason in row["reason"]], name
    for row in ROWS:
        assert bool(row["reason"]) != ("" in row["methods"].values()), row["names"]
        assert row["reason"] or set(vtc.list_methods()) >= {name for name in row["methods"] if name.isidentifier()}


def test_videos_are_those_of_the_tests():
    wanted = {name for tests in (mllm_zoo, mllm_classes) for name, cases in tests.CASES.items() if "video" in cases}
    wanted -= {"video_llama_3", "perception_lm"}  # refused in the call
    assert {name for name, row in LLMS.items() if row.get("video")} == wanted & {
        n for n in LLMS if not LLMS[n]["reason"]
    }


def test_encoders_of_the_tests_are_among_those_of_the_registries():
    registered = {row["class"] for row in ROWS if row["library"] != "open_clip" and not row["reason"]}
    for name in (name for name in zoo.ZOO if not name.startswith("open_clip")):
        assert type(zoo.model(name)).__name__ in registered, name


@pytest.mark.parametrize(
    "name", ["qwen3_vl", "gemma3", "gemma4", "llava_pixtral", "chameleon", "phi4_multimodal", "llama4", "git"]
)
def test_multimodal_models_are_as_vtc_explains_them(name):
    if name in others.REFUSED:
        assert LLMS[name]["reason"] in str(vtc.explain(others.sketch(name), "divprune", keep=0.5))
        return
    row, tests = LLMS[name], mllm_zoo if name in mllm_zoo.FAMILIES else mllm_classes
    plan = vtc.explain(tests.build(name))
    assert plan.ok == (not row["reason"]) and row["reason"] in str(plan)
    for method in ("divprune", "fastv", "scope") if plan.ok else ():
        plan = vtc.explain(tests.build(name), method, keep=0.5)
        assert plan.ok == (row["methods"][method] == "") and row["methods"][method] in str(plan), method


@pytest.mark.parametrize("name", ["hf-vit", "hf-mae", "hf-vivit", "hf-blip2", "hf-siglip2"])
def test_encoders_are_as_vtc_explains_them(name):
    model = zoo.model(name)
    (row,) = (row for row in known(type(model).__name__)["models"] if row["class"] == type(model).__name__)
    assert row["methods"].keys() == support_matrix.encoder_ways().keys()
    for method in ("tome", "downsample"):
        plan = vtc.explain(model, method)
        assert plan.ok == (row["methods"][method] == "") and row["methods"][method] in str(plan), method


def test_the_page_is_written_from_the_same_data():
    data = json.loads(support_matrix.DATA.read_text())
    assert support_matrix.written(data) == support_matrix.DATA.read_text()
    assert support_matrix.page(data) == support_matrix.PAGE.read_text(), "run tools/support_matrix.py"


def test_all_are_listed(listed):
    code, text, err = listed()
    assert (code, err) == (0, "")
    words = set(text.split())
    assert {"qwen2_5_vl", "gemma4", "Dinov2Model", "Eva:", "fuyu"} <= words and "without an encoder" in text
    data = json.loads(listed("--json")[1])
    assert data == known() and len(data["models"]) > 500


def test_a_word_finds_names_however_they_are_written(listed):
    for word in ("Qwen2.5-VL", "qwen2_5_vl", "QWEN25VL"):
        code, text, err = listed(word)
        assert (code, err) == (0, "") and "qwen2_5_vl" in text and "gemma" not in text
        assert "all" in text and "yes" in text
    text = " ".join(listed("gemma3_sliding")[1].split())
    assert re.search(r"all but [\w, ]*fastv, dart", text) and "divprune" not in text
    assert "fastv" not in listed("gemma4_unified")[1] and "divprune" in listed("gemma4_unified")[1]
    (row,) = json.loads(listed("vit_base_patch16_siglip_224", "--json")[1])["models"]
    assert row["class"] == "VisionTransformer" and row["names"] and all("siglip_224" in name for name in row["names"])
    text = listed("SwinModel")[1]
    assert "Refused" in text and "windows" in text and "Multimodal" not in text


def test_a_name_that_is_not_there_is_refused_with_those_near(listed):
    code, text, err = listed("qwen2_5_vlm")
    assert (code, text) == (2, "") and err.startswith("vtc: error: ") and err.count("\n") == 1
    assert "'qwen2_5_vlm'" in err and "near are qwen2_5_vl" in err and "vtc explain" in err
    code, text, err = listed("zzzzzz")
    assert (code, text) == (2, "") and "near" not in err
    assert listed("???")[0] == 2
