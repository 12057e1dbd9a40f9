"""The command line: what it prints, what it writes, and one line with the way out for everything that goes wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import vtc
from vtc.cli import command as cli

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def vtc_(capsys, monkeypatch):
    """Call the command in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments):
        code = cli.main([str(each) for each in arguments])
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


@pytest.fixture
def fails(vtc_):
    """The command must end with 2 and say one line, which is returned."""

    def call(*arguments):
        code, out, err = vtc_(*arguments)
        assert code == 2
        assert out == ""
        assert err.startswith("vtc: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        return err

    return call


@pytest.fixture(scope="module")
def weights():
    pytest.importorskip("transformers")
    pytest.importorskip("onnx")
    from vtc.checkpoints import MissingPackageError, dinov2_saliency

    try:
        return dinov2_saliency()
    except MissingPackageError as error:
        pytest.skip(str(error))


@pytest.fixture
def model(weights, monkeypatch):
    """The real model, loaded once for this file."""
    monkeypatch.setattr("vtc.checkpoints.dinov2_saliency", lambda: weights)
    return weights


# -- run ------------------------------------------------------------------------------------------------------------


def test_run(vtc_, model, tmp_path):
    out = tmp_path / "out.png"
    code, text, err = vtc_("run", "--repeats", 1, "--size", 112, "--out", out)
    assert (code, err) == (0, "")
    for words in ("PiToMe(flops=0.5)", "Tokens per layer", "multiply-adds", "cosine", "saliency", "x as fast"):
        assert words in text, words
    assert str(out) in text.replace("\n", "")
    with Image.open(out) as picture:
        assert picture.info["Software"] == "vtc"
        assert picture.width > 3.5 * picture.height * 0.7 and picture.height > 500  # four squares in a row, with titles
    assert not any(hasattr(module.__dict__.get("forward"), "tower") for module in model.modules())


def test_run_json(vtc_, model, tmp_path):
    out = tmp_path / "out.png"
    small = ["--size", 112, "--repeats", 2, "--out", out, "--json"]
    code, text, err = vtc_("run", "--method", "tome", "--tokens", 20, *small)
    assert (code, err) == (0, "")
    found = json.loads(text)
    assert found["image_tokens"] == [64, 20]
    assert found["tokens_per_layer"][0][0] == 65 and found["tokens_per_layer"][-1][1] == 21
    assert 0 < found["macs_ratio"] < 1 and found["macs"][1] < found["macs"][0]
    assert 0.5 < found["cosine_cls"] <= 1 and 0.5 < found["cosine_patches"] <= 1
    assert len(found["seconds"]) == 2 and found["speedup"] > 0
    assert found["environment"]["torch"] == torch.__version__
    assert out.exists()


def test_run_keep_1_is_dense(vtc_, model, tmp_path):
    """On the command line 1 means 1.0, not one token."""
    code, text, _ = vtc_("run", "--keep", 1, "--size", 56, "--repeats", 1, "--out", tmp_path / "o.png", "--json")
    found = json.loads(text)
    assert code == 0
    assert found["image_tokens"] == [16, 16] and found["macs_ratio"] == 1
    assert found["cosine_cls"] == pytest.approx(1, abs=1e-6) and found["saliency_correlation"] == pytest.approx(1)


@pytest.mark.parametrize("method", ["random", "downsample"])
def test_run_other_methods(vtc_, model, tmp_path, method):
    code, text, _ = vtc_(
        "run", "--method", method, "--keep", 0.4 if method == "downsample" else 0.8,
        "--size", 112, "--repeats", 1, "--out", tmp_path / "o.png", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(text)["image_tokens"][1] < 64


def test_a_method_without_a_budget_is_given_none(vtc_, fails, model, tmp_path):
    code, out, _ = vtc_("run", "--method", "pixelprune", "--repeats", 1, "--out", tmp_path / "run.png", "--json")
    assert code == 0 and json.loads(out)["method"] == "pixelprune"
    code, out, _ = vtc_(
        *"bench --model timm:test_vit --repeats 1 --warmup 1 --batch 1 --json --methods pixelprune".split()
    )
    assert code == 0 and json.loads(out)["rows"][0]["method"] == "pixelprune"
    assert "has no budget" in fails("run", "--method", "pixelprune", "--flops", 0.5, "--out", tmp_path / "run.png")


def test_run_overwrites_only_its_own(vtc_, fails, model, tmp_path):
    theirs = tmp_path / "holiday.png"
    Image.new("RGB", (8, 8)).save(theirs)
    before = theirs.read_bytes()
    assert "holiday.png" in fails("run", "--out", theirs)
    assert theirs.read_bytes() == before
    assert "no folder" in fails("run", "--out", tmp_path / "none" / "o.png")
    assert ".png" in fails("run", "--out", tmp_path / "o.jpg")
    ours = tmp_path / "o.png"
    for _ in range(2):
        assert vtc_("run", "--size", 28, "--repeats", 1, "--keep", 1, "--out", ours)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--keep", "0"], ["--keep", "0 is out of range", "what stays"]),
        (["--keep", "1.2"], ["--keep", "1.2"]),
        (["--keep", "abc"], ["--keep", "'abc'", "0.9"]),
        (["--keep", "nan"], ["--keep", "'nan'"]),
        (["--keep", "0.3"], ["--keep 0.3", "--tokens", "--flops"]),
        (["--flops", "-1"], ["--flops", "-1"]),
        (["--tokens", "0"], ["--tokens", "0"]),
        (["--tokens", "999"], ["999", "256"]),
        (["--keep", "0.9", "--flops", "0.5"], ["--keep", "--flops", "not allowed with"]),
        (["--method", "tomme"], ["'tomme'", "did you mean 'tome'"]),
        (["--method", "tome", "--preset", "head"], ["tome", "'preset'"]),
        (["--preset", "nope"], ["'nope'", "head"]),
        (["--size", "225"], ["225", "224"]),
        (["--repeats", "0"], ["--repeats"]),
        (["--image", "no/such.jpg"], ["no/such.jpg", "no such file"]),
        (["--image", str(ROOT)], [str(ROOT), "folder"]),
        (["--image", str(ROOT / "pyproject.toml")], ["pyproject.toml", "not a picture"]),
        (["--sizes", "1"], ["--sizes", "--help"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_run_bad_input(fails, model, tmp_path, arguments, names):
    out = tmp_path / "o.png"
    message = fails("run", "--out", out, *arguments)
    for name in names:
        assert name in message
    assert not out.exists()


def test_run_nan(fails, model, monkeypatch, tmp_path):
    monkeypatch.setattr("vtc.models.images.preprocess", lambda image, size: torch.full((1, 3, size, size), torch.nan))
    assert "NaN" in fails("run", "--size", 56, "--out", tmp_path / "o.png")


def test_missing_extra(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for name in [name for name in sys.modules if name.startswith("vtc.viz")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(vtc, "viz", raising=False)
    message = fails("run")
    assert "matplotlib" in message and 'pip install "vtc-torch[cli]"' in message


def test_bugs_keep_their_traceback(model, monkeypatch, tmp_path):
    monkeypatch.setattr("vtc.bench.photo.compare", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", "--out", str(tmp_path / "o.png")])


def test_ctrl_c(vtc_, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("vtc.list_methods", interrupted)
    assert vtc_("list") == (130, "", "")


# -- list and explain -----------------------------------------------------------------------------------------------


def test_list(vtc_):
    code, text, err = vtc_("list")
    assert (code, err) == (0, "")
    data = json.loads(vtc_("list", "--json")[1])
    assert data == {"methods": vtc.list_methods(), "adapters": vtc.list_adapters()}
    for name in (*data["methods"], *data["adapters"]):
        assert name in text


def test_explain(vtc_):
    pytest.importorskip("timm")
    code, text, err = vtc_("explain", "--model", "timm:test_vit", "--method", "pitome")
    assert (code, err) == (0, "")
    assert "VisionTransformer" in text and "layers" in text
    data = json.loads(vtc_("explain", "--model", "timm:test_vit", "--json")[1])
    assert data["ok"] and data["tried"] and data["encoders"][0]["adapter"] == "timm"


def test_explain_says_why_not(vtc_):
    pytest.importorskip("timm")
    code, text, err = vtc_("explain", "--model", "timm:swin_tiny_patch4_window7_224")
    assert (code, err) == (1, "")
    assert "windows" in text
    code, text, _ = vtc_("explain", "--model", "timm:test_resnet", "--json")
    assert code == 1 and json.loads(text)["ok"] is False


def test_explain_hugging_face_folder(vtc_, fails, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config.save_pretrained(tmp_path)
    code, text, _ = vtc_("explain", "--model", f"hf:{tmp_path}")
    assert code == 0 and "2 layers" in text
    assert "--download" in fails("explain", "--model", "hf:nobody/nothing")


def test_explain_bad_input(fails):
    pytest.importorskip("timm")
    assert "dinov2-small" in fails("explain", "--model", "resnet")
    assert "vit_base_patch16_224" in fails("explain", "--model", "timm:vit_base_patch16_225")
    assert "'tomme'" in fails("explain", "--model", "timm:test_vit", "--method", "tomme")
    assert "--model" in fails("explain")


# -- bench and eval -------------------------------------------------------------------------------------------------


def test_bench(vtc_, monkeypatch):
    pytest.importorskip("timm")
    tiny = ["bench", "--model", "timm:test_vit", "--repeats", 1, "--warmup", 1, "--batch", 1]
    code, text, err = vtc_(*tiny)
    assert (code, err) == (0, "")
    for words in ("tome", "pitome", "ideal", "realised", "keep=1", torch.__version__):
        assert words in text, words
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    code, text, _ = vtc_(*tiny, "--methods", "tome", "--flops", 0.8, "--threads", 2, "--json")
    assert threads == [2]
    (row,) = json.loads(text)["rows"]
    assert code == 0
    assert row["macs_ratio"] <= 0.8 and row["ideal"] == pytest.approx(1 / row["macs_ratio"])
    assert row["efficiency"] == pytest.approx(row["realised"] / row["ideal"])


def test_bench_bad_input(fails):
    pytest.importorskip("timm")
    assert "windows" in fails("bench", "--model", "timm:swin_tiny_patch4_window7_224", "--batch", 1, "--repeats", 1)
    assert "'nope'" in fails("bench", "--methods", "tome,nope")


def test_measure_leaves_the_model_alone():
    timm = pytest.importorskip("timm")
    from vtc.bench import measure, shared_copy

    model = timm.create_model("test_vit").eval()
    images, before = torch.randn(2, 3, 160, 160), dict(model.named_modules())
    expected = model(images)
    turns = []
    rows = measure(model, images, [vtc.ToMe(r=4), vtc.PiToMe(keep=0.9)], 3, 1, tick=lambda: turns.append(1))
    assert [row.method for row in rows] == ["tome", "pitome"] and len(turns) == 7 * 4
    assert dict(model.named_modules()) == before and torch.equal(model(images), expected)
    other = shared_copy(model)
    for mine, yours in zip(model.parameters(), other.parameters(), strict=True):
        assert mine is yours


def test_the_limit_is_the_same_counts_without_a_method():
    timm = pytest.importorskip("timm")
    from vtc.bench import measure, shared_copy
    from vtc.bench.sliced import sliced
    from vtc.handle import install

    model, images = timm.create_model("test_vit").eval(), torch.randn(2, 3, 160, 160)
    handle, cut, seen = install(shared_copy(model), vtc.ToMe(r=4)), shared_copy(model), []
    handle.model(images)
    assert sliced(cut, handle, lambda: cut(images))
    for block in cut.blocks:
        block.mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    cut(images)
    assert seen == [after for _, after in handle.report.tokens]
    (row,) = measure(model, images, [vtc.ToMe(r=4)], 1, 0)
    assert row.limit > 0 and row.of_limit == pytest.approx(row.realised / row.limit)


def test_interleave_order():
    from vtc.bench import interleave

    seen = []
    took = interleave({name: lambda name=name: seen.append(name) for name in "abc"}, repeats=59, warmup=1)
    assert {name: len(values) for name, values in took.items()} == {"a": 59, "b": 59, "c": 59}
    rounds = ["".join(seen[at : at + 3]) for at in range(0, 180, 3)]
    assert {"".join(sorted(one)) for one in rounds} == {"abc"} and len(set(rounds)) == 6
    follows = [sum(seen[i : i + 2] == [a, b] for i in range(179)) for a in "abc" for b in "abc" if a != b]
    assert max(follows) < 2 * min(follows)  # nobody has a favourite neighbour


def test_eval(vtc_, monkeypatch):
    common = pytest.importorskip("vtc.eval.common")
    task = pytest.importorskip("vtc.eval.spectral")
    seen = {}

    def run(**options):
        seen.update(options)
        rows = [{"method": "tome", "distance": float("nan")}]
        return common.Results("spectral", rows, {"method": "method"}, "About.")

    monkeypatch.setattr(task, "run", run)
    code, text, _ = vtc_("eval", "spectral", "--images", 3)
    assert code == 0 and "tome" in text and seen == {"images": 3, "progress": False}
    code, text, _ = vtc_("eval", "spectral", "--json")
    assert json.loads(text)["rows"] == [{"method": "tome", "distance": None}]


# -- the process ----------------------------------------------------------------------------------------------------


def process(*arguments):
    command = [sys.executable, "-m", "vtc", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_process():
    done = process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"vtc {vtc.__version__}\n", "")
    done = process("run", "--keep", "abc")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    done = process("nothing")
    assert done.returncode == 2 and "'nothing'" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_closed_pipe():
    """`vtc list | head -0`: no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "vtc", "list", "--json"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_help_is_readable(vtc_):
    assert vtc_()[0] == 0
    for command in ("run", "list", "list-models", "explain", "bench", "eval", "demo"):
        code, text, err = vtc_(command, "--help")
        assert (code, err) == (0, "")
        assert f"Example: vtc {command}" in text


@pytest.mark.parametrize(
    ("task", "option", "why"),
    [
        ("spectral", ["--dtype", "bfloat16"], "--dtype is for vtc eval elpv or photos, not spectral"),
        ("elpv", ["--model", "x"], "--model is for vtc eval scenes or clip, not elpv"),
        ("scenes", ["--images", "3"], "not scenes"),
    ],
)
def test_eval_says_which_measurement_an_option_is_for(capsys, task, option, why):
    assert cli.main(["eval", task, *option]) == 2
    assert why in capsys.readouterr().err
