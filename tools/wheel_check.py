#!/usr/bin/env python3
"""Build the wheel, install it in a clean environment, and check that it holds and imports everything.

1. The wheel is built from a copy of the files that git knows. Every file under vtc/ must be in it, and the headers that
   CuPy compiles, and nothing else.
2. Lean: a new environment gets the wheel and what it requires, no extra. There ``import vtc`` works, imports nothing
   optional and leaves CUDA alone; a method runs; what CuPy would compile is whole; ``vtc --help`` prints, or ends with
   a line that names the extra.
3. Whole: the optional packages of the development environment are appended to that environment's path. Every module of
   the wheel is imported, from the wheel, and ``vtc --help`` runs.

Run it with the development environment's Python: ``.venv/bin/python tools/wheel_check.py``, or ``make wheel-check``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LEAN = """
import sys
from pathlib import Path
import vtc
found = {"timm", "open_clip", "transformers", "cupy", "PIL", "matplotlib", "onnx", "rich", "gradio"} & set(sys.modules)
assert not found, f"import vtc imports {sorted(found)}"
import torch
assert not torch.cuda.is_initialized(), "import vtc initialises CUDA"
token_map = vtc.functional.tome(torch.randn(2, 17, 8), keep=0.8, prefix=1)
assert token_map.merge(torch.randn(2, 17, 8)).shape[1] < 17, "vtc.functional.tome merges nothing"
built = list(Path(vtc.__file__).parent.glob("_cpp.*"))
assert vtc.ops.backend() == ("cpp" if built else "torch"), f"{vtc.ops.backend()} runs, built: {built}"
from vtc.ops import cupy
assert cupy.folder().is_relative_to(Path(vtc.__file__).parent), f"CuPy would compile what is in {cupy.folder()}"
for file in cupy.FILES:
    assert "__global__" in cupy.source(file) and '#include "' not in cupy.source(file), f"{file}.cuh lacks a part"
"""

WHOLE = """
import importlib, sys
from pathlib import Path
prefix = Path(sys.prefix).resolve()
failed = []
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
    except Exception as error:
        failed.append(f"{name}: {type(error).__name__}: {error}")
        continue
    if not Path(module.__file__).resolve().is_relative_to(prefix):
        failed.append(f"{name} comes from {module.__file__}, not from the wheel")
sys.exit("; ".join(failed) or 0)
"""


class CheckFailed(Exception):
    """What is wrong, in one line; `output` is what the failing command printed."""

    output = ""


def call(what: str, *command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a command without a terminal and return what it printed; on failure, name `what`."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        failed = CheckFailed(f"{what} failed: {last}")
        failed.output = done.stdout
        raise failed
    return done.stdout


def known_files() -> list[str]:
    """The files of the checkout: tracked, or new and not ignored."""
    listed = call("git ls-files", "git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT)
    return sorted(name for name in set(listed.split("\0")) if name and (ROOT / name).is_file())


def build(tree: Path, files: list[str], out: Path) -> Path:
    for name in files:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    pinned = {"VTC_REQUIRE_EXT": "1"} if compiler and not os.environ.get("VTC_NO_EXT") else {}
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, tree)
    call("building the wheel", *command, cwd=tree, env=pinned)
    (wheel,) = out.glob("*.whl")
    return wheel


def compare(wheel: Path, files: list[str]) -> list[str]:
    """Check the wheel's files against the tree's; return the names of all modules."""
    expected = {name for name in files if name.startswith("vtc/")}
    expected |= {f"vtc/ops/cuda/{Path(name).name}" for name in files if re.fullmatch(r"csrc/cuda/\w+\.cuh", name)}
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if not name.split("/")[0].endswith(".dist-info") and not name.endswith(".so")}
    if missing := sorted(expected - packed):
        raise CheckFailed(f"the wheel lacks {', '.join(missing)}")
    if extra := sorted(packed - expected):
        raise CheckFailed(f"the wheel holds files that are not the package's: {', '.join(extra)}")
    if shutil.which("g++") and not os.environ.get("VTC_NO_EXT") and "vtc/_cpp.abi3.so" not in names:
        raise CheckFailed("a compiler is here, but the wheel lacks the C++ kernels")
    if not any(name.endswith("licenses/LICENSE") for name in names):
        raise CheckFailed("the wheel lacks the licence")
    sources = {Path(name) for name in expected if name.endswith(".py")}
    if bare := sorted({path.parent for path in sources if path.parent / "__init__.py" not in sources}):
        raise CheckFailed(f"no __init__.py in {', '.join(map(str, bare))}")
    modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in sources}
    return sorted(name for name in modules if not name.endswith(".__main__"))


def check(work: Path) -> str:
    files = known_files()
    print("wheel-check: building the wheel", flush=True)
    wheel = build(work / "tree", files, work / "dist")
    modules = compare(wheel, files)

    print("wheel-check: installing it in a clean environment", flush=True)
    home = work / "venv"
    call("python -m venv", sys.executable, "-m", "venv", home, cwd=work)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    clean = {"PYTHONPATH": "", "PYTHONSAFEPATH": "1", "VIRTUAL_ENV": str(home)}
    python = scripts / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "-qq", "-c", ROOT / "constraints.txt")
    call("installing the wheel", *pip, wheel, cwd=work, env=clean)
    call("import vtc without extras", python, "-c", LEAN, cwd=work, env=clean)
    try:
        call("vtc --help", scripts / "vtc", "--help", cwd=work, env=clean)
    except CheckFailed as error:
        if "Traceback" in error.output or "vtc-torch[cli]" not in str(error):
            error.args = (f"without extras, {error} (it should work, or say in one line to install vtc-torch[cli])",)
            raise

    print(f"wheel-check: importing its {len(modules)} modules beside the optional packages", flush=True)
    optional = Path(sysconfig.get_path("purelib"))
    lines = [str(optional)]
    if (optional / "_vtc_dev_torchvision.py").exists():
        lines.append("import _vtc_dev_torchvision")
    own = call("sysconfig", python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=work, env=clean)
    Path(own.strip(), "zz_optional.pth").write_text("\n".join(lines) + "\n")
    call("importing the wheel's modules", python, "-c", WHOLE, *modules, cwd=work, env=clean)
    text = call("vtc --help", scripts / "vtc", "--help", cwd=work, env=clean)
    if "usage" not in text.lower():
        raise CheckFailed("vtc --help prints no usage")
    return f"{wheel.name} holds {len(modules)} modules, all import; import vtc is lean"


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="vtc-wheel-") as work:
        try:
            said = check(Path(work).resolve())
        except CheckFailed as error:
            print(error.output, f"wheel-check: {error}", sep="\n", file=sys.stderr)
            return 1
    print(f"wheel-check: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
