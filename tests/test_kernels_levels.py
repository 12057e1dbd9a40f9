"""The C++ kernels at every level of instructions (AVX-512, AVX2, plain) that VTC_CPU may ask for: the same tests, calls
by chance under the sanitizers, and proof that a level is what runs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sanitizers
import torch

from vtc.ops import kernels

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.skipif(not kernels._load("cpp"), reason="the C++ kernels are not built here (no compiler)"),
    pytest.mark.skipif(sys.platform != "linux", reason="Linux only"),
]
FUNCTIONS = {"plain": "plain", "avx2": "middle", "avx512": "wide"}  # levels, and how functions of theirs end
_torchs = torch.backends.cpu.get_cpu_capability()
BEST = 3 if "AVX512" in _torchs else 2 if "AVX2" in _torchs else 1
LEVELS = list(FUNCTIONS)[:BEST]  # those of this processor


def python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([environment.pop("PYTHONPATH", str(ROOT)), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT)


MINED = """
import ctypes, mmap, re, subprocess, sys
import cpu_fuzz
from vtc.ops import kernels

(path,) = cpu_fuzz.Path(kernels.__file__).parents[1].glob("_cpp.*so")
symbols = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
names = re.findall(rf"\\b_ZN3vtc\\w+?_(?:{sys.argv[1]})E\\w+", symbols)
library, page = ctypes.CDLL(str(path)), mmap.PAGESIZE
for name in names:
    address = ctypes.cast(library[name], ctypes.c_void_p).value
    start = ctypes.c_void_p(address // page * page)
    assert ctypes.CDLL(None).mprotect(start, ctypes.c_size_t(2 * page), 7) == 0
    ctypes.memmove(address, b"\\x0f\\x0b", 2)
print(len(names), flush=True)
cpu_fuzz.run(300, 1)
print("unharmed")
"""


def mined(level: str, *others: str) -> subprocess.CompletedProcess[str]:
    """Random calls at a level, where the functions of other levels begin with an instruction that ends the process."""
    return python("-c", MINED, "|".join(FUNCTIONS[other] for other in others), VTC_CPU=level)


@pytest.mark.slow
@pytest.mark.skipif(BEST < 2 or not shutil.which("nm"), reason="the processor has one level, or no nm")
def test_the_level_that_is_asked_for_runs() -> None:
    for level in LEVELS:
        others = [other for other in LEVELS if other != level]
        ran = mined(level, *others)
        assert int(ran.stdout.split()[0]) >= 5, ran.stdout
        assert ran.returncode == 0 and "unharmed" in ran.stdout, ran.stderr[-2000:]
        if level != "plain":  # whose functions need not exist by themselves
            assert mined(level, level).returncode == -signal.SIGILL
    assert mined("", LEVELS[-1]).returncode == -signal.SIGILL  # unasked, the best


@pytest.mark.slow
def test_an_unknown_level_is_left_aside() -> None:
    ran = python("-c", "import torch, vtc; vtc.ops.energy(torch.eye(3)[None], 'elu', 0.5)", VTC_CPU="sse")
    assert ran.returncode == 0
    assert ran.stderr.count("VTC_CPU=sse is left aside: it takes avx512, avx2 or plain") == 1


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS[:-1])  # the last one is what this file runs anyway
def test_against_the_definitions(level: str) -> None:
    """Without what is no matter of the level: how much memory a call takes."""
    arguments = ("-q", "-p", "no:cacheprovider", "tests/test_kernels_cpu.py", "-k", "not no_operator")
    ran = python("-m", "pytest", *arguments, VTC_CPU=level)
    assert ran.returncode == 0 and re.search(r"\d+ passed", ran.stdout), ran.stdout[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(not sanitizers.there(), reason="g++ has no sanitizers here")
def test_random_calls_under_the_sanitizers(tmp_path: Path) -> None:
    """5,000 calls, a part at every level; first, planted faults must be seen in functions of that level."""
    from torch.utils.cpp_extension import include_paths

    package = tmp_path / "vtc"
    shutil.copytree(ROOT / "vtc", package, ignore=shutil.ignore_patterns("*.so", "__pycache__", "assets"))
    libraries = Path(torch.__file__).parent / "lib"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-psabi", *sanitizers.FLAGS]
    command += ["-D_GLIBCXX_ASSERTIONS", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [*(f"-isystem{path}" for path in include_paths()), f"-L{libraries}"]
    command += [str(ROOT / "csrc" / "cpu" / "fuzz_test.cpp"), "-o", str(package / "_cpp.abi3.so")]
    subprocess.run([*command, "-ltorch", "-ltorch_cpu", "-lc10"], check=True)
    environment, calls = sanitizers.environment(PYTHONPATH=str(tmp_path)), str(-(-5_000 // len(LEVELS)))

    def fuzz(level: str) -> subprocess.CompletedProcess[str]:
        script, seed = ROOT / "tests" / "cpu_fuzz.py", str(LEVELS.index(level))
        return python(script, calls, seed, **{**environment, "VTC_CPU": level})

    with ThreadPoolExecutor(2) as pool:
        for level, ran in zip(LEVELS, pool.map(fuzz, LEVELS), strict=True):
            assert ran.returncode == 0 and "clean" in ran.stdout, ran.stderr[-4000:]
            assert ran.stderr.count("ERROR: AddressSanitizer") == 2 and ran.stderr.count("signed integer overflow") == 1
            assert BEST == 1 or ran.stderr.count(f"in vtc::dots_{FUNCTIONS[level]}(") == 2, ran.stderr
