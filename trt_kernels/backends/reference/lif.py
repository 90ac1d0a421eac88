"""The LIF neuron as a loop over time (method.md, sections 1 and 2).

The order of operations is the contract that every kernel keeps: it decides which spikes fire.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ...checks import single_backward, state_dtype
from ...options import LIFOptions


class Fire(Function):
    """s = 1 where h passes the threshold; its gradient is the surrogate's."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, threshold: float, at: bool, surrogate: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(h)
        ctx.threshold, ctx.surrogate = threshold, surrogate
        return (h >= threshold if at else h > threshold).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        single_backward("lif")
        (h,) = ctx.saved_tensors
        return grad * ctx.surrogate(h - ctx.threshold), None, None, None


class HardReset(Function):
    """v = v_reset where it spiked, else h: a select, with the gradient of h(1-s) + v_reset·s."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, s: Tensor, v_reset: float) -> Tensor:
        ctx.save_for_backward(h, s)
        ctx.v_reset = v_reset
        return torch.where(s.bool(), v_reset, h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        single_backward("lif")
        h, s = ctx.saved_tensors
        return torch.where(s.bool(), 0, grad), (ctx.v_reset - h) * grad, None


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


def lif(
    x: Tensor,
    v_init: Tensor | None,
    weight: Tensor | None,
    options: LIFOptions,
    surrogate: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Spikes, last state, potential, and the regularizer's scalar (None without `weight`)."""
    dtype = state_dtype(x.dtype)
    shape = x.shape[: options.time_dim] + x.shape[options.time_dim + 1 :]
    v = x.new_zeros(shape, dtype=dtype) if v_init is None else v_init
    penalty = None if weight is None else x.new_zeros((), dtype=dtype)
    if x.numel() == 0:
        return x * 0, v.clone(), x.to(dtype) * 0, penalty
    # A tensor: some devices divide by a Python number as a product with its reciprocal.
    tau = torch.full((), 1 / (options.decay or 1), dtype=dtype, device=x.device)
    spikes, potentials = [], []
    for t, x_t in enumerate(x.to(dtype).unbind(options.time_dim)):
        h = v / tau + x_t if options.charge == "divide" else options.decay * v + x_t
        s = Fire.apply(h, options.threshold, options.fire_at_threshold, surrogate)
        through = s.detach() if options.detach_reset else s
        if options.reset == "hard":
            v = HardReset.apply(h, through, options.v_reset)
        elif options.reset == "soft":
            v = h - options.threshold * through
        else:
            v = h
        if weight is not None and penalty is not None:
            penalty = penalty + weight[t] * phi(options, t, h, s).sum() / h.numel()
        spikes.append(s)
        potentials.append(h)
    return (
        like(x, torch.stack(spikes, options.time_dim).to(x.dtype)),
        v,
        torch.stack(potentials, options.time_dim),
        penalty,
    )


def like(x: Tensor, value: Tensor) -> Tensor:
    """`value` in the memory layout of x."""
    return value if value.stride() == x.stride() else torch.empty_like(x).copy_(value)
