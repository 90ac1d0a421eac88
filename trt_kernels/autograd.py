"""The autograd Functions: what is kept for the backward pass, and nothing else."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import ops
from .backends import layout
from .backends.native import PlainLIF
from .checks import single_backward
from .options import (
    LIFGradients,
    LIFGrads,
    LIFOptions,
    LIFTensors,
    LIFWanted,
    LossOptions,
    PenaltyOptions,
)


class LIFFunction(Function):
    """Keeps x (and the small tensors that were given) and computes the potentials again; on a GPU,
    of a long sequence, from a potential kept every 16 steps. With `options.bits` of 2 it keeps two
    bits a neuron-step and no x.

    Takes x and the options, then the `LIFTensors` and the process group that the batch statistics
    are shared over, where any is given: every further argument costs a small call half a
    microsecond. Returns the spikes, then whichever of state, potential, penalty, rate and bits the
    options ask for; the spikes alone, not in a tuple, where they ask for nothing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: LIFOptions, *given: Any) -> Any:
        ctx.options = options
        tensors = LIFTensors(*given[:-1])
        ctx.group = given[-1] if given else None
        for_backward = any(ctx.needs_input_grad)
        results = ops.lif_forward(x, tensors, for_backward, options)
        *outputs, checkpoints, bits = results
        if options.bits == 2:
            ctx.x = (x.dtype, x.shape, layout.dense_input(x, options).stride())
            ctx.save_for_backward(None, *tensors, None, bits)
        elif given or checkpoints is not None:
            ctx.save_for_backward(x, *tensors, checkpoints, None)
        else:
            ctx.save_for_backward(x)
        extras = [output for output in (*outputs[1:], bits) if output is not None]
        if not extras:
            return results.spikes
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in (results.rate, bits) if t is not None))
        return results.spikes, *extras

    @staticmethod
    def backward(ctx: Any, grad_spikes: Tensor | None, *extras: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            single_backward("lif")
        options = ctx.options
        needs = ctx.needs_input_grad
        x, *saved = ctx.saved_tensors
        tensors, checkpoints, bits = LIFTensors(), None, None
        if saved:
            *given, checkpoints, bits = saved
            tensors = LIFTensors(*given)
        arriving = iter(extras)
        grads = LIFGrads(
            grad_spikes,
            next(arriving) if options.return_state else None,
            next(arriving) if options.return_potential else None,
            next(arriving) if tensors.penalty_weight is not None else None,
        )
        if bits is not None:
            x, grads = _instead_of_x(ctx.x, bits, grads, options)
        if len(needs) == 2:
            wanted = LIFWanted(needs[0])
            return ops.lif_backward(
                x, tensors, checkpoints, bits, None, grads, wanted, options
            ).x, None
        _, _, v_init, _, neuron, _, weight, bias, gains, _ = needs
        wanted = LIFWanted(needs[0], v_init, neuron, weight or bias, gains)
        if ctx.group is None or not options.batch:
            results = ops.lif_backward(x, tensors, checkpoints, bits, None, grads, wanted, options)
        else:
            results = _backward_over_group(
                ctx.group, x, tensors, checkpoints, grads, wanted, options
            )
        grad_weight = grad_bias = grad_gains = None
        if results.affine is not None:
            # The gradient of x̂·scale·weight + bias.
            grad_weight, grad_bias = results.affine.unbind()
            grad_weight = grad_weight if options.scale == 1 else grad_weight * options.scale
        if results.gains is not None and tensors.gains is not None:
            grad_gains = results.gains
            if tensors.gains.ndim == 1:
                grad_gains = grad_gains.sum(1)
        return (
            results.x,
            None,
            results.v_init,
            None,
            results.neuron,
            None,
            grad_weight if weight else None,
            grad_bias if bias else None,
            grad_gains,
            None,
        )


def _instead_of_x(
    like: tuple[torch.dtype, torch.Size, tuple[int, ...]],
    bits: Tensor,
    grads: LIFGrads,
    options: LIFOptions,
) -> tuple[Tensor, LIFGrads]:
    """A tensor like an x that was not kept, in shape and memory order: the gradient of the spikes,
    where it can serve, or one without values."""
    dtype, shape, stride = like
    if grads.spikes is None or options.steps:
        return torch.empty_strided(shape, stride, dtype=dtype, device=bits.device), grads
    given = grads.spikes
    if given.stride() != stride:
        given = torch.empty_strided(shape, stride, dtype=dtype, device=bits.device).copy_(given)
    return given, grads._replace(spikes=given)


def _backward_over_group(
    group: Any,
    x: Tensor,
    tensors: LIFTensors,
    checkpoints: Tensor | None,
    grads: LIFGrads,
    wanted: LIFWanted,
    options: LIFOptions,
) -> LIFGradients:
    """The backward pass where mean and deviation are those of all processes of a group.

    A process's own sums are the gradients of its weight and bias, as in torch's SyncBatchNorm.
    """
    sums = ops.lif_backward(
        x, tensors, checkpoints, None, None, grads, wanted._replace(x=False, affine=True), options
    )
    assert sums.affine is not None and tensors.stats is not None
    if not wanted.x:
        return sums
    channels = tensors.stats.shape[1]
    count = x.numel() // channels * max(1, options.steps)
    total = torch.cat([sums.affine.flatten().double(), sums.affine.new_tensor([count]).double()])
    torch.distributed.all_reduce(total, group=group)
    means = (total[:-1] / total[-1]).view(2, channels).to(sums.affine.dtype)
    written = ops.lif_backward(x, tensors, checkpoints, None, means, grads, LIFWanted(), options)
    return sums._replace(x=written.x)


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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        if torch.is_grad_enabled():
            single_backward("lif")
        x, *kept = ctx.saved_tensors
        checkpoints = kept[0] if kept else None
        straight = checkpoints is None or checkpoints.is_contiguous()
        if straight and x.is_contiguous() and grad.is_contiguous() and ops.is_plain(x, grad):
            return ctx.plain.backward(x, checkpoints, grad), None
        grads, options = LIFGrads(grad), ctx.plain.options
        results = ops.lif_backward(
            x, LIFTensors(), checkpoints, None, None, grads, LIFWanted(), options
        )
        return results.x, None


class LIFCarried(Function):
    """`LIFSpikes` from a state, and into those of state and potential that the options return."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v_init: Tensor | None, plain: PlainLIF) -> Any:
        ctx.plain = plain
        results = plain.forward_carried(x, v_init, any(ctx.needs_input_grad))
        ctx.save_for_backward(x, v_init, results.checkpoints)
        ctx.set_materialize_grads(False)
        return tuple(result for result in results[:3] if result is not None)

    @staticmethod
    def backward(ctx: Any, grad_spikes: Tensor | None, *extras: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            single_backward("lif")
        options = ctx.plain.options
        x, v_init, checkpoints = ctx.saved_tensors
        arriving = iter(extras)
        grads = LIFGrads(
            grad_spikes,
            next(arriving) if options.return_state else None,
            next(arriving) if options.return_potential else None,
        )
        tensors = (x, v_init, checkpoints, *grads)
        if ops.is_plain(*tensors):
            x, v_init, checkpoints, *given = (t if t is None else t.contiguous() for t in tensors)
            plainly = ctx.plain.backward_carried(x, v_init, checkpoints, LIFGrads(*given))
            return *plainly, None
        if ctx.plain.single:  # but for the state, which has no time anyway
            x, spikes, potential = (
                t if t is None else t.unsqueeze(0) for t in (x, grads.spikes, grads.potential)
            )
            grads = LIFGrads(spikes, grads.state, potential)
        wanted = LIFWanted(ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        results = ops.lif_backward(
            x, LIFTensors(v_init), checkpoints, None, None, grads, wanted, options
        )
        grad_x = results.x
        if ctx.plain.single and grad_x is not None:
            grad_x = grad_x.squeeze(0)
        return grad_x, results.v_init, None


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
