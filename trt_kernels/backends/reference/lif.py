"""The LIF neuron as a loop over time (method.md, sections 1 and 2).

The order of operations is the contract that every kernel keeps: it decides which spikes fire.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...checks import no_forward_mode, refuse_second, state_dtype, transforming
from ...options import CHARGES, LIFOptions, LIFResults, LIFTensors
from ...typed import Function
from .. import layout


@no_forward_mode("lif")
class Once(Function):
    """Passes gradients on that cannot be differentiated themselves."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        refuse_second("lif")


def once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of a backward pass; where it is recorded, to be differentiated, refused.

    Transforms of torch.func always record it, so that there the second derivative is refused. The
    ctx is not that of the Function itself there.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return grads
    if isinstance(ctx, (Fire._backward_cls, HardReset._backward_cls)):
        refuse_second("lif")
    given = iter(Once.apply(*(grad for grad in grads if grad is not None)))
    return tuple(None if grad is None else next(given) for grad in grads)


@no_forward_mode("lif")
class Fire(Function):
    """s = 1 where h passes the threshold; its gradient is the surrogate's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        h: Tensor, threshold: Tensor | float, at: bool, surrogate: Callable[[Tensor], Tensor]
    ) -> Tensor:
        return (h >= threshold if at else h > threshold).to(h.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        h, threshold, _, ctx.surrogate = inputs
        learned = isinstance(threshold, Tensor)
        ctx.threshold = None if learned else threshold
        ctx.save_for_backward(h, threshold if learned else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, threshold = ctx.saved_tensors
        slope = grad * ctx.surrogate(h - (ctx.threshold if threshold is None else threshold))
        down = None if threshold is None else -slope.sum_to_size(threshold.shape)
        return *once(ctx, slope, down), None, None


@no_forward_mode("lif")
class HardReset(Function):
    """v = v_reset where it spiked, else h: a select, with the gradient of h(1-s) + v_reset·s."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, s: Tensor, v_reset: Tensor | float) -> Tensor:
        return torch.where(s.bool(), v_reset, h)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        h, s, v_reset = inputs
        learned = isinstance(v_reset, Tensor)
        ctx.v_reset = None if learned else v_reset
        ctx.save_for_backward(h, s, v_reset if learned else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, s, v_reset = ctx.saved_tensors
        to_reset = None if v_reset is None else (s * grad).sum_to_size(v_reset.shape)
        through = ((ctx.v_reset if v_reset is None else v_reset) - h) * grad
        return once(ctx, torch.where(s.bool(), 0, grad), through, to_reset)


def phi(options: LIFOptions, t: int, h: Tensor, s: Tensor) -> Tensor:
    """φ(h_t) of the regularizer."""
    if options.phi == "square":
        return h * h
    if options.phi == "trt":
        return h * h / (1 + growth(options.delta, t) * (h.abs() + options.eps))
    if options.phi == "range":
        return torch.minimum(h.abs(), (1 - h).abs()) ** 2
    return s


def growth(delta: float, t: int) -> float:
    """expm1(δt), held at 2⁶⁰: beyond, its term is nothing and its square overflows."""
    return math.expm1(min(delta * t, math.log(2.0**60)))


def by_channel(values: Tensor, ndim: int, channel_dim: int) -> Tensor:
    """[C] values as they stand beside a tensor of `ndim` dimensions."""
    if values.numel() == 1:
        return values.reshape(())
    return values.reshape([-1 if dim == channel_dim else 1 for dim in range(ndim)])


def charged(
    v: Tensor,
    x: Tensor,
    factor: Tensor | float,
    threshold: Tensor | float,
    v_reset: Tensor | float,
    options: LIFOptions,
) -> Tensor:
    """h_t; `factor` is the decay, or tau where the charge divides."""
    form, divides = CHARGES[options.charge]

    def scaled(part: Tensor) -> Tensor:
        return part / factor if divides else part * factor

    if form == "leaky":
        return v + scaled(x - (v - v_reset))
    if form == "resting":
        return v - scaled(v - v_reset) + x
    if form == "boxed":
        return v + scaled(x - v)
    if form == "delayed":
        fired = v >= threshold if options.fire_at_threshold else v > threshold
        # A tensor: of two numbers, `where` makes float32.
        taken = torch.as_tensor(threshold, dtype=v.dtype, device=v.device)
        return scaled(v) + x - torch.where(fired, taken, 0)
    return scaled(v) + x


def lif(
    x: Tensor,
    tensors: LIFTensors,
    options: LIFOptions,
    surrogate: Callable[[Tensor], Tensor],
) -> LIFResults:
    """Spikes, last state, potential, rate, and the regularizer's scalar if it has a weight."""
    dtype = state_dtype(x.dtype)
    time_dim, weight = options.time_dim, tensors.penalty_weight
    if options.steps and transforming():  # which have no order in memory
        x = torch.stack([x] * options.steps, time_dim)
    elif options.steps:
        in_order = layout.empty_sequence(layout.dense_input(x.detach(), options), options)
        x = in_order.copy_(torch.stack([x] * options.steps, time_dim))
    shape = x.shape[:time_dim] + x.shape[time_dim + 1 :]
    v = x.new_zeros(shape, dtype=dtype) if tensors.v_init is None else tensors.v_init
    penalty = None if weight is None else x.new_zeros((), dtype=dtype)
    if x.numel() == 0:
        rate = x.new_zeros(x.shape[time_dim], dtype=dtype)
        return LIFResults(x * 0, v.clone(), x.to(dtype) * 0, penalty, rate)

    def place(values: Tensor) -> Tensor:
        return by_channel(values, len(shape), options.channel_dim)

    factor: Tensor | float = options.decay
    threshold: Tensor | float = options.threshold
    v_reset: Tensor | float = options.v_reset
    if tensors.neuron is not None:
        factor, threshold, v_reset = map(place, tensors.neuron)
    elif options.divides:
        # A tensor: some devices divide by a Python number as a product with its reciprocal.
        factor = torch.full((), 1 / (options.decay or 1), dtype=dtype, device=x.device)
    spikes, potentials, rates = [], [], []
    for t, x_t in enumerate(x.to(dtype).unbind(time_dim)):
        y = normalised(x_t, t, tensors, options.scale, place)
        h = charged(v, y, factor, threshold, v_reset, options)
        s = Fire.apply(h, threshold, options.fire_at_threshold, surrogate)
        through = s.detach() if options.detach_reset else s
        if options.reset == "hard":
            v = HardReset.apply(h, through, v_reset)
        elif options.reset == "soft":
            v = h - threshold * through
        else:
            v = h
        if weight is not None and penalty is not None:
            penalty = penalty + weight[t] * phi(options, t, h, s).sum() / h.numel()
        spikes.append(s)
        potentials.append(h)
        rates.append(s.detach().mean(dtype=torch.float64).to(dtype))
    return LIFResults(
        like(x, torch.stack(spikes, time_dim).to(x.dtype)),
        v,
        torch.stack(potentials, time_dim),
        penalty,
        torch.stack(rates),
    )


def normalised(
    x: Tensor, t: int, tensors: LIFTensors, scale: float, place: Callable[[Tensor], Tensor]
) -> Tensor:
    """Step t of the batch normalised input: gains · ((x - mean)·a + b)."""
    if tensors.stats is None:
        return x
    mean, rest, inverse = tensors.stats[:3]
    a = inverse * scale
    if tensors.norm_weight is not None:
        a = a * tensors.norm_weight
    b = -(rest * a) if tensors.norm_bias is None else tensors.norm_bias - rest * a
    y = (x - place(mean)) * place(a) + place(b)
    return y if tensors.gains is None else y * place(tensors.gains[t])


def batch_statistics(
    x: Tensor, channel_dim: int, eps: float, repeat: int, backend: str = "reference"
) -> Tensor:
    """[4, C]: mean, what rounding left of it, 1 / deviation, unbiased variance; differentiable."""
    dtype = state_dtype(x.dtype)
    others = [dim for dim in range(x.ndim) if dim != channel_dim]
    values = x.double()
    count = x.numel() // x.shape[channel_dim] * repeat
    exact = values.mean(others)
    centred = values - exact.reshape([-1 if d == channel_dim else 1 for d in range(x.ndim)])
    variance = (centred * centred).mean(others)
    mean = exact.to(dtype)
    rest = (exact - mean.double()).to(dtype)
    inverse = (1 / (variance + eps).sqrt()).to(dtype)
    return torch.stack([mean, rest, inverse, (variance * count / max(1, count - 1)).to(dtype)])


def like(x: Tensor, value: Tensor) -> Tensor:
    """`value` in the memory layout of x."""
    return (
        value
        if value.stride() == x.stride() or transforming()
        else torch.empty_like(x).copy_(value)
    )
