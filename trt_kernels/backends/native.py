"""The compiled backends, "cpu" and "cuda": plain tensors in, plain tensors out, no autograd.

Sequences reach the kernels as dense [outer][steps][inner], whatever the order of their dimensions
in memory. A tensor that is not dense is copied first.
"""

import importlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..checks import state_dtype
from ..options import LIFOptions, LossOptions, PenaltyOptions

_C: Any = None
_import_error: str | None = None
try:
    _C = importlib.import_module("trt_kernels._C")
except ImportError as error:
    _import_error = f"the compiled module is missing or does not load: {error}"

if _C is not None:
    DTYPES = {
        torch.float32: _C.DType.float32,
        torch.float64: _C.DType.float64,
        torch.float16: _C.DType.float16,
        torch.bfloat16: _C.DType.bfloat16,
    }


def why_no_cpu() -> str | None:
    return _import_error


@lru_cache(maxsize=1)
def why_no_cuda() -> str | None:
    if _C is None:
        return _import_error
    missing = _C.build_info()["cuda_missing"]
    if missing is not None:
        return f"compiled without CUDA: {missing}"
    devices, reason = _C.cuda_devices()
    if not devices:
        return f"no CUDA device: {reason}"
    if not torch.cuda.is_available():
        return "this PyTorch is built without CUDA"
    return None


def empty_state(x: Tensor, time_dim: int) -> Tensor:
    """An empty state for x: its shape without time, its order in memory, the state dtype."""
    if x.shape[time_dim] == 0:
        shape = x.shape[:time_dim] + x.shape[time_dim + 1 :]
        return x.new_empty(shape, dtype=state_dtype(x.dtype))
    return torch.empty_like(x.select(time_dim, 0), dtype=state_dtype(x.dtype))


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


def sequence(x: Tensor, time_dim: int) -> tuple[Any, tuple[int, ...], int]:
    """What kernels need of a dense x: dtype, sizes in memory order, which of them is time."""
    if x.is_contiguous():
        return DTYPES[x.dtype], x.shape, time_dim
    steps = x.shape[time_dim]
    # In any dense order, what lies within a timestep is as large as the step's stride.
    inner = x.stride(time_dim) if steps > 1 else x.numel()
    return DTYPES[x.dtype], (x.numel() // (steps * inner), steps, inner), 1


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=4096)  # bounded: an annealed threshold makes new settings at every step
def lif_handle(options: LIFOptions) -> Any:
    """The compiled settings of these options, made once."""
    return _C.LIF(
        charge=options.charge,
        reset=options.reset,
        surrogate=options.surrogate,
        phi=options.phi,
        decay=options.decay,
        tau=1 / options.decay if options.decay else math.inf,
        threshold=options.threshold,
        v_reset=options.v_reset,
        detach_reset=options.detach_reset,
        fire_at_threshold=options.fire_at_threshold,
        surrogate_parameter=options.surrogate_parameter,
        delta=options.delta,
        eps=options.eps,
    )


def launch_cuda(handle: Any, direction: str, x: Tensor, arguments: tuple[Any, ...]) -> None:
    """Runs `handle`'s kernel of a direction on x's device, on its current stream."""
    size = getattr(handle, f"cuda_{direction}_workspace")(*arguments[:3])
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    run = getattr(handle, f"cuda_{direction}")
    run(*arguments, workspace.data_ptr(), x.get_device(), stream)


def lif_forward(
    x: Tensor, v_init: Tensor | None, weight: Tensor | None, options: LIFOptions
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Spikes, state, potential and regularizer; what `options` does not ask for is None."""
    time_dim = options.time_dim
    if not x.is_contiguous():
        x = dense(x)
    spikes = torch.empty_like(x)
    state = potential = penalty = None
    if options.return_state:
        state = empty_state(x, time_dim)
    if options.return_potential:
        potential = torch.empty_like(x, dtype=state_dtype(x.dtype))
    if weight is not None:
        penalty = x.new_empty((), dtype=state_dtype(x.dtype))
    if v_init is not None:
        v_init = in_layout_of(empty_state(x, time_dim), v_init)
    arguments = (  # addresses written out: a function for them costs a small call a microsecond
        *sequence(x, time_dim),
        x.data_ptr(),
        0 if v_init is None else v_init.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        spikes.data_ptr(),
        0 if potential is None else potential.data_ptr(),
        0 if state is None else state.data_ptr(),
        0 if penalty is None else penalty.data_ptr(),
    )
    handle = lif_handle(options)
    if x.is_cpu:
        handle.cpu_forward(*arguments, torch.get_num_threads())
    else:
        launch_cuda(handle, "forward", x, arguments)
    return spikes, state, potential, penalty


class PlainLIF:
    """`lif` of a contiguous CPU tensor into spikes alone, bound once for its options and dtype.

    The same kernels as `lif_forward` and `lif_backward`, which decide all of this at every call: on
    a small tensor that costs as much as the rest.
    """

    def __init__(self, options: LIFOptions, dtype: torch.dtype) -> None:
        handle = lif_handle(options)
        self.options = options
        self._run_forward, self._run_backward = handle.cpu_forward, handle.cpu_backward
        self._dtype, self._time_dim = DTYPES[dtype], options.time_dim

    def forward(self, x: Tensor) -> Tensor:
        spikes = torch.empty_like(x)
        tensors = (x.data_ptr(), 0, 0, spikes.data_ptr(), 0, 0, 0)
        self._run_forward(self._dtype, x.shape, self._time_dim, *tensors, torch.get_num_threads())
        return spikes

    def backward(self, x: Tensor, grad: Tensor) -> Tensor:
        grad_x = torch.empty_like(x)
        tensors = (x.data_ptr(), 0, 0, grad.data_ptr(), 0, 0, 0, grad_x.data_ptr(), 0)
        self._run_backward(self._dtype, x.shape, self._time_dim, *tensors, torch.get_num_threads())
        return grad_x


def lif_backward(
    x: Tensor,
    v_init: Tensor | None,
    weight: Tensor | None,
    grads: Sequence[Tensor | None],
    needs_v_init: bool,
    options: LIFOptions,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and v_init from those of spikes, state, potential, penalty; None is zero."""
    grad_spikes, grad_state, grad_potential, grad_penalty = grads
    time_dim = options.time_dim
    if not x.is_contiguous():
        x = dense(x)
    grad_x = torch.empty_like(x)
    grad_v_init = None
    if v_init is not None or grad_state is not None:
        state = empty_state(x, time_dim)
        grad_v_init = state if needs_v_init else None
        v_init, grad_state = in_layout_of(state, v_init), in_layout_of(state, grad_state)
    if grad_spikes is not None and grad_spikes.stride() != x.stride():
        grad_spikes = in_layout_of(x, grad_spikes)
    if grad_potential is not None:
        grad_potential = in_layout_of(x, grad_potential)
    arguments = (
        *sequence(x, time_dim),
        x.data_ptr(),
        0 if v_init is None else v_init.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if grad_spikes is None else grad_spikes.data_ptr(),
        0 if grad_potential is None else grad_potential.data_ptr(),
        0 if grad_state is None else grad_state.data_ptr(),
        0 if grad_penalty is None else grad_penalty.data_ptr(),
        grad_x.data_ptr(),
        0 if grad_v_init is None else grad_v_init.data_ptr(),
    )
    handle = lif_handle(options)
    if x.is_cpu:
        handle.cpu_backward(*arguments, torch.get_num_threads())
    else:
        launch_cuda(handle, "backward", x, arguments)
    return grad_x, grad_v_init


LARGEST_EXPONENT = math.log(2.0**60)


@lru_cache(maxsize=64)
def penalty_handle(options: PenaltyOptions) -> Any:
    growth = []
    for t in range(options.steps):
        # A term divided by more is nothing; left out, it can neither overflow nor cost time.
        if options.delta * t > LARGEST_EXPONENT:
            break
        growth.append(math.expm1(options.delta * t))
    return _C.Penalty(growth=growth, scale=options.weight / options.steps, eps=options.eps)


def sum_dtype(params: Sequence[Tensor]) -> torch.dtype:
    double = any(p.dtype == torch.float64 for p in params)
    return torch.float64 if double else torch.float32


def trt_penalty_forward(params: Sequence[Tensor], options: PenaltyOptions) -> Tensor:
    params = [dense(p) for p in params]
    value = params[0].new_empty((), dtype=sum_dtype(params))
    rows = [(DTYPES[p.dtype], p.numel(), p.data_ptr(), 0, False) for p in params]
    penalty_handle(options).cpu_value(
        rows, DTYPES[value.dtype], value.data_ptr(), torch.get_num_threads()
    )
    return value


def trt_penalty_backward(
    grad: Tensor, params: Sequence[Tensor], options: PenaltyOptions
) -> list[Tensor]:
    params = [dense(p) for p in params]
    grads = [torch.empty_like(p) for p in params]
    rows = [
        (DTYPES[p.dtype], p.numel(), p.data_ptr(), g.data_ptr(), False)
        for p, g in zip(params, grads, strict=True)
    ]
    penalty_handle(options).cpu_gradient(
        rows, DTYPES[grad.dtype], grad.data_ptr(), torch.get_num_threads()
    )
    return grads


def trt_penalty_accumulate(
    params: Sequence[Tensor], grads: Sequence[Tensor], scale: float, options: PenaltyOptions
) -> None:
    """Adds scale · ∂R/∂w to every gradient in place, in one pass."""
    rows, later = [], []
    for p, g in zip(params, grads, strict=True):
        target = g
        if g.dtype != p.dtype or not is_dense(p) or p.stride() != g.stride():
            p = dense(p.to(torch.promote_types(p.dtype, g.dtype)))
            target = torch.zeros_like(p)
            later.append((g, target))
        rows.append((DTYPES[p.dtype], p.numel(), p.data_ptr(), target.data_ptr(), True))
    upstream = torch.tensor(scale, dtype=torch.float64, device="cpu")
    penalty_handle(options).cpu_gradient(
        rows, DTYPES[upstream.dtype], upstream.data_ptr(), torch.get_num_threads()
    )
    for g, target in later:
        g.add_(target)
    torch.autograd.graph.increment_version(grads)


def loss_arguments(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, options: LossOptions
) -> tuple[Any, Tensor, list[Tensor | None]]:
    """Compiled settings, the logits as they are read, and the tensors that keep memory alive."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    batch_dim = 1 - options.time_dim
    dtype = state_dtype(logits.dtype)
    indices = probabilities = None
    if target.is_floating_point():
        probabilities = target.to(dtype).contiguous()
    else:
        indices = target.contiguous()
    if class_weight is not None:
        class_weight = class_weight.to(dtype).contiguous()
    handle = _C.Loss(
        dtype=DTYPES[logits.dtype],
        steps=logits.shape[options.time_dim],
        batch=logits.shape[batch_dim],
        classes=logits.shape[-1],
        step_stride=logits.stride(options.time_dim),
        batch_stride=logits.stride(batch_dim),
        entropy_ratio=options.entropy_ratio,
        square_ratio=options.square_ratio,
        constant=options.constant,
        label_smoothing=options.label_smoothing,
        ignore_index=options.ignore_index,
    )
    return handle, logits, [indices, probabilities, class_weight]


def temporal_loss_forward(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """The loss, and log Σ exp of every row [T, B], which the backward needs."""
    handle, logits, tensors = loss_arguments(logits, target, class_weight, options)
    dtype = state_dtype(logits.dtype)
    steps, batch = logits.shape[options.time_dim], logits.shape[1 - options.time_dim]
    normalizer = logits.new_empty((steps, batch), dtype=dtype)
    value = logits.new_empty((), dtype=dtype)
    handle.cpu_value(
        logits.data_ptr(),
        *map(address, tensors),
        normalizer.data_ptr(),
        value.data_ptr(),
        torch.get_num_threads(),
    )
    return value, normalizer


def temporal_loss_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    normalizer: Tensor,
    options: LossOptions,
) -> Tensor:
    # The gradient is written with the strides of the logits, so these must not overlap.
    logits = dense(logits)
    handle, logits, tensors = loss_arguments(logits, target, class_weight, options)
    result = torch.empty_like(logits)
    handle.cpu_gradient(
        logits.data_ptr(),
        *map(address, tensors),
        normalizer.data_ptr(),
        grad.data_ptr(),
        result.data_ptr(),
        torch.get_num_threads(),
    )
    return result
