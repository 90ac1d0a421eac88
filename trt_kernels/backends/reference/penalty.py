"""The TRT weight regularizer as the paper writes it (method.md, section 3)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...options import PenaltyOptions


def trt_penalty(params: Sequence[Tensor], options: PenaltyOptions) -> Tensor:
    """R = (1/T) Σ_t Σ_w λ w² / (1 + (e^{δt} - 1)(|w| + ε)), a scalar."""
    double = any(p.dtype == torch.float64 for p in params)
    dtype = torch.float64 if double else torch.float32
    total = torch.zeros((), dtype=dtype, device=params[0].device)
    for t in range(options.steps):
        try:
            c = math.expm1(options.delta * t)
        except OverflowError:
            continue  # the term and its derivative are 0
        if c > torch.finfo(dtype).max:
            continue
        for p in params:
            w = p.to(dtype)
            total = total + (w * w / (1 + c * (w.abs() + options.eps))).sum()
    return options.weight * total / options.steps
