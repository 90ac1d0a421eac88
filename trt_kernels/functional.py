"""The public functions. They check every argument and choose a backend; ops.py runs it."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, ops
from .autograd import LIFFunction, LIFSpikes, TemporalLossFunction, TRTPenaltyFunction
from .backends import reference
from .backends.native import PlainLIF
from .ops import choose_backend, trt_penalty_accumulate
from .options import (
    LIFOptions,
    LossOptions,
    MembranePenalty,
    PenaltyOptions,
    make_lif_options,
)
from .surrogates import Surrogate, Triangle


class LIFOutput(NamedTuple):
    """What `lif` returns where more than spikes is asked for; the rest is None."""

    spikes: Tensor
    state: Tensor | None
    penalty: Tensor | None
    potential: Tensor | None
    rate: Tensor | None


# Checked calls of `lif` by everything but their values: the checks cost more than a small kernel.
_checked: dict[tuple[Any, ...], tuple[LIFOptions, PlainLIF | None]] = {}
_MOST_CHECKED = 4096


def _check_lif(
    x: Tensor, penalty: MembranePenalty | None, backend: Any, settings: Any
) -> LIFOptions:
    """Everything about a call that does not depend on the values of its tensors."""
    checks.tensor("x", x)
    if x.ndim == 0:
        raise ValueError("x: got a scalar, needs a time dimension")
    if penalty is not None and not isinstance(penalty, MembranePenalty):
        raise TypeError(f"penalty: got {type(penalty).__name__}, needs a MembranePenalty")
    return make_lif_options(
        settings,
        "" if penalty is None else penalty.phi,
        0.0 if penalty is None else penalty.delta,
        0.0 if penalty is None else penalty.eps,
        choose_backend("lif", backend, x.device),
        x.ndim,
        x.dtype,
    )


def lif(
    x: Tensor,
    *,
    decay: float = 0.5,
    threshold: float = 1.0,
    v_reset: float = 0.0,
    reset: str = "hard",
    detach_reset: bool = False,
    surrogate: Surrogate | Callable[[Tensor], Tensor] = Triangle(1.0),  # noqa: B008
    fire_at_threshold: bool = False,
    charge: str = "decay",
    steps: int | None = None,
    v_init: Tensor | None = None,
    time_dim: int = 0,
    channel_dim: int | None = None,
    penalty: MembranePenalty | None = None,
    return_state: bool = False,
    return_potential: bool = False,
    statistics: bool = False,
    memory: str = "recompute",
    backend: str | None = None,
) -> Any:
    """Leaky integrate-and-fire over all timesteps in one pass.

    With v_{-1} = v_init, for t = 0..T-1:

        h_t = decay·v_{t-1} + x_t                     charge "decay"
        h_t = v_{t-1} / tau + x_t, tau = 1/decay      charge "divide", a true division
        s_t = 1 if h_t > threshold else 0             (>= with fire_at_threshold)
        v_t = v_reset where s_t = 1, else h_t         reset "hard"
        v_t = h_t - threshold·s_t                     reset "soft"
        v_t = h_t                                     reset "none"

    Differentiable in x and v_init, with the surrogate's σ'(h - threshold) for the spike's
    derivative and, unless detach_reset, through the reset. Only x is kept for the backward pass.
    Float32 spikes and potentials are the same bit for bit on every backend.

    Args:
        x: input current, floating [..., T at time_dim, ...], any dense layout (read in place;
            others are copied). float16 and bfloat16 are integrated in float32.
        decay: membrane decay a step; with charge "divide", 1/tau.
        threshold: firing threshold, in the units of x.
        v_reset: potential after a spike under the hard reset.
        reset: "hard", "soft" or "none".
        detach_reset: no gradient through the spike of the reset.
        surrogate: Triangle, Sigmoid, ATan, Rectangle, FastSigmoid; or any callable that gives σ'(u)
            elementwise, on backend="reference" only.
        fire_at_threshold: fire at h >= threshold instead of h > threshold.
        charge: "decay", or "divide" with tau = 1/decay rounded to the state's dtype.
        v_init: potential before the first step, x's shape without time, float32 (float64 for
            float64 x); 0 if not given.
        time_dim: the dimension of x that is time.
        penalty: adds the scalar R = Σ_t weight_t · mean φ(h_t) to the result at no memory traffic.
        return_state: also return v_{T-1}, x's shape without time, float32 (float64 for float64).
        return_potential: also return all h_t, x's shape, float32 (float64 for float64).
        steps, channel_dim, statistics, memory: for later versions; anything but the default raises.
        backend: "cpu", "cuda", "triton", "reference" or "auto"; by default that of `use_backend`.

    Returns:
        Spikes of x's shape, dtype and layout; a `LIFOutput` if any extra is asked for. An empty x
        gives empty spikes, the state v_init, and a penalty of 0.

    Raises:
        TypeError, ValueError: a wrong argument, named.
        NotImplementedError: what a later version brings.
        RuntimeError: a backend that cannot serve, with the reason; double backward.

    Source: the TRT paper and its official code (arXiv 2506.19256), with charge "divide" for the
    latter's v/tau; SpikingJelly for fire_at_threshold and detach_reset.
    """
    settings = (
        decay,
        threshold,
        v_reset,
        reset,
        detach_reset,
        surrogate,
        fire_at_threshold,
        charge,
        steps,
        time_dim,
        channel_dim,
        return_state,
        return_potential,
        statistics,
        memory,
    )
    if torch.compiler.is_compiling() or penalty is not None or not isinstance(x, Tensor):
        options = _check_lif(x, penalty, backend, settings)
    else:
        chosen = ops.default_backend if backend is None else backend
        # The classes too: 0.0 and False equal 0, and would pass for a checked time_dim.
        classes = (
            decay.__class__,
            threshold.__class__,
            v_reset.__class__,
            time_dim.__class__,
            detach_reset.__class__,
            fire_at_threshold.__class__,
            return_state.__class__,
            return_potential.__class__,
            statistics.__class__,
        )
        key = (settings, classes, chosen, x.dtype, x.device, x.ndim, x.layout)
        try:
            known = _checked.get(key)
        except TypeError:  # something unhashable: the check names it
            known = _check_lif(x, penalty, backend, settings), None
        if known is None:
            options = _check_lif(x, penalty, backend, settings)
            known = options, ops.plain_lif(options, x.dtype)
            if options.surrogate != "custom":  # one of the user's own is not kept alive
                if len(_checked) >= _MOST_CHECKED:
                    _checked.clear()
                _checked[key] = known
        options, short = known
        if short is not None and v_init is None and x.is_contiguous() and ops.is_plain(x):
            return LIFSpikes.apply(x, short)
    weight = None if penalty is None else _penalty_weight(penalty, x, options)
    if v_init is not None:
        _check_v_init(v_init, x, options)
    state: Tensor | None
    potential: Tensor | None
    value: Tensor | None
    plain = not (return_state or return_potential or penalty is not None)
    if options.backend == "reference":
        spikes, state, potential, value = reference.lif(x, v_init, weight, options, surrogate)
        if plain:
            return spikes
        state = state if return_state else None
        potential = potential if return_potential else None
    else:
        if plain and v_init is None:
            return LIFFunction.apply(x, options)
        result = LIFFunction.apply(x, options, v_init, weight)
        if plain:
            return result
        spikes, *extras = result
        arriving = iter(extras)
        state = next(arriving) if return_state else None
        potential = next(arriving) if return_potential else None
        value = next(arriving) if penalty is not None else None
    return LIFOutput(spikes, state, value, potential, None)


def _penalty_weight(penalty: MembranePenalty, x: Tensor, options: LIFOptions) -> Tensor:
    steps = x.shape[options.time_dim]
    weight = penalty.weight
    if weight.shape[0] != steps:
        raise ValueError(
            f"penalty: its weight has {weight.shape[0]} entries, needs one for each of the "
            f"{steps} steps of x"
        )
    if weight.requires_grad:
        raise ValueError("penalty: its weight requires grad, but there is no gradient for it")
    if weight.device != x.device and weight.device.type != "cpu":
        checks.same_device("penalty", weight, "x", x)
    # From the CPU the copy is asynchronous: it synchronises nothing.
    return weight.to(x.device, checks.state_dtype(x.dtype), non_blocking=True).contiguous()


def _check_v_init(v_init: Tensor, x: Tensor, options: LIFOptions) -> None:
    checks.tensor("v_init", v_init, (checks.state_dtype(x.dtype),))
    dim = options.time_dim
    needed = (*x.shape[:dim], *x.shape[dim + 1 :])
    if tuple(v_init.shape) != needed:
        raise ValueError(f"v_init: got shape {tuple(v_init.shape)}, needs {needed}")
    checks.same_device("v_init", v_init, "x", x)


def trt_penalty(
    params: Iterable[Tensor],
    *,
    steps: int,
    weight: float,
    delta: float,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """The TRT weight regularizer of all parameters and all timesteps, in one pass over the weights.

        R = (1/T) Σ_t Σ_w  λ w² / (1 + (e^{δt} - 1)(|w| + ε)),  t = 0..T-1

    Differentiable in the parameters; keeps nothing beside them for the backward pass, which reads
    the weights once more and writes the gradients. The paper regularizes every parameter without
    "bias" in its name; `TRTLoss` makes that choice, this function takes what it is given.

    Args:
        params: floating tensors of any shapes on one device; a mixture of dtypes is summed in
            float64 if any is float64, else in float32.
        steps: T >= 1.
        weight: λ.
        delta: δ >= 0. A δt that overflows makes its term and its derivative 0.
        eps: ε >= 0.
        backend: as in `lif`.

    Returns:
        A scalar, float32 (float64 if any parameter is).

    Raises:
        TypeError, ValueError: a wrong argument, named; an empty list.
        RuntimeError: a backend that cannot serve, with the reason; double backward.

    Source: TRT (arXiv 2506.19256).
    """
    tensors, options = _penalty_arguments(params, steps, weight, delta, eps, backend)
    if options.backend == "reference":
        return reference.trt_penalty(tensors, options)
    value: Tensor = TRTPenaltyFunction.apply(options, *tensors)
    return value


@torch.no_grad()
def trt_penalty_(
    params: Iterable[Tensor],
    *,
    steps: int,
    weight: float,
    delta: float,
    eps: float = 1e-5,
    scale: float = 1.0,
    backend: str | None = None,
) -> None:
    """Adds scale · ∂R/∂w of `trt_penalty` to every parameter's `.grad` in place, in one pass.

    For training loops that do not report R: no graph, no scalar. Call it after `backward` and
    before the optimizer's step; under a GradScaler give its scale as `scale`. Parameters
    that do not require grad are left alone; a `.grad` of None is created.

    Args, Raises: as `trt_penalty`; scale: a finite float.
    """
    scale = checks.finite("scale", scale)
    tensors, options = _penalty_arguments(params, steps, weight, delta, eps, backend)
    for index, p in enumerate(tensors):
        if p.requires_grad and not p.is_leaf:
            raise ValueError(f"params[{index}]: not a leaf of the graph, so nobody reads its .grad")
        if p.grad is not None:
            checks.tensor(f"params[{index}].grad", p.grad)
    tensors = [p for p in tensors if p.requires_grad]
    if not tensors:
        return
    for p in tensors:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in tensors if p.grad is not None]
    if options.backend != "reference":
        trt_penalty_accumulate(tensors, grads, scale, options)
        return
    with torch.enable_grad():
        leaves = [p.detach().requires_grad_() for p in tensors]
        added = torch.autograd.grad(scale * reference.trt_penalty(leaves, options), leaves)
    for grad, more in zip(grads, added, strict=True):
        grad.add_(more)


def _penalty_arguments(
    params: Iterable[Tensor], steps: Any, weight: Any, delta: Any, eps: Any, backend: str | None
) -> tuple[list[Tensor], PenaltyOptions]:
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(f"params: got {type(params).__name__}, needs a list of tensors")
    tensors = list(params)
    if not tensors:
        raise ValueError("params: got an empty list, needs at least one parameter")
    for index, p in enumerate(tensors):
        checks.tensor(f"params[{index}]", p)
        checks.same_device(f"params[{index}]", p, "params[0]", tensors[0])
    options = PenaltyOptions(
        steps=checks.steps(steps),
        weight=checks.finite("weight", weight),
        delta=checks.non_negative("delta", delta),
        eps=checks.non_negative("eps", eps),
        backend=choose_backend("trt_penalty", backend, tensors[0].device),
    )
    return tensors, options


def temporal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    mse_ratio: float = 0.0,
    time_dim: int = 0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    check: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Cross entropy at every timestep, mixed with a squared distance to the label, in one pass.

        L = (1/T) Σ_t [ (1-η)·CE(O_t, y) + η·mean over batch and classes of (O_t - onehot(y))² ]

    Differentiable in the logits. Sums are float32 (float64 for float64 logits); for the backward
    pass the logits and a number a row are kept, and the gradient is multiplied by the upstream
    scalar before it is rounded to the logits' dtype.

    Args:
        logits: O, floating [T, B, K], or [B, T, K] with time_dim=1.
        target: y, int64 class indices [B], or floating class probabilities [B, K].
        mse_ratio: η in [0, 1]; 0 skips the squared term.
        class_weight: [K] weights of the classes in the cross entropy.
        ignore_index: rows with this index count in neither mean (indices only).
        label_smoothing: in [0, 1], as in `torch.nn.functional.cross_entropy`; the squared term uses
            the same smoothed target.
        check: look for indices out of range also where that would synchronise with a GPU. On the
            CPU eager calls always look. Where nobody looks (a GPU, torch.compile) the loss is NaN.
        backend: as in `lif`.

    Returns:
        A scalar, float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: a wrong argument, named; an index out of range.
        RuntimeError: a backend that cannot serve, with the reason; double backward.

    Source: TRT (arXiv 2506.19256), TET (Deng et al., ICLR 2022) for the mean over time.
    """
    ratio = checks.fraction("mse_ratio", mse_ratio)
    return mixed_loss(
        logits,
        target,
        entropy_ratio=1 - ratio,
        square_ratio=ratio,
        constant=None,
        time_dim=time_dim,
        class_weight=class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        check=check,
        backend=backend,
    )


def mixed_loss(
    logits: Tensor,
    target: Tensor,
    *,
    entropy_ratio: float,
    square_ratio: float,
    constant: float | None,
    time_dim: int = 0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    check: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`temporal_loss` and TET's loss, which pulls the logits to a constant, in one."""
    checks.tensor("logits", logits)
    if logits.ndim != 3:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, needs [T, B, K] or [B, T, K]")
    time_dim = checks.dimension("time_dim", time_dim, 3)
    if time_dim == 2:
        raise ValueError("time_dim: got the class dimension, needs 0 or 1")
    batch, classes = logits.shape[1 - time_dim], logits.shape[2]
    if classes == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, needs at least one class")
    smoothing = checks.fraction("label_smoothing", label_smoothing)
    ignore_index = checks.integer("ignore_index", ignore_index)
    checks.boolean("check", check)
    checks.tensor("target", target, (torch.int64, *checks.FLOATS))
    checks.same_device("target", target, "logits", logits)
    needed = (batch, classes) if target.is_floating_point() else (batch,)
    if tuple(target.shape) != needed:
        raise ValueError(f"target: got shape {tuple(target.shape)}, needs {needed}")
    if target.requires_grad:
        raise ValueError("target: requires grad, but the loss has no gradient for it")
    if class_weight is not None:
        checks.tensor("class_weight", class_weight)
        checks.same_device("class_weight", class_weight, "logits", logits)
        if tuple(class_weight.shape) != (classes,):
            raise ValueError(
                f"class_weight: got shape {tuple(class_weight.shape)}, needs {(classes,)}"
            )
        if class_weight.requires_grad:
            raise ValueError("class_weight: requires grad, but the loss has no gradient for it")
    options = LossOptions(
        time_dim=time_dim,
        entropy_ratio=entropy_ratio,
        square_ratio=square_ratio,
        constant=constant,
        label_smoothing=smoothing,
        ignore_index=ignore_index,
        backend=choose_backend("temporal_loss", backend, logits.device),
    )
    looks = check or logits.device.type == "cpu"
    if looks and not target.is_floating_point() and not torch.compiler.is_compiling():
        wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
        if bool(wrong.any()):
            raise ValueError(
                f"target: got class {int(target[wrong][0])}, needs 0 to {classes - 1} "
                f"or ignore_index ({ignore_index})"
            )
    if class_weight is not None:
        class_weight = class_weight.to(checks.state_dtype(logits.dtype))
    if options.backend == "reference":
        return reference.temporal_loss(logits, target, class_weight, options)
    value: Tensor = TemporalLossFunction.apply(logits, target, class_weight, options)
    return value
