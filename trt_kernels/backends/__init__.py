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
    if device is not None and SERVES.get(backend, device.type) != device.type:
        return f"it serves {SERVES[backend]} tensors, got one on {device}"
    if backend == "cpu":
        return native.why_no_cpu()
    if backend == "cuda":
        return native.why_no_cuda(device)
    if backend == "triton":
        return why_no_triton(device)
    return None
