"""The backends by name, and whether a backend can serve a device, or why not."""

import torch

from . import native
from .triton import interpreted, why_no_triton

OPERATORS = ("lif", "trt_penalty", "temporal_loss")  # every backend has all of them
NAMES = ("cpu", "cuda", "triton", "reference")
# The type of device that a backend serves ("reference" serves any), and what "auto" tries for each.
SERVES = {"cpu": "cpu", "cuda": "cuda", "triton": "cpu" if interpreted() else "cuda"}
AUTOMATIC = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def why_not(backend: str, device: torch.device | None = None) -> str | None:
    """The reason why `backend` cannot serve `device` (None: any of its kind), or None if it can."""
    served = SERVES.get(backend)
    other = device is not None and served is not None and device.type != served
    one = None if other else device
    reason = None
    if backend == "cpu":
        reason = native.why_no_cpu()
    elif backend == "cuda":
        reason = native.why_no_cuda(one)
    elif backend == "triton":
        reason = why_no_triton(one)
    if reason is None and other:
        reason = f"it serves {served} tensors, got one on {device}"
    return reason
