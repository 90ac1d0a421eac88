"""The temporal loss: all rows of all steps in one launch each way.

A row is the logits of one step and sample. A program takes a few short rows or one long one, block
by block of its classes. A second launch of one program ends the sums.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...checks import state_dtype
from ...options import LossOptions
from ..layout import MaybeTensor, for_loss_gradient, loss_rows, loss_tensors
from .launch import SUM_BLOCK, block_size, scalar, state_type, stored

WARPS = 4
TILE = 2048  # logits that a program holds at once: sixteen a thread
LEAST_CLASSES = 16  # of a block
MOST_ROWS = 8  # of a program: each is a reduction of its own, and a small batch makes several

# Arguments that compile nothing anew. That strides are aligned is told by ALIGNED: one of them may
# be a multiple of 16 at some batches and not at others, where the number of classes is none.
UNSPECIALIZED = ("rows", "batch", "step_stride", "batch_stride", "ignore_index")
ALIGNMENT = tl.constexpr(16)

LOG2_E = tl.constexpr(1.4426950408889634)
MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def read_labels(target, class_weight, sample, exists, classes, ignore_index, STATE: tl.constexpr):
    """The samples' labels and their class weights, which samples count, and which of these are
    valid: probabilities always, a label where it is a class."""
    label = tl.full(sample.shape, -1, tl.int64)
    weight = tl.zeros(sample.shape, STATE) + 1.0
    counts = exists
    valid = exists
    if target is not None:
        label = tl.load(target + sample, mask=exists, other=0)
        counts = exists & (label != ignore_index)
        valid = counts & (label >= 0) & (label < classes)
        if class_weight is not None:
            weight = tl.load(class_weight + label, mask=valid, other=0.0)
    return label, weight, counts, valid


@triton.jit
def find_rows(
    rows,
    batch,
    step_stride,
    batch_stride,
    INDEX: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program's rows, those that exist, the sample of each, and where its logits start."""
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)
    sample = row % batch
    step = row // batch
    start = step.to(tl.int64) * step_stride + sample.to(tl.int64) * batch_stride
    if ALIGNED:
        start = tl.multiple_of(start, ALIGNMENT)
    return row, row < rows, sample, start


@triton.jit
def read_shares(
    probabilities,
    class_weight,
    sample,
    label,
    label_weight,
    valid,
    index,
    classes,
    smoothing,
    STATE: tl.constexpr,
):
    """For a block of classes, of every row: shares of the cross entropy, and smoothed targets.

    As in torch, a label is weighed by its own class; probabilities and smoothing by every class.
    """
    is_class = index < classes
    given = tl.where(index[None, :] == label[:, None], 1.0, 0.0).to(STATE)
    if probabilities is not None:
        place = sample.to(tl.int64)[:, None] * classes + index[None, :]
        mask = valid[:, None] & is_class[None, :]
        given = tl.load(probabilities + place, mask=mask, other=0.0)
    given *= 1.0 - smoothing
    spread = smoothing / scalar(classes, STATE)
    weight = tl.zeros(index.shape, STATE) + 1.0
    if class_weight is not None:
        weight = tl.load(class_weight + index, mask=is_class, other=0.0)
    if probabilities is not None:
        share = (given + spread) * weight[None, :]
    else:
        share = given * label_weight[:, None] + spread * weight[None, :]
    return tl.where(is_class[None, :], share, 0.0), given + spread


@triton.jit(do_not_specialize=UNSPECIALIZED)
def value_kernel(
    logits,
    target,
    probabilities,
    class_weight,
    normalizer,
    partial,
    rows,
    batch,
    classes,
    step_stride,
    batch_stride,
    ignore_index,
    smoothing: tl.float64,
    constant: tl.float64,
    STATE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARE: tl.constexpr,
    CONSTANT: tl.constexpr,
    SPREAD: tl.constexpr,
    INDEX: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """log Σ exp of every row, and partial [2, programs], the sums of both terms over its rows.

    Without SPREAD all of a row's share is its label's, and the cross entropy needs one more logit.
    """
    smoothing = scalar(smoothing, STATE)
    row, exists, sample, start = find_rows(
        rows, batch, step_stride, batch_stride, INDEX, ALIGNED, ROWS
    )
    label, label_weight, counts, valid = read_labels(
        target, class_weight, sample, exists, classes, ignore_index, STATE
    )
    largest = tl.full((ROWS,), MINUS_INFINITY, STATE)
    total = tl.zeros((ROWS,), STATE)
    square = tl.zeros((ROWS,), STATE)
    for begin in range(0, classes, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        mask = valid[:, None] & (index < classes)[None, :]
        o = tl.load(logits + start[:, None] + index[None, :], mask=mask, other=MINUS_INFINITY)
        o = o.to(STATE)
        larger = tl.maximum(largest, tl.max(o, 1))
        # Minus infinity less itself is NaN: where nothing else was seen, exponents are taken as is.
        shift = tl.where(larger == MINUS_INFINITY, 0.0, larger)
        total *= tl.exp2((largest - shift) * LOG2_E)
        total += tl.sum(tl.exp2((o - shift[:, None]) * LOG2_E), 1)
        largest = larger
        if SQUARE:
            _, aim = read_shares(
                probabilities,
                class_weight,
                sample,
                label,
                label_weight,
                valid,
                index,
                classes,
                smoothing,
                STATE,
            )
            if CONSTANT:
                aim = scalar(constant, STATE)
            distance = tl.where(mask, o - aim, 0.0)
            square += tl.sum(distance * distance, 1)
    log_sum = tl.where(largest == MINUS_INFINITY, float("nan"), largest + tl.log(total))
    tl.store(normalizer + row, tl.where(valid, log_sum, float("nan")), mask=exists)

    # Shares of 0 are left out: a logit of minus infinity costs nothing where it has no target.
    entropy = tl.zeros((ROWS,), STATE)
    if ENTROPY and SPREAD:
        for begin in range(0, classes, BLOCK):
            index = begin + tl.arange(0, BLOCK)
            mask = valid[:, None] & (index < classes)[None, :]
            o = tl.load(logits + start[:, None] + index[None, :], mask=mask, other=0.0).to(STATE)
            share, _ = read_shares(
                probabilities,
                class_weight,
                sample,
                label,
                label_weight,
                valid,
                index,
                classes,
                smoothing,
                STATE,
            )
            entropy += tl.sum(tl.where(share == 0, 0.0, share * (log_sum[:, None] - o)), 1)
    elif ENTROPY:
        o = tl.load(logits + start + label, mask=valid, other=0.0).to(STATE)
        entropy = tl.where(label_weight == 0, 0.0, label_weight * (log_sum - o))

    wrong = tl.where(counts, float("nan"), 0.0).to(tl.float64)
    entropy = tl.where(valid, entropy.to(tl.float64), wrong)
    square = tl.where(valid, square.to(tl.float64), wrong)
    tl.store(partial + tl.program_id(0), tl.sum(entropy, 0))
    tl.store(partial + tl.num_programs(0) + tl.program_id(0), tl.sum(square, 0))


@triton.jit(do_not_specialize=["programs", "steps", "batch", "ignore_index"])
def finish_kernel(
    partial,
    target,
    class_weight,
    divisors,
    value,
    programs,
    steps,
    batch,
    classes,
    ignore_index,
    entropy_ratio: tl.float64,
    square_ratio: tl.float64,
    STATE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the divisors of the two means, the same for every step, and the loss.

    They are the sum of the labels' class weights, and the samples that count times the classes.
    """
    index = tl.arange(0, BLOCK)
    weights = tl.zeros((BLOCK,), tl.float64)
    samples = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, batch, BLOCK):
        sample = begin + index
        _, weight, counts, valid = read_labels(
            target, class_weight, sample, sample < batch, classes, ignore_index, STATE
        )
        # Probabilities are all counted once, whatever the class weights.
        weights += tl.where(valid, weight, 0.0).to(tl.float64)
        samples += tl.where(counts, 1.0, 0.0).to(tl.float64)
    entropy_divisor = tl.sum(weights, 0)
    square_divisor = tl.sum(samples, 0) * scalar(classes, tl.float64)
    tl.store(divisors, entropy_divisor)
    tl.store(divisors + 1, square_divisor)

    entropy = tl.zeros((BLOCK,), tl.float64)
    square = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, programs, BLOCK):
        place = begin + index
        entropy += tl.load(partial + place, mask=place < programs, other=0.0)
        square += tl.load(partial + programs + place, mask=place < programs, other=0.0)
    total = scalar(0.0, tl.float64)
    if ENTROPY:
        total += scalar(entropy_ratio, tl.float64) * tl.sum(entropy, 0) / entropy_divisor
    if SQUARE:
        total += scalar(square_ratio, tl.float64) * tl.sum(square, 0) / square_divisor
    tl.store(value, total / scalar(steps, tl.float64))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gradient_kernel(
    logits,
    target,
    probabilities,
    class_weight,
    normalizer,
    divisors,
    upstream,
    grad,
    rows,
    batch,
    classes,
    step_stride,
    batch_stride,
    ignore_index,
    smoothing: tl.float64,
    constant: tl.float64,
    entropy_ratio: tl.float64,
    square_ratio: tl.float64,
    STATE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARE: tl.constexpr,
    CONSTANT: tl.constexpr,
    SPREAD: tl.constexpr,
    INDEX: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """upstream · ∂L/∂logits, with the strides of the logits; the ratios are already over steps."""
    smoothing = scalar(smoothing, STATE)
    arriving = tl.load(upstream).to(tl.float64)
    entropy_scale = arriving * scalar(entropy_ratio, tl.float64) / tl.load(divisors).to(tl.float64)
    square_scale = (
        arriving * scalar(square_ratio, tl.float64) / tl.load(divisors + 1).to(tl.float64)
    )
    entropy_scale, square_scale = entropy_scale.to(STATE), square_scale.to(STATE)

    row, exists, sample, start = find_rows(
        rows, batch, step_stride, batch_stride, INDEX, ALIGNED, ROWS
    )
    label, label_weight, counts, valid = read_labels(
        target, class_weight, sample, exists, classes, ignore_index, STATE
    )
    log_sum = tl.load(normalizer + row, mask=valid, other=0.0)
    all_shares = label_weight
    if ENTROPY and SPREAD:
        all_shares = tl.zeros((ROWS,), STATE)
        for begin in range(0, classes, BLOCK):
            share, _ = read_shares(
                probabilities,
                class_weight,
                sample,
                label,
                label_weight,
                valid,
                begin + tl.arange(0, BLOCK),
                classes,
                smoothing,
                STATE,
            )
            all_shares += tl.sum(share, 1)

    wrong = tl.where(counts, float("nan"), 0.0).to(STATE)
    for begin in range(0, classes, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        is_class = (index < classes)[None, :]
        place = start[:, None] + index[None, :]
        o = tl.load(logits + place, mask=valid[:, None] & is_class, other=0.0).to(STATE)
        share, aim = read_shares(
            probabilities,
            class_weight,
            sample,
            label,
            label_weight,
            valid,
            index,
            classes,
            smoothing,
            STATE,
        )
        if CONSTANT:
            aim = scalar(constant, STATE)
        result = tl.zeros((ROWS, BLOCK), STATE)
        # A term of weight 0 is left out: infinite logits would make NaN of it.
        if ENTROPY:
            softmax = tl.exp2((o - log_sum[:, None]) * LOG2_E)
            slope = entropy_scale * (all_shares[:, None] * softmax - share)
            result += tl.where(entropy_scale == 0, 0.0, slope)
        if SQUARE:
            result += tl.where(square_scale == 0, 0.0, square_scale * (2.0 * (o - aim)))
        result = tl.where(valid[:, None], result, wrong[:, None])
        tl.store(
            grad + place, stored(result, grad.dtype.element_ty), mask=exists[:, None] & is_class
        )


class Launch:
    """The grid, sizes and settings that both directions share."""

    def __init__(self, logits: Tensor, probabilities: MaybeTensor, options: LossOptions) -> None:
        steps, batch = loss_rows(logits, options)
        classes = logits.shape[-1]
        tile = block_size(TILE)
        block = min(max(triton.next_power_of_2(classes), LEAST_CLASSES), tile)
        rows = min(tile // block, block_size(MOST_ROWS))
        self.programs = triton.cdiv(steps * batch, rows)
        strides = (logits.stride(options.time_dim), logits.stride(1 - options.time_dim))
        self.sizes = (steps * batch, batch, classes, *strides)
        aligned = all(size % ALIGNMENT.value == 0 for size in (classes, *strides))
        self.numbers = (
            options.ignore_index,
            options.label_smoothing,
            0.0 if options.constant is None else options.constant,
        )
        self.terms: dict[str, Any] = {
            "STATE": state_type(logits.dtype),
            "ENTROPY": options.entropy_ratio != 0,
            "SQUARE": options.square_ratio != 0,
            "num_warps": WARPS,
            "enable_fp_fusion": True,
        }
        self.settings: dict[str, Any] = {
            **self.terms,
            "CONSTANT": options.constant is not None,
            "SPREAD": probabilities is not None or options.label_smoothing != 0,
            "INDEX": tl.int32 if steps * batch + rows < 2**31 else tl.int64,
            "ALIGNED": aligned,
            "ROWS": rows,
            "BLOCK": block,
        }


def temporal_loss_forward(
    logits: Tensor, target: Tensor, class_weight: MaybeTensor, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, log Σ exp of every row [T, B], and the divisors of the two means [2]."""
    logits, indices, probabilities, class_weight = loss_tensors(logits, target, class_weight)
    dtype = state_dtype(logits.dtype)
    steps, batch = loss_rows(logits, options)
    normalizer = logits.new_empty((steps, batch), dtype=dtype)
    divisors, value = logits.new_empty(2, dtype=dtype), logits.new_empty((), dtype=dtype)
    launch = Launch(logits, probabilities, options)
    partial = logits.new_empty((2, launch.programs), dtype=torch.float64)
    with torch.cuda.device_of(logits):
        value_kernel[(launch.programs,)](
            logits,
            indices,
            probabilities,
            class_weight,
            normalizer,
            partial,
            *launch.sizes,
            *launch.numbers,
            **launch.settings,
        )
        finish_kernel[(1,)](
            partial,
            indices,
            class_weight,
            divisors,
            value,
            launch.programs,
            steps,
            batch,
            logits.shape[-1],
            options.ignore_index,
            options.entropy_ratio,
            options.square_ratio,
            BLOCK=SUM_BLOCK,
            **launch.terms,
        )
    return value, normalizer, divisors


def temporal_loss_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weight: MaybeTensor,
    normalizer: Tensor,
    divisors: Tensor,
    options: LossOptions,
) -> Tensor:
    logits, indices, probabilities, class_weight = loss_tensors(
        for_loss_gradient(logits), target, class_weight
    )
    result = torch.empty_like(logits)
    steps = max(1, logits.shape[options.time_dim])
    launch = Launch(logits, probabilities, options)
    with torch.cuda.device_of(logits):
        gradient_kernel[(launch.programs,)](
            logits,
            indices,
            probabilities,
            class_weight,
            normalizer,
            divisors,
            grad,
            result,
            *launch.sizes,
            *launch.numbers,
            options.entropy_ratio / steps,
            options.square_ratio / steps,
            **launch.settings,
        )
    return result
