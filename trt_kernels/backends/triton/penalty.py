"""The TRT weight regularizer: all tensors and all T terms in one launch each way.

A launch takes a tuple of tensors, and a program finds its own by a chain of selects on its number.
Terms are taken in pairs, since divisions would decide the time: 1/a + 1/b = (a + b) / (a·b).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...options import LARGEST_EXPONENT, PenaltyOptions
from ..layout import accumulation, dense, sum_dtype
from .launch import block_size, scalar, state_type, stored, sum_partials

WARPS = 4
TILE = 2048  # elements a program holds at once: sixteen a thread, which hide the scalar work
TILES = 8  # of a program, so that a chain of selects costs a tenth of the arithmetic at 42 tensors
MOST_TENSORS = 64  # of a launch: each lengthens the chain of every program


@triton.jit
def find(tensors, others, firsts, wholes, tails, COUNT: tl.constexpr, CHUNK: tl.constexpr):
    """This program's part of `tensors` and of `others`, and how many elements it has.

    Tensor i begins at program firsts[i], fills `wholes[i]` programs, and has `tails[i]` elements in
    the one after them.
    """
    program = tl.program_id(0)
    # The numbers of a tuple come as float32, exact up to 2^24: integers would be compiled in.
    number = program.to(tl.float32)
    tensor, other = tensors[0], others[0]
    first, whole = scalar(firsts[0], tl.float32), scalar(wholes[0], tl.float32)
    tail = scalar(tails[0], tl.float32)
    for i in tl.static_range(1, COUNT):
        later = number >= firsts[i]
        tensor = tl.where(later, tensors[i], tensor)
        other = tl.where(later, others[i], other)
        first = tl.where(later, firsts[i], first)
        whole = tl.where(later, wholes[i], whole)
        tail = tl.where(later, tails[i], tail)
    size = tl.where(number - first < whole, CHUNK, tail.to(tl.int32))
    offset = (program - first.to(tl.int32)).to(tl.int64) * CHUNK
    return tensor + offset, other + offset, size


@triton.jit
def read(data, index, size, WHOLE: tl.constexpr):
    """A tile: without a mask where it is whole, so that its accesses are 16 bytes wide."""
    mask = None if WHOLE else index < size
    return tl.load(data + index, mask=mask)


@triton.jit
def value_of_tile(data, index, size, terms, growth, eps, STATE: tl.constexpr, WHOLE: tl.constexpr):
    """Σ over a tile and over t of w² / d_t, where d_t = 1 + c_t·(|w| + eps)."""
    w = read(data, index, size, WHOLE).to(STATE)
    a = tl.abs(w)
    total = tl.full(a.shape, 1.0, STATE)  # d_0 = 1
    c = growth
    for t in range(1, terms, 2):
        after = c * (1.0 + growth) + growth
        # A last term without a partner has one of weight 0.
        paired = t + 1 < terms
        c_pair = tl.where(paired, after, 0.0)
        d = c.to(STATE) * a + (1.0 + c * eps).to(STATE)
        d_pair = c_pair.to(STATE) * a + (1.0 + c_pair * eps).to(STATE)
        total += (d_pair + tl.where(paired, 1.0, 0.0).to(STATE) * d) / (d * d_pair)
        c = after * (1.0 + growth) + growth
    return tl.sum(w * w * total, 0)


@triton.jit(do_not_specialize=["partial", "terms"])
def value_kernel(
    tensors,
    firsts,
    wholes,
    tails,
    partial,
    terms,
    growth: tl.float64,
    eps: tl.float64,
    STATE: tl.constexpr,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """partial[program] = Σ over its elements and over t of w² / d_t, with c_1 = `growth`."""
    data, _, size = find(tensors, tensors, firsts, wholes, tails, COUNT, TILE * TILES)
    growth, eps = scalar(growth, tl.float64), scalar(eps, tl.float64)
    index = tl.arange(0, TILE)
    total = scalar(0.0, tl.float64)
    for begin in range(0, size, TILE):
        if size - begin >= TILE:
            here = value_of_tile(data + begin, index, TILE, terms, growth, eps, STATE, True)
        else:
            here = value_of_tile(
                data + begin, index, size - begin, terms, growth, eps, STATE, False
            )
        total += here.to(tl.float64)
    tl.store(partial + tl.program_id(0), total)


@triton.jit
def gradient_of_tile(
    data,
    grad,
    index,
    size,
    terms,
    growth,
    eps,
    scale,
    STATE: tl.constexpr,
    ADD: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Writes or adds scale · w · Σ_t (d_t + 1 + c_t·eps) / d_t²."""
    w = read(data, index, size, WHOLE).to(STATE)
    a = tl.abs(w)
    total = tl.full(a.shape, 2.0, STATE)  # c_0 = 0
    c = growth
    for t in range(1, terms, 2):
        after = c * (1.0 + growth) + growth
        paired = t + 1 < terms
        c_pair = tl.where(paired, after, 0.0)
        offset, offset_pair = (1.0 + c * eps).to(STATE), (1.0 + c_pair * eps).to(STATE)
        d = c.to(STATE) * a + offset
        d_pair = c_pair.to(STATE) * a + offset_pair
        rest = 1.0 / (d * d_pair)
        inverse, inverse_pair = rest * d_pair, rest * d
        weight = tl.where(paired, 1.0, 0.0).to(STATE)
        total += (d + offset) * (inverse * inverse)
        total += weight * (d_pair + offset_pair) * (inverse_pair * inverse_pair)
        c = after * (1.0 + growth) + growth
    result = scale * w * total
    if ADD:
        result += read(grad, index, size, WHOLE).to(STATE)
    result = stored(result, grad.dtype.element_ty)
    if WHOLE:
        tl.store(grad + index, result)
    else:
        tl.store(grad + index, result, mask=index < size)


@triton.jit(do_not_specialize=["terms"])
def gradient_kernel(
    tensors,
    grads,
    firsts,
    wholes,
    tails,
    upstream,
    terms,
    growth: tl.float64,
    eps: tl.float64,
    scale: tl.float64,
    STATE: tl.constexpr,
    ADD: tl.constexpr,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """scale · upstream · w · Σ_t ..., into the gradients or added to them; upstream may be None."""
    data, grad, size = find(tensors, grads, firsts, wholes, tails, COUNT, TILE * TILES)
    growth, eps = scalar(growth, tl.float64), scalar(eps, tl.float64)
    scale = scalar(scale, tl.float64)
    if upstream is not None:
        scale *= tl.load(upstream).to(tl.float64)
    scale = scale.to(STATE)
    index = tl.arange(0, TILE)
    for begin in range(0, size, TILE):
        here, to, left = data + begin, grad + begin, size - begin
        if left >= TILE:
            gradient_of_tile(here, to, index, left, terms, growth, eps, scale, STATE, ADD, True)
        else:
            gradient_of_tile(here, to, index, left, terms, growth, eps, scale, STATE, ADD, False)


class Group(NamedTuple):
    """Tensors that share a launch, by their places in a list, and the programs dealt to them."""

    members: list[int]
    firsts: tuple[float, ...]
    wholes: tuple[float, ...]
    tails: tuple[float, ...]
    programs: int


def groups(tensors: Sequence[Tensor], tile: int) -> Iterator[Group]:
    """Those that are not empty, by dtype, at most MOST_TENSORS of them a launch."""
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.numel():
            by_dtype.setdefault(tensor.dtype, []).append(i)
    for of_dtype in by_dtype.values():
        for begin in range(0, len(of_dtype), MOST_TENSORS):
            members = of_dtype[begin : begin + MOST_TENSORS]
            firsts, wholes, tails = [], [], []
            programs = 0
            for i in members:
                whole, tail = divmod(tensors[i].numel(), tile * TILES)
                firsts.append(float(programs))
                wholes.append(float(whole))
                tails.append(float(tail))
                programs += whole + (tail > 0)
            yield Group(members, tuple(firsts), tuple(wholes), tuple(tails), programs)


def terms_of(options: PenaltyOptions) -> tuple[int, float]:
    """The terms that count, and expm1(δ), from which the kernels make every c_t = expm1(δt):
    c_{t+1} = c_t·(1 + c_1) + c_1, in float64 and with nothing that cancels."""
    if options.delta * (options.steps - 1) <= LARGEST_EXPONENT:
        terms = options.steps
    else:
        # A term divided by more than 2^60 is nothing; left out, it cannot overflow.
        terms = 1 + int(LARGEST_EXPONENT / options.delta)
    return terms, math.expm1(min(options.delta, LARGEST_EXPONENT))


def trt_penalty_forward(params: Sequence[Tensor], options: PenaltyOptions) -> Tensor:
    params = [dense(p) for p in params]
    tile = block_size(TILE)
    launches = list(groups(params, tile))
    value = params[0].new_empty((), dtype=sum_dtype(params))
    partial = value.new_empty(sum(group.programs for group in launches), dtype=torch.float64)
    with torch.cuda.device_of(value):
        begin = 0
        for group in launches:
            value_kernel[(group.programs,)](
                tuple(params[i] for i in group.members),
                group.firsts,
                group.wholes,
                group.tails,
                partial[begin:],
                *terms_of(options),
                options.eps,
                STATE=state_type(params[group.members[0]].dtype),
                COUNT=len(group.members),
                TILE=tile,
                TILES=TILES,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
            begin += group.programs
        sum_partials(partial, options.weight / options.steps, value)
    return value


def write_gradient(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    scale: float,
    upstream: Tensor | None,
    add: bool,
    options: PenaltyOptions,
) -> None:
    """Writes or adds scale · upstream · ∂R/∂w, for dense pairs of one dtype and memory order."""
    tile = block_size(TILE)
    with torch.cuda.device_of(params[0]):
        for group in groups(params, tile):
            gradient_kernel[(group.programs,)](
                tuple(params[i] for i in group.members),
                tuple(grads[i] for i in group.members),
                group.firsts,
                group.wholes,
                group.tails,
                upstream,
                *terms_of(options),
                options.eps,
                scale * options.weight / options.steps,
                STATE=state_type(params[group.members[0]].dtype),
                ADD=add,
                COUNT=len(group.members),
                TILE=tile,
                TILES=TILES,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )


def trt_penalty_backward(
    grad: Tensor, params: Sequence[Tensor], options: PenaltyOptions
) -> list[Tensor]:
    params = [dense(p) for p in params]
    grads = [torch.empty_like(p) for p in params]
    write_gradient(params, grads, 1.0, grad, False, options)
    return grads


def trt_penalty_accumulate(
    params: Sequence[Tensor], grads: Sequence[Tensor], scale: float, options: PenaltyOptions
) -> None:
    ready, targets, _ = zip(*(triples := list(accumulation(params, grads))), strict=True)
    write_gradient(ready, targets, scale, None, True, options)
    for _, target, g in triples:
        if target is not g:
            g.add_(target)
    torch.autograd.graph.increment_version(grads)
