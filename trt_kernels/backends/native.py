"""The compiled backends, "cpu" and "cuda": plain tensors in, plain tensors out, no autograd.

layout.py says how tensors reach the kernels.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import FLOATS, state_dtype
from ..options import (
    LARGEST_EXPONENT,
    LIFGradients,
    LIFGrads,
    LIFOptions,
    LIFResults,
    LIFTensors,
    LIFWanted,
    LossOptions,
    PenaltyOptions,
)
from .layout import (
    CHECKPOINT_EVERY,
    accumulation,
    channel_view,
    dense,
    empty_checkpoints,
    for_loss_gradient,
    lif_backward_tensors,
    lif_forward_tensors,
    lif_shape,
    loss_rows,
    loss_tensors,
    sum_dtype,
)

_import_error: str | None = None
if TYPE_CHECKING:
    from .. import _C as _C
else:
    try:
        _C = importlib.import_module("trt_kernels._C")
    except ImportError as error:
        _C, _import_error = None, f"the compiled module is missing or does not load: {error}"

DTYPES = {} if _C is None else {d: getattr(_C.DType, str(d).removeprefix("torch.")) for d in FLOATS}


def why_no_cpu() -> str | None:
    return _import_error


@lru_cache(maxsize=64)
def why_no_cuda(device: torch.device | None = None) -> str | None:
    """The reason why CUDA kernels cannot serve `device` (None: any GPU), or None if they can."""
    if _C is None:
        return _import_error
    missing = _C.build_info()["cuda_missing"]
    if missing is not None:
        return f"compiled without CUDA: {missing}"
    if torch.version.hip is not None:
        return "this PyTorch is built for AMD GPUs: backend='triton' serves them"
    devices, reason = _C.cuda_devices()
    if not devices:
        return f"no CUDA device: {reason}"
    if not torch.cuda.is_available():
        return "this PyTorch is built without CUDA, or cannot use its device"
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    reason = _C.cuda_why_not(index)
    return reason or None


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=4096)  # bounded: an annealed threshold makes new settings at every step
def lif_handle(options: LIFOptions) -> "_C.LIF":
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
        scale=options.scale,
        batch=options.batch,
        bits=options.bits,
    )


def current_stream(device: int) -> int:
    """The handle of torch's current stream there; its public form costs a small call 2 µs more."""
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream


def workspace(size: int, x: Tensor) -> Tensor | None:
    """Memory for a kernel's partial results. Torch hands it out again only behind the launch."""
    return torch.empty(size, dtype=torch.uint8, device=x.device) if size else None


def lif_arguments(
    kind: Any, like: Tensor, tensors: LIFTensors, options: LIFOptions, **more: Tensor | None
) -> Any:
    """What the compiled kernels take, for an input like `like`: `kind`, with addresses by name."""
    gains = tensors.gains
    arguments = kind(
        DTYPES[like.dtype],
        *lif_shape(like, tensors, options),
        constant=options.steps > 0,
        gains_by_channel=gains is not None and gains.ndim == 2,
        checkpoint_every=CHECKPOINT_EVERY,
    )
    for name, tensor in (*zip(LIFTensors._fields, tensors, strict=True), *more.items()):
        if tensor is not None:
            setattr(arguments, name, tensor.data_ptr())
    return arguments


def lif_forward(
    x: Tensor, tensors: LIFTensors, for_backward: bool, options: LIFOptions
) -> LIFResults:
    x, tensors, results = lif_forward_tensors(x, tensors, options, for_backward)
    arguments = lif_arguments(_C.LIFForward, x, tensors, options, x=x, **results._asdict())
    handle = lif_handle(options)
    if options.backend == "cpu":
        handle.cpu_forward(arguments, torch.get_num_threads())
    else:
        space = workspace(handle.cuda_forward_workspace(arguments), x)
        handle.cuda_forward(
            arguments, address(space), x.get_device(), current_stream(x.get_device())
        )
    return results


def lif_backward(
    x: Tensor,
    tensors: LIFTensors,
    checkpoints: Tensor | None,
    bits: Tensor | None,
    means: Tensor | None,
    grads: LIFGrads,
    wanted: LIFWanted,
    options: LIFOptions,
) -> LIFGradients:
    x, tensors, checkpoints, grads, gradients = lif_backward_tensors(
        x, tensors, checkpoints, grads, wanted, options
    )
    arguments = lif_arguments(
        _C.LIFBackward,
        x,
        tensors,
        options,
        x=x if bits is None else None,
        bits=bits,
        means=means,
        checkpoints=checkpoints,
        **{f"grad_{name}": grad for name, grad in grads._asdict().items()},
        **{f"grad_{name}": grad for name, grad in gradients._asdict().items()},
    )
    handle = lif_handle(options)
    if options.backend == "cpu":
        handle.cpu_backward(arguments, torch.get_num_threads())
    else:
        space = workspace(handle.cuda_backward_workspace(arguments), x)
        handle.cuda_backward(
            arguments, address(space), x.get_device(), current_stream(x.get_device())
        )
    return gradients


def batch_statistics(x: Tensor, channel_dim: int, eps: float, repeat: int, backend: str) -> Tensor:
    x = dense(x)
    stats = x.new_empty((4, x.shape[channel_dim]), dtype=state_dtype(x.dtype))
    view = channel_view(x, channel_dim)
    arguments = _C.Statistics(DTYPES[x.dtype], *view, eps, repeat, x.data_ptr(), stats.data_ptr())
    if backend == "cpu":
        arguments.cpu(torch.get_num_threads())
    else:
        space = workspace(arguments.cuda_workspace(), x)
        arguments.cuda(address(space), x.get_device(), current_stream(x.get_device()))
    return stats


class PlainLIF:
    """`lif` of a contiguous tensor, bound once for its options and dtype.

    The same kernels as `lif_forward` and `lif_backward`, which decide all of this at every call: on
    a small tensor that costs as much as the rest. Where it is `single`, x is of one timestep, and
    neither it nor a result has a time dimension.
    """

    def __init__(self, options: LIFOptions, dtype: torch.dtype, single: bool = False) -> None:
        handle = lif_handle(options)
        self.options, self.single = options, single
        self._cuda = options.backend == "cuda"
        self._dtype, self._time_dim = DTYPES[dtype], options.time_dim
        self._run_forward: Callable[..., None]
        self._run_backward: Callable[..., None]
        self._run_forward_carried: Callable[..., None]
        self._run_backward_carried: Callable[..., None]
        if self._cuda:
            self._run_forward = handle.cuda_forward_plain
            self._run_backward = handle.cuda_backward_plain
            self._run_forward_carried = handle.cuda_forward_carried
            self._run_backward_carried = handle.cuda_backward_carried
        else:
            self._run_forward = handle.cpu_forward_plain
            self._run_backward = handle.cpu_backward_plain
            self._run_forward_carried = handle.cpu_forward_carried
            self._run_backward_carried = handle.cpu_backward_carried

    def forward(self, x: Tensor, for_backward: bool) -> tuple[Tensor, Tensor | None]:
        """Spikes, and the checkpoints where the backward pass needs them."""
        spikes = torch.empty_like(x)
        arguments = (self._dtype, x.shape, self._time_dim, x.data_ptr(), spikes.data_ptr())
        if not self._cuda:
            self._run_forward(*arguments, torch.get_num_threads())
            return spikes, None
        checkpoints = empty_checkpoints(x, self.options) if for_backward else None
        self._run_forward(*arguments, *self._on_device(x, checkpoints))
        return spikes, checkpoints

    def backward(self, x: Tensor, checkpoints: Tensor | None, grad: Tensor) -> Tensor:
        grad_x = torch.empty_like(x)
        tensors = (x.data_ptr(), grad.data_ptr(), grad_x.data_ptr())
        arguments = (self._dtype, x.shape, self._time_dim, *tensors)
        if self._cuda:
            self._run_backward(*arguments, *self._on_device(x, checkpoints))
        else:
            self._run_backward(*arguments, torch.get_num_threads())
        return grad_x

    def forward_carried(self, x: Tensor, v_init: Tensor | None, for_backward: bool) -> LIFResults:
        """As `forward`, from a state and into what the options return."""
        options, sizes, dim = self.options, self._sizes(x), self._time_dim
        spikes, dtype = torch.empty_like(x), state_dtype(x.dtype)
        state = potential = checkpoints = None
        if options.return_state:
            state = x.new_empty((*sizes[:dim], *sizes[dim + 1 :]), dtype=dtype)
        if options.return_potential:
            potential = torch.empty_like(x, dtype=dtype)
        carried = (address(v_init), address(state), address(potential))
        arguments = (self._dtype, sizes, dim, x.data_ptr(), spikes.data_ptr(), *carried)
        if self._cuda:
            if for_backward and not self.single:
                checkpoints = empty_checkpoints(x, options)
            self._run_forward_carried(*arguments, *self._on_device(x, checkpoints))
        else:
            self._run_forward_carried(*arguments, torch.get_num_threads())
        return LIFResults(spikes, state, potential, checkpoints=checkpoints)

    def backward_carried(
        self, x: Tensor, v_init: Tensor | None, checkpoints: Tensor | None, grads: LIFGrads
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of x and v_init, from contiguous ones of the results."""
        grad_x = torch.empty_like(x)
        grad_v_init = None if v_init is None else torch.empty_like(v_init)
        carried = (address(v_init), address(grad_v_init))
        arriving = (address(grads.state), address(grads.potential))
        tensors = (x.data_ptr(), address(grads.spikes), grad_x.data_ptr(), *carried, *arriving)
        arguments = (self._dtype, self._sizes(x), self._time_dim, *tensors)
        if self._cuda:
            self._run_backward_carried(*arguments, *self._on_device(x, checkpoints))
        else:
            self._run_backward_carried(*arguments, torch.get_num_threads())
        return grad_x, grad_v_init

    def _sizes(self, x: Tensor) -> tuple[int, ...]:
        return (1, *x.shape) if self.single else x.shape

    @staticmethod
    def _on_device(x: Tensor, checkpoints: Tensor | None) -> tuple[int, int, int, int]:
        kept = 0 if checkpoints is None else checkpoints.data_ptr()
        return kept, CHECKPOINT_EVERY, x.get_device(), current_stream(x.get_device())


@lru_cache(maxsize=64)
def penalty_handle(options: PenaltyOptions) -> "_C.Penalty":
    growth = []
    for t in range(options.steps):
        # A term divided by more is nothing; left out, it can neither overflow nor cost time.
        if options.delta * t > LARGEST_EXPONENT:
            break
        growth.append(math.expm1(options.delta * t))
    return _C.Penalty(growth=growth, scale=options.weight / options.steps, eps=options.eps)


# dtype, elements, addresses of weight and gradient, add?
Row = tuple["_C.DType", int, int, int, bool]


def penalty_rows(params: Sequence[Tensor], grads: Sequence[Tensor], add: bool) -> list[Row]:
    """What kernels need of dense parameters and of the gradients to be written or added to."""
    return [
        (DTYPES[p.dtype], p.numel(), p.data_ptr(), g.data_ptr(), add)
        for p, g in zip(params, grads, strict=True)
    ]


def trt_penalty_forward(params: Sequence[Tensor], options: PenaltyOptions) -> Tensor:
    params = [dense(p) for p in params]
    value = params[0].new_empty((), dtype=sum_dtype(params))
    rows = [(DTYPES[p.dtype], p.numel(), p.data_ptr(), 0, False) for p in params]
    handle = penalty_handle(options)
    arguments = (rows, DTYPES[value.dtype], value.data_ptr())
    if options.backend == "cpu":
        handle.cpu_value(*arguments, torch.get_num_threads())
    else:
        device = value.get_device()
        elements = sum(p.numel() for p in params)
        space = workspace(handle.cuda_value_workspace(elements, len(params)), value)
        handle.cuda_value(*arguments, address(space), device, current_stream(device))
    return value


def write_penalty_gradient(
    rows: list[Row], scale: float, upstream: Tensor | None, where: Tensor, options: PenaltyOptions
) -> None:
    """Writes or adds scale · upstream · ∂R/∂w on the device of `where`."""
    handle = penalty_handle(options)
    dtype = DTYPES[torch.float32 if upstream is None else upstream.dtype]
    arguments = (rows, scale, dtype, address(upstream))
    if options.backend == "cpu":
        handle.cpu_gradient(*arguments, torch.get_num_threads())
    else:
        device = where.get_device()
        space = workspace(handle.cuda_gradient_workspace(), where)
        handle.cuda_gradient(*arguments, address(space), device, current_stream(device))


def trt_penalty_backward(
    grad: Tensor, params: Sequence[Tensor], options: PenaltyOptions
) -> list[Tensor]:
    params = [dense(p) for p in params]
    grads = [torch.empty_like(p) for p in params]
    write_penalty_gradient(penalty_rows(params, grads, False), 1.0, grad, params[0], options)
    return grads


def trt_penalty_accumulate(
    params: Sequence[Tensor], grads: Sequence[Tensor], scale: float, options: PenaltyOptions
) -> None:
    """Adds scale · ∂R/∂w to every gradient in place, in one pass."""
    ready, targets, _ = zip(*(triples := list(accumulation(params, grads))), strict=True)
    write_penalty_gradient(penalty_rows(ready, targets, True), scale, None, ready[0], options)
    for _, target, g in triples:
        if target is not g:
            g.add_(target)
    torch.autograd.graph.increment_version(grads)


def loss_handle(logits: Tensor, options: LossOptions) -> Any:
    """The compiled settings of a loss over these logits."""
    batch_dim = 1 - options.time_dim
    return _C.Loss(
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


def temporal_loss_forward(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, and what the backward needs: log Σ exp of every row [T, B], and on a GPU the
    divisors of the two means [2]."""
    tensors = loss_tensors(logits, target, class_weight)
    logits = tensors[0]
    dtype = state_dtype(logits.dtype)
    normalizer = logits.new_empty(loss_rows(logits, options), dtype=dtype)
    value = logits.new_empty((), dtype=dtype)
    handle = loss_handle(logits, options)
    arguments = (*map(address, tensors), normalizer.data_ptr())
    if options.backend == "cpu":
        handle.cpu_value(*arguments, value.data_ptr(), torch.get_num_threads())
        return value, normalizer, None
    divisors = logits.new_empty(2, dtype=dtype)
    device = logits.get_device()
    space = workspace(handle.cuda_workspace(), logits)
    handle.cuda_value(
        *arguments,
        divisors.data_ptr(),
        value.data_ptr(),
        address(space),
        device,
        current_stream(device),
    )
    return value, normalizer, divisors


def temporal_loss_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    normalizer: Tensor,
    divisors: Tensor | None,
    options: LossOptions,
) -> Tensor:
    tensors = loss_tensors(for_loss_gradient(logits), target, class_weight)
    logits = tensors[0]
    result = torch.empty_like(logits)
    handle = loss_handle(logits, options)
    arguments = (*map(address, tensors), normalizer.data_ptr())
    if options.backend == "cpu":
        handle.cpu_gradient(*arguments, grad.data_ptr(), result.data_ptr(), torch.get_num_threads())
        return result
    device = logits.get_device()
    handle.cuda_gradient(
        *arguments,
        address(divisors),
        grad.data_ptr(),
        result.data_ptr(),
        device,
        current_stream(device),
    )
    return result


def spike_pack(x: Tensor, backend: str) -> tuple[Tensor, bool | Tensor]:
    """Of a dense x in the order of memory: its bits [1, ceil(n / 8)], and whether each element is
    exactly 0 or 1, on a GPU as a tensor [1]. Where it is not, the bits are of no use."""
    n = x.numel()
    bits = torch.empty((1, -(-n // 8)), dtype=torch.uint8, device=x.device)
    arguments = (DTYPES[x.dtype], n, x.data_ptr(), bits.data_ptr())
    if backend == "cpu":
        return bits, bool(_C.cpu_spike_pack(*arguments, torch.get_num_threads()))
    binary = torch.empty(1, dtype=torch.bool, device=x.device)
    device = x.get_device()
    _C.cuda_spike_pack(*arguments, binary.data_ptr(), device, current_stream(device))
    return bits, binary


def spike_unpack(
    bits: Tensor, outer: int, steps: int, inner: int, dtype: torch.dtype, backend: str
) -> Tensor:
    """The elements of bits [steps, ceil(outer · inner / 8)] as they lie in memory,
    [outer · steps · inner]."""
    to = torch.empty(outer * steps * inner, dtype=dtype, device=bits.device)
    arguments = (DTYPES[dtype], bits.data_ptr(), outer, steps, inner, to.data_ptr())
    if backend == "cpu":
        _C.cpu_spike_unpack(*arguments, torch.get_num_threads())
    else:
        device = bits.get_device()
        _C.cuda_spike_unpack(*arguments, device, current_stream(device))
    return to
