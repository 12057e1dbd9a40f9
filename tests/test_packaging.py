"""The package as people install it: lean to import, typed, with its extras and its command."""

import importlib.util
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from vtc.cli.command import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it to Python 3.10

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = ["timm", "open_clip", "transformers", "cupy", "PIL", "matplotlib", "torchvision", "onnx", "rich", "gradio"]


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def command(*arguments):
    code = "import sys; from vtc.cli.command import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_import_is_lean():
    """`import vtc` costs little beyond torch, imports nothing optional and never touches CUDA."""
    code = f"""
import sys, time
import torch
start = time.perf_counter()
import vtc
print(time.perf_counter() - start)
print(*sorted(set({OPTIONAL}) & set(sys.modules)))
print(torch.cuda.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    seconds, imported, cuda = done.stdout.splitlines()
    assert imported == "", f"import vtc imports {imported}"
    assert cuda == "False"
    assert float(seconds) < 10  # 0.2 s on an idle machine; a framework takes several


def test_import_does_not_seed_or_configure():
    """`import vtc` leaves torch's generator, threads and default dtype as they were."""
    code = """
import torch
state = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
import vtc
now = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
assert torch.equal(state[0], now[0]) and state[1:] == now[1:]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_typed():
    folder = Path(importlib.util.find_spec("vtc").origin).parent
    assert (folder / "py.typed").is_file()


def test_public_names_exist():
    import vtc

    assert len(set(vtc.__all__)) == len(vtc.__all__)
    for name in vtc.__all__:
        assert hasattr(vtc, name), name


def test_version_is_one(project):
    import vtc

    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert project["version"] == vtc.__version__ == citation[1]


def test_requirements(project):
    names = [re.match(r"[\w-]+", line)[0] for line in project["dependencies"]]
    assert names == ["torch", "einops"]
    extras = project["optional-dependencies"]
    assert {"timm", "open-clip", "hf", "demo", "eval", "test", "docs", "all"} <= set(extras)
    (everything,) = extras["all"]
    wanted = set(everything.partition("[")[2].rstrip("]").split(","))
    assert wanted == set(extras) - {"all", "test", "docs", "harness", "index", "vllm"}


def test_torch_is_no_build_requirement():
    """pip would fetch one of several gigabytes just to build; the kernels are built at their first use instead."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert [re.match(r"[\w-]+", line)[0] for line in wanted] == ["setuptools", "wheel"]


def test_torch_is_pinned_for_development():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert any(re.fullmatch(r"torch==\d+\.\d+\.\d+", line) for line in lines)


def test_licence(project):
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert "license: Apache-2.0" in (ROOT / "CITATION.cff").read_text()


def test_entry_point(project):
    assert project["scripts"] == {"vtc": "vtc.cli:main"}
    try:
        found = metadata.entry_points(group="console_scripts", name="vtc")
    except metadata.PackageNotFoundError:
        pytest.skip("vtc-torch is not installed here")
    assert all(entry.value == "vtc.cli:main" for entry in found)


@pytest.mark.parametrize("word", ["", "run", "list", "list-models", "explain", "bench", "eval", "demo"])
def test_help(word, capsys):
    assert main([*word.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert "usage" in out.lower() and not err


def test_unknown_subcommand_ends_with_2():
    done = command("no-such-command")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
