"""The public functions. They check every argument and choose a backend; ops.py runs it."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, ops, packing, sharding
from . import transforms as _transforms  # noqa: F401  it gives ops.py what torch.func transforms
from .autograd import LIFCarried, LIFFunction, LIFSpikes, TemporalLossFunction, TRTPenaltyFunction
from .backends import reference
from .backends.native import PlainLIF
from .ops import choose_backend, trt_penalty_accumulate
from .options import (
    LEARNABLE,
    LIF_SETTINGS,
    LIFOptions,
    LIFTensors,
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
        packing.active(),
    )


def _options(
    x: Tensor, penalty: MembranePenalty | None, backend: Any, settings: Any, learned: bool
) -> tuple[LIFOptions, PlainLIF | None]:
    """`_check_lif`, which a call like one before is spared, and the short way, if there is one.

    `learned` where tensors are among the settings.
    """
    if learned:
        return _check_lif(x, penalty, backend, _with_floats(settings)), None
    if torch.compiler.is_compiling() or penalty is not None or not isinstance(x, Tensor):
        return _check_lif(x, penalty, backend, settings), None
    if x.is_nested:  # else it looks like one that was checked before
        checks.tensor("x", x)
    chosen = ops.default_backend if backend is None else backend
    # The classes too: 0.0 and False equal 0, and would pass for a checked time_dim.
    classes = tuple(map(type, settings))
    key = (settings, classes, packing.active(), chosen, x.dtype, x.device, x.ndim, x.layout)
    try:
        known = _checked.get(key)
    except TypeError:  # something unhashable: the check names it
        return _check_lif(x, penalty, backend, settings), None
    if known is None:
        options = _check_lif(x, penalty, backend, settings)
        known = options, ops.plain_lif(options, x.dtype)
        if options.surrogate != "custom":  # one of the user's own is not kept alive
            if len(_checked) >= _MOST_CHECKED:
                _checked.clear()
            _checked[key] = known
    return known


def lif(
    x: Tensor,
    *,
    decay: float | Tensor = 0.5,
    threshold: float | Tensor = 1.0,
    v_reset: float | Tensor = 0.0,
    reset: str = "hard",
    detach_reset: bool = False,
    surrogate: Surrogate | Callable[[Tensor], Tensor] = Triangle(1.0),  # noqa: B008
    fire_at_threshold: bool = False,
    charge: str = "decay",
    steps: int | None = None,
    v_init: Tensor | float | None = None,
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

        h_t = k·v_{t-1} + x_t                                  charge "decay"; decay 1 is the IF
        h_t = v_{t-1} + k·(x_t - (v_{t-1} - v_reset))          charge "leak", as in PLIF
        h_t = v_{t-1} - k·(v_{t-1} - v_reset) + x_t            charge "rest"
        h_t = v_{t-1} + k·(x_t - v_{t-1})                      charge "box"
        h_t = k·v_{t-1} + x_t - threshold·[v_{t-1} fires]      charge "delayed"
        s_t = 1 if h_t > threshold else 0                      (>= with fire_at_threshold)
        v_t = v_reset where s_t = 1, else h_t                  reset "hard"
        v_t = h_t - threshold·s_t                              reset "soft"
        v_t = h_t                                              reset "none"

    k is the decay. "delayed" resets at the next step, without a gradient through the spike: it goes
    with reset "none". The charges "divide", "leak_divide" and "rest_divide" are the first three
    with a true division by tau = 1/decay in the place of k. The order of operations is the one
    written; `presets` has those of other libraries.

    Differentiable in x, v_init, decay, threshold and v_reset, with the surrogate's
    σ'(h - threshold) for the spike's derivative and, unless detach_reset, through the reset. Only x
    is kept for the backward pass. Float32 spikes and potentials are the same bit for bit on every
    backend.

    Args:
        x: input current, floating [..., T at time_dim, ...], any dense layout (read in place;
            others are copied). float16 and bfloat16 are integrated in float32.
        decay: membrane decay a step, or 1/tau, as the charge says. This, threshold and v_reset are
            each a float, or a floating tensor: a scalar, or one value for each of C channels;
            rounded to the state's dtype, and with a gradient where it requires one. The values of a
            tensor are not checked.
        threshold: firing threshold, in the units of x.
        v_reset: potential after a spike under the hard reset.
        reset: "hard", "soft" or "none".
        detach_reset: no gradient through the spike of the reset.
        surrogate: Triangle, Sigmoid, ATan, Rectangle, FastSigmoid, SignedStep; or any callable that
            gives σ'(u) elementwise, on backend="reference" only.
        fire_at_threshold: fire at h >= threshold instead of h > threshold.
        charge: "decay", "leak", "rest", "box", "delayed", "divide", "leak_divide", "rest_divide";
            where it divides, by 1/decay rounded to the state's dtype.
        steps: x has no time and is a constant current over so many steps. It is read once, and its
            gradient is summed over time. Spikes are those of the repeated x, with T at time_dim.
        v_init: potential before the first step: a float, or a tensor of x's shape without time,
            float32 (float64 for float64 x); 0 if not given.
        time_dim: the dimension of the spikes that is time.
        channel_dim: the dimension of x that tensors of C values belong to.
        penalty: adds the scalar R = Σ_t weight_t · mean φ(h_t) to the result at no memory traffic.
        return_state: also return v_{T-1}, x's shape without time, float32 (float64 for float64).
        return_potential: also return all h_t, the spikes' shape, float32 (float64 for float64).
        statistics: also return the mean firing rate of each step, [T], float32 (float64 for
            float64), from the same pass. It has no gradient: for one, use a penalty "spike".
        memory: "recompute" keeps x. "bits" keeps two bits a neuron-step instead, with which the
            gradient is exactly the same: for a Rectangle surrogate, a reset that is detached, soft
            or none, a decay without gradient, and no penalty but "spike".
        backend: "cpu", "cuda", "triton", "reference" or "auto"; by default that of `use_backend`.

    Returns:
        Spikes of x's shape (with time), dtype and layout; a `LIFOutput` if any extra is asked for.
        An empty x gives empty spikes, the state v_init, and a penalty and rates of 0.

    Raises:
        TypeError, ValueError: a wrong argument, named.
        RuntimeError: a backend that cannot serve, with the reason; double backward.

    Source: the TRT paper and its official code (arXiv 2506.19256), with charge "divide" for the
    latter's v/tau; SpikingJelly for fire_at_threshold, detach_reset and the charges "leak" and
    "rest"; snnTorch for "delayed"; Norse for "box".
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
    learned = (
        isinstance(decay, Tensor) or isinstance(threshold, Tensor) or isinstance(v_reset, Tensor)
    )
    options, short = _options(x, penalty, backend, settings, learned)
    if v_init is not None:
        v_init = _initial(v_init, x, options)
    if short is not None and x.is_contiguous() and ops.holds_values(x):
        alone = not (return_state or return_potential)
        if v_init is None and alone:
            return LIFSpikes.apply(x, short)
        if v_init is None or (v_init.is_contiguous() and ops.holds_values(v_init)):
            spikes, *extras = LIFCarried.apply(x, v_init, short)
            if alone:
                return spikes
            state = extras[0] if return_state else None
            return LIFOutput(spikes, state, None, extras[-1] if return_potential else None, None)
    neuron = None
    if learned:
        neuron = _neuron(x, decay, threshold, v_reset, options, 1)
    weight = None if penalty is None else _penalty_weight(penalty, x, options)
    return _lif(x, LIFTensors(v_init, weight, neuron), options, surrogate, None)


# The short ways of single steps, by everything that they depend on; the options are kept, so that
# their identity stays theirs.
_steps: dict[tuple[Any, ...], tuple[dict[str, Any], PlainLIF | None]] = {}


def lif_step(
    x: Tensor, v: Tensor | None, options: dict[str, Any], *, return_potential: bool = False
) -> LIFOutput:
    """One timestep of `lif`, for loops over time outside of it: x, v and results have one shape.

    `options` are those of `lif` but time_dim, steps, v_init and what is returned; nobody changes
    them after the first call, so that the same dict costs no more checks. Spikes and state are
    returned, and the potential before the reset if asked for.
    """
    learned = any(isinstance(options.get(name), Tensor) for name in LEARNABLE)
    if not learned and x.is_contiguous() and ops.is_plain(x, v):
        fits = v is None or (v.shape == x.shape and v.dtype == checks.state_dtype(x.dtype))
        if fits and (v is None or (v.is_contiguous() and v.device == x.device)):
            backend, packs = ops.default_backend, packing.active()
            key = (id(options), return_potential, x.dtype, x.device, x.ndim, backend, packs)
            known = _steps.get(key)
            if known is None:
                known = _steps[key] = options, _short_step(x, options, return_potential)
            if known[1] is not None:
                spikes, state, *rest = LIFCarried.apply(x, v, known[1])
                return LIFOutput(spikes, state, None, rest[0] if rest else None, None)
    out = lif(
        x.unsqueeze(0), **options, v_init=v, return_state=True, return_potential=return_potential
    )
    return single(out)


def single(out: LIFOutput) -> LIFOutput:
    """What one timestep of time_dim 0 returned, without time; no views, which have no detach_()."""
    spikes, potential = (
        None if t is None else t.squeeze(0).clone() for t in (out.spikes, out.potential)
    )
    assert spikes is not None
    return out._replace(spikes=spikes, potential=potential)


def _short_step(x: Tensor, options: dict[str, Any], return_potential: bool) -> PlainLIF | None:
    if len(_steps) >= _MOST_CHECKED:
        _steps.clear()
    asked = {**LIF_DEFAULTS, **options, "return_state": True, "return_potential": return_potential}
    settings = tuple(asked[name] for name in LIF_SETTINGS)
    checked = _check_lif(x.unsqueeze(0), asked["penalty"], asked["backend"], settings)
    return ops.plain_lif(checked, x.dtype, single=True)


def _lif(x: Tensor, tensors: LIFTensors, options: LIFOptions, surrogate: Any, group: Any) -> Any:
    """Runs a checked call."""
    penalised = tensors.penalty_weight is not None
    state: Tensor | None
    potential: Tensor | None
    value: Tensor | None
    rate: Tensor | None
    plain = not (
        options.return_state or options.return_potential or options.statistics or penalised
    )
    if options.backend == "reference":
        try:
            results = reference.lif(x, tensors, options, surrogate)
        except NotImplementedError as error:
            if "jvp" not in str(error):
                raise
            checks.refuse_forward_mode("lif")
        spikes, state, potential, value, rate, *_ = results
        if plain:
            return spikes
        return LIFOutput(
            spikes,
            state if options.return_state else None,
            value,
            potential if options.return_potential else None,
            rate if options.statistics else None,
        )
    if checks.transforming():
        return _transformed(x, tensors, options, plain)
    if any(t is not None for t in tensors):
        result = LIFFunction.apply(x, options, *tensors, group)
    else:
        result = LIFFunction.apply(x, options)
    if isinstance(result, Tensor):
        return result
    spikes, *extras = result
    arriving = iter(extras)
    state = next(arriving) if options.return_state else None
    potential = next(arriving) if options.return_potential else None
    value = next(arriving) if penalised else None
    rate = next(arriving) if options.statistics else None
    if options.bits:
        packing.remember(spikes, next(arriving)[0], options.time_dim)
    return spikes if plain else LIFOutput(spikes, state, value, potential, rate)


def _transformed(x: Tensor, tensors: LIFTensors, options: LIFOptions, plain: bool) -> Any:
    """`lif` under a transform of torch.func, where bits are not kept: they would have no sample."""
    options = options._replace(bits=0)
    spikes, state, potential, value, rate, *_ = ops.lif_forward(x, tensors, True, options)
    return spikes if plain else LIFOutput(spikes, state, value, potential, rate)


def _with_floats(settings: tuple[Any, ...]) -> tuple[Any, ...]:
    """The settings with a float in the place of each tensor, which `_neuron` checks."""
    return tuple(
        LIF_DEFAULTS[name] if name in LEARNABLE and isinstance(value, Tensor) else value
        for name, value in zip(LIF_SETTINGS, settings, strict=True)
    )


def _neuron(
    x: Tensor, decay: Any, threshold: Any, v_reset: Any, options: LIFOptions, channels: int
) -> Tensor:
    """decay (or tau, to divide by), threshold and v_reset as [3, C], of at least `channels`."""
    dtype = checks.state_dtype(x.dtype)
    count = None
    if options.channel_dim >= 0:
        dim = options.channel_dim
        count = x.shape[dim if options.steps or dim < options.time_dim else dim + 1]
    if options.bits == 2 and isinstance(decay, Tensor) and decay.requires_grad:
        raise ValueError("memory: 'bits' needs a decay without gradient: it takes the potentials")
    rows = []
    for name, value in (("decay", decay), ("threshold", threshold), ("v_reset", v_reset)):
        divides = name == "decay" and options.divides
        if isinstance(value, Tensor):
            row = checks.channels(name, value, count, dtype, x)
            row = 1 / row if divides else row
        else:
            row = torch.full((1,), 1 / value if divides else value, dtype=dtype, device=x.device)
        rows.append(row)
    for row in rows:
        channels = row.numel() if row.numel() != 1 else channels
    return torch.stack([row.expand(channels) for row in rows])


LIF_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(lif).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
}


def _penalty_weight(penalty: MembranePenalty, x: Tensor, options: LIFOptions) -> Tensor:
    steps = options.steps or x.shape[options.time_dim]
    weight = penalty.weight
    if weight.shape[0] != steps:
        raise ValueError(
            f"penalty: its weight has {weight.shape[0]} entries, needs one for each of the "
            f"{steps} steps"
        )
    if weight.requires_grad:
        raise ValueError("penalty: its weight requires grad, but there is no gradient for it")
    if weight.device != x.device and weight.device.type != "cpu":
        checks.same_device("penalty", weight, "x", x)
    # From the CPU the copy is asynchronous: it synchronises nothing.
    return weight.to(x.device, checks.state_dtype(x.dtype), non_blocking=True).contiguous()


def _initial(v_init: Any, x: Tensor, options: LIFOptions) -> Tensor | None:
    """v_init as a checked tensor; None for zeros."""
    dtype, dim = checks.state_dtype(x.dtype), options.time_dim
    needed = tuple(x.shape) if options.steps else (*x.shape[:dim], *x.shape[dim + 1 :])
    if not isinstance(v_init, Tensor):
        value = checks.neuron_parameter("v_init", v_init, x.dtype)
        return x.new_full(needed, value, dtype=dtype) if value else None
    checks.tensor("v_init", v_init, (dtype,))
    if tuple(v_init.shape) != needed:
        raise ValueError(f"v_init: got shape {tuple(v_init.shape)}, needs {needed}")
    checks.same_device("v_init", v_init, "x", x)
    return v_init


def batch_norm_lif(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    time_dim: int = 0,
    scale: float = 1.0,
    gains: Tensor | None = None,
    process_group: Any = None,
    **lif_options: Any,
) -> Any:
    """Batch normalisation and `lif` in one operator: what stands between two convolutions.

        z = scale·weight·(x - mean) / √(var + eps) + bias       y_t = gains_t·z_t
        spikes = lif(y)

    mean and var are those of each channel over everything else, time included (the "tdBN" of the
    official networks; the α·threshold of tdBN proper goes into `scale`), biased as in
    `torch.nn.functional.batch_norm`; without `training`, running_mean and running_var. In training
    these two are updated in place, var unbiased, by `momentum`.

    Two passes over x forward and two backward; only x and vectors of a channel's numbers are kept.
    Differentiable in x, weight, bias, gains, v_init, decay, threshold and v_reset. y is computed in
    the state's dtype as gains·((x - m)·a + b), a = inverse·scale·weight, and never rounded to half:
    given the same mean and inverse deviation, spikes are those of `lif` bit for bit.

    Args:
        x: floating [T, B, C, *], or [B, T, C, *] with time_dim=1; any dense layout in place. With
            `steps` [B, C, *], constant in time: normalised and read once, running_var as if x had
            been repeated.
        running_mean, running_var: [C], or None in training.
        weight, bias: [C] or None, for 1 and 0.
        training: take mean and var from x.
        momentum: share of the new in the running statistics; a float, or a scalar tensor, whose
            value is not checked.
        eps: a number > 0.
        time_dim: 0 or 1.
        scale: a factor of the normalised x.
        gains: a factor for every step of the whole normalisation, [T], or [T, C] (TEBN).
        process_group: in training, share the statistics over this group of `torch.distributed`, as
            SyncBatchNorm does (`torch.distributed.group.WORLD` for all processes).
        lif_options: every keyword of `lif`; channel_dim is that of C, and memory "recompute".

    Returns:
        What `lif` returns.

    Raises:
        TypeError, ValueError: a wrong argument, named; one value a channel in training.
        RuntimeError: a backend that cannot serve, with the reason; double backward; a process group
            under torch.compile.

    Source: BatchNorm (arXiv 1502.03167), tdBN (2011.05280), TEBN (NeurIPS 2022).
    """
    unknown = lif_options.keys() - LIF_DEFAULTS.keys()
    if unknown:
        raise TypeError(
            f"batch_norm_lif: unknown options {sorted(unknown)}; lif takes {sorted(LIF_DEFAULTS)}"
        )
    given = {**LIF_DEFAULTS, **lif_options, "time_dim": time_dim}
    penalty = given["penalty"]
    settings = tuple(given[name] for name in LIF_SETTINGS)
    learned = any(isinstance(given[name], Tensor) for name in LEARNABLE)
    options, _ = _options(x, penalty, given["backend"], settings, learned)
    if options.time_dim > 1:
        raise ValueError(
            f"time_dim: got {time_dim}, needs 0 for [T, B, C, *] or 1 for [B, T, C, *]"
        )
    if x.ndim < (2 if options.steps else 3):
        wanted = "[B, C, *]" if options.steps else "[T, B, C, *]"
        raise ValueError(f"x: got shape {tuple(x.shape)}, needs {wanted}")
    if options.bits == 2:
        raise ValueError("memory: 'bits' is not for batch_norm_lif, whose backward pass needs x")
    channel_dim = 1 if options.steps else 2
    if given["channel_dim"] is not None and given["channel_dim"] % x.ndim != channel_dim:
        raise ValueError(
            f"channel_dim: got {given['channel_dim']}, but the channels normalised are dimension "
            f"{channel_dim}"
        )
    scale = checks.neuron_parameter("scale", scale, x.dtype)
    training = checks.boolean("training", training)
    options = options._replace(channel_dim=1, scale=scale, batch=training)
    if isinstance(momentum, Tensor):
        checks.scalar("momentum", momentum)
    else:
        momentum = checks.fraction("momentum", momentum)
    eps = checks.positive("eps", eps)
    channels = x.shape[channel_dim]
    dtype = checks.state_dtype(x.dtype)
    vectors = []
    for name, vector in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if vector is not None:
            checks.tensor(name, vector)
            checks.same_device(name, vector, "x", x)
            if tuple(vector.shape) != (channels,):
                raise ValueError(f"{name}: got shape {tuple(vector.shape)}, needs ({channels},)")
        vectors.append(vector)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean, running_var: got one without the other")
    for running in (running_mean, running_var):
        if running is not None and running.requires_grad:
            raise ValueError("running_mean, running_var: require grad, but there is none for them")
        if running is not None and training and channels > 1 and running.stride(0) == 0:
            raise ValueError(
                "running_mean, running_var: repeat one number in memory, need one for each channel"
            )
    if gains is not None:
        steps = options.steps or x.shape[options.time_dim]
        checks.tensor("gains", gains)
        checks.same_device("gains", gains, "x", x)
        if tuple(gains.shape) not in ((steps,), (steps, channels)):
            raise ValueError(
                f"gains: got shape {tuple(gains.shape)}, needs ({steps},) or ({steps}, {channels})"
            )
        gains = gains.to(dtype).contiguous()
    neuron = None
    if learned:
        neuron = _neuron(x, given["decay"], given["threshold"], given["v_reset"], options, channels)
    # Everything is checked before the running statistics change.
    v_init = None if given["v_init"] is None else _initial(given["v_init"], x, options)
    penalty_weight = None if penalty is None else _penalty_weight(penalty, x, options)
    if training:
        group = process_group
        stats = _batch_stats(x, channel_dim, eps, max(1, options.steps), options.backend, group)
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                _update_running(running_mean, stats[0], momentum)
                _update_running(running_var, stats[3], momentum)
    else:
        group = None
        if running_mean is None or running_var is None:
            raise ValueError("running_mean, running_var: got None, needed where training is False")
        stats = _running_stats(running_mean, running_var, eps, dtype)
    weight, bias = (None if v is None else v.to(dtype).contiguous() for v in (weight, bias))
    tensors = LIFTensors(v_init, penalty_weight, neuron, stats, weight, bias, gains)
    return _lif(x, tensors, options, given["surrogate"], group)


def _update_running(running: Tensor, new: Tensor, momentum: Any) -> None:
    share = momentum.to(running) if isinstance(momentum, Tensor) else momentum
    new = new.to(running.dtype)
    if not checks.transforming():
        running.lerp_(new, share)
        return
    try:
        running.add_((new - running) * share)  # vmap has no lerp
    except RuntimeError as error:
        raise RuntimeError(
            "running_mean, running_var: batch_norm_lif cannot update them in place under this "
            "transform of torch.func: give None, or pass them through the transformed function"
        ) from error


def _batch_stats(
    x: Tensor, channel_dim: int, eps: float, repeat: int, backend: str, group: Any
) -> Tensor:
    """The statistics of x, over a group of processes where there is one; [4, C]."""
    channels = x.shape[channel_dim]
    count = x.numel() // max(1, channels) * repeat
    if group is None:
        if count <= 1:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, needs more than one value a channel in training"
            )
        if backend == "reference":
            return reference.batch_statistics(x, channel_dim, eps, repeat)
        return ops.batch_statistics(x.detach(), channel_dim, eps, repeat, backend)
    if torch.compiler.is_compiling():
        raise RuntimeError("process_group: statistics are not shared under torch.compile")
    if backend == "reference":
        raise ValueError("process_group: statistics are not shared on backend='reference'")
    # Parallel variance: of the group's means and variances, in double and in the order of ranks.
    own = x.new_zeros((3, channels), dtype=torch.float64)
    own[2] = count
    if count:
        mean, rest, _, unbiased = ops.batch_statistics(
            x.detach(), channel_dim, eps, repeat, backend
        ).double()
        own[0] = mean + rest
        own[1] = unbiased * (count - 1)
    every = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(every, own, group=group)
    means, squares, counts = torch.stack(every).unbind(1)  # [processes, C] each
    total = counts.sum(0)
    mean = (means * counts).sum(0) / total
    squares = (squares + counts * (means - mean) ** 2).sum(0)
    rounded = mean.to(checks.state_dtype(x.dtype))
    inverse = 1 / (squares / total + eps).sqrt()
    rows = [mean - rounded.double(), inverse, squares / (total - 1)]
    return torch.stack([rounded, *(row.to(rounded.dtype) for row in rows)])


def _running_stats(mean: Tensor, variance: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """As of a batch, of running statistics."""
    inverse = 1 / (variance.double() + eps).sqrt()
    mean = mean.to(dtype)
    return torch.stack([mean, torch.zeros_like(mean), inverse.to(dtype), variance.to(dtype)])


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
            float64 if any is float64, else in float32. Of DTensors, sharded or replicated, each
            process reads its own shards, and one all-reduce over each dimension of a mesh that
            shards sums the value; the backward pass communicates nothing, and a gradient is placed
            as its parameter. Ordinary tensors and replicas count once.
        steps: T >= 1.
        weight: λ.
        delta: δ >= 0. A δt that overflows makes its term and its derivative 0.
        eps: ε >= 0.
        backend: as in `lif`.

    Returns:
        A scalar, float32 (float64 if any parameter is).

    Raises:
        TypeError, ValueError: a wrong argument, named; an empty list; a DTensor that is Partial, or
            on a mesh without this process.
        RuntimeError: a backend that cannot serve, with the reason; double backward.

    Source: TRT (arXiv 2506.19256).
    """
    tensors, options = _penalty_arguments(params, steps, weight, delta, eps, backend)
    if any(map(sharding.is_dtensor, tensors)):
        return sharding.sum_over_shards(tensors, lambda own: _penalty(own, options))
    return _penalty(tensors, options)


def _penalty(params: list[Tensor], options: PenaltyOptions) -> Tensor:
    if options.backend == "reference":
        return reference.trt_penalty(params, options)
    if checks.transforming():
        return ops.trt_penalty_forward(params, options)
    if torch.compiler.is_compiling() and not any(p.requires_grad for p in params):
        # Without gradients Dynamo calls `forward` of a Function without ctx, where its signature
        # happens to have as many names as there are arguments: two parameters here.
        return ops.trt_penalty_forward(params, options)
    value: Tensor = TRTPenaltyFunction.apply(options, *params)
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

    For training loops that do not report R: no graph, no scalar, no buffer beside `.grad`. Call it
    once a step, after the last `backward` and before clipping and the optimizer's step:

        loss.backward()
        trt_penalty_(params, steps=T, weight=1e-5, delta=0.25)
        optimizer.step()

    With a `torch.amp.GradScaler`, after `unscale_`:

        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        trt_penalty_(params, steps=T, weight=1e-5, delta=0.25)
        scaler.step(optimizer)
        scaler.update()

    or, where nothing calls `unscale_`, with `scale=scaler.get_scale()`, which waits for a GPU.

    Parameters that do not require grad are left alone; a `.grad` of None is created; a parameter
    that is listed twice gets it twice. Nothing is communicated: under DDP and FSDP2 the gradients
    that `backward` leaves are means over the processes, to which every process adds the same.

    Args, Raises: as `trt_penalty`; scale: a finite float; ValueError too for a parameter that is no
    leaf, and for a DTensor's `.grad` that is not placed as the parameter is.
    """
    if checks.transforming():
        raise RuntimeError(
            "trt_penalty_: writes into .grad, which nothing has under a transform of torch.func: "
            "differentiate trt_penalty instead"
        )
    scale = checks.finite("scale", scale)
    tensors, options = _penalty_arguments(params, steps, weight, delta, eps, backend)
    for index, p in enumerate(tensors):
        if torch.autograd.forward_ad.unpack_dual(p).tangent is not None:
            checks.refuse_forward_mode("trt_penalty_")
        if p.requires_grad and not p.is_leaf:
            raise ValueError(f"params[{index}]: not a leaf of the graph, so nobody reads its .grad")
        if p.grad is not None:
            checks.tensor(f"params[{index}].grad", p.grad)
            if sharding.is_dtensor(p):
                sharding.check_gradient(f"params[{index}].grad", p)
    tensors = [p for p in tensors if p.requires_grad]
    if not tensors:
        return
    for p in tensors:
        if p.grad is None:
            with torch.inference_mode(False):  # else no backward could add to it
                p.grad = torch.zeros_like(p)
    grads = [p.grad for p in tensors if p.grad is not None]
    if wholes := [grad for grad in grads if sharding.is_dtensor(grad)]:
        tensors, grads = (list(map(sharding.local, several)) for several in (tensors, grads))
    if options.backend != "reference":
        trt_penalty_accumulate(tensors, grads, scale, options)
    else:
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [
                (p.clone() if p.is_inference() else p.detach()).requires_grad_() for p in tensors
            ]
            added = torch.autograd.grad(scale * reference.trt_penalty(leaves, options), leaves)
        for grad, more in zip(grads, added, strict=True):
            grad.add_(more)
    if wholes:  # a DTensor counts its changes apart from the tensor that it holds
        torch.autograd.graph.increment_version(wholes)


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
        if sharding.is_dtensor(p):
            sharding.check_parameter(f"params[{index}]", p)
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
    looks = check or (logits.device.type == "cpu" and not checks.transforming())
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
    if checks.transforming():
        return ops.temporal_loss_forward(logits, target, class_weight, options)[0]
    value: Tensor = TemporalLossFunction.apply(logits, target, class_weight, options)
    return value
