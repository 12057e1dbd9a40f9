#!/usr/bin/env python3
"""Run the tests of the Hugging Face adapters on the oldest supported transformers, in a throw-away environment.

That environment holds the old transformers and whatever it needs in another version; everything else comes from the
development environment, whose packages are appended to its path. Run it with the development environment's Python:
``.venv/bin/python tools/old_transformers.py [TEST ...]``, or ``make old-transformers``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from throwaway import Environment

OLDEST = "5.17.0"
TESTS = [
    *("tests/test_huggingface.py", "tests/test_matrix.py", "tests/test_oracle.py"),
    *("tests/test_mllm.py", "tests/test_mllm_life.py", "tests/test_mllm_methods.py", "tests/test_mllm_tower.py"),
    "tests/test_mllm_retrievers.py",
    *("tests/test_mllm_video.py", "tests/test_mllm_pixelprune.py", "tests/test_pixelprune_encoders.py"),
    "tests/test_stream.py",
    *("tests/test_ppe.py", "tests/test_cascade.py"),
    "tests/test_mllm_self_check.py::test_a_class_that_nobody_tried_is_served_if_it_passes",
    # sdpa is the default; eager attention is asked of the current release alone
    *("-k", "(huggingface or hf or mllm or ppe or cascade or stream) and not eager"),
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
        environment = Environment("old-transformers", Path(work))
        if not environment.install(f"transformers=={options.version}", free=("transformers", "huggingface_hub")):
            return 1
        return environment.pytest(PLUGIN.format(version=options.version), "-n", "2", *options.tests)


if __name__ == "__main__":
    sys.exit(main())
