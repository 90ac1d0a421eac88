"""The operators while a transform of torch.func runs: grad, vjp, jacrev and vmap, nested at will.

A Function that torch.func can transform takes no ctx in its forward pass, and costs a call several
times what those in autograd.py do; so ops.py takes these here only while a transform runs. They
have the arguments and results of the registered operators.

`vmap` runs the operator for each sample and stacks the results. Of `lif` without sums over neurons
the samples are one more dimension instead, and one call.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .autograd import keep_lif, keep_loss, lif_backward
from .checks import refuse_forward_mode, refuse_second
from .options import LIFOptions, LIFTensors, LossOptions, PenaltyOptions
from .typed import Function

_TENSORS, _OPTIONS = len(LIFTensors._fields), len(LIFOptions._fields)


def _no_jvp(function: str) -> Any:
    return staticmethod(lambda *_: refuse_forward_mode(function))


def _by_sample(run: Callable[..., Any], info: Any, dims: Sequence[Any], args: Sequence[Any]) -> Any:
    """The results of `run` for every sample, stacked, and their dimension."""
    results = [
        run(*(a if d is None else a.select(d, i) for a, d in zip(args, dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def _front(value: Tensor | None, dim: int | None, size: int, to: int = 0) -> Tensor | None:
    """`value` with its samples in dimension `to`, repeated where it has none."""
    if value is None or dim is not None:
        return value if value is None or dim is None else value.movedim(dim, to)
    return value.unsqueeze(to).expand(*value.shape[:to], size, *value.shape[to:])


def _one_more(options: LIFOptions) -> LIFOptions:
    """The options for tensors with a further dimension in front."""
    channel_dim = options.channel_dim + (options.channel_dim >= 0)
    return options._replace(time_dim=options.time_dim + 1, channel_dim=channel_dim)


def _sums(options: LIFOptions) -> bool:
    """Whether a result is a number of all neurons together."""
    return bool(options.phi or options.statistics or options.batch)


class LIFForward(Function):
    @staticmethod
    def forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        tensors, options = LIFTensors(*args[:_TENSORS]), LIFOptions(*args[-_OPTIONS:])
        return ops.or_empty(x, *ops.lif_forward(x, tensors, True, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        keep_lif(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return lif_backward(ctx, grads, LIFBackward.apply)

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, v_init: Tensor | None, *args: Any) -> Any:
        options, size = LIFOptions(*args[-_OPTIONS:]), info.batch_size
        if _sums(options) or any(dim is not None for dim in dims[2:]):
            return _by_sample(LIFForward.apply, info, dims, (x, v_init, *args))
        given = (_front(x, dims[0], size), _front(v_init, dims[1], size), *args[:-_OPTIONS])
        results = LIFForward.apply(*given, *_one_more(options))
        # Checkpoints have time first; what is empty stands for nothing.
        return results, tuple(
            None if r.numel() == 0 and i else int(i == _CHECKPOINTS) for i, r in enumerate(results)
        )

    jvp = _no_jvp("lif")


_CHECKPOINTS = 5  # among the results of `LIFForward`


class LIFBackward(Function):
    @staticmethod
    def forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return ops.or_empty(x, *ops.lif_backward(x, *ops.lif_backward_arguments(args)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        refuse_second("lif")

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, *args: Any) -> Any:
        tensors, checkpoints, bits, means, grads, wanted, options = ops.lif_backward_arguments(args)
        of_x, of_v_init, *of_tensors = dims[: 1 + _TENSORS]
        of_checkpoints, of_bits, of_means, *of_grads = dims[1 + _TENSORS :][: 3 + len(grads)]
        size = info.batch_size
        summed = _sums(options) or wanted.neuron or wanted.affine or wanted.gains
        if summed or any(dim is not None for dim in (*of_tensors, of_bits, of_means)):
            return _by_sample(LIFBackward.apply, info, dims, (x, *args))
        results = LIFBackward.apply(
            _front(x, of_x, size),
            *tensors._replace(v_init=_front(tensors.v_init, of_v_init, size)),
            _front(checkpoints, of_checkpoints, size, to=1),
            bits,
            means,
            *(_front(grad, dim, size) for grad, dim in zip(grads, of_grads, strict=True)),
            *wanted,
            *_one_more(options),
        )
        return results, tuple(0 if w else None for w in wanted)

    jvp = _no_jvp("lif")


class Statistics(Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return ops.batch_statistics(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, ...]:
        return (None,) * 5  # the backward pass of `lif` has the gradient through them

    @staticmethod
    def vmap(info: Any, dims: Any, *args: Any) -> Any:
        return _by_sample(Statistics.apply, info, dims, args)

    jvp = _no_jvp("batch_norm_lif")


class PenaltyForward(Function):
    @staticmethod
    def forward(options: PenaltyOptions, *params: Tensor) -> Tensor:
        return ops.trt_penalty_forward(params, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.options, *params = inputs
        ctx.save_for_backward(*params)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, *PenaltyBackward.apply(ctx.options, grad, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, dims: Any, options: PenaltyOptions, *params: Tensor) -> Any:
        def run(*given: Tensor) -> Any:
            return PenaltyForward.apply(options, *given)

        return _by_sample(run, info, dims[1:], params)

    jvp = _no_jvp("trt_penalty")


class PenaltyBackward(Function):
    @staticmethod
    def forward(options: PenaltyOptions, grad: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.trt_penalty_backward(grad, params, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        refuse_second("trt_penalty")

    @staticmethod
    def vmap(info: Any, dims: Any, options: PenaltyOptions, *tensors: Tensor) -> Any:
        def run(*given: Tensor) -> Any:
            return PenaltyBackward.apply(options, *given)

        return _by_sample(run, info, dims[1:], tensors)

    jvp = _no_jvp("trt_penalty")


class LossForward(Function):
    @staticmethod
    def forward(
        logits: Tensor, target: Tensor, class_weight: Tensor | None, *options: Any
    ) -> tuple[Tensor, ...]:
        value, *kept = ops.temporal_loss_forward(
            logits, target, class_weight, LossOptions(*options)
        )
        return value, *ops.or_empty(logits, *kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        keep_loss(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        result = LossBackward.apply(grad, *ctx.saved_tensors, *ctx.options)
        return result, None, None, *(None for _ in ctx.options)

    @staticmethod
    def vmap(info: Any, dims: Any, *args: Any) -> Any:
        return _by_sample(LossForward.apply, info, dims, args)

    jvp = _no_jvp("temporal_loss")


class LossBackward(Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        grad, logits, target, class_weight, normalizer, divisors, *options = args
        kept = (class_weight, normalizer, divisors)
        return ops.temporal_loss_backward(grad, logits, target, *kept, LossOptions(*options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Any) -> Any:
        refuse_second("temporal_loss")

    @staticmethod
    def vmap(info: Any, dims: Any, *args: Any) -> Any:
        return _by_sample(LossBackward.apply, info, dims, args)

    jvp = _no_jvp("temporal_loss")


ops.under_transforms.update(
    lif_forward=LIFForward.apply,
    lif_backward=LIFBackward.apply,
    batch_statistics=Statistics.apply,
    trt_penalty_forward=lambda params, *o: PenaltyForward.apply(PenaltyOptions(*o), *params),
    trt_penalty_backward=lambda grad, params, *o: PenaltyBackward.apply(
        PenaltyOptions(*o), grad, *params
    ),
    temporal_loss_forward=LossForward.apply,
    temporal_loss_backward=LossBackward.apply,
)
