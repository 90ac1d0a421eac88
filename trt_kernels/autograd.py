"""The autograd Functions: what is kept for the backward pass, and nothing else.

At the end the registered operators get the same gradients, for whoever meets them without these
Functions: the graph of an exported program, torch.func inside torch.compile.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.utils._pytree import tree_leaves

from . import ops
from .backends import layout
from .backends.native import PlainLIF
from .checks import (
    no_forward_mode,
    refuse_forward_mode,
    refuse_second,
    single_backward,
    transforming,
)
from .options import (
    LIFGradients,
    LIFGrads,
    LIFOptions,
    LIFTensors,
    LIFWanted,
    LossOptions,
    PenaltyOptions,
)
from .typed import Function


@no_forward_mode("lif")
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
        arriving = iter(extras)
        grads = LIFGrads(
            grad_spikes,
            next(arriving) if options.return_state else None,
            next(arriving) if options.return_potential else None,
            next(arriving) if options.phi else None,
        )
        needs = ctx.needs_input_grad
        if len(needs) == 2:
            return _lif_gradients(ctx, needs[0], LIFTensors(), grads)[0], None
        x, *given = _lif_gradients(ctx, needs[0], LIFTensors(*needs[2:-1]), grads)
        return x, None, *given, None


def _lif_gradients(
    ctx: Any, needs_x: bool, needs: LIFTensors, grads: LIFGrads, run: Any = None
) -> tuple[Any, ...]:
    """The gradients of x and of every one of the `LIFTensors`, where they are needed; by the
    operator `run` where it is given."""
    options = ctx.options
    x, *saved = ctx.saved_tensors
    tensors, checkpoints, bits = LIFTensors(), None, None
    if saved:
        *given, checkpoints, bits = saved
        tensors = LIFTensors(*given)
    if bits is not None:
        x, grads = _instead_of_x(ctx.x, bits, grads, options)
    affine = bool(needs.norm_weight or needs.norm_bias)
    wanted = LIFWanted(needs_x, bool(needs.v_init), bool(needs.neuron), affine, bool(needs.gains))
    if ctx.group is None or not options.batch:
        results = ops.lif_backward(x, tensors, checkpoints, bits, None, grads, wanted, options, run)
    else:
        results = _backward_over_group(ctx.group, x, tensors, checkpoints, grads, wanted, options)
    if results.v_init is results.neuron is results.affine is results.gains is None:
        return results.x, *LIFTensors()
    grad_weight = grad_bias = grad_gains = None
    if results.affine is not None:
        # The gradient of x̂·scale·weight + bias.
        grad_weight, grad_bias = results.affine.unbind()
        grad_weight = grad_weight if options.scale == 1 else grad_weight * options.scale
    if results.gains is not None and tensors.gains is not None:
        grad_gains = results.gains
        if tensors.gains.ndim == 1:
            grad_gains = grad_gains.sum(1)
    given_grads = LIFTensors(
        v_init=results.v_init,
        neuron=results.neuron,
        norm_weight=grad_weight if needs.norm_weight else None,
        norm_bias=grad_bias if needs.norm_bias else None,
        gains=grad_gains,
    )
    return results.x, *given_grads


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


@no_forward_mode("lif")
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


@no_forward_mode("lif")
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


@no_forward_mode("trt_penalty")
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


@no_forward_mode("temporal_loss")
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


# --- The operators without these Functions.
def keep_lif(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    """As `LIFFunction.forward` keeps it."""
    x, *rest = inputs
    count = len(LIFTensors._fields)
    tensors, options = rest[:count], LIFOptions(*rest[count + 1 :])
    ctx.options, ctx.group = options, None
    *_, rate, checkpoints, bits = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rate, checkpoints, bits)
    if options.bits == 2:
        ctx.x = (x.dtype, x.shape, layout.dense_input(x, options).stride())
        ctx.save_for_backward(None, *tensors, None, bits)
    else:
        kept = checkpoints if rest[count] and layout.has_checkpoints(x, options) else None
        ctx.save_for_backward(x, *tensors, kept, None)


def _lif_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        single_backward("lif")
    return lif_backward(ctx, grads)


def lif_backward(ctx: Any, grads: Sequence[Tensor | None], run: Any = None) -> tuple[Any, ...]:
    """The gradients of the operator's arguments; by the operator `run` where it is given."""
    spikes, state, potential, penalty, *_ = grads
    options = ctx.options
    arrived = LIFGrads(
        spikes,
        state if options.return_state else None,
        potential if options.return_potential else None,
        penalty if options.phi else None,
    )
    needs_x, *needs = ctx.needs_input_grad[: 1 + len(LIFTensors._fields)]
    gradients = _lif_gradients(ctx, needs_x, LIFTensors(*needs), arrived, run)
    return *gradients, None, *(None for _ in options)


def _keep_penalty(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    params, *options = inputs
    ctx.save_for_backward(*params)
    ctx.options = PenaltyOptions(*options)


def _penalty_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    single_backward("trt_penalty")
    grads = ops.trt_penalty_backward(grad, ctx.saved_tensors, ctx.options)
    return grads, *(None for _ in ctx.options)


def keep_loss(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    logits, target, class_weight, *options = inputs
    _, normalizer, divisors = output
    ctx.mark_non_differentiable(normalizer, divisors)
    given = divisors if divisors.numel() else None
    ctx.save_for_backward(logits, target, class_weight, normalizer, given)
    ctx.options = LossOptions(*options)


def _loss_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    single_backward("temporal_loss")
    logits, target, class_weight, normalizer, divisors = ctx.saved_tensors
    result = ops.temporal_loss_backward(
        grad, logits, target, class_weight, normalizer, divisors, ctx.options
    )
    return result, None, None, *(None for _ in ctx.options)


def _register(name: str, backward: Any, keep: Any) -> None:
    """`torch.library.register_autograd` that refuses what it would take for no derivative."""
    operator = getattr(torch.ops.trt_kernels, name).default
    kernel = make_autograd_impl(operator, Info(backward, keep))
    function = next(
        (f for f in ("trt_penalty", "temporal_loss", "lif") if f in name), "batch_norm_lif"
    )

    def run(keyset: Any, *args: Any) -> Any:
        tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        if any(torch._VF._unpack_dual(t, level=0)[1] is not None for t in tensors):
            refuse_forward_mode(function)
        if transforming() and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise RuntimeError(
                f"{function}: torch.func does not differentiate the registered operator, which "
                "torch.compile and torch.export take: do not compile the transform, or take "
                "torch.autograd inside"
            )
        return kernel(keyset, *args)

    ops.library.impl(name, run, "Autograd", with_keyset=True)


for _name, _backward, _keep in (
    ("lif_forward", _lif_backward, keep_lif),
    ("trt_penalty_forward", _penalty_backward, _keep_penalty),
    ("temporal_loss_forward", _loss_backward, keep_loss),
    # The backward pass of `lif` has the gradient through the statistics of its x.
    ("batch_statistics", lambda *_: (None,) * 5, None),
    ("lif_backward", lambda *_: refuse_second("lif"), None),
    ("trt_penalty_backward", lambda *_: refuse_second("trt_penalty"), None),
    ("temporal_loss_backward", lambda *_: refuse_second("temporal_loss"), None),
):
    _register(_name, _backward, _keep)
