"""Kernels that the package has not inside: built at their first use, kept in the user's cache, or one line why not.

Most tests run a compiler that writes a text; what is loaded is noted, not loaded.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import vtc
from vtc.ops import __main__ as command
from vtc.ops import build, kernels

ROOT = Path(__file__).parents[1]
COMPILER = """#!/bin/sh
cd "${0%/*}"
echo "$@" >> calls
sleep 0.2
if [ -e broken ]; then echo 'In file included from x' >&2; echo 'x.h:3:1: fatal error: no torch.h' >&2; exit 1; fi
while [ $# -gt 1 ]; do [ "$1" = -o ] && cp library "$2"; shift; done
"""
pytestmark = pytest.mark.skipif(os.name == "nt", reason="the compiler of these tests is a shell script")


class Machine:
    """A new user's: `folder` holds the compiler, the cache, and a package without kernels inside."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.compiler = folder, folder / "g++"
        self.cache = folder / "cache" / "vtc" / "kernels"
        self.compiler.write_text(COMPILER)
        self.compiler.chmod(0o755)
        (folder / "library").write_text("a library")
        self.loaded: list[Path] = []
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.setenv("CXX", str(self.compiler))
        monkeypatch.delenv("VTC_NO_EXT", raising=False)
        monkeypatch.setattr(kernels, "__file__", str(folder / "vtc" / "ops" / "kernels.py"))
        monkeypatch.setattr(kernels, "_loaded", {})
        monkeypatch.setattr(kernels, "_missing", {})
        monkeypatch.setattr(kernels, "_chosen", None)
        monkeypatch.setattr(torch.ops, "load_library", self.loaded.append)

    def restart(self) -> None:
        """As in a new process."""
        kernels._loaded.clear()
        kernels._missing.clear()

    @property
    def calls(self) -> int:
        log = self.folder / "calls"
        return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture):
    """What vtc said since the last call of it: warnings are what a user sees who has set up no logging."""

    def lines() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        caplog.clear()
        return found

    return lines


def test_the_first_use_builds_and_the_next_process_finds_it(machine, said):
    assert vtc.ops.backend() == vtc.ops.backend() == "cpp" and machine.calls == 1
    (line,) = said()
    assert line.startswith("vtc: building the C++ kernels") and build.AHEAD in line and "VTC_NO_EXT=1" in line
    (library,) = machine.cache.glob("*.so")
    assert machine.loaded == [library] and library.read_text() == "a library"
    assert machine.cache.stat().st_mode & 0o777 == machine.cache.parent.stat().st_mode & 0o777 == 0o700
    machine.restart()
    assert kernels._find("cpp") and vtc.ops.backend() == "cpp"  # at import already
    assert machine.calls == 1 and said() == [] and set(machine.loaded) == {library}
    assert sorted(path.suffix for path in machine.cache.iterdir()) == [".lock", ".so"]


def test_what_is_in_the_package_comes_first(machine, said, capsys):
    packed = machine.folder / "vtc" / "_cpp.abi3.so"
    packed.parent.mkdir()
    packed.touch()
    assert vtc.ops.backend() == "cpp" and machine.loaded == [packed] and machine.calls == 0 and said() == []
    assert command.main(["build"]) == 0 and machine.calls == 0 and str(packed) in capsys.readouterr().out


def test_one_builds_and_the_others_wait(machine, said):
    """Threads here; processes in test_processes_at_once."""
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build.library("cpp"), range(4)))
    assert len(paths) == 1 and machine.calls == 1
    assert sum("building" in line for line in said()) == 1


def test_without_a_compiler_the_definitions_run(machine, said, monkeypatch):
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(machine.folder / "nothing"))
    assert vtc.ops.backend() == vtc.ops.backend() == "torch"
    (line,) = said()
    assert "no C++ compiler is here (g++ or clang++)" in line and "VTC_NO_EXT=1" in line
    with pytest.raises(vtc.OptionError, match="backend 'cpp' is not there: no C"):
        vtc.ops.set_backend("cpp")
    unit = vtc.ops.normalize(torch.randn(1, 6, 4))
    assert vtc.ops.energy(unit, "elu", 0.5).shape == (1, 6)
    machine.restart()
    monkeypatch.setenv("PATH", f"{machine.folder}{os.pathsep}{os.defpath}")  # it is installed: nothing was remembered
    assert vtc.ops.backend() == "cpp" and machine.calls == 1
    machine.restart()
    monkeypatch.setenv("PATH", str(machine.folder / "nothing"))  # and gone: what it built is there
    said()
    assert vtc.ops.backend() == "cpp" and said() == []


def test_a_failure_is_remembered_with_its_reason_until_asked_again(machine, said, capsys):
    (machine.folder / "broken").touch()
    assert vtc.ops.backend() == "torch" and machine.calls == 1
    building, line = said()
    assert "building" in building and "ended with 1: x.h:3:1: fatal error: no torch.h" in line and build.AHEAD in line
    machine.restart()
    assert vtc.ops.backend() == "torch" and machine.calls == 1
    assert [line] == said()
    machine.restart()
    with pytest.raises(vtc.OptionError, match=r"backend 'cpp' is not there: .*fatal error: no torch\.h"):
        vtc.ops.set_backend("cpp")
    assert command.main(["build"]) == 1 and machine.calls == 2
    assert "In file included from x" in capsys.readouterr().err
    (machine.folder / "broken").unlink()
    assert command.main(["build"]) == 0 and machine.calls == 3
    assert str(machine.cache) in capsys.readouterr().out
    machine.restart()
    said()
    assert vtc.ops.backend() == "cpp" and said() == [] and not list(machine.cache.glob("*.failed"))


def test_a_library_that_does_not_load_is_not_built_at_each_start(machine, said, monkeypatch):
    def refuse(path: Path) -> None:
        raise OSError(f"{path}: undefined\nsymbol")

    monkeypatch.setattr(torch.ops, "load_library", refuse)
    for _ in range(2):
        assert vtc.ops.backend() == "torch" and machine.calls == 1
        assert "does not load" in said()[-1] and not list(machine.cache.glob("*.so"))
        machine.restart()


def test_switched_off(machine, said, monkeypatch, capsys):
    packed = machine.folder / "vtc" / "_cpp.abi3.so"
    packed.parent.mkdir()
    packed.touch()
    monkeypatch.setenv("VTC_NO_EXT", "1")
    assert vtc.ops.backend() == "torch" and machine.calls == 0 and machine.loaded == [] and said() == []
    assert command.main(["build"]) == 1 and "VTC_NO_EXT is set" in capsys.readouterr().err
    assert not machine.cache.exists()


@pytest.mark.parametrize("change", ["sources", "a header", "flags", "torch", "compiler", "options"])
def test_what_changes_is_built_anew(machine, monkeypatch, change):
    sources = machine.folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    monkeypatch.setattr(build, "PLACES", [sources])
    old = build.library("cpp")
    assert build.library("cpp") == build.cached("cpp") == old and machine.calls == 1
    if change == "flags":
        monkeypatch.setitem(build.FLAGS, "cpp", [*build.FLAGS["cpp"], "-g"])
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    elif change == "compiler":
        os.utime(machine.compiler, (1, 1))
    elif change == "options":
        monkeypatch.setenv("CXX", f"{machine.compiler} -march=native")
    else:
        path = sources / ("cpu.cpp" if change == "sources" else "cpu/merge.h")
        path.write_text(path.read_text() + "\n")
    assert build.cached("cpp") is None
    assert build.library("cpp") != old and machine.calls == 2 and old.exists()


def test_a_cache_that_cannot_be_written(machine, said):
    (machine.folder / "cache").write_text("a file")
    assert vtc.ops.backend() == "torch" and machine.calls == 0
    (line,) = said()
    assert str(machine.cache) in line and "XDG_CACHE_HOME names another place" in line


@pytest.mark.parametrize("which", ["folder", "above", "library", "link", "owner"])
def test_nothing_is_loaded_that_others_may_have_written(machine, said, monkeypatch, which):
    path = build.library("cpp")
    if which == "link":
        machine.cache.rename(machine.folder / "elsewhere")
        machine.cache.symlink_to(machine.folder / "elsewhere")
    elif which == "owner":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    else:
        {"folder": path.parent, "above": path.parent.parent, "library": path}[which].chmod(0o777)
    said()
    assert not kernels._find("cpp") and vtc.ops.backend() == "torch" and machine.loaded == [] and machine.calls == 1
    (line,) = said()
    assert "others may write" in line and "chmod go-w" in line


def test_no_home(machine, said, monkeypatch):
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setattr(Path, "home", nowhere)
    assert vtc.ops.backend() == "torch" and "XDG_CACHE_HOME names a place" in said()[-1]


def test_no_sources(machine, said, monkeypatch):
    monkeypatch.setattr(build, "PLACES", [machine.folder / "nothing"])
    assert vtc.ops.backend() == "torch" and "install vtc-torch anew" in said()[-1]


def test_cuda_without_a_torch_for_it(machine, said, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert vtc.ops.backend("cuda") == "torch" and machine.calls == 0
    assert "without CUDA" in said()[-1]


def test_a_forked_process_does_not_wait_for_a_thread_it_has_not(machine):
    """As a DataLoader's worker, forked while another thread builds."""
    assert vtc.ops.backend() == "cpp"
    done = threading.Event()

    def hold() -> None:
        with kernels._lock:
            held.set()
            done.wait(20)

    held = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if kernels.backend("cpu") == "cpp" else 1)
    try:
        for _ in range(200):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            time.sleep(0.05)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError("the forked process waits for ever")
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        done.set()
        thread.join()


SCRIPT = """
import os
before = dict(os.environ)
os.environ["PATH"] = os.environ["CXX"] = "/nothing"  # importing vtc does not even look for a compiler
import torch, vtc
from vtc.ops import kernels
assert not kernels._missing, kernels._missing
os.environ.clear()
os.environ.update(before)

def f(x):
    return vtc.ops.rows(x, torch.tensor([[2, 0]]))

x = torch.arange(6.0).view(1, 3, 2)
assert torch.compile(f, fullgraph=True, backend="eager")(x).tolist() == [[[4, 5], [0, 1]]]
assert torch._C._dispatch_has_kernel_for_dispatch_key("vtc::rows", "CPU")
print(vtc.ops.backend())
"""


def package(folder: Path) -> None:
    """A copy without kernels inside."""
    names = shutil.ignore_patterns("*.so", "__pycache__", "assets", "*.safetensors")
    shutil.copytree(ROOT / "vtc", folder / "vtc", ignore=names)
    shutil.copytree(ROOT / "csrc", folder / "csrc")


def two_at_once(folder: Path, **variables: str) -> list[str]:
    """The standard error of both."""
    env = {**os.environ, "PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), **variables}
    start = [sys.executable, "-c", SCRIPT]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": folder, "env": env}
    running = [subprocess.Popen(start, **pipes) for _ in range(2)]
    ended = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    assert [out.split() for out, _ in ended] == [["cpp"]] * 2, ended
    assert "".join(err for _, err in ended).count("vtc: building") == 1, ended
    return [err for _, err in ended]


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "vtc" / "_cpp.abi3.so").exists(), reason="the C++ kernels are not built here")
def test_processes_at_once(tmp_path):
    """In both the first operator is in a graph that torch.compile makes, which can hold no building and no loading."""
    package(tmp_path)
    shutil.copy2(ROOT / "vtc" / "_cpp.abi3.so", tmp_path / "library")
    (tmp_path / "g++").write_text(COMPILER.replace("sleep 0.2", "sleep 3"))
    (tmp_path / "g++").chmod(0o755)
    two_at_once(tmp_path, CXX=str(tmp_path / "g++"))
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_a_real_compiler(tmp_path):
    """Half a minute; wheel-check does the same with what pip installs."""
    package(tmp_path)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    start = [sys.executable, "-c", SCRIPT]
    first, second = (subprocess.run(start, cwd=tmp_path, env=env, capture_output=True, text=True) for _ in range(2))
    assert first.stdout == second.stdout == "cpp\n", first.stderr + second.stderr
    assert first.stderr.count("vtc: ") == 1 and "vtc: " not in second.stderr
