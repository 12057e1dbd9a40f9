#!/usr/bin/env python3
"""Run tests/test_harness*.py beside clip_benchmark and lmms-eval, in a throw-away environment.

That environment gets this checkout with its extra `harness` (so that lmms-eval finds vtc's entry point) and whatever
they need in another version; everything else comes from the development environment, whose packages are appended to
its path. Run it with the development environment's Python: ``.venv/bin/python tools/harness_check.py [PYTEST OPTION
...]``, or ``make harness-check``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINNED = ("clip-benchmark==1.6.2", "lmms-eval==0.7.3")  # what the tests ran with last

# Loaded by pytest: here nothing may be skipped for want of a harness.
PLUGIN = """
import clip_benchmark
import lmms_eval
"""


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="vtc-harness-") as work:
        home = Path(work, "venv")
        python = str(home / ("Scripts" if os.name == "nt" else "bin") / "python")
        env = {**os.environ, "PYTHONPATH": work, "VIRTUAL_ENV": str(home), "VTC_NO_EXT": "1"}
        env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        print(f"harness-check: installing {', '.join(PINNED)} in a throw-away environment", flush=True)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        shared = Path(sysconfig.get_path("purelib"))
        lines = [str(shared)]
        if (shared / "_vtc_dev_torchvision.py").exists():
            lines.append("import _vtc_dev_torchvision")
        Path(own, "zz_shared.pth").write_text("\n".join(lines) + "\n")
        # pip sees the shared packages, keeps those that fit and installs the others in front of them.
        pip = [python, "-m", "pip", "install", "-qq", "-c", str(ROOT / "constraints.txt")]
        if subprocess.run([*pip, *PINNED, "-e", f"{ROOT}[harness]"], env=env, stdin=subprocess.DEVNULL).returncode:
            print("harness-check: the extra harness does not install", file=sys.stderr)
            return 1
        Path(work, "vtc_harness.py").write_text(PLUGIN)
        # not in the checkout, whose vtc_torch.egg-info may be old and would hide the entry point
        pytest = [
            python,
            "-m",
            "pytest",
            "-p",
            "vtc_harness",
            "-p",
            "no:cacheprovider",
            "-q",
            "-c",
            str(ROOT / "pyproject.toml"),
        ]
        # what is slow there needs neither harness, and has run in the development environment
        tests = [*map(str, sorted((ROOT / "tests").glob("test_harness*.py"))), "-m", "not slow", *sys.argv[1:]]
        status = subprocess.run([*pytest, *tests], cwd=work, env=env, stdin=subprocess.DEVNULL).returncode
    print(f"harness-check: the tests {'fail' if status else 'pass'}", file=sys.stderr if status else sys.stdout)
    return status


if __name__ == "__main__":
    sys.exit(main())
