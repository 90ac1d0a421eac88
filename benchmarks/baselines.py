"""What the kernels are compared with, in plain PyTorch: the official formulas and yardsticks.

Written anew from method.md's equations in the official code's operations, one by one, as its users
run them. Time is dimension 0.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional


class TriangleSpike(Function):
    """1 where u > 0; its derivative is the triangle of width 1."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return u.gt(0).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return (1 - u.abs()).clamp(min=0) * grad.clone()


def official_lif(
    x: Tensor,
    *,
    tau: float = 2.0,
    threshold: float = 1.0,
    v_reset: float = 0.0,
    time_dim: int = 0,
) -> Tensor:
    """The official LIF: a Python loop over time, hard reset, not detached."""
    v: Any = 0
    spikes = []
    for t in range(x.shape[time_dim]):
        v = v / tau + x.select(time_dim, t)  # as x[t], or x[:, t]
        spike = TriangleSpike.apply(v - threshold)
        v = (1 - spike) * v + v_reset * spike
        spikes.append(spike)
    return torch.stack(spikes, time_dim)


def learned_lif(x: Tensor, decay: Tensor, threshold: Tensor) -> Tensor:
    """The same loop with a decay and a threshold of each channel, x [T, B, C, *]."""
    shape = (-1, *[1] * (x.ndim - 3))
    decay, threshold = decay.view(shape), threshold.view(shape)
    v: Any = 0
    spikes = []
    for current in x.unbind():
        v = v * decay + current
        spike = TriangleSpike.apply(v - threshold)
        v = (1 - spike) * v
        spikes.append(spike)
    return torch.stack(spikes)


class NormLIF:
    """torch's batch normalisation over time and batch together, then a neuron.

    Its statistics are its own; weight and bias come with x, [T, B, C, *] or [B, C, *].
    """

    def __init__(
        self, channels: int, device: torch.device, training: bool, neuron: Callable[..., Tensor]
    ) -> None:
        self.training, self.neuron = training, neuron
        self.mean = torch.zeros(channels, device=device)
        self.variance = torch.ones(channels, device=device)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
        images = x.flatten(0, -4)
        y = functional.batch_norm(images, self.mean, self.variance, weight, bias, self.training)
        return self.neuron(y.unflatten(0, x.shape[:-3]), **options)


def official_penalty(
    named: Sequence[tuple[str, Tensor]],
    *,
    steps: int,
    weight: float,
    delta: float,
    eps: float = 1e-5,
) -> Tensor:
    """The official regularizer: for each step, each parameter without "bias" in its name."""
    total: Any = 0
    for t in range(steps):
        step: Any = 0
        for name, w in named:
            if "bias" not in name:
                factor = weight / (1 + (math.exp(delta * t) - 1) * (w.abs() + eps))
                step = step + torch.sum(w**2 * factor)
        total = total + step
    return total / steps


def closed_penalty(w: Tensor, growth: Sequence[float], scale: float, eps: float) -> Tensor:
    """R of one parameter, all steps in one expression; growth is c_t, scale λ/T."""
    magnitude = w.abs()
    total: Any = 0
    for c in growth:
        total = total + 1 / (1 + c * (magnitude + eps))
    return scale * (w * w * total).sum()


def closed_penalty_grad(w: Tensor, growth: Sequence[float], scale: float, eps: float) -> Tensor:
    """∂R/∂w of one parameter, all steps in one expression."""
    magnitude = w.abs()
    total: Any = 0
    for c in growth:
        total = total + (2 + c * (magnitude + 2 * eps)) / (1 + c * (magnitude + eps)) ** 2
    return scale * w * total


def closed_form(
    *, steps: int, weight: float, delta: float, eps: float = 1e-5, compiled: bool = False
) -> Callable[..., Tensor]:
    """R of many parameters by the closed forms of value and derivative, which keep w alone."""
    growth = [math.expm1(delta * t) for t in range(steps)]
    value, derivative = closed_penalty, closed_penalty_grad
    if compiled:
        value = torch.compile(value, dynamic=True, fullgraph=True)
        derivative = torch.compile(derivative, dynamic=True, fullgraph=True)
    constants = (growth, weight / steps, eps)

    class Closed(Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            ctx.save_for_backward(w)
            # Flat, so that one compiled kernel serves every shape.
            return value(w.detach().view(-1), *constants)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (w,) = ctx.saved_tensors
            return grad * derivative(w.detach().view(-1), *constants).view_as(w)

    return lambda *params: torch.stack([Closed.apply(w) for w in params]).sum()


def compiled_closed_form(
    *, steps: int, weight: float, delta: float, eps: float = 1e-5
) -> Callable[..., Tensor]:
    """R by torch.compile of the closed form of the value, its derivative left to the compiler."""
    growth = [math.expm1(delta * t) for t in range(steps)]
    value = torch.compile(closed_penalty, dynamic=True, fullgraph=True)
    constants = (growth, weight / steps, eps)
    return lambda *params: torch.stack([value(w.view(-1), *constants) for w in params]).sum()


def weight_decay(*params: Tensor) -> Tensor:
    """The sum of squares: the memory traffic that weight decay in the loss costs anyway."""
    return torch.stack([w.square().sum() for w in params]).sum()


def official_loss(logits: Tensor, target: Tensor, *, mse_ratio: float) -> Tensor:
    """The official temporal loss: cross entropy and squared distance, step by step."""
    one_hot = functional.one_hot(target, logits.shape[-1]).float()
    total: Any = 0
    for t in range(logits.shape[0]):
        o = logits[t].float()
        entropy = functional.cross_entropy(o, target)
        square = functional.mse_loss(o, one_hot) if mse_ratio else 0
        total = total + (1 - mse_ratio) * entropy + mse_ratio * square
    return total / logits.shape[0]


def flat_loss(logits: Tensor, target: Tensor, *, mse_ratio: float) -> Tensor:
    """The temporal loss with torch's own two losses, each once over all steps."""
    steps, _, classes = logits.shape
    one_hot = functional.one_hot(target, classes).to(logits.dtype)
    entropy = functional.cross_entropy(logits.flatten(0, 1), target.repeat(steps))
    square = functional.mse_loss(logits, one_hot.expand_as(logits)) if mse_ratio else 0
    return (1 - mse_ratio) * entropy + mse_ratio * square


class Nothing(Function):
    """Keeps its input and computes nothing: what autograd itself costs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.empty_like(x)
