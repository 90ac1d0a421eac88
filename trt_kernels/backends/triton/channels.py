"""Values given by channel, and sums over everything but the channel.

A tensor is [before][channels][stride] in memory: element i has channel i // stride % channels.
Each program stores the sums of its own elements, and a second launch adds these up, both in an
order that shapes alone decide.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import warp_size

WARPS = 4
NEIGHBOURS = 32  # channels of a program where they are neighbours in memory: a row of 128 bytes


class Mapping(NamedTuple):
    """How programs take the elements of a tensor: `block` each, by one of these names.

    "one": in order, all of one channel. "plain": in order, of any channels. "channel": of one
    channel each. "tile": of `tile` neighbouring channels each. For sums, `chunks` programs share
    the elements of a channel.
    """

    name: str
    block: int
    tile: int
    programs: int
    chunks: int


def plain_mapping(size: int, channels: int, block: int) -> Mapping:
    programs = triton.cdiv(size, block)
    return Mapping("one" if channels == 1 else "plain", block, 1, programs, programs)


def sum_mapping(size: int, channels: int, stride: int, block: int) -> Mapping:
    if channels == 1:
        return plain_mapping(size, 1, block)
    positions = size // channels
    tile = min(NEIGHBOURS, triton.next_power_of_2(channels)) if stride == 1 else 1
    # A block no larger than a channel's elements, and no smaller than a program's threads.
    fitting = max(triton.next_power_of_2(positions) * tile, WARPS * warp_size())
    block = min(block, fitting)
    chunks = triton.cdiv(positions, block // tile)
    if stride == 1:
        return Mapping("tile", block, tile, chunks * triton.cdiv(channels, tile), chunks)
    return Mapping("channel", block, 1, chunks * channels, chunks)


@triton.jit
def elements(
    size,
    positions,
    channels,
    channel_stride,
    MAP: tl.constexpr,
    TILE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program's elements: their places in memory, which of them exist, and their channels.

    `positions` is how many a channel has: an argument, whose divisibility makes accesses wide.
    """
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if MAP == "channel":
        channel = program % channels
        position = (program // channels).to(INDEX) * BLOCK + lane
        exists = position < positions
        row = position // channel_stride * channels + channel
        index = row * channel_stride + position % channel_stride
    elif MAP == "tile":
        tiles = tl.cdiv(channels, TILE)
        channel = program % tiles * TILE + lane % TILE
        position = (program // tiles).to(INDEX) * (BLOCK // TILE) + lane // TILE
        exists = (position < positions) & (channel < channels)
        index = position * channels + channel
    else:
        index = program.to(INDEX) * BLOCK + lane
        exists = index < size
        channel = program * 0
        if MAP == "plain":
            channel = index // channel_stride % channels
    return index, exists, channel


@triton.jit
def of_channel(values, row, channel, channels, exists, MAP: tl.constexpr):
    """Row `row` of values [rows, channels] at the program's channels."""
    if MAP == "tile":
        value = tl.load(values + row * channels + channel, mask=exists, other=1.0)
    else:
        value = tl.load(values + row * channels + channel)
    return value


@triton.jit
def store_sum(partial, row, rows, value, exists, channels, MAP: tl.constexpr, TILE: tl.constexpr):
    """Row `row` of partial [chunks, rows, channels], float64: the program's sums of `value`."""
    program = tl.program_id(0)
    value = tl.where(exists, value, 0.0).to(tl.float64)
    if MAP == "tile":
        tiles = tl.cdiv(channels, TILE)
        total = tl.sum(tl.reshape(value, (value.shape[0] // TILE, TILE)), 0)
        channel = program % tiles * TILE + tl.arange(0, TILE)
        to = partial + (program // tiles * rows + row) * channels + channel
        tl.store(to, total, mask=channel < channels)
    else:
        to = partial + (program // channels * rows + row) * channels + program % channels
        tl.store(to, tl.sum(value, 0))


@triton.jit
def column_sums(partial, first, columns, stride, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Σ over rows of partial [rows, stride] in columns first .. first + COLUMNS - 1."""
    column = first + tl.arange(0, COLUMNS)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float64)
    for begin in range(0, rows, ROWS):
        exists = (begin + row < rows) & (column < columns)
        total += tl.load(partial + (begin + row) * stride + column, mask=exists, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["chunks", "columns"])
def column_sum_kernel(partial, chunks, columns, result, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """result [columns] = Σ over chunks of partial [chunks, columns]."""
    first = tl.program_id(0) * COLUMNS
    total = column_sums(partial, first, columns, columns, chunks, ROWS, COLUMNS)
    column = first + tl.arange(0, COLUMNS)
    tl.store(result + column, total.to(result.dtype.element_ty), mask=column < columns)


def sum_tile(columns: int) -> tuple[int, int]:
    """Rows and columns that a program of a second launch adds up at once."""
    width = min(32, triton.next_power_of_2(columns))
    return 2048 // width, width


def sum_chunks(partial: Tensor, result: Tensor) -> None:
    """result = Σ over the first dimension of partial: the second launch of sums by channel."""
    rows, width = sum_tile(result.numel())
    grid = (triton.cdiv(result.numel(), width),)
    column_sum_kernel[grid](
        partial,
        partial.shape[0],
        result.numel(),
        result,
        ROWS=rows,
        COLUMNS=width,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def empty_partial(mapping: Mapping, result: Tensor) -> Tensor:
    """Empty memory for what the programs of `mapping` store for a result [rows, channels]."""
    return result.new_empty((mapping.chunks, *result.shape), dtype=torch.float64)
