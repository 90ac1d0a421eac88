"""`temporal_loss` against the official loop of cross entropy and squared distance."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import trt_kernels as tk
from benchmarks import baselines
from benchmarks.measure import Absent, Case, Measured, Variant
from benchmarks.ours import ours
from benchmarks.steps import Expected, Step

STEPS, BATCH, RATIO = 6, 64, 0.05
# The byte ledger: logits read; then logits read and gradients written, float32.
BYTES = 3 * 4
TABLE = "temporal_loss, forward and backward"


def make_case(table: str, classes: int, device: torch.device) -> Case:
    """Forward and backward."""
    logits = torch.randn(STEPS, BATCH, classes, device=device, requires_grad=True)
    target = torch.randint(classes, (BATCH,), device=device)
    grad = torch.tensor(1.5, device=device)

    def step(function: Callable[..., Any]) -> Step:
        return Step(lambda o: function(o, target, mse_ratio=RATIO), [logits], [grad])

    def reference(logits: Tensor, target: Tensor, mse_ratio: float) -> Tensor:
        return tk.temporal_loss(logits, target, mse_ratio=mse_ratio, backend="reference")

    expected = Expected(step(reference), output=1e-5, gradient=1e-5)
    best, rest = ours(tk.temporal_loss, device, step, expected)
    others: list[Variant | Absent] = [
        *rest,
        Variant("all steps at once", step(baselines.flat_loss), expected),
        Variant("official loop", step(baselines.official_loss), expected),
    ]
    elements = logits.numel()
    return Case(
        table,
        f"({STEPS}, {BATCH}, {classes}) float32",
        best,
        others,
        BYTES * elements,
        elements,
        "logit",
        4 * elements,
        {"classes": classes, "rows": STEPS * BATCH, "targets": target.nbytes},
    )


@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_training(measured: Measured, device: torch.device, classes: int) -> None:
    """As large as losses are: on a GPU launches and Python, by wall clock."""
    measured(make_case(TABLE, classes, device), "wall")


@pytest.mark.cuda
@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_graph(measured: Measured, device: torch.device, classes: int) -> None:
    """The same replayed: the kernels alone."""
    measured(make_case(f"{TABLE}, graph replay", classes, device), "graph")


@pytest.mark.cuda
@pytest.mark.parametrize("classes", [100_000])
def test_large(measured: Measured, device: torch.device, classes: int) -> None:
    """As many classes as words: the memory traffic alone."""
    measured(make_case(f"{TABLE}, many classes", classes, device))
