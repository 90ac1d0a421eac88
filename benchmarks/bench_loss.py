"""`temporal_loss` against the official loop of cross entropy and squared distance."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import trt_kernels as tk
from benchmarks import baselines
from benchmarks.measure import Case, Expected, Measured, Step, Variant

STEPS, BATCH, RATIO = 6, 64, 0.05
# The byte ledger: logits read; then logits read and gradients written, float32.
BYTES = 3 * 4


@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_training(measured: Measured, classes: int) -> None:
    """Forward and backward."""
    logits = torch.randn(STEPS, BATCH, classes, requires_grad=True)
    target = torch.randint(classes, (BATCH,))
    grad = torch.tensor(1.5)

    def step(function: Callable[..., Any]) -> Step:
        return Step(lambda o: function(o, target, mse_ratio=RATIO), [logits], [grad])

    def reference(logits: Tensor, target: Tensor, mse_ratio: float) -> Tensor:
        return tk.temporal_loss(logits, target, mse_ratio=mse_ratio, backend="reference")

    expected = Expected(step(reference), output=1e-5, gradient=1e-5)
    elements = logits.numel()
    measured(
        Case(
            "temporal_loss, forward and backward",
            f"({STEPS}, {BATCH}, {classes}) float32",
            Variant("ours", step(tk.temporal_loss), expected),
            [
                Variant("all steps at once", step(baselines.flat_loss), expected),
                Variant("official loop", step(baselines.official_loss), expected),
            ],
            BYTES * elements,
            elements,
            "logit",
            4 * elements,
            {"classes": classes, "rows": STEPS * BATCH, "targets": target.nbytes},
        )
    )
