"""The multi-step LIF: a program owns a block of neurons over all timesteps, in registers.

Time goes by segments of `CHECKPOINT_EVERY` steps, unrolled, and the last may be shorter: up to one
segment everything is unrolled, and the whole segments of a longer sequence are a loop. The backward
pass computes the potentials of a segment again from x, keeps them as a tuple of blocks and walks
the segment in reverse; or it reads all that it needs of them from bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...options import (
    CHARGES,
    LARGEST_EXPONENT,
    LIFGradients,
    LIFGrads,
    LIFOptions,
    LIFResults,
    LIFTensors,
    LIFWanted,
)
from ..layout import (
    CHECKPOINT_EVERY,
    LIFShape,
    MaybeTensor,
    lif_backward_tensors,
    lif_forward_tensors,
    lif_shape,
)
from .channels import (
    WARPS,
    Mapping,
    elements,
    empty_partial,
    of_channel,
    plain_mapping,
    store_sum,
    sum_chunks,
    sum_mapping,
)
from .launch import block_size, scalar, state_type, stored, sum_partials, warp_size
from .neuron import (
    after_reset,
    charged,
    fires,
    part_of_charge,
    potential_gradient,
    spike_gradient,
)
from .regularizer import phi_derivative, phi_value
from .spike_pack import packed, unpacked
from .surrogate import surrogate_derivative

VECTOR_BYTES = 16  # of a thread and a step: the widest access there is

# A thread that kept the potentials of eight neurons for more steps than this would spill.
MOST_WIDE_STEPS = 10

# Steps whose loads are issued before the first is used, to hide the latency of memory.
AHEAD = tl.constexpr(4)
# KINDS, the choices that a kernel is compiled for, is read by position, and an element gets a name
# before it is passed on: Triton 3.6 passes `KINDS[9]` itself as a str, which no function takes.
SEGMENT = tl.constexpr(CHECKPOINT_EVERY)


@triton.jit
def places(
    neurons,
    inner,
    steps,
    positions,
    channels,
    channel_stride,
    KINDS: tl.constexpr,
    SPLIT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program's neurons: their numbers, those that exist, where they start in a sequence and its
    time stride, their channels, and the sizes.

    A state is [outer][inner], a sequence [outer][steps][inner]; without SPLIT outer is 1.
    """
    MAP: tl.constexpr = KINDS[9]
    TILE: tl.constexpr = KINDS[10]
    neuron, exists, channel = elements(
        neurons, positions, channels, channel_stride, MAP, TILE, INDEX, BLOCK
    )
    stride = scalar(inner, INDEX)
    start = neuron
    if SPLIT:
        start += neuron // stride * ((steps - 1) * stride)
    return neuron, exists, start, stride, channel, channels, neurons, steps


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
def neuron_rules(values, factor, threshold, v_reset, place, STATE: tl.constexpr, MAP: tl.constexpr):
    """factor, threshold and v_reset: of every channel where there are values [3, channels]."""
    if values is None:
        rules = (scalar(factor, STATE), scalar(threshold, STATE), scalar(v_reset, STATE))
    else:
        _, exists, _, _, channel, channels, _, _ = place
        rules = (
            of_channel(values, 0, channel, channels, exists, MAP),
            of_channel(values, 1, channel, channels, exists, MAP),
            of_channel(values, 2, channel, channels, exists, MAP),
        )
    return rules


@triton.jit
def norm_rules(stats, weight, bias, scale, place, STATE: tl.constexpr, MAP: tl.constexpr):
    """mean, a and b of the normalised input, then what is left of the mean, and 1 / deviation."""
    _, exists, _, _, channel, channels, _, _ = place
    mean = of_channel(stats, 0, channel, channels, exists, MAP)
    rest = of_channel(stats, 1, channel, channels, exists, MAP)
    inverse = of_channel(stats, 2, channel, channels, exists, MAP)
    a = inverse * scalar(scale, STATE)
    if weight is not None:
        a = a * of_channel(weight, 0, channel, channels, exists, MAP)
    b = -(rest * a)
    if bias is not None:
        b = of_channel(bias, 0, channel, channels, exists, MAP) - rest * a
    return mean, a, b, rest, inverse


@triton.jit
def normalised(x, norm):
    return (x - norm[0]) * norm[1] + norm[2]


@triton.jit
def gain_of(gains, t, place, KINDS: tl.constexpr):
    """The gain of step t, of [T] or of [T, channels]."""
    _, exists, _, _, channel, channels, _, _ = place
    if KINDS[7]:
        MAP: tl.constexpr = KINDS[9]
        gain = of_channel(gains, t, channel, channels, exists, MAP)
    else:
        gain = tl.load(gains + t)
    return gain


@triton.jit
def current(x, t, norm, gains, place, STATE: tl.constexpr, KINDS: tl.constexpr):
    """The input current of step t, from x at that step."""
    y = x.to(STATE)
    if norm is not None:
        y = normalised(y, norm)
    if gains is not None:
        y = y * gain_of(gains, t, place, KINDS)
    return y


@triton.jit
def store_bits(bits, plane, t, flags, place):
    """The flags of step t in a plane of bits [planes, steps, bytes]; neurons are in order."""
    neuron, exists, _, _, _, _, neurons, steps = place
    BYTES: tl.constexpr = flags.shape[0] // 8
    row = (scalar(neurons, neuron.dtype) + 7) // 8
    byte = tl.program_id(0).to(neuron.dtype) * BYTES + tl.arange(0, BYTES)
    tl.store(bits + (plane * steps + t) * row + byte, packed(flags & exists), mask=byte < row)


@triton.jit
def read_bits(bits, plane, t, place):
    """The flags of step t in a plane of bits."""
    neuron, exists, _, _, _, _, neurons, steps = place
    row = (scalar(neurons, neuron.dtype) + 7) // 8
    return unpacked(bits + (plane * steps + t) * row, neuron, exists)


@triton.jit
def forward_segment(
    v, total, first, tensors, place, rules, norm, KINDS: tl.constexpr, COUNT: tl.constexpr
):
    """Steps first .. first + COUNT - 1: v after them, and `total` with what they add to R."""
    x, gains, weight, growth, spikes, potential, counts, bits = tensors
    _, exists, start, stride, _, _, _, _ = place
    factor, threshold, v_reset, eps, surrogate_parameter = rules
    FORM: tl.constexpr = KINDS[0]
    DIVIDES: tl.constexpr = KINDS[12]
    RESET: tl.constexpr = KINDS[1]
    AT_THRESHOLD: tl.constexpr = KINDS[2]
    PHI: tl.constexpr = KINDS[3]
    CONSTANT: tl.constexpr = KINDS[6]
    PLANES: tl.constexpr = KINDS[8]
    xs: tl.tuple = ()
    for i in tl.static_range(COUNT):
        if CONSTANT:
            xs += (x,)
        elif i < AHEAD:
            xs += (tl.load(x + start + (first + i) * stride, mask=exists, other=0.0),)
    for i in tl.static_range(COUNT):
        # Loads go before the stores of an earlier step: behind them they could not be moved up.
        if not CONSTANT and i + AHEAD < COUNT:
            later = start + (first + i + AHEAD) * stride
            xs += (tl.load(x + later, mask=exists, other=0.0),)
        t = first + i
        index = start + t * stride
        y = current(xs[i], t, norm, gains, place, v.dtype, KINDS)
        h = charged(v, y, factor, threshold, v_reset, FORM, DIVIDES, AT_THRESHOLD)
        s = fires(h, threshold, AT_THRESHOLD)
        v = after_reset(h, s, threshold, v_reset, RESET)
        tl.store(spikes + index, tl.where(s, 1.0, 0.0).to(spikes.dtype.element_ty), mask=exists)
        if potential is not None:
            tl.store(potential + index, h, mask=exists)
        if weight is not None:
            phi = phi_value(h, s, read_number(growth, t, v.dtype), eps, PHI)
            total += tl.load(weight + t) * phi
        if counts is not None:
            count = tl.sum(tl.where(s & exists, 1, 0), 0)
            tl.store(counts + t * tl.num_programs(0) + tl.program_id(0), count)
        if bits is not None:
            store_bits(bits, 0, t, s, place)
            if PLANES == 2:
                inside = tl.abs(h - threshold) < 0.5 * surrogate_parameter
                store_bits(bits, 1, t, inside, place)
    return v, total


@triton.jit(do_not_specialize=["segments"])
def forward_kernel(
    x,
    v_init,
    weight,
    growth,
    values,
    stats,
    norm_weight,
    norm_bias,
    gains,
    spikes,
    potential,
    state,
    checkpoints,
    partial,
    counts,
    bits,
    neurons,
    inner,
    segments,
    positions,
    channels,
    channel_stride,
    factor: tl.float64,
    threshold: tl.float64,
    v_reset: tl.float64,
    eps: tl.float64,
    surrogate_parameter: tl.float64,
    scale: tl.float64,
    STATE: tl.constexpr,
    KINDS: tl.constexpr,
    LONG: tl.constexpr,
    LAST: tl.constexpr,
    SPLIT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Steps are `segments` whole segments, if LONG, and then LAST steps. None is no such tensor.

    `partial` has one sum a program, `counts` [steps, programs] one of spikes; `checkpoints`
    [segments, neurons] has v after each segment.
    """
    MAP: tl.constexpr = KINDS[9]
    steps = segments * SEGMENT + LAST
    place = places(
        neurons, inner, steps, positions, channels, channel_stride, KINDS, SPLIT, INDEX, BLOCK
    )
    neuron, exists, _, _, _, _, _, _ = place
    factor, threshold, v_reset = neuron_rules(values, factor, threshold, v_reset, place, STATE, MAP)
    rules = (factor, threshold, v_reset, scalar(eps, STATE), scalar(surrogate_parameter, STATE))
    norm = None
    if stats is not None:
        norm = norm_rules(stats, norm_weight, norm_bias, scale, place, STATE, MAP)
    if KINDS[6]:
        x = tl.load(x + neuron, mask=exists, other=0.0)
    tensors = (x, gains, weight, growth, spikes, potential, counts, bits)
    v = read_or_zero(v_init, neuron, exists, STATE, BLOCK)
    total = tl.zeros((BLOCK,), STATE)
    if LONG:
        for segment in range(segments):
            v, total = forward_segment(
                v, total, segment * SEGMENT, tensors, place, rules, norm, KINDS, SEGMENT
            )
            if checkpoints is not None:
                tl.store(checkpoints + scalar(segment, tl.int64) * neurons + neuron, v, mask=exists)
    v, total = forward_segment(v, total, steps - LAST, tensors, place, rules, norm, KINDS, LAST)
    if state is not None:
        tl.store(state + neuron, v, mask=exists)
    if partial is not None:
        here = tl.sum(tl.where(exists, total, 0.0), 0)
        tl.store(partial + tl.program_id(0), here.to(tl.float64))


COUNT_BLOCK = 1024


@triton.jit(do_not_specialize=["programs", "neurons"])
def rate_kernel(counts, programs, neurons, rate, BLOCK: tl.constexpr):
    """rate [T]: a program a step, from counts [T, programs]."""
    t = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, programs, BLOCK):
        here = first + index
        total += tl.load(counts + t * programs + here, mask=here < programs, other=0)
    mean = tl.sum(total, 0).to(tl.float64) / neurons.to(tl.float64)
    tl.store(rate + t, mean.to(rate.dtype.element_ty))


@triton.jit
def arriving(t, tensors, place, STATE: tl.constexpr, KINDS: tl.constexpr):
    """What the backward pass reads of step t: the spikes' gradient, x, and the two bits."""
    x, _, _, _, bits, grad_spikes, _, _ = tensors
    _, exists, start, stride, _, _, _, _ = place
    index = start + t * stride
    grad = tl.zeros(exists.shape, STATE)
    if grad_spikes is not None:
        grad = tl.load(grad_spikes + index, mask=exists, other=0.0)
    again = grad
    if KINDS[6]:
        again = x
    elif KINDS[11]:
        # With a policy unlike the first load's: merged with it, x would stay in registers.
        again = tl.load(x + index, mask=exists, other=0.0, eviction_policy="evict_first")
    fired = exists
    inside = exists
    if bits is not None:
        fired = read_bits(bits, 0, t, place)
        inside = read_bits(bits, 1, t, place)
    return grad, again, fired, inside


@triton.jit
def backward_segment(
    dv,
    sums,
    v,
    first,
    tensors,
    partials,
    place,
    rules,
    norm,
    means,
    scale,
    KINDS: tl.constexpr,
    COUNT: tl.constexpr,
    DETACH_LAST: tl.constexpr,
):
    """Steps first .. first + COUNT - 1 in reverse: what arrives at the potential before them, and
    `sums` with what they add.

    `v` is that potential, `dv` what arrives at the one after them.
    """
    x, gains, weight, growth, bits, _, grad_potential, grad_x = tensors
    to_neuron, to_affine, to_gains = partials
    _, exists, start, stride, _, channels, _, steps = place
    factor, threshold, v_reset, k, eps, surrogate_parameter = rules
    sum_x, sum_factor, sum_threshold, sum_reset, sum_weight, sum_bias = sums
    FORM: tl.constexpr = KINDS[0]
    DIVIDES: tl.constexpr = KINDS[12]
    INPUT_TOO: tl.constexpr = KINDS[13]
    RESET: tl.constexpr = KINDS[1]
    AT_THRESHOLD: tl.constexpr = KINDS[2]
    PHI: tl.constexpr = KINDS[3]
    DETACH: tl.constexpr = KINDS[4]
    SURROGATE: tl.constexpr = KINDS[5]
    CONSTANT: tl.constexpr = KINDS[6]
    MAP: tl.constexpr = KINDS[9]
    TILE: tl.constexpr = KINDS[10]
    xs: tl.tuple = ()
    for i in tl.static_range(COUNT):
        if CONSTANT:
            xs += (x,)
        elif bits is None:
            xs += (tl.load(x + start + (first + i) * stride, mask=exists, other=0.0),)
    # From the last step backwards, as they are used.
    read: tl.tuple = ()
    for i in tl.static_range(COUNT):
        if i < AHEAD:
            read += (arriving(first + COUNT - 1 - i, tensors, place, dv.dtype, KINDS),)
    before = v
    hs: tl.tuple = ()
    for i in tl.static_range(COUNT):
        if bits is None:
            y = current(xs[i], first + i, norm, gains, place, v.dtype, KINDS)
            h = charged(v, y, factor, threshold, v_reset, FORM, DIVIDES, AT_THRESHOLD)
            v = after_reset(h, fires(h, threshold, AT_THRESHOLD), threshold, v_reset, RESET)
            hs += (h,)
        else:
            hs += (v,)  # nothing reads them
    for i in tl.static_range(COUNT):
        if i + AHEAD < COUNT:
            read += (arriving(first + COUNT - 1 - i - AHEAD, tensors, place, dv.dtype, KINDS),)
        t = first + COUNT - 1 - i
        index = start + t * stride
        h = hs[COUNT - 1 - i]
        grad, again, fired, inside = read[i]
        ds = grad.to(dv.dtype)
        s = fires(h, threshold, AT_THRESHOLD) if bits is None else fired
        if weight is not None:
            scale_here = scale * tl.load(weight + t)
            if PHI == "spike":
                ds += scale_here
        ds = spike_gradient(
            h, ds, dv, threshold, v_reset, RESET, DETACH or (DETACH_LAST and i == 0)
        )
        if bits is None:
            sigma = surrogate_derivative(h - threshold, surrogate_parameter, SURROGATE)
        else:
            sigma = tl.where(inside, 1.0 / surrogate_parameter, 0.0)
        through = ds * sigma
        dh = potential_gradient(through, s, dv, RESET)
        if grad_potential is not None:
            dh += tl.load(grad_potential + index, mask=exists, other=0.0)
        if weight is not None and PHI != "spike":
            growth_here = read_number(growth, t, dv.dtype)
            dh += scale_here * phi_derivative(h, growth_here, eps, PHI)
        dy = dh * k if INPUT_TOO else dh
        if to_neuron is not None:
            to_reset = tl.where(s, dv, 0.0)
            sum_threshold -= through
            if RESET == "soft":
                sum_threshold -= to_reset
            if RESET == "hard":
                sum_reset += to_reset
            if FORM == "leaky" or FORM == "resting":
                sum_reset += dh * k
            if bits is None:
                earlier = before
                if COUNT - 1 - i > 0:
                    h_before = hs[COUNT - 2 - i]
                    s_before = fires(h_before, threshold, AT_THRESHOLD)
                    earlier = after_reset(h_before, s_before, threshold, v_reset, RESET)
                y = earlier
                if INPUT_TOO:
                    y = current(again, t, norm, gains, place, dv.dtype, KINDS)
                part = dh * part_of_charge(earlier, y, v_reset, FORM)
                sum_factor += -part if FORM == "resting" else part
                if FORM == "delayed":
                    late = fires(earlier, threshold, AT_THRESHOLD)
                    sum_threshold -= tl.where(late, dh, 0.0)
        dz = dy
        if gains is not None:
            dz = dy * gain_of(gains, t, place, KINDS)
            if to_gains is not None:
                z = normalised(again.to(dv.dtype), norm)
                store_sum(to_gains, t, steps, dy * z, exists, channels, MAP, TILE)
        if to_affine is not None:
            sum_weight += dz * deviation(again.to(dv.dtype), norm)
            sum_bias += dz
        if grad_x is not None:
            if CONSTANT:
                sum_x += dz
            else:
                dx = dz
                if norm is not None:
                    if means is not None:
                        dx -= means[1] + deviation(again.to(dv.dtype), norm) * means[0]
                    dx *= norm[1]
                tl.store(grad_x + index, stored(dx, grad_x.dtype.element_ty), mask=exists)
        dv = dh * k if FORM == "plain" or FORM == "delayed" else dh * (1.0 - k)
    return dv, (sum_x, sum_factor, sum_threshold, sum_reset, sum_weight, sum_bias)


@triton.jit
def deviation(x, norm):
    """x̂: how many deviations x is above the mean."""
    return ((x - norm[0]) - norm[3]) * norm[4]


@triton.jit(do_not_specialize=["segments"])
def backward_kernel(
    x,
    v_init,
    weight,
    growth,
    values,
    stats,
    norm_weight,
    norm_bias,
    gains,
    means,
    checkpoints,
    bits,
    grad_spikes,
    grad_state,
    grad_potential,
    grad_penalty,
    grad_x,
    grad_v_init,
    to_neuron,
    to_affine,
    to_gains,
    neurons,
    inner,
    segments,
    positions,
    channels,
    channel_stride,
    factor: tl.float64,
    k: tl.float64,
    threshold: tl.float64,
    v_reset: tl.float64,
    eps: tl.float64,
    surrogate_parameter: tl.float64,
    scale: tl.float64,
    STATE: tl.constexpr,
    KINDS: tl.constexpr,
    LONG: tl.constexpr,
    LAST: tl.constexpr,
    SPLIT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `forward_kernel`; `weight` is None where nothing arrives at the penalty.

    The last three tensors have a row of sums by channel a chunk: [chunks, 3, channels],
    [chunks, 2, channels] and [chunks, steps, channels].
    """
    DIVIDES: tl.constexpr = KINDS[12]
    CONSTANT: tl.constexpr = KINDS[6]
    MAP: tl.constexpr = KINDS[9]
    TILE: tl.constexpr = KINDS[10]
    steps = segments * SEGMENT + LAST
    place = places(
        neurons, inner, steps, positions, channels, channel_stride, KINDS, SPLIT, INDEX, BLOCK
    )
    neuron, exists, _, _, channel, _, _, _ = place
    factor, threshold, v_reset = neuron_rules(values, factor, threshold, v_reset, place, STATE, MAP)
    if values is None:
        k = scalar(k, STATE)
    elif DIVIDES:
        k = 1.0 / factor
    else:
        k = factor
    rules = (
        factor,
        threshold,
        v_reset,
        k,
        scalar(eps, STATE),
        scalar(surrogate_parameter, STATE),
    )
    norm = None
    if stats is not None:
        norm = norm_rules(stats, norm_weight, norm_bias, scale, place, STATE, MAP)
    subtracted = None
    if means is not None:
        subtracted = (
            of_channel(means, 0, channel, channels, exists, MAP),
            of_channel(means, 1, channel, channels, exists, MAP),
        )
    if CONSTANT and bits is None:
        x = tl.load(x + neuron, mask=exists, other=0.0)
    tensors = (x, gains, weight, growth, bits, grad_spikes, grad_potential, grad_x)
    partials = (to_neuron, to_affine, to_gains)
    penalty_scale = read_number(grad_penalty, 0, STATE) / scalar(neurons, STATE)
    dv = read_or_zero(grad_state, neuron, exists, STATE, BLOCK)
    v = read_or_zero(v_init, neuron, exists, STATE, BLOCK)
    zero = tl.zeros((BLOCK,), STATE)
    sums = (zero, zero, zero, zero, zero, zero)
    last_v = v
    if LONG and bits is None:
        before = checkpoints + scalar(segments - 1, tl.int64) * neurons
        last_v = tl.load(before + neuron, mask=exists, other=0.0)
    # Nothing arrives at an unused last state; times an infinite potential it must stay nothing.
    dv, sums = backward_segment(
        dv,
        sums,
        last_v,
        steps - LAST,
        tensors,
        partials,
        place,
        rules,
        norm,
        subtracted,
        penalty_scale,
        KINDS,
        LAST,
        grad_state is None,
    )
    if LONG:
        for i in range(segments):
            segment = segments - 1 - i
            segment_v = v
            if bits is None and segment > 0:
                before = checkpoints + scalar(segment - 1, tl.int64) * neurons
                segment_v = tl.load(before + neuron, mask=exists, other=0.0)
            dv, sums = backward_segment(
                dv,
                sums,
                segment_v,
                segment * SEGMENT,
                tensors,
                partials,
                place,
                rules,
                norm,
                subtracted,
                penalty_scale,
                KINDS,
                SEGMENT,
                False,
            )
    if grad_v_init is not None:
        tl.store(grad_v_init + neuron, dv, mask=exists)
    sum_x, sum_factor, sum_threshold, sum_reset, sum_weight, sum_bias = sums
    if CONSTANT and grad_x is not None:
        if norm is not None:
            if subtracted is not None:
                shift = subtracted[1] + deviation(x.to(STATE), norm) * subtracted[0]
                sum_x -= scalar(steps, STATE) * shift
            sum_x *= norm[1]
        tl.store(grad_x + neuron, stored(sum_x, grad_x.dtype.element_ty), mask=exists)
    if to_neuron is not None:
        if DIVIDES:
            sum_factor *= -(k * k)
        store_sum(to_neuron, 0, 3, sum_factor, exists, channels, MAP, TILE)
        store_sum(to_neuron, 1, 3, sum_threshold, exists, channels, MAP, TILE)
        store_sum(to_neuron, 2, 3, sum_reset, exists, channels, MAP, TILE)
    if to_affine is not None:
        store_sum(to_affine, 0, 2, sum_weight, exists, channels, MAP, TILE)
        store_sum(to_affine, 1, 2, sum_bias, exists, channels, MAP, TILE)


def neurons_a_thread(x: Tensor, parked: int, more: bool, busy: bool) -> int:
    """As many as a vector of x holds. Of half precision that is eight, which a thread has registers
    for where it keeps few potentials, `parked`, and does nothing `more` with them. Where it is
    `busy` with sums and normalisation it has them for half a vector."""
    wide = parked <= MOST_WIDE_STEPS and not more
    least = 8 if busy else 2 if wide else 4
    return VECTOR_BYTES // max(x.element_size(), least)


class Launch:
    """The grid and the settings that both directions share, for a dense x that is not empty."""

    def __init__(
        self, x: Tensor, tensors: LIFTensors, options: LIFOptions, shape: LIFShape
    ) -> None:
        outer, steps, inner, channels, channel_stride = shape
        self.x, self.tensors, self.options = x, tensors, options
        self.neurons = outer * inner
        self.channels = channels
        self.channel_stride = channel_stride if channels > 1 else 1
        # Without a time stride all neurons are one run.
        self.inner = self.neurons if steps == 1 else inner
        self.segments, last = divmod(steps - 1, CHECKPOINT_EVERY)
        self.steps, self.last = steps, last + 1
        self.factor = 1 / options.decay if options.divides else options.decay

    @property
    def sizes(self) -> tuple[int, ...]:
        positions = self.neurons // self.channels
        channels = (positions, self.channels, self.channel_stride)
        return self.neurons, self.inner, self.segments, *channels

    def block(self, parked: int, more: bool, busy: bool = False) -> int:
        more = more or self.tensors.neuron is not None or self.tensors.stats is not None
        return block_size(WARPS * warp_size() * neurons_a_thread(self.x, parked, more, busy))

    def settings(self, mapping: Mapping, reads_x_again: bool = False) -> dict[str, Any]:
        options, gains = self.options, self.tensors.gains
        # Half precision shares every kernel's arithmetic: no FMA where a spike is decided.
        return {
            "STATE": state_type(self.x.dtype),
            "KINDS": (
                CHARGES[options.charge].form,
                options.reset,
                options.fire_at_threshold,
                options.phi,
                options.detach_reset,
                options.surrogate,
                options.steps > 0,
                gains is not None and gains.ndim == 2,
                options.bits,
                mapping.name,
                mapping.tile,
                reads_x_again,
                options.divides,
                CHARGES[options.charge].scales_input,
            ),
            "LONG": self.segments > 0,
            "LAST": self.last,
            "SPLIT": self.inner != self.neurons,
            "INDEX": tl.int32 if self.neurons * self.steps + mapping.block < 2**31 else tl.int64,
            "BLOCK": mapping.block,
            "num_warps": WARPS,
            "enable_fp_fusion": False,
        }


def growth_of(options: LIFOptions, steps: int, x: Tensor) -> MaybeTensor:
    """expm1(δt) of every step [T], held at 2⁶⁰, where φ uses it; made on the device."""
    if options.phi != "trt":
        return None
    t = torch.arange(steps, dtype=torch.float64, device=x.device)
    growth = (t * options.delta).clamp_(max=LARGEST_EXPONENT).expm1_()
    return growth.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def lif_forward(
    x: Tensor, tensors: LIFTensors, for_backward: bool, options: LIFOptions
) -> LIFResults:
    x, tensors, results = lif_forward_tensors(x, tensors, options, for_backward)
    spikes, state, potential, penalty, rate, checkpoints, bits = results
    v_init, weight, values, stats, norm_weight, norm_bias, gains = tensors
    if x.numel() == 0:
        if state is not None:
            state.zero_() if v_init is None else state.copy_(v_init)
        for result in (penalty, rate):
            if result is not None:
                result.zero_()
        return results
    shape = lif_shape(x, tensors, options)
    more = weight is not None or potential is not None or rate is not None or bits is not None
    launch = Launch(x, tensors, options, shape)
    mapping = plain_mapping(launch.neurons, launch.channels, launch.block(0, more))
    partial = growth = counts = None
    if penalty is not None:
        partial = x.new_empty(mapping.programs, dtype=torch.float64)
        growth = growth_of(options, launch.steps, x)
    if rate is not None:
        counts = x.new_empty((launch.steps, mapping.programs), dtype=torch.int32)
    with torch.cuda.device_of(x):
        forward_kernel[(mapping.programs,)](
            x,
            v_init,
            weight,
            growth,
            values,
            stats,
            norm_weight,
            norm_bias,
            gains,
            spikes,
            potential,
            state,
            checkpoints,
            partial,
            counts,
            bits,
            *launch.sizes,
            launch.factor,
            options.threshold,
            options.v_reset,
            options.eps,
            options.surrogate_parameter,
            options.scale,
            **launch.settings(mapping),
        )
        if penalty is not None and partial is not None:
            sum_partials(partial, 1 / launch.neurons, penalty)
        if rate is not None:
            rate_kernel[(launch.steps,)](
                counts,
                mapping.programs,
                launch.neurons,
                rate,
                BLOCK=COUNT_BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
    return results


def lif_backward(
    x: Tensor,
    tensors: LIFTensors,
    checkpoints: MaybeTensor,
    bits: MaybeTensor,
    means: MaybeTensor,
    grads: LIFGrads,
    wanted: LIFWanted,
    options: LIFOptions,
) -> LIFGradients:
    x, tensors, checkpoints, grads, results = lif_backward_tensors(
        x, tensors, checkpoints, grads, wanted, options
    )
    if x.numel() == 0:
        if results.v_init is not None:
            results.v_init.zero_() if grads.state is None else results.v_init.copy_(grads.state)
        for result in (results.neuron, results.affine, results.gains):
            if result is not None:
                result.zero_()
        return results
    shape = lif_shape(x, tensors, options)
    launch = Launch(x, tensors, options, shape)
    reads = (checkpoints, bits, grads)
    with torch.cuda.device_of(x):
        if results.x is None or not options.batch or tensors.stats is None:
            run_backward(launch, *reads, None, results)
        elif means is not None:
            run_backward(launch, *reads, means, results)
        else:
            affine = results.affine
            if affine is None:
                affine = torch.empty_like(tensors.stats[:2])
            run_backward(launch, *reads, None, results._replace(x=None, affine=affine))
            means = affine / (launch.steps * launch.neurons // launch.channels)
            run_backward(launch, *reads, means, LIFGradients(results.x))
    return results


def run_backward(
    launch: Launch,
    checkpoints: MaybeTensor,
    bits: MaybeTensor,
    grads: LIFGrads,
    means: MaybeTensor,
    results: LIFGradients,
) -> None:
    """Writes those results that are there, in one pass over the neurons."""
    x, tensors, options = launch.x, launch.tensors, launch.options
    v_init, weight, values, stats, norm_weight, norm_bias, gains = tensors
    growth = None
    if grads.penalty is None:
        weight = None
    else:
        growth = growth_of(options, launch.steps, x)
    sums = (results.neuron, results.affine, results.gains)
    has_sums = any(result is not None for result in sums)
    parked = 0 if bits is not None else min(launch.steps, CHECKPOINT_EVERY)
    more = grads.penalty is not None or grads.potential is not None or bits is not None
    busy = stats is not None or (has_sums and parked > MOST_WIDE_STEPS)
    sizes, block = (launch.neurons, launch.channels), launch.block(parked, more, busy)
    if has_sums:
        mapping = sum_mapping(*sizes, launch.channel_stride, block)
    else:
        mapping = plain_mapping(*sizes, block)
    partials = [None if result is None else empty_partial(mapping, result) for result in sums]
    reads_x_again = bits is None and (
        means is not None
        or results.affine is not None
        or results.gains is not None
        or (results.neuron is not None and CHARGES[options.charge].scales_input)
    )
    backward_kernel[(mapping.programs,)](
        x,
        v_init,
        weight,
        growth,
        values,
        stats,
        norm_weight,
        norm_bias,
        gains,
        means,
        checkpoints,
        bits,
        grads.spikes,
        grads.state,
        grads.potential,
        grads.penalty,
        results.x,
        results.v_init,
        *partials,
        *launch.sizes,
        launch.factor,
        options.decay,
        options.threshold,
        options.v_reset,
        options.eps,
        options.surrogate_parameter,
        options.scale,
        **launch.settings(mapping, reads_x_again),
    )
    for partial, result in zip(partials, sums, strict=True):
        if partial is not None and result is not None:
            sum_chunks(partial, result)
