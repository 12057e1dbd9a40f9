#!/usr/bin/env python3
"""Install vtc as people do, in a clean environment, and see that its kernels run.

1. The README's own lines, in a copy of the files that git knows: `pip install .` pulls torch, that of constraints.txt,
   and `vtc.ops.backend()` says cpp. First without a compiler: the definitions run, and one line says so. Then in two
   processes at once: one builds, the other waits.
2. Lean: `import vtc` imports nothing optional and leaves CUDA alone; a method runs; `vtc --help` prints, or ends with a
   line that names the extra.
3. From an sdist and from a plain wheel, which holds what git knows under vtc/, the kernels' sources, and nothing else.
4. From a wheel of `make wheel`: cpp with neither compiler nor cache.
5. Whole: the optional packages of the development environment are appended to that environment's path. Every module of
   the wheel is imported, from the wheel, and `vtc --help` runs.

Run it with the development environment's Python: `.venv/bin/python tools/wheel_check.py`, or `make wheel-check`.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import make_wheel

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
from vtc.ops import cupy
assert cupy.folder().is_relative_to(Path(vtc.__file__).parent), f"CuPy would compile what is in {cupy.folder()}"
for file in cupy.FILES:
    assert "__global__" in cupy.source(file) and '#include "' not in cupy.source(file), f"{file}.cuh lacks a part"
"""

BACKEND = "import vtc.ops; print(vtc.ops.backend()); from vtc.ops import kernels; print(kernels.__file__)"

WHOLE = """
import importlib, sys
from pathlib import Path
prefix = Path(sys.prefix).resolve()
ELSEWHERE = {  # plug-ins, which their libraries import: make vllm-check and retrieval-check do
    "vtc.vllm.": ("prometheus_client", "vllm"),
    "vtc.retrieval.colpali": ("colpali_engine",),
    "vtc.retrieval.sentence_transformers": ("sentence_transformers",),
}
failed = []
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not any(name.startswith(ours) and error.name in missing for ours, missing in ELSEWHERE.items()):
            failed.append(f"{name}: {error}")
        continue
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


def copy(files: list[str], tree: Path) -> None:
    for name in files:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)


def compare(wheel: Path, files: list[str], built: set[str]) -> list[str]:
    """Check the wheel's files against the tree's; return the names of all modules."""
    expected = {name for name in files if name.startswith("vtc/")} | built
    ours = r"csrc/(\w+/)?\w+\.(cpp|cu|h|cuh)"
    kernels = {name for name in files if re.fullmatch(ours, name) and not re.search(r"_test\.cpp|shim\.h", name)}
    expected |= {f"vtc/ops/{name}" for name in kernels}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    packed = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    if missing := sorted(expected - packed):
        raise CheckFailed(f"{wheel.name} lacks {', '.join(missing)}")
    if extra := sorted(packed - expected):
        raise CheckFailed(f"{wheel.name} holds files that are not the package's: {', '.join(extra)}")
    if not any(name.endswith("licenses/LICENSE") for name in names):
        raise CheckFailed(f"{wheel.name} lacks the licence")
    if (
        (pure := wheel.name.endswith("-py3-none-any.whl")) == bool(built)
        or "-cp310-abi3-" not in wheel.name
        and not pure
    ):
        raise CheckFailed(f"{wheel.name} has the wrong tags")
    sources = {Path(name) for name in expected if name.endswith(".py")}
    if bare := sorted({path.parent for path in sources if path.parent / "__init__.py" not in sources}):
        raise CheckFailed(f"no __init__.py in {', '.join(map(str, bare))}")
    modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in sources}
    return sorted(name for name in modules if not name.endswith(".__main__"))


def readme() -> list[str]:
    """The commands by which the README installs."""
    found = re.search(r"```sh\n(pip install \.\s.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    if not found:
        raise CheckFailed("README.md has no block that begins with pip install .")
    return [line.partition("  #")[0].strip() for line in found[1].strip().splitlines()]


class Clean:
    """A clean environment in the folder `work`; its processes have their own cache, and no setting of vtc's."""

    def __init__(self, work: Path) -> None:
        self.work, home = work, work / "venv"
        call("python -m venv", sys.executable, "-m", "venv", home, cwd=work)
        self.scripts = home / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.scripts / "python"
        path = f"{self.scripts}{os.pathsep}{os.environ['PATH']}"
        self.env = {
            "PATH": path,
            "PYTHONPATH": "",
            "PYTHONSAFEPATH": "1",
            "VIRTUAL_ENV": str(home),
            "OMP_NUM_THREADS": "1",
        }
        self.env |= {
            "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
            "PIP_QUIET": "2",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        self.env |= {"XDG_CACHE_HOME": str(work / "cache"), "VTC_NO_EXT": "", "VTC_REQUIRE_EXT": ""}

    def call(self, what: str, *command: str | Path, cwd: Path | None = None, **env: str) -> str:
        return call(what, *command, cwd=cwd or self.work, env={**self.env, **env})

    def install(self, what: str, archive: Path) -> None:
        """Over what is there; torch stays."""
        self.call(f"pip install {what}", self.python, "-m", "pip", "install", "--force-reinstall", "--no-deps", archive)

    def backend(self, expected: str, lines: list[str], what: str, **env: str) -> None:
        """See which backend runs, and that vtc says just these lines (the beginnings of them)."""
        printed = self.call(what, self.python, "-c", BACKEND, **env).splitlines()
        said = [line for line in printed if line.startswith("vtc: ")]
        *_, backend, module = [line for line in printed if line not in said]
        if not Path(module).is_relative_to(self.work / "venv"):
            raise CheckFailed(f"{what}: vtc comes from {module}")
        fits = len(said) == len(lines) and all(map(str.startswith, said, (f"vtc: {line}" for line in lines)))
        if backend != expected or not fits:
            raise CheckFailed(f"{what}: {backend} runs, not {expected}, and vtc says {said}, not {lines}")


def check(work: Path) -> str:
    files, tree = known_files(), work / "tree"
    copy(files, tree)
    compiler = any(map(shutil.which, (os.environ.get("CXX") or "g++ clang++").split()))
    best = "cpp" if compiler else "torch"
    clean = Clean(work)

    print("wheel-check: installing by the README's lines in a clean environment", flush=True)
    core, *others = readme()
    clean.call(core, "bash", "-ec", core, cwd=tree)
    none = ["the torch definitions run, slower than C++ kernels: no C++ compiler is here (g++ or clang++)"]
    clean.backend("torch", none, "without a compiler", PATH=str(clean.scripts), CXX="")
    if compiler:
        print("wheel-check: two processes at once build the kernels", flush=True)
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda _: clean.call("first use", clean.python, "-c", BACKEND), range(2)))
        said = "".join(both)
        if not all("\ncpp\n" in text for text in both) or said.count("vtc: building") != 1 or said.count("vtc: ") > 2:
            raise CheckFailed(f"two processes at once say {both}")
    clean.call("import vtc without extras", clean.python, "-c", LEAN)
    try:
        clean.call("vtc --help", clean.scripts / "vtc", "--help")
    except CheckFailed as error:
        if "Traceback" in error.output or "vtc-torch[cli]" not in str(error):
            error.args = (f"without extras, {error} (it should work, or say in one line to install vtc-torch[cli])",)
            raise
    for line in others:
        printed = clean.call(line, "bash", "-ec", line, cwd=tree)
    if printed.strip().splitlines()[-1] != best:
        raise CheckFailed(f"the README's last line, {line}, says {printed.strip()}, not {best}")

    print("wheel-check: the same from an sdist and from a wheel", flush=True)
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", work / "dist")
    call("building the sdist", *build, "--sdist", tree, cwd=tree)
    (sdist,) = (work / "dist").glob("*.tar.gz")
    clean.install("of the sdist", sdist)
    clean.backend(best, [] if compiler else none, "from the sdist")
    clean.call("pip wheel", clean.python, "-m", "pip", "wheel", "--no-deps", "-w", work / "dist", sdist)
    (plain,) = (work / "dist").glob("*.whl")
    modules = compare(plain, files, set())
    clean.install("of the wheel", plain)
    clean.backend(best, [] if compiler else none, "from the wheel")

    kernels = "none, for want of a compiler"
    if compiler:
        print("wheel-check: the same from a wheel with the kernels inside", flush=True)
        full = make_wheel.build(tree, work / "full")
        compare(full, files, {"vtc/_cpp.abi3.so"} | ({"vtc/_cuda.abi3.so"} if shutil.which("nvcc") else set()))
        clean.install("of the wheel with kernels", full)
        bare = {"PATH": str(clean.scripts), "CXX": "", "XDG_CACHE_HOME": str(work / "empty")}
        clean.backend("cpp", [], "from the wheel with kernels", **bare)
        kernels = full.name

    print(f"wheel-check: importing its {len(modules)} modules beside the optional packages", flush=True)
    optional = Path(sysconfig.get_path("purelib"))
    lines = [str(optional)]
    if (optional / "_vtc_dev_torchvision.py").exists():
        lines.append("import _vtc_dev_torchvision")
    own = clean.call("sysconfig", clean.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    Path(own.strip(), "zz_optional.pth").write_text("\n".join(lines) + "\n")
    clean.call("importing the wheel's modules", clean.python, "-c", WHOLE, *modules)
    text = clean.call("vtc --help", clean.scripts / "vtc", "--help")
    if "usage" not in text.lower():
        raise CheckFailed("vtc --help prints no usage")
    return f"{best} from the checkout, the sdist and {plain.name}; with kernels inside: {kernels}"


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
