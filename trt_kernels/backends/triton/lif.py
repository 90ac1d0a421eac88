"""The multi-step LIF: a program owns a block of neurons over all timesteps, in registers.

Time goes by segments of `CHECKPOINT_EVERY` steps, unrolled, and the last may be shorter: up to one
segment everything is unrolled, and the whole segments of a longer sequence are a loop. The backward
pass computes the potentials of a segment again from x, keeps them as a tuple of blocks and walks
the segment in reverse.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...options import LARGEST_EXPONENT, LIFOptions
from ..layout import (
    CHECKPOINT_EVERY,
    MaybeTensor,
    fold,
    lif_backward_tensors,
    lif_forward_tensors,
)
from .launch import block_size, scalar, state_type, stored, sum_partials, warp_size
from .neuron import after_reset, charged, fires, potential_gradient
from .regularizer import phi_derivative, phi_value

WARPS = 4
VECTOR_BYTES = 16  # of a thread and a step: the widest access there is

# A thread that kept the potentials of eight neurons for more steps than this would spill.
MOST_WIDE_STEPS = 10

# Steps whose loads are issued before the first is used, to hide the latency of memory.
AHEAD = tl.constexpr(4)
SEGMENT = tl.constexpr(CHECKPOINT_EVERY)


@triton.jit
def places(neurons, inner, steps, SPLIT: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """A program's neurons, those that exist, where they start in a sequence, and its time stride.

    A state is [outer][inner], a sequence [outer][steps][inner]; without SPLIT outer is 1.
    """
    neuron = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    stride = scalar(inner, INDEX)
    start = neuron
    if SPLIT:
        start += neuron // stride * ((steps - 1) * stride)
    return neuron, neuron < neurons, start, stride


@triton.jit
def read_or_zero(data, index, exists, STATE: tl.constexpr, BLOCK: tl.constexpr):
    """A block of the tensor at `data`, or zeros where there is no such tensor."""
    if data is None:
        block = tl.zeros((BLOCK,), STATE)
    else:
        block = tl.load(data + index, mask=exists, other=0.0).to(STATE)
    return block


@triton.jit
def read_number(data, t, STATE: tl.constexpr):
    """Entry t of a [T] tensor, or 0 where there is none."""
    return scalar(0.0, STATE) if data is None else tl.load(data + t)


@triton.jit
def forward_segment(
    v, total, first, tensors, place, rules, KINDS: tl.constexpr, COUNT: tl.constexpr
):
    """Steps first .. first + COUNT - 1: v after them, and `total` with what they add to R."""
    x, weight, growth, spikes, potential = tensors
    start, exists, stride = place
    factor, threshold, v_reset, eps = rules
    CHARGE: tl.constexpr = KINDS[0]
    RESET: tl.constexpr = KINDS[1]
    AT_THRESHOLD: tl.constexpr = KINDS[2]
    PHI: tl.constexpr = KINDS[3]
    xs: tl.tuple = ()
    for i in tl.static_range(COUNT):
        if i < AHEAD:
            xs += (tl.load(x + start + (first + i) * stride, mask=exists, other=0.0),)
    for i in tl.static_range(COUNT):
        # Loads go before the stores of an earlier step: behind them they could not be moved up.
        if i + AHEAD < COUNT:
            later = start + (first + i + AHEAD) * stride
            xs += (tl.load(x + later, mask=exists, other=0.0),)
        index = start + (first + i) * stride
        h = charged(v, xs[i].to(v.dtype), factor, CHARGE)
        s = fires(h, threshold, AT_THRESHOLD)
        v = after_reset(h, s, threshold, v_reset, RESET)
        tl.store(spikes + index, tl.where(s, 1.0, 0.0).to(spikes.dtype.element_ty), mask=exists)
        if potential is not None:
            tl.store(potential + index, h, mask=exists)
        if weight is not None:
            phi = phi_value(h, s, read_number(growth, first + i, v.dtype), eps, PHI)
            total += tl.load(weight + first + i) * phi
    return v, total


@triton.jit(do_not_specialize=["segments"])
def forward_kernel(
    x,
    v_init,
    weight,
    growth,
    spikes,
    potential,
    state,
    checkpoints,
    partial,
    neurons,
    inner,
    segments,
    factor: tl.float64,
    threshold: tl.float64,
    v_reset: tl.float64,
    eps: tl.float64,
    STATE: tl.constexpr,
    KINDS: tl.constexpr,
    LONG: tl.constexpr,
    LAST: tl.constexpr,
    SPLIT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Steps are `segments` whole segments, if LONG, and then LAST steps. None is no such tensor.

    `partial` has one sum a program; `checkpoints` [segments, neurons] has v after each segment.
    """
    steps = segments * SEGMENT + LAST
    neuron, exists, start, stride = places(neurons, inner, steps, SPLIT, INDEX, BLOCK)
    tensors = (x, weight, growth, spikes, potential)
    place = (start, exists, stride)
    rules = (
        scalar(factor, STATE),
        scalar(threshold, STATE),
        scalar(v_reset, STATE),
        scalar(eps, STATE),
    )
    v = read_or_zero(v_init, neuron, exists, STATE, BLOCK)
    total = tl.zeros((BLOCK,), STATE)
    if LONG:
        for segment in range(segments):
            v, total = forward_segment(
                v, total, segment * SEGMENT, tensors, place, rules, KINDS, SEGMENT
            )
            if checkpoints is not None:
                tl.store(checkpoints + scalar(segment, tl.int64) * neurons + neuron, v, mask=exists)
    v, total = forward_segment(v, total, steps - LAST, tensors, place, rules, KINDS, LAST)
    if state is not None:
        tl.store(state + neuron, v, mask=exists)
    if partial is not None:
        here = tl.sum(tl.where(exists, total, 0.0), 0)
        tl.store(partial + tl.program_id(0), here.to(tl.float64))


@triton.jit
def backward_segment(
    dv,
    v,
    first,
    tensors,
    place,
    rules,
    scale,
    KINDS: tl.constexpr,
    COUNT: tl.constexpr,
    DETACH_LAST: tl.constexpr,
):
    """Steps first .. first + COUNT - 1 in reverse: what arrives at the potential before them.

    `v` is that potential, `dv` what arrives at the one after them.
    """
    x, weight, growth, grad_spikes, grad_potential, grad_x = tensors
    start, exists, stride = place
    factor, slope, threshold, v_reset, eps, surrogate_parameter = rules
    CHARGE: tl.constexpr = KINDS[0]
    RESET: tl.constexpr = KINDS[1]
    AT_THRESHOLD: tl.constexpr = KINDS[2]
    PHI: tl.constexpr = KINDS[3]
    DETACH: tl.constexpr = KINDS[4]
    SURROGATE: tl.constexpr = KINDS[5]
    xs: tl.tuple = ()
    for i in tl.static_range(COUNT):
        xs += (tl.load(x + start + (first + i) * stride, mask=exists, other=0.0),)
    # From the last step backwards, as they are used.
    grads: tl.tuple = ()
    for i in tl.static_range(COUNT):
        if grad_spikes is not None and i < AHEAD:
            index = start + (first + COUNT - 1 - i) * stride
            grads += (tl.load(grad_spikes + index, mask=exists, other=0.0),)
    hs: tl.tuple = ()
    for i in tl.static_range(COUNT):
        h = charged(v, xs[i].to(v.dtype), factor, CHARGE)
        v = after_reset(h, fires(h, threshold, AT_THRESHOLD), threshold, v_reset, RESET)
        hs += (h,)
    for i in tl.static_range(COUNT):
        if grad_spikes is not None and i + AHEAD < COUNT:
            later = start + (first + COUNT - 1 - i - AHEAD) * stride
            grads += (tl.load(grad_spikes + later, mask=exists, other=0.0),)
        t = first + COUNT - 1 - i
        index = start + t * stride
        h = hs[COUNT - 1 - i]
        s = fires(h, threshold, AT_THRESHOLD)
        ds = tl.zeros_like(dv)
        if grad_spikes is not None:
            ds = grads[i].to(dv.dtype)
        if weight is not None:
            scale_here = scale * tl.load(weight + t)
            if PHI == "spike":
                ds += scale_here
        dh = potential_gradient(
            h,
            s,
            ds,
            dv,
            threshold,
            v_reset,
            surrogate_parameter,
            RESET,
            DETACH or (DETACH_LAST and i == 0),
            SURROGATE,
        )
        if grad_potential is not None:
            dh += tl.load(grad_potential + index, mask=exists, other=0.0)
        if weight is not None and PHI != "spike":
            growth_here = read_number(growth, t, dv.dtype)
            dh += scale_here * phi_derivative(h, growth_here, eps, PHI)
        tl.store(grad_x + index, stored(dh, grad_x.dtype.element_ty), mask=exists)
        dv = slope * dh
    return dv


@triton.jit(do_not_specialize=["segments"])
def backward_kernel(
    x,
    v_init,
    weight,
    growth,
    checkpoints,
    grad_spikes,
    grad_state,
    grad_potential,
    grad_penalty,
    grad_x,
    grad_v_init,
    neurons,
    inner,
    segments,
    factor: tl.float64,
    slope: tl.float64,
    threshold: tl.float64,
    v_reset: tl.float64,
    eps: tl.float64,
    surrogate_parameter: tl.float64,
    STATE: tl.constexpr,
    KINDS: tl.constexpr,
    LONG: tl.constexpr,
    LAST: tl.constexpr,
    SPLIT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `forward_kernel`; `weight` is None where nothing arrives at the penalty."""
    steps = segments * SEGMENT + LAST
    neuron, exists, start, stride = places(neurons, inner, steps, SPLIT, INDEX, BLOCK)
    tensors = (x, weight, growth, grad_spikes, grad_potential, grad_x)
    place = (start, exists, stride)
    rules = (
        scalar(factor, STATE),
        scalar(slope, STATE),
        scalar(threshold, STATE),
        scalar(v_reset, STATE),
        scalar(eps, STATE),
        scalar(surrogate_parameter, STATE),
    )
    scale = read_number(grad_penalty, 0, STATE) / scalar(neurons, STATE)
    dv = read_or_zero(grad_state, neuron, exists, STATE, BLOCK)
    v = read_or_zero(v_init, neuron, exists, STATE, BLOCK)
    last_v = v
    if LONG:
        before = checkpoints + scalar(segments - 1, tl.int64) * neurons
        last_v = tl.load(before + neuron, mask=exists, other=0.0)
    # Nothing arrives at an unused last state; times an infinite potential it must stay nothing.
    dv = backward_segment(
        dv, last_v, steps - LAST, tensors, place, rules, scale, KINDS, LAST, grad_state is None
    )
    if LONG:
        for i in range(segments):
            segment = segments - 1 - i
            segment_v = v
            if segment > 0:
                before = checkpoints + scalar(segment - 1, tl.int64) * neurons
                segment_v = tl.load(before + neuron, mask=exists, other=0.0)
            dv = backward_segment(
                dv,
                segment_v,
                segment * SEGMENT,
                tensors,
                place,
                rules,
                scale,
                KINDS,
                SEGMENT,
                False,
            )
    if grad_v_init is not None:
        tl.store(grad_v_init + neuron, dv, mask=exists)


def neurons_a_thread(x: Tensor, parked: int, more: bool) -> int:
    """As many as a vector of x holds. Of half precision that is eight, which a thread has registers
    for where it keeps few potentials, `parked`, and does nothing `more` with them."""
    wide = parked <= MOST_WIDE_STEPS and not more
    return VECTOR_BYTES // max(x.element_size(), 2 if wide else 4)


class Launch:
    """The grid and the settings that both directions share, for a dense x that is not empty."""

    def __init__(self, x: Tensor, options: LIFOptions, parked: int, more: bool) -> None:
        outer, steps, inner = fold(x, options.time_dim)
        neurons = outer * inner
        if steps == 1:
            inner = neurons  # no time stride: all neurons are one run
        block = block_size(WARPS * warp_size() * neurons_a_thread(x, parked, more))
        segments, last = divmod(steps - 1, CHECKPOINT_EVERY)
        self.sizes = (neurons, inner, segments)
        self.programs = triton.cdiv(neurons, block)
        divides = options.charge == "divide"
        self.factor = 1 / options.decay if divides else options.decay
        # Half precision shares every kernel's arithmetic: no FMA where a spike is decided.
        self.settings: dict[str, Any] = {
            "STATE": state_type(x.dtype),
            "KINDS": (
                options.charge,
                options.reset,
                options.fire_at_threshold,
                options.phi,
                options.detach_reset,
                options.surrogate,
            ),
            "LONG": segments > 0,
            "LAST": last + 1,
            "SPLIT": inner != neurons,
            "INDEX": tl.int32 if x.numel() + block < 2**31 else tl.int64,
            "BLOCK": block,
            "num_warps": WARPS,
            "enable_fp_fusion": False,
        }


def growth_of(options: LIFOptions, steps: int, x: Tensor) -> Tensor | None:
    """expm1(δt) of every step [T], held at 2⁶⁰, where φ uses it; made on the device."""
    if options.phi != "trt":
        return None
    t = torch.arange(steps, dtype=torch.float64, device=x.device)
    growth = (t * options.delta).clamp_(max=LARGEST_EXPONENT).expm1_()
    return growth.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def lif_forward(
    x: Tensor,
    v_init: MaybeTensor,
    weight: MaybeTensor,
    for_backward: bool,
    options: LIFOptions,
) -> tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]:
    x, v_init, spikes, state, potential, penalty, checkpoints = lif_forward_tensors(
        x, v_init, options, weight is not None, for_backward
    )
    if x.numel() == 0:
        if state is not None:
            state.zero_() if v_init is None else state.copy_(v_init)
        if penalty is not None:
            penalty.zero_()
        return spikes, state, potential, penalty, checkpoints
    launch = Launch(x, options, 0, weight is not None or potential is not None)
    partial = growth = None
    if penalty is not None:
        partial = x.new_empty(launch.programs, dtype=torch.float64)
        growth = growth_of(options, x.shape[options.time_dim], x)
    with torch.cuda.device_of(x):
        forward_kernel[(launch.programs,)](
            x,
            v_init,
            weight,
            growth,
            spikes,
            potential,
            state,
            checkpoints,
            partial,
            *launch.sizes,
            launch.factor,
            options.threshold,
            options.v_reset,
            options.eps,
            **launch.settings,
        )
        if penalty is not None and partial is not None:
            sum_partials(partial, 1 / launch.sizes[0], penalty)
    return spikes, state, potential, penalty, checkpoints


def lif_backward(
    x: Tensor,
    v_init: MaybeTensor,
    weight: MaybeTensor,
    checkpoints: MaybeTensor,
    grads: Sequence[MaybeTensor],
    needs_v_init: bool,
    options: LIFOptions,
) -> tuple[Tensor, MaybeTensor]:
    grad_penalty = grads[3]
    reads, (grad_x, grad_v_init) = lif_backward_tensors(
        x, v_init, checkpoints, grads[:3], needs_v_init, options
    )
    x, v_init, checkpoints, grad_spikes, grad_state, grad_potential = reads
    if x.numel() == 0:
        if grad_v_init is not None:
            grad_v_init.zero_() if grad_state is None else grad_v_init.copy_(grad_state)
        return grad_x, grad_v_init
    parked = min(x.shape[options.time_dim], CHECKPOINT_EVERY)
    more = grad_penalty is not None or grad_potential is not None
    launch = Launch(x, options, parked, more)
    growth = None
    if grad_penalty is None:
        weight = None
    else:
        growth = growth_of(options, x.shape[options.time_dim], x)
    with torch.cuda.device_of(x):
        backward_kernel[(launch.programs,)](
            x,
            v_init,
            weight,
            growth,
            checkpoints,
            grad_spikes,
            grad_state,
            grad_potential,
            grad_penalty,
            grad_x,
            grad_v_init,
            *launch.sizes,
            launch.factor,
            1 / launch.factor if options.charge == "divide" else launch.factor,
            options.threshold,
            options.v_reset,
            options.eps,
            options.surrogate_parameter,
            **launch.settings,
        )
    return grad_x, grad_v_init
