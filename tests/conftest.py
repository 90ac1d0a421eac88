"""Fixtures that every test shares."""

import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

# Several test processes share the cores: threads that wait must not spin. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter. Read when the kernels are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).parents[1]
# Where the compiled modules to be tested are, if not those of the package: built with sanitizers.
OTHER_BUILD = os.environ.get("TRT_KERNELS_TEST_BUILD")
BUILT = ROOT / (OTHER_BUILD or "build/on_host")


def load_built(name, folder):
    """A compiled module from a folder."""
    found = list(folder.glob(f"{name.rpartition('.')[2]}.*so"))
    assert found, f"{name} is not built in {folder}: make on-host"
    spec = importlib.util.spec_from_file_location(name, found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if OTHER_BUILD:
    sys.modules["trt_kernels._C"] = load_built("trt_kernels._C", BUILT)

import trt_kernels as tk  # noqa: E402
from trt_kernels import backends, ops  # noqa: E402
from trt_kernels.backends import native  # noqa: E402

LEVELS = native._C.cpu_levels()
# Runs the suite as a lesser processor would.
if os.environ.get("TRT_KERNELS_TEST_LEVEL"):
    native._C.set_cpu_level(os.environ["TRT_KERNELS_TEST_LEVEL"])


def pytest_collection_modifyitems(items):
    """The longest tests first: at the end they would leave the other processes idle."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory is NaN, so that an element nobody wrote fails a test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def level_setter():
    """A function that sets the instruction-set level until the test ends."""
    before = native._C.cpu_level()
    yield native._C.set_cpu_level
    native._C.set_cpu_level(before)


@pytest.fixture(params=LEVELS)
def level(request, level_setter):
    """Each instruction-set level of this processor in turn."""
    level_setter(request.param)
    return request.param


@pytest.fixture
def threads():
    """A function that sets the number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@cache
def cuda_on_host():
    """The bindings over the CUDA kernels compiled for the host (tests/csrc/CMakeLists.txt)."""
    return load_built("_cuda_on_host", BUILT / "tests" / "csrc")


def forget_choices():
    """Clears what was remembered about backends and compiled settings."""
    remembered = (native.lif_handle, native.penalty_handle, native.why_no_cuda, ops._resolve)
    for cached in remembered:
        cached.cache_clear()
    tk.functional._checked.clear()


class TorchWithGPU:
    """torch, but for the answers that it has from a driver: one GPU, the current one."""

    cuda = SimpleNamespace(is_available=lambda: True, current_device=lambda: 0)

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def gpu_on_host(monkeypatch):
    """A GPU for whoever asks whether "cuda" can serve: its kernels' own source, run on the host.

    Only the answers of a driver are replaced: the compiled module is a real one, which
    torch.compile cannot trace, and the choice of a backend runs as on a GPU.
    """
    module = cuda_on_host()
    dtypes = {dtype: getattr(module.DType, value.name) for dtype, value in native.DTYPES.items()}
    monkeypatch.setattr(native, "_C", module)
    monkeypatch.setattr(native, "DTYPES", dtypes)
    monkeypatch.setattr(native, "torch", TorchWithGPU())
    monkeypatch.setattr(native, "current_stream", lambda device: 0)
    forget_choices()
    yield
    forget_choices()


@pytest.fixture
def on_host(gpu_on_host, monkeypatch):
    """Lets the backend "cuda" serve CPU tensors."""
    monkeypatch.setitem(backends.SERVES, "cuda", "cpu")


def serve(name, request):
    """Makes a backend the default of this test, on CPU tensors."""
    if name == "cuda":
        request.getfixturevalue("on_host")
    return tk.use_backend(name)


@pytest.fixture(params=("cpu", "cuda", "triton"))
def backend(request):
    """Each backend with kernels, as the default: CUDA's run on the host, Triton's interpreted."""
    with serve(request.param, request):
        yield request.param


@pytest.fixture(params=(*LEVELS, "cuda", "triton"))
def kernels(request):
    """Like `backend`, with the CPU's kernels at each instruction-set level."""
    name = request.param
    if name in LEVELS:
        request.getfixturevalue("level_setter")(name)
        name = "cpu"
    with serve(name, request):
        yield name
