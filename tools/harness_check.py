#!/usr/bin/env python3
"""Run tests/test_harness*.py beside clip_benchmark and lmms-eval, in a throw-away environment.

That environment gets this checkout with its extra `harness` (so that lmms-eval finds vtc's entry point) and whatever
they need in another version; everything else comes from the development environment, whose packages are appended to
its path. Run it with the development environment's Python: ``.venv/bin/python tools/harness_check.py [PYTEST OPTION
...]``, or ``make harness-check``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from throwaway import ROOT, Environment

PINNED = ("clip-benchmark==1.6.2", "lmms-eval==0.7.3")  # what the tests ran with last

# Loaded by pytest: here nothing may be skipped for want of a harness.
PLUGIN = """
import clip_benchmark
import lmms_eval
"""


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="vtc-harness-") as work:
        environment = Environment("harness-check", Path(work), VTC_NO_EXT="1")
        if not environment.install(*PINNED, "-e", f"{ROOT}[harness]"):
            return 1
        # what is slow there needs neither harness, and has run in the development environment
        tests = [*map(str, sorted((ROOT / "tests").glob("test_harness*.py"))), "-m", "not slow", *sys.argv[1:]]
        # not in the checkout, whose vtc_torch.egg-info may be old and would hide the entry point
        return environment.pytest(PLUGIN, "-c", str(ROOT / "pyproject.toml"), *tests, cwd=Path(work))


if __name__ == "__main__":
    sys.exit(main())
