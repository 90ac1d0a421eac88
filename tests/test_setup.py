"""The pieces of setup.py that decide what is built."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup_module(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("trt_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_architectures(setup_module, monkeypatch):
    for name in ("TRT_KERNELS_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    assert setup_module.cuda_archs() == setup_module.DEFAULT_ARCHS
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 10.0+PTX")
    assert setup_module.cuda_archs() == "80-real;90a-real;100-real;100-virtual"
    monkeypatch.setenv("TRT_KERNELS_CUDA_ARCHS", "80,90")
    assert setup_module.cuda_archs() == "80;90"
    with pytest.raises(setup_module.BuildFailed, match="cannot read 'Hopper'"):
        setup_module.from_torch_list("Hopper")


def test_first_error(setup_module):
    output = "[1/3] Building\nx.cu(3): error: bad thing\nninja: build stopped\n"
    assert setup_module.first_error(output) == "x.cu(3): error: bad thing"
    assert setup_module.first_error("") == "no output"


def build(tmp_path, **environment):
    """Builds the extension into tmp_path."""
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "-b", tmp_path / "lib", "-t", tmp_path / "temp"],
        cwd=ROOT,
        env={**__import__("os").environ, **environment},
        capture_output=True,
        text=True,
    )


def test_bad_settings_are_refused(tmp_path):
    done = build(tmp_path, TRT_KERNELS_CUDA="yes")
    assert done.returncode and "TRT_KERNELS_CUDA: got 'yes', needs 0 or 1" in done.stderr
    missing = {"TRT_KERNELS_CUDA": "1", "CUDA_HOME": "", "CUDA_PATH": "", "PATH": str(tmp_path)}
    done = build(tmp_path, **missing)
    assert done.returncode and "nvcc was not found" in done.stderr


@pytest.mark.slow
def test_a_failing_cuda_build_leaves_a_cpu_package_and_a_reason(tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal error: broken on purpose' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    quick = {
        "CMAKE_ARGS": "-DTRT_KERNELS_ONLY_BASELINE=ON -DTRT_KERNELS_OPTIMIZE=0",
        "CUDA_HOME": str(tmp_path),
    }
    done = build(tmp_path, TRT_KERNELS_CUDA="", **quick)
    assert done.returncode == 0, done.stdout + done.stderr
    (library,) = (tmp_path / "lib").rglob("_C*")
    code = (
        "import torch, importlib.util as u\n"
        f"s = u.spec_from_file_location('_C', {str(library)!r})\n"
        "m = u.module_from_spec(s); s.loader.exec_module(m)\n"
        "print(m.build_info()['cuda_missing'])\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "failed" in shown.stdout
    done = build(tmp_path, TRT_KERNELS_CUDA="1", **quick)
    assert done.returncode and "TRT_KERNELS_CUDA=1, but" in done.stderr
