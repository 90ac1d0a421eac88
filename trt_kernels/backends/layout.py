"""How tensors reach the kernels of every device, and what those write into.

Sequences reach the kernels dense, whatever the order of their dimensions in memory, as
[outer][steps][inner]. A tensor that is not dense is copied first.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..checks import state_dtype
from ..options import LIFOptions, LossOptions

MaybeTensor = Tensor | None

# Steps from one kept potential to the next: a GPU's backward pass parks this many potentials at
# once, and starts each such segment from the potential that the forward pass left before it.
CHECKPOINT_EVERY = 16


def empty_state(x: Tensor, time_dim: int) -> Tensor:
    """An empty state for x: its shape without time, its order in memory, the state dtype."""
    if x.shape[time_dim] == 0:
        shape = x.shape[:time_dim] + x.shape[time_dim + 1 :]
        return x.new_empty(shape, dtype=state_dtype(x.dtype))
    return torch.empty_like(x.select(time_dim, 0), dtype=state_dtype(x.dtype))


def empty_checkpoints(x: Tensor, options: LIFOptions) -> Tensor | None:
    """Empty memory for the potentials before steps 16, 32, ...: segments - 1 states of x.

    None where the backward pass needs none: on the CPU, and for a sequence of one segment.
    """
    steps = x.shape[options.time_dim]
    if options.backend == "cpu" or steps <= CHECKPOINT_EVERY:
        return None
    state = empty_state(x, options.time_dim)
    count = -(-steps // CHECKPOINT_EVERY) - 1
    return state.new_empty_strided((count, *state.shape), (state.numel(), *state.stride()))


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


def in_layout_of(x: Tensor, value: Tensor | None) -> Tensor | None:
    """`value` in the memory order of x (they have one shape): gradients arrive in any layout."""
    if value is None or value.stride() == x.stride():
        return value
    return torch.empty_like(x, dtype=value.dtype).copy_(value)


def fold(x: Tensor, time_dim: int) -> tuple[int, int, int]:
    """The sizes (outer, steps, inner) of a dense x."""
    steps = x.shape[time_dim]
    if x.is_contiguous():
        inner = 1
        for size in x.shape[time_dim + 1 :]:
            inner *= size
    else:
        # In any dense order, what lies within a timestep is as large as the step's stride.
        inner = x.stride(time_dim) if steps > 1 else x.numel()
    return x.numel() // max(1, steps * inner), steps, inner


def lif_forward_tensors(
    x: Tensor, v_init: Tensor | None, options: LIFOptions, penalized: bool, for_backward: bool
) -> tuple[Tensor, MaybeTensor, Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]:
    """What the forward pass reads, x and v_init, and what it writes: spikes, and where they are
    wanted state, potential, penalty and checkpoints."""
    time_dim = options.time_dim
    if not x.is_contiguous():
        x = dense(x)
    state = potential = penalty = checkpoints = None
    if options.return_state:
        state = empty_state(x, time_dim)
    if options.return_potential:
        potential = torch.empty_like(x, dtype=state_dtype(x.dtype))
    if penalized:
        penalty = x.new_empty((), dtype=state_dtype(x.dtype))
    if for_backward:
        checkpoints = empty_checkpoints(x, options)
    if v_init is not None:
        v_init = in_layout_of(empty_state(x, time_dim), v_init)
    return x, v_init, torch.empty_like(x), state, potential, penalty, checkpoints


def lif_backward_tensors(
    x: Tensor,
    v_init: Tensor | None,
    checkpoints: Tensor | None,
    grads: Sequence[Tensor | None],
    needs_v_init: bool,
    options: LIFOptions,
) -> tuple[
    tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor],
    tuple[Tensor, MaybeTensor],
]:
    """What the backward pass reads, x, v_init, checkpoints and the gradients of spikes, state and
    potential, and what it writes: the gradients of x and, where needed, of v_init."""
    grad_spikes, grad_state, grad_potential = grads
    if not x.is_contiguous():
        x = dense(x)
    if checkpoints is not None:
        # Whoever kept x, a hook of the user's among them, may bring it back in another order.
        expected = empty_checkpoints(x, options)
        if expected is not None and checkpoints.stride() != expected.stride():
            checkpoints = expected.copy_(checkpoints)
    grad_v_init = None
    if v_init is not None or grad_state is not None:
        state = empty_state(x, options.time_dim)
        grad_v_init = state if needs_v_init else None
        v_init, grad_state = in_layout_of(state, v_init), in_layout_of(state, grad_state)
    if grad_spikes is not None and grad_spikes.stride() != x.stride():
        grad_spikes = in_layout_of(x, grad_spikes)
    if grad_potential is not None:
        grad_potential = in_layout_of(x, grad_potential)
    reads = (x, v_init, checkpoints, grad_spikes, grad_state, grad_potential)
    return reads, (torch.empty_like(x), grad_v_init)


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
