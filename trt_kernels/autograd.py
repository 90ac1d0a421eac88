"""The autograd Functions: what is kept for the backward pass, and nothing else."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import ops
from .backends.native import PlainLIF
from .checks import single_backward
from .options import LIFOptions, LossOptions, PenaltyOptions


class LIFFunction(Function):
    """Keeps x (and v_init where given) and computes the potentials again; on a GPU, of a long
    sequence, from a potential kept every 16 steps.

    Takes x and the options, then v_init and the regularizer's weight where either is given: every
    further argument costs a small call half a microsecond. Returns the spikes, then whichever of
    state, potential and penalty the options ask for; the spikes alone, not in a tuple, where they
    ask for nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        options: LIFOptions,
        v_init: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Any:
        ctx.options = options
        for_backward = any(ctx.needs_input_grad)
        *outputs, checkpoints = ops.lif_forward(x, v_init, weight, for_backward, options)
        if v_init is None and weight is None and checkpoints is None:
            ctx.save_for_backward(x)
        else:
            ctx.save_for_backward(x, v_init, weight, checkpoints)
        spikes, state, potential, penalty = outputs
        if state is None and potential is None and penalty is None:
            return spikes
        ctx.set_materialize_grads(False)
        return tuple(output for output in outputs if output is not None)

    @staticmethod
    def backward(ctx: Any, grad_spikes: Tensor | None, *extras: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            single_backward("lif")
        options = ctx.options
        needs = ctx.needs_input_grad
        saved = ctx.saved_tensors
        x, v_init, weight, checkpoints = saved if len(saved) == 4 else (saved[0], None, None, None)
        grad_state = grad_potential = grad_penalty = None
        if extras:
            arriving = iter(extras)
            grad_state = next(arriving) if options.return_state else None
            grad_potential = next(arriving) if options.return_potential else None
            grad_penalty = next(arriving) if weight is not None else None
        grads = (grad_spikes, grad_state, grad_potential, grad_penalty)
        needs_v_init = len(needs) > 2 and needs[2]
        grad_x, grad_v_init = ops.lif_backward(
            x, v_init, weight, checkpoints, grads, needs_v_init, options
        )
        return (grad_x if needs[0] else None, None, grad_v_init, None)[: len(needs)]


class LIFSpikes(Function):
    """`LIFFunction` of a plain contiguous tensor into spikes alone, by the short way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plain: PlainLIF) -> Tensor:
        ctx.plain = plain
        spikes, checkpoints = plain.forward(x, ctx.needs_input_grad[0])
        if checkpoints is None:
            ctx.save_for_backward(x)
        else:
            ctx.save_for_backward(x, checkpoints)
        return spikes

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            single_backward("lif")
        x, *kept = ctx.saved_tensors
        checkpoints = kept[0] if kept else None
        straight = checkpoints is None or checkpoints.is_contiguous()
        if straight and x.is_contiguous() and grad.is_contiguous() and ops.is_plain(x, grad):
            return ctx.plain.backward(x, checkpoints, grad), None
        grads = (grad, None, None, None)
        options = ctx.plain.options
        return ops.lif_backward(x, None, None, checkpoints, grads, False, options)[0], None


class TRTPenaltyFunction(Function):
    """Keeps the parameters alone."""

    @staticmethod
    def forward(ctx: Any, options: PenaltyOptions, *params: Tensor) -> Tensor:
        ctx.save_for_backward(*params)
        ctx.options = options
        return ops.trt_penalty_forward(params, options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        single_backward("trt_penalty")
        needed = ctx.needs_input_grad[1:]
        params = [p for p, need in zip(ctx.saved_tensors, needed, strict=True) if need]
        grads = iter(ops.trt_penalty_backward(grad, params, ctx.options))
        return None, *(next(grads) if need else None for need in needed)


class TemporalLossFunction(Function):
    """Keeps the logits and a number a row."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, class_weight: Tensor | None, options: LossOptions
    ) -> Tensor:
        value, *kept = ops.temporal_loss_forward(logits, target, class_weight, options)
        ctx.save_for_backward(logits, target, class_weight, *kept)
        ctx.options = options
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        single_backward("temporal_loss")
        logits, target, class_weight, normalizer, divisors = ctx.saved_tensors
        result = ops.temporal_loss_backward(
            grad, logits, target, class_weight, normalizer, divisors, ctx.options
        )
        return result, None, None, None
