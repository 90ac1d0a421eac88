"""The autograd Functions: what is kept for the backward pass, and nothing else."""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from . import ops
from .checks import single_backward
from .options import LIFOptions, LossOptions, PenaltyOptions


class LIFFunction(Function):
    """Keeps x (and v_init where given) and computes the potentials again.

    Returns the spikes, then whichever of state, potential and penalty the options ask for; the
    spikes alone, not in a tuple, where they ask for nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v_init: Tensor | None, weight: Tensor | None, options: LIFOptions
    ) -> Any:
        spikes, state, potential, penalty = ops.lif_forward(x, v_init, weight, options)
        ctx.save_for_backward(x, v_init, weight)
        ctx.options = options
        if state is None and potential is None and penalty is None:
            return spikes
        ctx.set_materialize_grads(False)
        return spikes, *(extra for extra in (state, potential, penalty) if extra is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        single_backward("lif")
        x, v_init, weight = ctx.saved_tensors
        options = ctx.options
        arriving = iter(grads)
        grad_spikes = next(arriving)
        grad_state = next(arriving) if options.return_state else None
        grad_potential = next(arriving) if options.return_potential else None
        grad_penalty = next(arriving) if weight is not None else None
        grad_x, grad_v_init = ops.lif_backward(
            x,
            v_init,
            weight,
            grad_spikes,
            grad_state,
            grad_potential,
            grad_penalty,
            ctx.needs_input_grad[1],
            options,
        )
        return grad_x if ctx.needs_input_grad[0] else None, grad_v_init, None, None


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
        value, normalizer = ops.temporal_loss_forward(logits, target, class_weight, options)
        ctx.save_for_backward(logits, target, class_weight, normalizer)
        ctx.options = options
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        single_backward("temporal_loss")
        logits, target, class_weight, normalizer = ctx.saved_tensors
        result = ops.temporal_loss_backward(
            grad, logits, target, class_weight, normalizer, ctx.options
        )
        return result, None, None, None
