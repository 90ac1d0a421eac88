"""`trt_penalty` over ResNet-19's parameters against the official loop and compiled closed forms."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import trt_kernels as tk
from benchmarks import baselines, networks
from benchmarks.measure import Case, Expected, Measured, Step, Variant

SETTINGS = {"weight": 1e-5, "delta": 0.25}  # the paper's, for CIFAR10
# The byte ledger: weights read; then weights read and gradients written, float32.
BYTES = 3 * 4


def make_case(name: str, named: list[tuple[str, Tensor]], steps: int, full: bool) -> Case:
    """A case over the parameters without "bias" in their name."""
    params = [w for key, w in named if "bias" not in key]
    names = [key for key, _ in named if "bias" not in key]
    elements = sum(w.numel() for w in params)
    settings: dict[str, Any] = {"steps": steps, **SETTINGS}
    grad = torch.tensor(1.5)

    def step(function: Callable[..., Any]) -> Step:
        return Step(function, params, [grad])

    def official(*params: Tensor) -> Tensor:
        return baselines.official_penalty(list(zip(names, params, strict=True)), **settings)

    def ours(*params: Tensor) -> Tensor:
        return tk.trt_penalty(params, **settings)

    def reference(*params: Tensor) -> Tensor:
        return tk.trt_penalty(params, backend="reference", **settings)

    torch._dynamo.reset()
    # Each sum in its own order: norm-wise errors of float32 sums over millions.
    expected = Expected(step(reference), output=1e-5, gradient=1e-5)
    compiled = {"optional": True, "compiled": True}
    others = [
        Variant("sum of squares", step(baselines.weight_decay)),
        Variant("official loop", step(official), expected),
        Variant("closed form", step(baselines.closed_form(**settings)), expected),
        Variant(
            "compiled closed form",
            step(baselines.compiled_closed_form(**settings)),
            expected,
            **compiled,
        ),
    ]
    if full:
        hand_written = baselines.closed_form(compiled=True, **settings)
        others.append(Variant("compiled, own derivative", step(hand_written), expected, **compiled))
    return Case(
        "trt_penalty, forward and backward",
        f"{name}, T = {steps}",
        Variant("ours", step(ours), expected),
        others,
        BYTES * elements,
        elements,
        "parameter",
        4 * elements,
        {"steps": steps, "network": name},
    )


@pytest.mark.parametrize("steps", [6, 10])
def test_resnet19(measured: Measured, pytestconfig: pytest.Config, steps: int) -> None:
    """All regularized parameters in one call."""
    measured(make_case("ResNet-19", networks.resnet19(), steps, pytestconfig.getoption("--full")))


@pytest.mark.full
@pytest.mark.parametrize("steps", [6])
def test_one_tensor(measured: Measured, steps: int) -> None:
    """One large tensor: the kernels without the calls."""
    weight = (0.03 * torch.randn(12 << 20)).requires_grad_()
    measured(make_case("one tensor of 12M", [("weight", weight)], steps, full=True))
