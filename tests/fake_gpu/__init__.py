"""A GPU that is not there: Triton's own compiler, launcher and driver code over a stub of libcuda.

`install` makes Triton compile for an architecture and launch over CPU tensors. It shows that every
kernel compiles, that its launcher is built and takes the arguments, and that grids, blocks and
shared memory are legal. Nothing is computed, so it says nothing about values, races or speed.
`python -m tests.fake_gpu` does all cases of tests/test_triton.py for every architecture and Triton;
the plugin beside this file runs the tests marked gpu.
"""

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

ARCHITECTURES = ("sm_80", "sm_90", "sm_120")


class FakeGPU:
    """The stub that is loaded, and what went through it."""

    def __init__(self, library: Any) -> None:
        self._library = library

    @property
    def launches(self) -> int:
        return int(self._library.fake_gpu_launches())

    @property
    def bad_launches(self) -> int:
        """Launches that no GPU of the architecture would take; each raised an error, too."""
        return int(self._library.fake_gpu_bad_launches())


def build(folder: Path) -> Path:
    """Compiles the stub as libcuda.so.1."""
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_name("driver.c")
    command = ["cc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, "-o", str(library), str(source)], check=True)
    return library


def install(architecture: str, folder: Path) -> FakeGPU:
    """From here on Triton finds one GPU of `architecture`. In a process of its own: for good."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["FAKE_GPU"] = architecture.removeprefix("sm_")
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ.pop("TRITON_INTERPRET", None)
    # Loaded by this name before Triton asks for it, so no other one is looked for.
    library = ctypes.CDLL(str(build(folder)), ctypes.RTLD_GLOBAL)
    for name in ("fake_gpu_launches", "fake_gpu_bad_launches"):
        getattr(library, name).restype = ctypes.c_long

    import torch

    if not hasattr(torch._C, "_cuda_getCurrentRawStream"):
        torch._C._cuda_getCurrentRawStream = lambda device: 0
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    number = int(architecture.removeprefix("sm_"))

    class Driver(CudaDriver):  # type: ignore[misc]
        """Triton's own, but for three answers that it has from torch."""

        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device=None: divmod(number, 10)

    triton.runtime.driver.set_active(Driver())
    return FakeGPU(library)
