import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU; on one, make gpu-check runs these")


@pytest.fixture(autouse=True)
def _no_grad_leaks():
    """Every test starts in grad mode and leaves it."""
    assert torch.is_grad_enabled()
    yield
    assert torch.is_grad_enabled()
