"""What every launch of a Triton kernel shares."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...checks import state_dtype
from . import interpreted

# The interpreter's time goes by operations, not by elements: few and large blocks are quick there.
INTERPRETED_BLOCK = 16384

DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def state_type(dtype: torch.dtype) -> tl.dtype:
    """The type in which kernels compute for tensors of `dtype`."""
    return DTYPES[state_dtype(dtype)]


def block_size(size: int) -> int:
    """`size` elements a program on a GPU, more under the interpreter."""
    return max(size, INTERPRETED_BLOCK) if interpreted() else size


@cache
def warp_size() -> int:
    """Threads of a warp: 32 on NVIDIA's GPUs, 64 on most of AMD's."""
    if interpreted():
        return 32
    return int(triton.runtime.driver.active.get_current_target().warp_size)


@triton.jit
def scalar(value, TYPE: tl.constexpr):
    """A number of that type, from a kernel's argument: a tensor, or a number of Python's."""
    return tl.full((), value, TYPE)


INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def stored(value, TYPE: tl.constexpr):
    """`value` in the type of the tensor it is stored to, rounded to nearest even."""
    if INTERPRETED and tl.bfloat16 == TYPE:
        # The interpreter's own conversion truncates.
        bits = value.to(tl.uint32, bitcast=True)
        high = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        high = tl.where(value == value, high, 0x7FC0)
        result = high.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(TYPE)
    return result


SUM_BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def sum_kernel(partial, count, scale: tl.float64, result, BLOCK: tl.constexpr):
    """One program: scale · Σ partial, in an order that depends on `count` alone."""
    index = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, count, BLOCK):
        total += tl.load(partial + first + index, mask=first + index < count, other=0.0)
    tl.store(result, tl.sum(total, 0) * scalar(scale, tl.float64))


def sum_partials(partial: Tensor, scale: float, result: Tensor) -> None:
    """result = scale · Σ of the programs' sums: the second launch of a reduction."""
    sum_kernel[(1,)](
        partial, partial.numel(), scale, result, BLOCK=SUM_BLOCK, enable_fp_fusion=True
    )
