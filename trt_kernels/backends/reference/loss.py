"""The temporal loss as a loop over time (method.md, section 4)."""

import torch
from torch import Tensor
from torch.nn import functional

from ...checks import state_dtype
from ...options import LossOptions


def temporal_loss(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, options: LossOptions
) -> Tensor:
    """entropy_ratio · mean_t CE + square_ratio · mean (O - target)², a scalar."""
    dtype = state_dtype(logits.dtype)
    steps = logits.to(dtype).unbind(options.time_dim)
    classes = logits.shape[-1]
    indices = not target.is_floating_point()
    if indices:
        kept = target != options.ignore_index
        given = functional.one_hot(torch.where(kept, target, 0), classes).to(dtype)
    else:
        kept = torch.ones_like(target[:, 0], dtype=torch.bool)
        target = given = target.to(dtype)
    smooth = given * (1 - options.label_smoothing) + options.label_smoothing / classes
    square_target = (
        smooth if options.constant is None else torch.full_like(smooth, options.constant)
    )
    # torch refuses an ignore_index >= 0 beside probabilities, where it means nothing.
    ignore_index = options.ignore_index if indices else -100
    loss = logits.new_zeros((), dtype=dtype)
    for o in steps:
        if options.entropy_ratio:
            loss = loss + options.entropy_ratio * functional.cross_entropy(
                o,
                target,
                weight=class_weight,
                label_smoothing=options.label_smoothing,
                ignore_index=ignore_index,
            )
        if options.square_ratio:
            distance = torch.where(kept.unsqueeze(-1), o - square_target, 0)
            loss = loss + options.square_ratio * distance.square().sum() / (kept.sum() * classes)
    return loss / len(steps)
