"""The report, and that an unusable compiled module is one of its lines and not a crash."""

import os
import shutil
import subprocess
import sys
import types

import pytest
import torch

import trt_kernels as tk
from trt_kernels import backends, ops
from trt_kernels.backends import NAMES, OPERATORS, native


def test_report():
    report = tk.report()
    assert report.versions["torch"] == torch.__version__
    assert report.settings["threads"] == str(torch.get_num_threads())
    assert set(report.unavailable) == set(NAMES)
    for backend in ("cpu", "reference"):
        assert report.unavailable[backend] == dict.fromkeys(OPERATORS)
    for backend in NAMES:
        for operator, reason in report.unavailable[backend].items():
            available = reason is None
            try:
                run_one(operator, backend)
            except RuntimeError as error:
                assert not available and reason in str(error)
            else:
                assert available or backend == "cuda"


def run_one(operator, backend):
    if operator == "lif":
        tk.lif(torch.zeros(2, 3), backend=backend)
    elif operator == "trt_penalty":
        tk.trt_penalty([torch.zeros(3)], steps=2, weight=1.0, delta=0.5, backend=backend)
    else:
        tk.temporal_loss(torch.zeros(2, 1, 3), torch.tensor([0]), backend=backend)


def test_module_prints_it():
    done = subprocess.run(
        [sys.executable, "-m", "trt_kernels"], capture_output=True, text=True, check=True
    )
    for part in ("torch", "cpu level", "threads", "reference  lif", "cuda       lif"):
        assert part in done.stdout


def test_cpu_level_can_be_chosen():
    before = native._C.cpu_level()
    assert before == os.environ.get("TRT_KERNELS_TEST_LEVEL", native._C.cpu_levels()[-1])
    with pytest.raises(ValueError, match="CPU level 'sse9' is not usable here; usable: baseline"):
        native._C.set_cpu_level("sse9")
    assert native._C.cpu_level() == before


def test_without_the_compiled_module(tmp_path):
    """The package imports, the reference runs, and everything else says what is missing."""
    package = tmp_path / "trt_kernels"
    source = os.path.dirname(tk.__file__)
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    (package / "_C.py").write_text("raise ImportError('broken on purpose')\n")
    code = (
        "import torch, trt_kernels as tk\n"
        f"assert tk.__file__.startswith({str(tmp_path)!r})\n"
        "tk.lif(torch.zeros(2, 3), backend='reference')\n"
        "print(tk.report())\n"
        "tk.lif(torch.zeros(2, 3))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "RuntimeError: lif: backend 'cpu' cannot serve: the compiled module" in done.stderr
    assert "does not load: broken on purpose" in done.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
def test_cuda_part_is_built_and_loads_where_nvcc_is():
    if os.environ.get("TRT_KERNELS_CUDA") == "0":
        pytest.skip("forbidden by TRT_KERNELS_CUDA=0")
    info = native._C.build_info()
    assert info["cuda_missing"] is None, info["cuda_missing"]
    assert info["cuda_architectures"]
    count, reason = native._C.cuda_devices()
    assert count > 0 or reason


GPU = torch.device("cuda", 0)


@pytest.fixture
def fresh_choices():
    """Nothing is remembered of the choice of a backend, before and after."""
    remembered = (ops._resolve, native.why_no_cuda)
    for choice in remembered:
        choice.cache_clear()
    yield
    for choice in remembered:
        choice.cache_clear()


def test_a_cuda_tensor_is_never_served_slowly():
    """On a machine without a device the tensor cannot exist, but the choice can be asked."""
    for operator in OPERATORS:
        try:
            assert ops.choose_backend(operator, None, GPU) in ("cuda", "triton")
        except RuntimeError as error:
            assert f"{operator}: backend 'cuda' cannot serve" in str(error)
        with pytest.raises(RuntimeError, match="it serves cpu tensors, got one on cuda:0"):
            ops.choose_backend(operator, "cpu", GPU)


def test_auto_takes_triton_where_cuda_cannot_serve(fresh_choices, monkeypatch):
    monkeypatch.setitem(backends.SERVES, "triton", "cuda")
    monkeypatch.setattr(native, "why_no_cuda", lambda device: "no nvcc")
    monkeypatch.setattr(backends, "why_no_triton", lambda device: None)
    assert ops.choose_backend("lif", None, GPU) == "triton"
    with pytest.raises(RuntimeError, match="lif: backend 'cuda' cannot serve: no nvcc"):
        ops.choose_backend("lif", "cuda", GPU)
    monkeypatch.setattr(backends, "why_no_triton", lambda device: "not installed")
    ops._resolve.cache_clear()
    both = "backend 'cuda' cannot serve: no nvcc; backend 'triton' cannot serve: not installed"
    with pytest.raises(RuntimeError, match=both):
        ops.choose_backend("lif", None, GPU)


@pytest.mark.parametrize(
    "devices,torch_sees_it,own,message",
    [
        ((0, "the driver is for CUDA 11.8"), True, "", "no CUDA device: the driver is for CUDA"),
        ((1, ""), False, "", "this PyTorch is built without CUDA"),
        ((1, ""), True, "this build has no kernels for device 0, sm_60", "no kernels for device 0"),
        ((1, ""), True, "", None),
    ],
)
def test_every_reason_against_cuda(
    fresh_choices, monkeypatch, devices, torch_sees_it, own, message
):
    module = types.SimpleNamespace(
        build_info=lambda: {"cuda_missing": None},
        cuda_devices=lambda: devices,
        cuda_why_not=lambda index: own,
    )
    monkeypatch.setattr(native, "_C", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_sees_it)
    if message is None:
        assert ops.choose_backend("lif", None, GPU) == "cuda"
    else:
        with pytest.raises(RuntimeError, match=message):
            ops.choose_backend("lif", "cuda", GPU)
