"""The statistics that batch normalisation needs, of every channel in one pass over x."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...checks import state_dtype
from ..layout import channel_view, dense
from .channels import WARPS, column_sums, elements, of_channel, store_sum, sum_mapping, sum_tile
from .launch import block_size, scalar

BLOCK = 1024  # elements a program


@triton.jit
def moments_kernel(
    x,
    size,
    positions,
    channels,
    within,
    partial,
    MAP: tl.constexpr,
    TILE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partial [chunks, 2, channels]: sums of x less its channel's first element, and of squares."""
    index, exists, channel = elements(size, positions, channels, within, MAP, TILE, INDEX, BLOCK)
    value = tl.load(x + index, mask=exists, other=0.0).to(tl.float64)
    # Squares of what lies around the first element lose nothing to a large mean.
    first = of_channel(x, 0, channel.to(INDEX) * within, channels, exists, MAP).to(tl.float64)
    value -= first
    store_sum(partial, 0, 2, value, exists, channels, MAP, TILE)
    store_sum(partial, 1, 2, value * value, exists, channels, MAP, TILE)


@triton.jit(do_not_specialize=["chunks", "channels", "within"])
def statistics_kernel(
    x,
    partial,
    chunks,
    channels,
    within,
    result,
    count: tl.float64,
    bias: tl.float64,
    eps: tl.float64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """result [4, channels]; `bias` is what an unbiased variance is larger by."""
    begin = tl.program_id(0) * COLUMNS
    channel = begin + tl.arange(0, COLUMNS)
    exists = channel < channels
    stride = 2 * channels
    count = scalar(count, tl.float64)
    shift = column_sums(partial, begin, channels, stride, chunks, ROWS, COLUMNS) / count
    squares = column_sums(partial + channels, begin, channels, stride, chunks, ROWS, COLUMNS)
    variance = squares / count - shift * shift
    variance = tl.where(variance < 0, 0.0, variance)
    first = tl.load(x + channel.to(tl.int64) * within, mask=exists, other=0.0).to(tl.float64)
    STATE: tl.constexpr = result.dtype.element_ty
    exact = first + shift
    mean = exact.to(STATE)
    inverse = 1.0 / tl.sqrt(variance + scalar(eps, tl.float64))
    unbiased = variance * scalar(bias, tl.float64)
    tl.store(result + channel, mean, mask=exists)
    rest = exact - mean.to(tl.float64)
    tl.store(result + channels + channel, rest.to(STATE), mask=exists)
    tl.store(result + 2 * channels + channel, inverse.to(STATE), mask=exists)
    tl.store(result + 3 * channels + channel, unbiased.to(STATE), mask=exists)


def batch_statistics(x: Tensor, channel_dim: int, eps: float, repeat: int, backend: str) -> Tensor:
    x = dense(x)
    _, channels, within = channel_view(x, channel_dim)
    result = x.new_empty((4, channels), dtype=state_dtype(x.dtype))
    if x.numel() == 0:
        return result.fill_(float("nan"))
    count = x.numel() // channels
    mapping = sum_mapping(x.numel(), channels, within, block_size(BLOCK))
    partial = x.new_empty((mapping.chunks, 2, channels), dtype=torch.float64)
    rows, width = sum_tile(channels)
    with torch.cuda.device_of(x):
        moments_kernel[(mapping.programs,)](
            x,
            x.numel(),
            count,
            channels,
            within,
            partial,
            MAP=mapping.name,
            TILE=mapping.tile,
            INDEX=tl.int32 if x.numel() + mapping.block < 2**31 else tl.int64,
            BLOCK=mapping.block,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
        statistics_kernel[(triton.cdiv(channels, width),)](
            x,
            partial,
            mapping.chunks,
            channels,
            within,
            result,
            count,
            count * repeat / max(1, count * repeat - 1),
            eps,
            ROWS=rows,
            COLUMNS=width,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return result
