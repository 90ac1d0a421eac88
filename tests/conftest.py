"""Fixtures that every test shares."""

import os

# Several test processes share the cores: threads that wait must not spin. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from trt_kernels.backends import native

LEVELS = native._C.cpu_levels()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory is NaN, so that an element nobody wrote fails a test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=LEVELS)
def level(request):
    """Each instruction-set level of this processor in turn."""
    before = native._C.cpu_level()
    native._C.set_cpu_level(request.param)
    yield request.param
    native._C.set_cpu_level(before)


@pytest.fixture
def threads():
    """A function that sets the number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
