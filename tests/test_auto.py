"""keep="auto": what is measured, what is chosen for each target, and that the model is left alone otherwise."""

import json
import re

import mllm_processor
import mllm_zoo
import pytest
import torch
from zoo import model, pixels

import vtc
from vtc import auto
from vtc.bench.fidelity import ENCODER, LLM, Checked, check, fitting
from vtc.cli.command import main
from vtc.eval import scenes


@pytest.fixture(scope="module")
def llava():
    network = mllm_zoo.build("llava")
    return network, mllm_zoo.inputs("llava", "single")


def rows(*found):
    """The dense model in 1 s, and methods as (seconds, fidelity)."""
    made = [Checked(vtc.ToMe(keep=k / 10), (100, 50), s, 1 / s, near) for k, (s, near) in enumerate(found, 1)]
    return [Checked(None, (100, 100), 1.0, 1.0, 1.0), *made]


@pytest.mark.parametrize(
    ("target", "value", "found", "keep", "why"),
    [
        ("fidelity", 0.9, [(0.8, 0.95), (0.5, 0.91), (0.3, 0.5)], 0.2, "the fastest whose fidelity is at least 0.9"),
        ("fidelity", 0.9, [(0.8, 0.5), (1.5, 1.0)], None, "nothing that is faster reaches a fidelity of 0.9"),
        ("ttft", 0.6, [(0.8, 0.95), (0.5, 0.7), (0.4, 0.9)], 0.3, "the most faithful within 0.6 s"),
        ("ttft", 0.2, [(0.8, 0.95), (0.5, 0.7)], 0.2, "nothing keeps to 0.2 s"),
        ("ttft", 2.0, [(0.5, 0.7)], None, "the dense model takes 1.000 s"),
        ("tokens", 50, [(0.5, 0.7), (0.6, 0.8)], 0.2, "the most faithful"),
        ("tokens", 50, [(0.995, 1.0), (1.2, 1.0)], None, "nothing is faster"),
    ],
)
def test_the_choice(target, value, found, keep, why):
    targets = {"ttft": None, "fidelity": None} | ({target: value} if target != "tokens" else {})
    choice = auto._choice(rows(*found), target, targets["ttft"], targets["fidelity"])
    assert (choice.method and choice.method.keep) == keep and why in str(choice)


def test_a_multimodal_llm(llava):
    network, inputs = llava
    with vtc.compress(network, "auto", keep="auto", inputs=inputs, tokens=4, repeats=1) as handle:
        names = [row.method and row.method.label for row in handle.choice.rows]
        assert names == [None, *LLM]
        assert handle.choice.why and (handle.method.keep in (4, 1.0))
        network(**inputs)
        left = set(handle.report.after)
        assert left == ({4} if handle.choice.method else set(handle.report.before))
    dense, all_of_it, one = check(network, inputs, [vtc.Random(keep=1.0), vtc.Random(keep=1)], 1)
    assert all_of_it.fidelity == 1.0 >= one.fidelity and one.tokens[1] < all_of_it.tokens[1] == dense.tokens[0]


def test_what_a_model_refuses_is_not_tried(llava):
    assert fitting(llava[0]) == list(LLM) and fitting(model("timm-vit")) == list(ENCODER)
    assert fitting(mllm_zoo.build("gemma3_sliding")) == [name for name in LLM if "+proportional" not in name]


def test_an_encoder():
    network, images = model("timm-vit"), pixels(2)
    before = network(images)
    choice = vtc.choose(network, [images, images], "tome", fidelity=0.5, repeats=1)
    assert [r.method.flops for r in choice.rows[1:]] == [0.8, 0.65, 0.5]
    assert all(-1 <= r.fidelity <= 1.0001 for r in choice.rows)
    assert torch.equal(network(images), before)


def test_refusals(llava):
    network, inputs = llava
    for options, why in [
        ({}, "give inputs="),
        ({"inputs": inputs}, "one target"),
        ({"inputs": inputs, "ttft": 1, "fidelity": 1}, "one target"),
        ({"inputs": inputs, "ttft": 0}, "seconds, above 0"),
        ({"inputs": inputs, "fidelity": 1.5}, "at most 1"),
        ({"inputs": [], "tokens": 4}, "inputs is empty"),
    ]:
        with pytest.raises(vtc.VTCError, match=why):
            vtc.compress(network, "idpruner", keep="auto", **options)
    assert not any("vtc" in type(x).__module__ for x in network.model.__dict__.values())


def test_self_check(tmp_path, capsys):
    """Of a multimodal LLM in a folder and the pictures in another, random and downsample always beside."""
    folder, pictures = tmp_path / "llava", tmp_path / "pictures"
    mllm_processor.save("llava", folder)
    pictures.mkdir()
    for i in range(2):
        scenes.scene("test", i).image.save(pictures / f"{i}.png")
    command = ["bench", "--self-check", "--images", str(pictures), "--model", str(folder), "--methods", "tome"]
    assert main([*command, "--keep", "0.5", "--repeats", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in found["rows"]] == ["dense", "random", "downsample", "tome"]
    assert found["images"] == 2 and found["rows"][0]["tokens_after"] == 50 and found["rows"][3]["tokens_after"] <= 26
    assert main([*command, "--keep", "0.5", "--repeats", "1"]) == 0
    assert re.search(r"downsample +keep 0.5", capsys.readouterr().out)
    assert main([*command[:-2], "--keep", "0.5", "--repeats", "1"]) == 0
    assert all(f"{name} " in text for text in [capsys.readouterr().out] for name in LLM)
    for more, why in [
        (["--flops", "0.5"], "an encoder alone"),
        (["--batch", "2"], "one picture is a batch"),
        (["--warmup", "1"], "--warmup"),
        (["--positions", "ppe"], "--positions"),
        (["--size", "64"], "for encoders"),
    ]:
        assert main([*command, *more]) == 2 and why in capsys.readouterr().err
    assert main([*command[:3], str(tmp_path / "none")]) == 2 and "no such folder" in capsys.readouterr().err
    assert main([*command[:3], str(folder)]) == 2 and "no picture in it" in capsys.readouterr().err
    assert main(["bench", "--images", "x"]) == 2 and "--self-check" in capsys.readouterr().err
    assert main([*command[:4], "--model", "timm:vit_tiny_patch16_224"]) == 2
    assert "add --download" in capsys.readouterr().err


def test_loyalty_is_fidelity_now():
    network, images = model("timm-vit"), pixels(1)
    with pytest.warns(DeprecationWarning, match="fidelity="):
        choice = vtc.choose(network, images, "tome", loyalty=0.5, repeats=1)
    with pytest.warns(DeprecationWarning, match="fidelity"):
        assert choice.rows[0].loyalty == choice.rows[0].fidelity == 1.0
