import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import sys
from pathlib import Path

import pytest
import torch

try:
    from hypothesis import settings
except ImportError:  # vLLM's own environment has none, and runs no test that draws cases
    pass
else:
    # The random cases of a commit are the same in every run; --hypothesis-profile=default draws others.
    settings.register_profile("repeatable", derandomize=True, deadline=None)
    settings.load_profile("repeatable")

torch.set_num_threads(1)


def pytest_configure(config):
    """VTC_RAISED=FOLDER: note there which lines of vtc/ make an error, a file per process, for tools/raised.py."""
    if "VTC_RAISED" not in os.environ:
        return
    from vtc.errors import VTCError

    folder, root = Path(os.environ["VTC_RAISED"]), Path(__file__).resolve().parent.parent
    folder.mkdir(parents=True, exist_ok=True)
    notes = (folder / f"{os.getpid()}.txt").open("a", buffering=1)

    def init(error, *args):
        frame = sys._getframe(1)
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(root / "vtc"):
            notes.write(f"{path.relative_to(root)}:{frame.f_lineno}\n")
        super(VTCError, error).__init__(*args)

    VTCError.__init__ = init


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU; on one, make gpu-check runs these")


@pytest.fixture(autouse=True)
def _no_grad_leaks():
    """Every test starts in grad mode and leaves it."""
    assert torch.is_grad_enabled()
    yield
    assert torch.is_grad_enabled()
