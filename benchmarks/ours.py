"""This package's operators, on each backend that serves a device."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.measure import Absent, Variant
from benchmarks.steps import Expected, Step
from trt_kernels import backends

COMPILED = ("cuda", "triton")
Function = Callable[..., Any]


def ours(
    function: Function,
    device: torch.device,
    make: Callable[[Function], Step],
    expected: Expected,
) -> tuple[Variant, list[Variant | Absent]]:
    """The variant that others are compared with, and on a GPU the other backend beside it.

    On a CPU it is "ours". On a GPU "ours cuda" beside "ours triton"; where CUDA cannot serve, its
    absence beside "ours triton". TRT_KERNELS_BENCH_TRITON=0 leaves Triton's out where CUDA's run.
    """
    if device.type == "cpu":
        return Variant("ours", make(function), expected), []
    absent: list[Variant | Absent] = []
    running: list[Variant] = []
    for backend in COMPILED:
        name = f"ours {backend}"
        reason = backends.why_not(backend, device)
        if backend == "triton" and running and os.environ.get("TRT_KERNELS_BENCH_TRITON") == "0":
            absent.append(Absent(name, "not asked for: make gpu TRITON=1"))
        elif reason is None:
            running.append(Variant(name, make(partial(function, backend=backend)), expected))
        else:
            absent.append(Absent(name, reason))
    if not running:
        raise RuntimeError("; ".join(f"{a.name}: {a.reason}" for a in absent))
    return running[0], [*running[1:], *absent]
