#!/usr/bin/env python3
"""Run the retrieval tests beside sentence-transformers, colpali-engine, Ray Data and LanceDB, in a throw-away
environment.

That environment gets these and whatever they need in another version; everything else, torch too, comes from the
development environment, whose packages are appended to its path. Run it with the development environment's Python:
``.venv/bin/python tools/retrieval_check.py [PYTEST OPTION ...]``, or ``make retrieval-check``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from throwaway import Environment

PINNED = (  # what the tests ran with last
    *("sentence-transformers==6.2.0", "fastcluster==1.3.0", "colpali-engine==0.3.18"),
    *("ray[data]==2.60.0", "pyarrow==26.0.1", "lancedb==0.40.0"),
)
# the first asks for what happens without them, which is to be before any of them is imported
TESTS = ("test_retrieval.py", "test_mllm_retrievers.py", "test_retrieval_hosts.py", "test_retrieval_scale.py")

# Loaded by pytest: here nothing may be skipped for want of a library.
PLUGIN = """
import importlib
import pytest

pytest.importorskip = lambda name, **unused: importlib.import_module(name)
"""


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="vtc-retrieval-") as work:
        environment = Environment("retrieval-check", Path(work), VTC_NO_EXT="1")
        if not environment.install(*PINNED, free=("peft",)):  # colpali-engine wants an older one
            return 1
        return environment.pytest(PLUGIN, *(f"tests/{name}" for name in TESTS), *sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
