"""`trt_penalty` over ResNet-19's parameters against the official loop and compiled closed forms."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import trt_kernels as tk
from benchmarks import baselines
from benchmarks.clocks import launches
from benchmarks.measure import Absent, Case, Measured, Variant, said
from benchmarks.ours import ours
from benchmarks.steps import Expected, Step
from examples.networks import ResNet19

SETTINGS = {"weight": 1e-5, "delta": 0.25}  # the paper's, for CIFAR10
# The byte ledger: weights read; then weights read and gradients written, float32.
BYTES = 3 * 4
TABLE, WALL_CLOCK = "trt_penalty, forward and backward", "trt_penalty, wall clock"


def resnet19(device: torch.device) -> list[tuple[str, Tensor]]:
    """Its named parameters: 12,630,858."""
    return list(ResNet19().to(device).named_parameters())


def make_case(
    name: str, named: list[tuple[str, Tensor]], steps: int, full: bool, table: str = TABLE
) -> Case:
    """A case over the parameters without "bias" in their name."""
    params = [w for key, w in named if "bias" not in key]
    names = [key for key, _ in named if "bias" not in key]
    elements = sum(w.numel() for w in params)
    settings: dict[str, Any] = {"steps": steps, **SETTINGS}
    device = params[0].device
    grad = torch.tensor(1.5, device=device)

    def step(function: Callable[..., Any]) -> Step:
        return Step(function, params, [grad])

    def official(*params: Tensor) -> Tensor:
        return baselines.official_penalty(list(zip(names, params, strict=True)), **settings)

    def penalty(*params: Tensor, backend: str | None = None) -> Tensor:
        return tk.trt_penalty(params, backend=backend, **settings)

    def reference(*params: Tensor) -> Tensor:
        return penalty(*params, backend="reference")

    # Each sum in its own order: norm-wise errors of float32 sums over millions.
    expected = Expected(step(reference), output=1e-5, gradient=1e-5)
    best, rest = ours(penalty, device, step, expected)
    others: list[Variant | Absent] = [
        *rest,
        Variant("sum of squares", step(baselines.weight_decay)),
        Variant("official loop", step(official), expected),
        Variant("closed form", step(baselines.closed_form(**settings)), expected),
    ]
    if device.type == "cpu":
        others += compiled_forms(step, expected, settings, full)
    return Case(
        table,
        f"{name}, T = {steps}",
        best,
        others,
        BYTES * elements,
        elements,
        "parameter",
        4 * elements,
        {"steps": steps, "network": name},
    )


def compiled_forms(
    step: Callable[..., Step], expected: Expected, settings: dict[str, Any], full: bool
) -> Iterator[Variant]:
    """torch.compile of the closed form, and of its derivative written by hand."""
    torch._dynamo.reset()
    functions = {"compiled closed form": baselines.compiled_closed_form(**settings)}
    if full:
        functions["compiled, own derivative"] = baselines.closed_form(compiled=True, **settings)
    for name, function in functions.items():
        yield Variant(name, step(function), expected, optional=True, compiled=True)


@pytest.mark.parametrize("steps", [6, 10])
def test_resnet19(
    measured: Measured, device: torch.device, pytestconfig: pytest.Config, steps: int
) -> None:
    """All regularized parameters in one call."""
    measured(make_case("ResNet-19", resnet19(device), steps, pytestconfig.getoption("--full")))


@pytest.mark.cuda
@pytest.mark.parametrize("steps", [6])
def test_call(measured: Measured, device: torch.device, steps: int) -> None:
    """What a training loop waits for, and how many kernels it launches."""
    case = make_case("ResNet-19", resnet19(device), steps, False, WALL_CLOCK)
    for variant in (case.ours, *case.others):
        if isinstance(variant, Variant) and variant.name.startswith("ours"):
            case.about[f"launches, {variant.name}"] = counted(variant.step)
    measured(case, "wall")


def counted(step: Step) -> int | str:
    """How many kernels a step launches, or why they could not be counted."""
    try:
        return launches(step) or "the profiler saw no kernel"
    except Exception as error:
        return said(error)


@pytest.mark.cuda
@pytest.mark.parametrize("steps", [6])
def test_compiled(measured: Measured, device: torch.device, steps: int) -> None:
    """torch.compile of the closed form, in a case of its own: compiling takes long."""
    table = "trt_penalty, torch.compile of the closed form"
    case = make_case("ResNet-19", resnet19(device), steps, False, table)
    step, expected = case.ours.step, case.ours.expected

    def over(function: Callable[..., Any]) -> Step:
        return Step(function, step.inputs, step.grads)

    assert expected is not None
    settings = {"steps": steps, **SETTINGS}
    case.others = list(compiled_forms(over, expected, settings, full=False))
    measured(case)


@pytest.mark.full
@pytest.mark.parametrize("steps", [6])
def test_one_tensor(measured: Measured, device: torch.device, steps: int) -> None:
    """One large tensor: the kernels without the calls."""
    weight = (0.03 * torch.randn(12 << 20, device=device)).requires_grad_()
    measured(make_case("one tensor of 12M", [("weight", weight)], steps, full=True))
