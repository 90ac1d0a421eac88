"""How tensors reach the kernels of every device, and what those write into.

Sequences reach the kernels dense, whatever the order of their dimensions in memory, as
[outer][steps][inner]. A tensor that is not dense is copied first.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import state_dtype
from ..options import (
    LIFGradients,
    LIFGrads,
    LIFOptions,
    LIFResults,
    LIFTensors,
    LIFWanted,
    LossOptions,
)

MaybeTensor = Tensor | None

# Steps from one kept potential to the next: a GPU's backward pass parks this many potentials at
# once, and starts each such segment from the potential that the forward pass left before it.
CHECKPOINT_EVERY = 16


def steps_of(x: Tensor, options: LIFOptions) -> int:
    return options.steps or x.shape[options.time_dim]


def empty_state(x: Tensor, options: LIFOptions) -> Tensor:
    """An empty state for x: its shape without time, its order in memory, the state dtype."""
    dtype, time_dim = state_dtype(x.dtype), options.time_dim
    if options.steps:
        return torch.empty_like(x, dtype=dtype)
    if x.shape[time_dim] == 0:
        return x.new_empty(x.shape[:time_dim] + x.shape[time_dim + 1 :], dtype=dtype)
    return torch.empty_like(x.select(time_dim, 0), dtype=dtype)


def empty_sequence(x: Tensor, options: LIFOptions, dtype: torch.dtype | None = None) -> Tensor:
    """An empty sequence for a dense x: like x, or like a constant x with time put in."""
    if not options.steps:
        return torch.empty_like(x, dtype=dtype)
    steps, time_dim = options.steps, options.time_dim
    inner = math.prod(x.shape[time_dim:])
    shape = (*x.shape[:time_dim], steps, *x.shape[time_dim:])
    before = (stride * steps for stride in x.stride()[:time_dim])
    strides = (*before, inner, *x.stride()[time_dim:])
    return torch.empty_strided(shape, strides, dtype=dtype or x.dtype, device=x.device)


def has_checkpoints(x: Tensor, options: LIFOptions) -> bool:
    """Whether a backward pass of x starts from checkpoints."""
    if options.backend == "cpu" or options.bits == 2:
        return False
    return steps_of(x, options) > CHECKPOINT_EVERY


def empty_checkpoints(x: Tensor, options: LIFOptions) -> Tensor | None:
    """Empty memory for the potentials before steps 16, 32, ...: segments - 1 states of x.

    None where the backward pass needs none: on the CPU, for a sequence of one segment, and where it
    has bits.
    """
    if not has_checkpoints(x, options):
        return None
    state = empty_state(x, options)
    count = -(-steps_of(x, options) // CHECKPOINT_EVERY) - 1
    return state.new_empty_strided((count, *state.shape), (state.numel(), *state.stride()))


def empty_bits(x: Tensor, options: LIFOptions) -> Tensor | None:
    """Empty memory for the planes of bits, where the options ask for any."""
    if not options.bits:
        return None
    steps = steps_of(x, options)
    neurons = x.numel() if options.steps else x.numel() // max(1, steps)
    return x.new_empty((options.bits, steps, -(-neurons // 8)), dtype=torch.uint8)


def is_dense(x: Tensor) -> bool:
    """True if x fills its memory without gaps or overlaps, in any order of dimensions."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def dense(x: Tensor) -> Tensor:
    return x if is_dense(x) else torch.empty_like(x).copy_(x)


def dense_input(x: Tensor, options: LIFOptions) -> Tensor:
    """x dense; where it is constant, with what comes after time innermost in memory."""
    if x.is_contiguous():
        return x
    x = dense(x)
    if options.steps:
        within = tuple(zip(x.shape, x.stride(), strict=True))[options.time_dim :]
        if sum((size - 1) * stride for size, stride in within) >= math.prod(s for s, _ in within):
            return x.contiguous()
    return x


def in_layout_of(x: Tensor, value: Tensor | None) -> Tensor | None:
    """`value` in the memory order of x (they have one shape): gradients arrive in any layout."""
    if value is None or value.stride() == x.stride():
        return value
    return torch.empty_like(x, dtype=value.dtype).copy_(value)


def fold(x: Tensor, time_dim: int) -> tuple[int, int, int]:
    """The sizes (outer, steps, inner) of a dense x."""
    steps = x.shape[time_dim]
    if x.is_contiguous():
        return math.prod(x.shape[:time_dim]), steps, math.prod(x.shape[time_dim + 1 :])
    # In any dense order, what lies within a timestep is as large as the step's stride.
    inner = x.stride(time_dim) if steps > 1 else x.numel()
    return x.numel() // (steps * inner), steps, inner


class LIFShape(NamedTuple):
    """Sizes of a sequence in memory, and the channel of neuron n of a state [outer][inner], which
    is n // channel_stride % channels."""

    outer: int
    steps: int
    inner: int
    channels: int
    channel_stride: int


def lif_shape(x: Tensor, tensors: LIFTensors, options: LIFOptions) -> LIFShape:
    """The sizes of what kernels run over, for a dense x (any sequence where it has time)."""
    if options.steps:
        inner = math.prod(x.shape[options.time_dim :])
        sizes = (x.numel() // max(1, inner), options.steps, inner)
    else:
        sizes = fold(x, options.time_dim)
    channels = tensors.channels
    if channels == 1:
        return LIFShape(*sizes, 1, max(1, sizes[0] * sizes[2]))
    dim = options.channel_dim
    if x.numel() == 0:  # its strides mean nothing; the state of no steps is contiguous
        state = (
            x.shape
            if options.steps
            else (*x.shape[: options.time_dim], *x.shape[options.time_dim + 1 :])
        )
        return LIFShape(*sizes, channels, max(1, math.prod(state[dim + 1 :])))
    stride = x.stride(dim if options.steps or dim < options.time_dim else dim + 1)
    if not options.steps and stride > x.stride(options.time_dim):
        stride //= max(1, x.shape[options.time_dim])
    return LIFShape(*sizes, channels, stride)


def lif_forward_tensors(
    x: Tensor, tensors: LIFTensors, options: LIFOptions, for_backward: bool
) -> tuple[Tensor, LIFTensors, LIFResults]:
    """What the forward pass reads, and what it writes, still empty."""
    if not x.is_contiguous():
        x = dense_input(x, options)
    dtype = state_dtype(x.dtype)
    steps = steps_of(x, options)
    if tensors.v_init is not None:
        tensors = tensors._replace(v_init=in_layout_of(empty_state(x, options), tensors.v_init))
    return (
        x,
        tensors,
        LIFResults(
            empty_sequence(x, options),
            empty_state(x, options) if options.return_state else None,
            empty_sequence(x, options, dtype) if options.return_potential else None,
            None if tensors.penalty_weight is None else x.new_empty((), dtype=dtype),
            x.new_empty(steps, dtype=dtype) if options.statistics else None,
            empty_checkpoints(x, options) if for_backward else None,
            empty_bits(x, options),
        ),
    )


def lif_backward_tensors(
    x: Tensor,
    tensors: LIFTensors,
    checkpoints: Tensor | None,
    grads: LIFGrads,
    wanted: LIFWanted,
    options: LIFOptions,
) -> tuple[Tensor, LIFTensors, MaybeTensor, LIFGrads, LIFGradients]:
    """What the backward pass reads, and what it writes, still empty.

    `x` is the input, or where only bits were kept, anything of its shape and order in memory.
    """
    if not x.is_contiguous():
        x = dense_input(x, options)
    dtype = state_dtype(x.dtype)
    if checkpoints is not None:
        # Whoever kept x, a hook of the user's among them, may bring it back in another order.
        expected = empty_checkpoints(x, options)
        if expected is not None and checkpoints.stride() != expected.stride():
            checkpoints = expected.copy_(checkpoints)
    grad_spikes, grad_state, grad_potential, grad_penalty = grads
    grad_v_init = None
    if tensors.v_init is not None or grad_state is not None:
        state = empty_state(x, options)
        grad_v_init = state if wanted.v_init else None
        tensors = tensors._replace(v_init=in_layout_of(state, tensors.v_init))
        grad_state = in_layout_of(state, grad_state)
    sequence = x
    if options.steps and (grad_spikes is not None or grad_potential is not None):
        sequence = empty_sequence(x, options)
    if grad_spikes is not None and grad_spikes.stride() != sequence.stride():
        grad_spikes = in_layout_of(sequence, grad_spikes)
    if grad_potential is not None:
        grad_potential = in_layout_of(sequence, grad_potential)
    channels = tensors.channels
    gradients = LIFGradients(
        torch.empty_like(x) if wanted.x else None,
        grad_v_init,
        x.new_empty((3, channels), dtype=dtype) if wanted.neuron else None,
        x.new_empty((2, channels), dtype=dtype) if wanted.affine else None,
        x.new_empty((steps_of(x, options), channels), dtype=dtype) if wanted.gains else None,
    )
    grads = LIFGrads(grad_spikes, grad_state, grad_potential, grad_penalty)
    return x, tensors, checkpoints, grads, gradients


def channel_view(x: Tensor, channel_dim: int) -> tuple[int, int, int]:
    """A dense x as [before][channels][within] in memory."""
    channels = x.shape[channel_dim]
    within = x.stride(channel_dim) if channels > 1 else max(1, x.numel())
    if channels == 1 or x.numel() == 0:
        return 1, channels, x.numel() // max(1, channels)
    return x.numel() // (channels * within), channels, within


def sum_dtype(params: Sequence[Tensor]) -> torch.dtype:
    """The dtype in which a sum over all of `params` is returned."""
    double = any(p.dtype == torch.float64 for p in params)
    return torch.float64 if double else torch.float32


def accumulation(
    params: Sequence[Tensor], grads: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(parameter, target, gradient): both first dense, of one dtype and in one order of memory.

    A target that is not the gradient itself is a tensor of zeros, to be added to the gradient. No
    two targets share memory: a gradient that comes again gets such a tensor.
    """
    seen: set[int] = set()
    for p, g in zip(params, grads, strict=True):
        target = g
        again = g.data_ptr() in seen
        seen.add(g.data_ptr())
        if again or g.dtype != p.dtype or not is_dense(p) or p.stride() != g.stride():
            p = dense(p.to(torch.promote_types(p.dtype, g.dtype)))
            target = torch.zeros_like(p)
        yield p, target, g


def loss_tensors(
    logits: Tensor, target: Tensor, class_weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Logits with neighbouring classes, class indices or probabilities, and class weights."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    dtype = state_dtype(logits.dtype)
    indices = probabilities = None
    if target.is_floating_point():
        probabilities = target.to(dtype).contiguous()
    else:
        indices = target.contiguous()
    if class_weight is not None:
        class_weight = class_weight.to(dtype).contiguous()
    return logits, indices, probabilities, class_weight


def for_loss_gradient(logits: Tensor) -> Tensor:
    """Logits as the gradient is written: without overlaps, and with neighbouring classes."""
    logits = dense(logits)
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def loss_rows(logits: Tensor, options: LossOptions) -> tuple[int, int]:
    """The sizes (steps, batch) of logits."""
    return logits.shape[options.time_dim], logits.shape[1 - options.time_dim]
