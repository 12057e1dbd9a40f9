"""The CUDA kernels without a GPU: nvcc builds them, NVRTC as CuPy does; and how CuPy launches them."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from vtc.ops import cupy, selection

ROOT = Path(__file__).parents[1]
with_cupy = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="CuPy and NVRTC come for Linux on x86 alone"
)


CPU_ALONE = {"vtc::cosines", "vtc::cover_select", "vtc::distinct_select"}  # their definitions run on a GPU


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_nvcc() -> None:
    """Where nvcc is, the setup built what lies in csrc now; it loads without a GPU, and every operator is in it."""
    library = ROOT / "vtc" / "_cuda.abi3.so"
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh")]
    assert sources and library.stat().st_mtime > max(path.stat().st_mtime for path in sources), "make setup builds it"
    code = """if True:
        import torch
        from vtc.ops import kernels
        assert kernels._load("cuda") and kernels._load("cpp")
        names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("vtc::"))
        for device in ("CPU", "CUDA"):
            print(*(n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(n, device)))
    """
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    cpu, cuda = ran.stdout.splitlines()
    assert "vtc::energy" in cpu and set(cpu.split()) - set(cuda.split()) == CPU_ALONE, ran.stderr


@with_cupy
@pytest.mark.parametrize("file", cupy.FILES)
def test_nvrtc(file: str) -> None:
    """What CuPy would compile compiles: every kernel, for every type of tokens and every tile, by its mangled name."""
    text = cupy.ptx(file)
    entries = set(
        re.findall(r"\.entry _ZN8vtc_cuda\d+(\w+?_kernel)(?:I(f|6__half|13__nv_bfloat16)(?:Li(\d)E)?)?E", text)
    )
    expected = {(name, "", "") for name, of in cupy._PLAIN.items() if of == file}
    for name, (of, *variants) in cupy._KERNELS.items():
        types = ("f", "6__half", "13__nv_bfloat16") if of == file else ()
        expected |= {(name, type_, variant) for type_ in types for variant in variants or [""]}
    assert expected and entries == expected and len(re.findall(r"\.entry", text)) == len(expected)


def test_cupy_launches_fit_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch hands over as many arguments as its kernel has parameters, of their types; CuPy would not notice."""
    text = "".join(cupy.source(file) for file in cupy.FILES)
    launched = set()

    def launch(name: str, like: Tensor, grid: tuple[int, ...], threads: int, *arguments: object, **more: int) -> None:
        found = re.search(rf"\b{name}\(([^)]*)\) {{", text)
        assert found, name
        kinds = [re.sub(r"const|\w+$", "", part).strip().replace(" ", "") for part in found[1].split(",")]
        assert len(kinds) == len(arguments), name
        for kind, value in zip(kinds, arguments, strict=True):
            if kind.endswith("*"):
                of = {"T*": like.dtype, "float*": torch.float32, "int64*": torch.long, "bool*": torch.bool}[kind]
                assert value is None or (isinstance(value, Tensor) and value.dtype == of), (name, kind, value)
            else:
                expected = {"int": int, "float": float, "int64": numpy.int64}[kind]
                assert type(value) is expected, (name, kind, value)
        assert 1 <= len(grid) <= 3 and threads % 32 == 0
        assert ("variant" in more) == bool(re.search(rf"template <typename T, int R>[^{{;]*\b{name}\(", text)), name
        launched.add(name)

    monkeypatch.setattr(cupy, "_launch", launch)
    x, score = torch.randn(2, 20, 8), torch.rand(2, 20)
    index, mask = torch.arange(20).expand(2, -1), torch.ones(2, 20, dtype=torch.bool)
    each, half = torch.tensor([3, 2]), x.bfloat16()
    cupy.energy(half, 0, 0.5, 1.0, mask)
    cupy.match(half, index[:, ::2], index[:, 1::2], None)
    cupy.top_pairs(score, index, index, index, each, 3, mask)
    cupy.pair_round(half, score, 3, 1, 0, 0.5, 1.0, False, True)
    cupy.rows(half, index)
    cupy.merge(half, index // 2, 10, score)
    cupy.merge_backward(half[:, :10], index // 2, None, 10)
    for kind in range(len(selection.SELECTIONS)):
        cupy.greedy_select(half, score, each, 3, kind, 0.5, 1, mask)
    cupy.dpp_select(half, score, each, 3, mask)
    cupy.dpc_knn(half, each, 3, 5, mask)
    cupy.received(half[:, None], half[:, None], 0.5, mask)
    cupy.probe_norms(half[None], 0.01)
    cupy.minmax(score, mask, 1e-6, 0.0)
    assert launched == {*cupy._KERNELS, *cupy._PLAIN}
    assert [operator.__name__ for operator in cupy.OPERATORS] == re.findall(
        r'm\.impl\("(\w+)"', (ROOT / "csrc" / "cuda.cu").read_text()
    )


def test_without_sources_cupy_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cupy, "_SOURCES", [tmp_path])
    with pytest.raises(RuntimeError, match="CuPy has nothing to compile"):
        cupy.source("energy")


@pytest.mark.slow
def test_importing_vtc_does_not_import_cupy() -> None:
    code = "import sys, vtc, vtc.ops.cupy; assert 'cupy' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


GRAPH = """
import torch
torch.version.cuda = "13.0"  # as of a torch with CUDA
from vtc.ops import kernels

def f(x):
    return x + 1 if kernels.backend("cuda") == "cupy" else x - 1

assert torch.compile(f, fullgraph=True, backend="eager")(torch.ones(1)) == 2
assert "vtc::energy" in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
assert not torch.cuda.is_initialized()
"""


@pytest.mark.slow
@with_cupy
def test_cupy_is_registered_before_a_graph_needs_it(tmp_path: Path) -> None:
    """In a package without compiled kernels; registering inside of torch.compile would break the graph."""
    shutil.copytree(ROOT / "vtc", tmp_path / "vtc", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    ran = subprocess.run([sys.executable, "-c", GRAPH], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
