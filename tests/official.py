"""The official TRT code's neuron and objectives (method.md), written anew, operation by operation.

For the tests of what stands in their place: `BaseNode` and `LIFNode` have the attributes of theirs.
"""

import math

import torch
from torch import nn
from torch.autograd import Function


class Spike(Function):
    """1 where u > 0; its derivative is the surrogate's."""

    @staticmethod
    def forward(ctx, u, kind, parameter):
        ctx.save_for_backward(u)
        ctx.surrogate = kind, parameter
        return (u > 0).float()

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        kind, p = ctx.surrogate
        if kind == "sigmoid":
            s = 1 / (1 + torch.exp(-p * u))
            slope = p * (1 - s) * s
        elif kind == "triangle":
            slope = (1 / p) * (1 / p) * (p - u.abs()).clamp(min=0)
        else:
            slope = (u.abs() < p).float()
        return slope * grad, None, None


class LIFNode(nn.Module):
    def __init__(
        self,
        v_threshold=0.5,
        v_reset=0.0,
        tau=5,
        surrogate_type="sigmoid",
        surrogate_param=2.0,
        surrogate_m=5,
    ):
        super().__init__()
        self.v_threshold, self.v_reset, self.tau = v_threshold, v_reset, tau
        self.surrogate_type, self.surrogate_param = surrogate_type, surrogate_param
        self.surrogate_m = surrogate_m
        self.mem, self.spike_pot = 0, []

    def reset(self):
        self.mem, self.spike_pot = 0, []

    def forward(self, x):
        self.reset()
        for t in range(x.shape[1]):
            self.mem = self.mem / self.tau + x[:, t]
            spike = Spike.apply(
                self.mem - self.v_threshold, self.surrogate_type, self.surrogate_param
            )
            if self.v_reset is None:
                self.mem = self.mem - spike * self.v_threshold
            else:
                self.mem = (1 - spike) * self.mem + self.v_reset * spike
            self.spike_pot.append(spike)
        return torch.stack(self.spike_pot, dim=1)


def penalty(model, t, decay, lamb, epsilon):
    total = 0
    for name, w in model.named_parameters():
        if "bias" not in name:
            factor = lamb / (1 + (math.exp(decay * t) - 1) * (w.abs() + epsilon))
            total = total + (w**2 * factor).sum()
    return total


def TRT_Loss(model, outputs, labels, criterion, decay, lamb, epsilon, eta=0.05):
    steps, loss = outputs.shape[1], 0
    one_hot = nn.functional.one_hot(labels, outputs.shape[-1]).float()
    for t in range(steps):
        logits = outputs[:, t].float()
        squares = nn.functional.mse_loss(logits, one_hot) if eta != 0 else 0
        loss = loss + (1 - eta) * criterion(logits, labels) + eta * squares
        loss = loss + penalty(model, t, decay, lamb, epsilon)
    return loss / steps


def TET_Loss(outputs, labels, criterion, means, lamb):
    steps, loss = outputs.shape[1], 0
    for t in range(steps):
        loss = loss + criterion(outputs[:, t], labels)
    squares = nn.functional.mse_loss(outputs, torch.full_like(outputs, means)) if lamb else 0
    return (1 - lamb) * loss / steps + lamb * squares


class SeqToANNContainer(nn.Module):
    """Layers without time on [B, T, *]."""

    def __init__(self, *layers):
        super().__init__()
        self.module = layers[0] if len(layers) == 1 else nn.Sequential(*layers)

    def forward(self, x):
        y = self.module(x.flatten(0, 1).contiguous())
        shape = [x.shape[0], x.shape[1]]
        shape.extend(y.shape[1:])
        return y.view(shape)
