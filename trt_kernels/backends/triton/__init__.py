"""The Triton backend: for GPUs where the CUDA part is not built, and for AMD's.

operators.py imports Triton, and is imported itself where an operator first runs.
"""

import os
from functools import lru_cache
from importlib.util import find_spec

import torch


def interpreted() -> bool:
    """True where Triton's interpreter runs the kernels, on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=64)
def why_no_triton(device: torch.device | None = None) -> str | None:
    """The reason why Triton cannot serve `device` (None: any GPU), or None if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if not interpreted() and not torch.cuda.is_available():
        return "no GPU that this PyTorch can use"
    return None
