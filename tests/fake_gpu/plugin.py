"""Runs the tests marked gpu for Triton on the fake GPU: every launch, and no comparison.

FAKE_GPU=sm_90 python -m pytest -p tests.fake_gpu.plugin tests/test_gpu.py tests/test_gpu_block.py
"""

import contextlib
import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

from tests import fake_gpu

architecture = os.environ.get("FAKE_GPU", "sm_90")
gpu = fake_gpu.install(architecture, Path(tempfile.mkdtemp(prefix="fake_gpu_")))

import torch  # noqa: E402

CAPABILITY = divmod(int(architecture.removeprefix("sm_")), 10)
# What these tests do to a real device only.
REAL = (
    "stream",
    "graph",
    "synchronises",
    "autocast",
    "memory",
    "2_31",
    "compiles",
    "training_step",
    "current_one",
    "other_devices",
    "auto_chooses",
    "both_backends",
    "keeps_x",
    "kernels_error",
    "nonfinite",
    "large_lif",
    "many_neuron_steps",
    "any_layout",
    "out_of_range",
)


class NoDevice(contextlib.nullcontext[None]):
    def __init__(self, *_: Any) -> None:
        super().__init__()


torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda device=None: CAPABILITY
torch.cuda.get_device_name = lambda device=None: f"fake {architecture}"
torch.cuda.device_of = NoDevice  # type: ignore[misc,assignment]
torch.cuda.synchronize = lambda *_: None
torch.cuda.current_device = lambda: 0
torch.cuda.device_count = lambda: 1


def pytest_configure() -> None:
    """Nothing was computed, so nothing can be compared."""
    torch.equal = lambda *_: True
    torch.testing.assert_close = lambda *_, **__: None


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    from trt_kernels import backends

    backends.SERVES["triton"] = "cpu"
    substitutes = {"DEVICE": "cpu", "relative_error": lambda *_: 0.0}
    # Under the names by which they import each other, and under pytest's own.
    named = ("tests.test_gpu", "tests.test_gpu_block", "tests.cases")
    for module in {*map(importlib.import_module, named), *(item.module for item in items)}:
        for known, value in (*substitutes.items(), ("equal", None), ("same", None)):
            if hasattr(module, known):
                setattr(module, known, value or (lambda *_, **__: None))
    chosen = [i for i in items if "triton" in i.name and not any(part in i.name for part in REAL)]
    config.hook.pytest_deselected(items=[i for i in items if i not in chosen])
    items[:] = chosen


def pytest_sessionfinish(session: Any) -> None:
    if session.config.pluginmanager.has_plugin("dsession"):
        return  # the processes that run tests have a GPU each
    print(f"\n{architecture}: {gpu.launches} launches, {gpu.bad_launches} refused")
    if gpu.bad_launches or not gpu.launches:
        session.exitstatus = 1
