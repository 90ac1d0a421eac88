"""The operators as `torch.ops.trt_kernels.*`: schemas, fake kernels, and which backend runs.

Plain eager calls go straight to the backend: a Python op costs as much again as the kernel of a
small tensor. Under tracing, fake tensors or any dispatch mode they go through the registered op.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import backends
from .backends import layout, native
from .checks import choice, state_dtype, transforming
from .options import (
    LIFGradients,
    LIFGrads,
    LIFOptions,
    LIFResults,
    LIFTensors,
    LIFWanted,
    LossOptions,
    PenaltyOptions,
)

# --- Backend choice. A module global: a ContextVar breaks fullgraph tracing, and a thread-local
# would be unseen by the thread of the backward pass.


def check_backend_name(backend: Any, argument: str = "backend") -> str:
    return choice(argument, backend, (*backends.NAMES, "auto"))


_VARIABLE = "TRT_KERNELS_BACKEND"
default_backend = check_backend_name(os.environ.get(_VARIABLE, "auto"), _VARIABLE)


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Chooses the backend of every call inside: "cpu", "cuda", "triton", "reference" or "auto".

    A call's own `backend` argument comes first, then this, then the environment variable
    TRT_KERNELS_BACKEND, then "auto": compiled kernels of the tensor's device, which on a GPU are
    those of "cuda", or of "triton" where "cuda" cannot serve. The choice holds for
    all threads. A backward pass runs where its forward ran.

    Raises:
        ValueError: an unknown name. A backend that cannot serve raises where it is called.
    """
    global default_backend
    previous, default_backend = default_backend, check_backend_name(backend)
    try:
        yield
    finally:
        default_backend = previous


def choose_backend(operator: str, backend: str | None, device: torch.device) -> str:
    """The backend that serves `operator` on `device`, or an error that says why none does."""
    if backend is not None:
        check_backend_name(backend)
    resolve = _resolve_once if torch.compiler.is_compiling() else _resolve
    return resolve(operator, default_backend if backend is None else backend, device)


@lru_cache(maxsize=256)
def _resolve(operator: str, name: str, device: torch.device) -> str:
    names = (name,) if name != "auto" else backends.AUTOMATIC.get(device.type, ())
    if not names:
        raise RuntimeError(
            f"{operator}: no compiled backend serves device {device}; "
            "backend='reference' runs anywhere"
        )
    reasons = []
    for candidate in names:
        reason = backends.why_not(candidate, device)
        if reason is None:
            return candidate
        reasons.append(f"backend {candidate!r} cannot serve: {reason}")
    raise RuntimeError(f"{operator}: {'; '.join(reasons)}")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _resolve_once(operator: str, name: str, device: torch.device) -> str:
    """`_resolve` called by torch.compile while it traces: it asks a driver, through functions of
    the compiled module, and neither can be traced."""
    return _resolve(operator, name, device)


@cache
def kernels(backend: str) -> ModuleType:
    """The module that runs a compiled backend's operators; Triton is imported where it is used."""
    return native if backend != "triton" else import_module("trt_kernels.backends.triton.operators")


# Bound here: these checks are a good part of a small call.
_modes, _has_storage = torch._C._len_torch_dispatch_stack, torch._C._has_storage
_Parameter = torch.nn.Parameter


def is_plain(*tensors: Tensor | None) -> bool:
    """True for ordinary tensors, whose memory holds their values, in ordinary eager execution."""
    return not torch.compiler.is_compiling() and holds_values(*tensors)


def holds_values(*tensors: Tensor | None) -> bool:
    """`is_plain` where nothing compiles."""
    if _modes() or transforming():
        return False
    for t in tensors:
        if t is None:
            continue
        kind = t.__class__
        ordinary = kind is Tensor or kind is _Parameter
        # Without a storage are those that torch batches itself, such as by is_grads_batched.
        if not ordinary or t.is_neg() or t._is_zerotensor() or not _has_storage(t):
            return False
    return True


# --- Schemas.
_LIF = (
    "int time_dim, int steps, int channel_dim, float decay, float threshold, float v_reset, "
    "str reset, bool detach_reset, str surrogate, float surrogate_parameter, "
    "bool fire_at_threshold, str charge, str phi, float delta, float eps, float scale, bool batch, "
    "bool return_state, bool return_potential, bool statistics, int bits, str backend"
)
_LIF_TENSORS = (
    "Tensor? v_init, Tensor? penalty_weight, Tensor? neuron, Tensor? stats, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor? gains"
)
_PENALTY = "int steps, float weight, float delta, float eps, str backend"
_LOSS = (
    "int time_dim, float entropy_ratio, float square_ratio, float? constant, "
    "float label_smoothing, int ignore_index, str backend"
)
_SCHEMAS = {
    "lif_forward": f"(Tensor x, {_LIF_TENSORS}, bool for_backward, {_LIF}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "lif_backward": f"(Tensor x, {_LIF_TENSORS}, Tensor? checkpoints, Tensor? kept_bits, "
    "Tensor? means, Tensor? grad_spikes, Tensor? grad_state, Tensor? grad_potential, "
    "Tensor? grad_penalty, bool wants_x, bool wants_v_init, bool wants_neuron, "
    f"bool wants_affine, bool wants_gains, {_LIF}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "batch_statistics": "(Tensor x, int channel_dim, float eps, int repeat, str backend) -> Tensor",
    "trt_penalty_forward": f"(Tensor[] params, {_PENALTY}) -> Tensor",
    "trt_penalty_backward": f"(Tensor grad, Tensor[] params, {_PENALTY}) -> Tensor[]",
    "trt_penalty_accumulate": "(Tensor[] params, Tensor(a!)[] grads, float scale, "
    f"{_PENALTY}) -> ()",
    "temporal_loss_forward": "(Tensor logits, Tensor target, Tensor? class_weight, "
    f"{_LOSS}) -> (Tensor, Tensor, Tensor)",
    "temporal_loss_backward": "(Tensor grad, Tensor logits, Tensor target, Tensor? class_weight, "
    f"Tensor normalizer, Tensor? divisors, {_LOSS}) -> Tensor",
}

library = torch.library.Library("trt_kernels", "DEF")
for _name, _schema in _SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.needs_fixed_stride_order,))
_registered = torch.ops.trt_kernels
# Those that run while a transform of torch.func does, by name; transforms.py puts them here.
under_transforms: dict[str, Any] = {}


def _operator(name: str) -> Any:
    """What runs where tensors are not plain."""
    if transforming() and not torch.compiler.is_compiling():
        return under_transforms[name]
    return getattr(_registered, name)


def _register(name: str, run: Any, fake: Any) -> None:
    for key in ("CPU", "CUDA"):
        library.impl(name, run, key)
    torch.library.register_fake(f"trt_kernels::{name}", fake, lib=library)


def or_empty(x: Tensor, *values: Tensor | None) -> tuple[Tensor, ...]:
    """An op returns a tensor for everything; an empty one stands for None."""
    return tuple(
        x.new_empty(0, dtype=state_dtype(x.dtype)) if value is None else value for value in values
    )


# --- lif
def lif_forward(
    x: Tensor, tensors: LIFTensors, for_backward: bool, options: LIFOptions
) -> LIFResults:
    """The spikes, and what else `options` or the backward pass ask for."""
    if is_plain(x, *tensors):
        results: LIFResults = kernels(options.backend).lif_forward(
            x, tensors, for_backward, options
        )
        return results
    run = _operator("lif_forward")
    spikes, *extras = run(x, *tensors, for_backward, *options)
    asked = (
        options.return_state,
        options.return_potential,
        tensors.penalty_weight is not None,
        options.statistics,
        for_backward and layout.has_checkpoints(x, options),
        options.bits > 0,
    )
    return LIFResults(spikes, *(e if a else None for a, e in zip(asked, extras, strict=True)))


def plain_lif(
    options: LIFOptions, dtype: torch.dtype, single: bool = False
) -> native.PlainLIF | None:
    """The short way for plain contiguous tensors, where these options have one."""
    if options.backend not in ("cpu", "cuda") or options.steps or options.bits:
        return None
    if options.statistics or options.phi:
        return None
    return native.PlainLIF(options, dtype, single)


_TENSORS = len(LIFTensors._fields)


def _run_lif_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tensors, for_backward = LIFTensors(*arguments[:_TENSORS]), arguments[_TENSORS]
    options = LIFOptions(*arguments[_TENSORS + 1 :])
    results = kernels(options.backend).lif_forward(x, tensors, for_backward, options)
    return or_empty(x, *results)


def _fake_lif_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tensors, for_backward = LIFTensors(*arguments[:_TENSORS]), arguments[_TENSORS]
    options = LIFOptions(*arguments[_TENSORS + 1 :])
    return or_empty(x, *layout.lif_forward_tensors(x, tensors, options, for_backward)[2])


def lif_backward(
    x: Tensor,
    tensors: LIFTensors,
    checkpoints: Tensor | None,
    bits: Tensor | None,
    means: Tensor | None,
    grads: LIFGrads,
    wanted: LIFWanted,
    options: LIFOptions,
    run: Any = None,
) -> LIFGradients:
    """The wanted gradients from those of the results; by the operator `run` where it is given.

    Where the potentials come from `bits`, `x` is anything of its shape and order in memory. Where
    mean and deviation are x's own (`options.batch`), the gradient of x needs the `affine` sums over
    their number, `means` [2, C]: of these x where they are not given.
    """
    if run is None and is_plain(x, *tensors, *grads, means):
        gradients: LIFGradients = kernels(options.backend).lif_backward(
            x, tensors, checkpoints, bits, means, grads, wanted, options
        )
        return gradients
    run = _operator("lif_backward") if run is None else run
    results = run(x, *tensors, checkpoints, bits, means, *grads, *wanted, *options)
    return LIFGradients(*(r if w else None for w, r in zip(wanted, results, strict=True)))


def lif_backward_arguments(arguments: Sequence[Any]) -> tuple[Any, ...]:
    rest = iter(arguments)

    def take(kind: Any) -> Any:
        return kind(*(next(rest) for _ in kind._fields))

    tensors = take(LIFTensors)
    kept = [next(rest) for _ in range(3)]
    return tensors, *kept, take(LIFGrads), take(LIFWanted), take(LIFOptions)


def _run_lif_backward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    rest = lif_backward_arguments(arguments)
    return or_empty(x, *kernels(rest[-1].backend).lif_backward(x, *rest))


def _fake_lif_backward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tensors, checkpoints, _, _, grads, wanted, options = lif_backward_arguments(arguments)
    ready = layout.lif_backward_tensors(x, tensors, checkpoints, grads, wanted, options)
    return or_empty(x, *ready[-1])


_register("lif_forward", _run_lif_forward, _fake_lif_forward)
_register("lif_backward", _run_lif_backward, _fake_lif_backward)


def batch_statistics(x: Tensor, channel_dim: int, eps: float, repeat: int, backend: str) -> Tensor:
    """Of every channel over everything else: mean, what rounding left of it, 1 / deviation with
    `eps` in it, and the unbiased variance of `repeat` times these numbers. [4, C], state dtype."""
    if is_plain(x):
        stats: Tensor = kernels(backend).batch_statistics(x, channel_dim, eps, repeat, backend)
    else:
        stats = _operator("batch_statistics")(x, channel_dim, eps, repeat, backend)
    return stats


_register(
    "batch_statistics",
    lambda *arguments: kernels(arguments[-1]).batch_statistics(*arguments),
    lambda x, dim, *_: x.new_empty((4, x.shape[dim]), dtype=state_dtype(x.dtype)),
)


# --- trt_penalty
def trt_penalty_forward(params: Sequence[Tensor], options: PenaltyOptions) -> Tensor:
    """R, a scalar of the sum's dtype."""
    if is_plain(*params):
        value: Tensor = kernels(options.backend).trt_penalty_forward(params, options)
    else:
        value = _operator("trt_penalty_forward")(params, *options)
    return value


def trt_penalty_backward(
    grad: Tensor, params: Sequence[Tensor], options: PenaltyOptions
) -> list[Tensor]:
    """grad · ∂R/∂w for every parameter."""
    if is_plain(grad, *params):
        grads: list[Tensor] = kernels(options.backend).trt_penalty_backward(grad, params, options)
    else:
        grads = _operator("trt_penalty_backward")(grad, params, *options)
    return grads


def trt_penalty_accumulate(
    params: Sequence[Tensor], grads: Sequence[Tensor], scale: float, options: PenaltyOptions
) -> None:
    """Adds scale · ∂R/∂w to `grads` in place."""
    if is_plain(*params, *grads):
        kernels(options.backend).trt_penalty_accumulate(params, grads, scale, options)
    else:
        _registered.trt_penalty_accumulate(params, grads, scale, *options)


def _run_trt_penalty_forward(params: Sequence[Tensor], *options: Any) -> Tensor:
    value: Tensor = kernels(options[-1]).trt_penalty_forward(params, PenaltyOptions(*options))
    return value


def _run_trt_penalty_backward(
    grad: Tensor, params: Sequence[Tensor], *options: Any
) -> list[Tensor]:
    chosen = PenaltyOptions(*options)
    grads: list[Tensor] = kernels(chosen.backend).trt_penalty_backward(grad, params, chosen)
    return grads


def _run_trt_penalty_accumulate(
    params: Sequence[Tensor], grads: Sequence[Tensor], scale: float, *options: Any
) -> None:
    kernels(options[-1]).trt_penalty_accumulate(params, grads, scale, PenaltyOptions(*options))


_register(
    "trt_penalty_forward",
    _run_trt_penalty_forward,
    lambda params, *_: params[0].new_empty((), dtype=layout.sum_dtype(params)),
)
_register(
    "trt_penalty_backward",
    _run_trt_penalty_backward,
    lambda grad, params, *_: [torch.empty_like(p) for p in params],
)
_register(
    "trt_penalty_accumulate", _run_trt_penalty_accumulate, lambda params, grads, scale, *_: None
)


# --- temporal_loss
def temporal_loss_forward(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, a scalar of the sum's dtype; log Σ exp of every row [T, B]; and where the backward
    pass does not find them itself, the divisors of the two means [2]."""
    tensors = (logits, target, class_weight)
    if is_plain(*tensors):
        outputs: tuple[Tensor, Tensor, Tensor | None]
        outputs = kernels(options.backend).temporal_loss_forward(*tensors, options)
        return outputs
    value, normalizer, divisors = _operator("temporal_loss_forward")(*tensors, *options)
    return value, normalizer, divisors if divisors.numel() else None


def temporal_loss_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    normalizer: Tensor,
    divisors: Tensor | None,
    options: LossOptions,
) -> Tensor:
    """grad · ∂L/∂logits."""
    tensors = (grad, logits, target, class_weight, normalizer, divisors)
    if is_plain(*tensors):
        result: Tensor = kernels(options.backend).temporal_loss_backward(*tensors, options)
    else:
        result = _operator("temporal_loss_backward")(*tensors, *options)
    return result


def _run_temporal_loss_forward(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    chosen = LossOptions(*options)
    value, *kept = kernels(chosen.backend).temporal_loss_forward(
        logits, target, class_weight, chosen
    )
    return (value, *or_empty(logits, *kept))


def _fake_temporal_loss_forward(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    chosen, dtype = LossOptions(*options), state_dtype(logits.dtype)
    rows = layout.loss_rows(logits, chosen)
    divisors = logits.new_empty(0 if chosen.backend == "cpu" else 2, dtype=dtype)
    return logits.new_empty((), dtype=dtype), logits.new_empty(rows, dtype=dtype), divisors


def _run_temporal_loss_backward(grad: Tensor, *arguments: Any) -> Tensor:
    chosen = LossOptions(*arguments[5:])
    result: Tensor = kernels(chosen.backend).temporal_loss_backward(grad, *arguments[:5], chosen)
    return result


_register("temporal_loss_forward", _run_temporal_loss_forward, _fake_temporal_loss_forward)
_register(
    "temporal_loss_backward",
    _run_temporal_loss_backward,
    lambda grad, logits, *_: torch.empty_like(layout.for_loss_gradient(logits)),
)
