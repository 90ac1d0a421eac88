"""The Triton backend: for GPUs where the CUDA part is not built, and for AMD's.

operators.py imports Triton, and is imported itself where an operator first runs.
"""

import os
from functools import lru_cache
from importlib.util import find_spec

import torch

OLDEST = (7, 0)  # what Triton compiles for, of NVIDIA's architectures


def interpreted() -> bool:
    """True where Triton's interpreter runs the kernels, on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=64)
def why_no_triton(device: torch.device | None = None) -> str | None:
    """The reason why Triton cannot serve `device` (None: any GPU), or None if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no GPU that this PyTorch can use"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < OLDEST:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}, and Triton needs {OLDEST[0]}.{OLDEST[1]}: "
            "use backend='cuda' or 'reference'"
        )
    return None
