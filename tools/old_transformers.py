#!/usr/bin/env python3
"""Run the tests of the Hugging Face adapters on the oldest supported transformers, in a throw-away environment.

That environment holds the old transformers and whatever it needs in another version; everything else comes from the
development environment, whose packages are appended to its path. Run it with the development environment's Python:
``.venv/bin/python tools/old_transformers.py [TEST ...]``, or ``make old-transformers``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = "5.17.0"
TESTS = [
    *("tests/test_huggingface.py", "tests/test_matrix.py", "tests/test_oracle.py"),
    *("tests/test_mllm.py", "tests/test_mllm_life.py", "tests/test_mllm_methods.py", "tests/test_mllm_tower.py"),
    *("tests/test_ppe.py", "tests/test_cascade.py"),
    *("-k", "huggingface or hf or mllm or ppe or cascade"),
]

# Loaded by pytest and its workers: what is tested must be the version that was asked for.
PLUGIN = """
import pytest
import transformers

def pytest_configure(config):
    if transformers.__version__ != "{version}":
        raise pytest.UsageError(f"transformers is {{transformers.__version__}}, not {version}")

def pytest_report_header(config):
    return f"transformers {{transformers.__version__}} from {{transformers.__path__[0]}}"
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tests", nargs="*", default=TESTS, help="what pytest is to run")
    parser.add_argument("--version", default=OLDEST, help="the release of transformers (default: %(default)s)")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="vtc-transformers-") as work:
        home = Path(work, "venv")
        python = str(home / ("Scripts" if os.name == "nt" else "bin") / "python")
        env = {**os.environ, "PYTHONPATH": work, "VIRTUAL_ENV": str(home)}
        env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        print(f"old-transformers: installing transformers {options.version} in a throw-away environment", flush=True)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        shared = Path(sysconfig.get_path("purelib"))
        lines = [str(shared)]
        if (shared / "_vtc_dev_torchvision.py").exists():
            lines.append("import _vtc_dev_torchvision")
        Path(own, "zz_shared.pth").write_text("\n".join(lines) + "\n")
        # pip sees the shared packages, keeps those that fit and installs the others in front of them.
        pins = (ROOT / "constraints.txt").read_text().splitlines()
        free = [pin for pin in pins if not pin.startswith(("transformers==", "huggingface_hub=="))]
        Path(work, "constraints.txt").write_text("\n".join(free) + "\n")
        pip = [python, "-m", "pip", "install", "-qq", "-c", str(Path(work, "constraints.txt"))]
        if subprocess.run([*pip, f"transformers=={options.version}"], env=env, stdin=subprocess.DEVNULL).returncode:
            print(f"old-transformers: transformers {options.version} does not install", file=sys.stderr)
            return 1
        Path(work, "vtc_old_transformers.py").write_text(PLUGIN.format(version=options.version))
        pytest = [python, "-m", "pytest", "-p", "vtc_old_transformers", "-p", "no:cacheprovider", "-q", "-n", "2"]
        status = subprocess.run([*pytest, *options.tests], cwd=ROOT, env=env, stdin=subprocess.DEVNULL).returncode
    if status:
        print(f"old-transformers: the tests fail with transformers {options.version}", file=sys.stderr)
    else:
        print(f"old-transformers: the tests pass with transformers {options.version}")
    return status


if __name__ == "__main__":
    sys.exit(main())
