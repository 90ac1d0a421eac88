"""Spikes as bits: bit j of byte i is element 8i + j."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import block_size, scalar, state_type

WARPS = 4
BLOCK = 2048  # elements a program


@triton.jit
def packed(flags):
    """The bytes of a block of flags, a multiple of eight."""
    bit = tl.reshape(tl.where(flags, 1, 0), (flags.shape[0] // 8, 8))
    return tl.sum(bit << tl.arange(0, 8)[None, :], 1).to(tl.uint8)


@triton.jit
def unpacked(bits, index, exists):
    """The flags at `index` of a row of bytes."""
    byte = tl.load(bits + index // 8, mask=exists, other=0).to(tl.int32)
    return ((byte >> (index % 8).to(tl.int32)) & 1) != 0


@triton.jit
def pack_kernel(
    x, size, bits, binary, STATE: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr
):
    """The bits of x; `binary`, true before, becomes false where x is anything but 0 and 1."""
    first = tl.program_id(0).to(INDEX) * BLOCK
    index = first + tl.arange(0, BLOCK)
    # In the state's type, as the interpreter compares bfloat16 by its bits.
    value = tl.load(x + index, mask=index < size, other=0.0).to(STATE)
    byte = first // 8 + tl.arange(0, BLOCK // 8)
    tl.store(bits + byte, packed(value != 0), mask=byte < (scalar(size, INDEX) + 7) // 8)
    # By its bits, 0 is not -0, which would come back as 0.
    pattern = value.to(tl.int64 if tl.float64 == STATE else tl.int32, bitcast=True)
    others = tl.sum(tl.where((pattern == 0) | (value == 1), 0, 1), 0)
    # Whichever programs store it store the same.
    tl.store(binary, others == 0, mask=others > 0)


@triton.jit
def unpack_kernel(
    bits, result, size, steps, inner, row_bytes, INDEX: tl.constexpr, BLOCK: tl.constexpr
):
    """result [outer][steps][inner] from bits [steps, row_bytes], each row [outer][inner]."""
    index = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    exists = index < size
    row = index // inner
    neuron = row // steps * inner + index % inner
    start = row % steps * row_bytes
    spike = unpacked(bits + start, neuron, exists)
    tl.store(result + index, tl.where(spike, 1.0, 0.0).to(result.dtype.element_ty), mask=exists)


def settings(size: int) -> dict[str, Any]:
    block = block_size(BLOCK)
    index = tl.int32 if size + block < 2**31 else tl.int64
    return {"INDEX": index, "BLOCK": block, "num_warps": WARPS, "enable_fp_fusion": False}


def spike_pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bits of a dense x in the order of its memory, [1, ceil(numel / 8)], and whether they say
    all: every value is exactly 0 or 1 (a boolean scalar on the device)."""
    size = x.numel()
    bits = x.new_empty((1, -(-size // 8)), dtype=torch.uint8)
    binary = x.new_ones((), dtype=torch.bool)
    if size:
        chosen = settings(size)
        with torch.cuda.device_of(x):
            pack_kernel[(triton.cdiv(size, chosen["BLOCK"]),)](
                x, size, bits, binary, STATE=state_type(x.dtype), **chosen
            )
    return bits, binary


def spike_unpack(bits: Tensor, outer: int, steps: int, inner: int, dtype: torch.dtype) -> Tensor:
    """Spikes [outer][steps][inner], flat, from bits [steps, ceil(outer·inner / 8)]."""
    size = outer * steps * inner
    result = bits.new_empty(size, dtype=dtype)
    if size:
        chosen = settings(size)
        with torch.cuda.device_of(bits):
            unpack_kernel[(triton.cdiv(size, chosen["BLOCK"]),)](
                bits, result, size, steps, inner, bits.shape[1], **chosen
            )
    return result
