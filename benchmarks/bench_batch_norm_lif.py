"""`batch_norm_lif` against batch normalisation and `lif` apart, and SpikingJelly's two layers."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import trt_kernels as tk
from benchmarks import peers
from benchmarks.baselines import NormLIF
from benchmarks.bench_lif import ON_CPU, ON_GPU, Make, Shape, library, rounding
from benchmarks.measure import Absent, Case, Measured, Variant, optional
from benchmarks.ours import Function, ours
from benchmarks.steps import Expected, Step
from benchmarks.targets import BLOCK, BLOCK_INFERENCE, CONSTANT_BLOCK, SEPARATE

PLAIN, LAST = "NCHW", "channels_last"
SINGLE, HALF = torch.float32, torch.bfloat16
# [T, B, C, H, W]: the layers of a network from its wide images to its many channels.
FIRST, MIDDLE, LATE = (4, 32, 64, 32, 32), (4, 32, 128, 16, 16), (4, 32, 512, 4, 4)
QUICK = (
    (FIRST, SINGLE, PLAIN),
    (MIDDLE, SINGLE, PLAIN),
    (LATE, SINGLE, PLAIN),
    (MIDDLE, SINGLE, LAST),
    (MIDDLE, HALF, PLAIN),
    (MIDDLE, HALF, LAST),
)
FULL = ((FIRST, HALF, PLAIN), (LATE, HALF, PLAIN), (FIRST, SINGLE, LAST), (LATE, SINGLE, LAST))
LARGE, LARGE_LATE = (4, 256, 64, 32, 32), (4, 512, 512, 8, 8)
ON_A_GPU = (
    (LARGE, SINGLE, PLAIN),
    (LARGE, HALF, PLAIN),
    (LARGE, HALF, LAST),
    (LARGE_LATE, SINGLE, PLAIN),
    (LARGE_LATE, HALF, PLAIN),
)
# The byte ledger, in tensors of x's size. Forward: x read for the statistics, x read and spikes
# written. Backward: x and a gradient read for the sums; both read, and one written.
TRAINING, INFERENCE = 8, 2
# Statistics are summed in another order: one spike in a million may differ. With a y that is
# rounded on its way, in half precision to half, some do.
ONE_IN_A_MILLION, ROUNDED = 1e-3, {SINGLE: 5e-3, HALF: 0.1}


def cases(chosen: Any, *marks: Any) -> list[Any]:
    """Parameters (shape, dtype, layout)."""
    return [pytest.param(*case, id=named(*case), marks=marks) for case in chosen]


def named(shape: Shape, dtype: torch.dtype, layout: str = PLAIN) -> str:
    suffix = "" if layout == PLAIN else f" {layout}"
    return f"({', '.join(map(str, shape))}) {str(dtype).removeprefix('torch.')}{suffix}"


def random(shape: Shape, device: torch.device, dtype: torch.dtype, layout: str) -> Tensor:
    """Numbers of a layout, which is that of all images of all steps."""
    x = torch.randn(shape, device=device).to(dtype)
    if layout == LAST:
        images = x.flatten(0, -4).contiguous(memory_format=torch.channels_last)
        x = images.unflatten(0, shape[:-3])
    return x


def affine(channels: int, device: torch.device) -> list[Tensor]:
    """Weight and bias of a normalisation that has learned something."""
    weight = 0.5 + torch.rand(channels, device=device)
    return [weight.requires_grad_(), torch.rand(channels, device=device).requires_grad_()]


def fused(channels: int, device: torch.device, training: bool = True, **options: Any) -> Function:
    """`batch_norm_lif` with running statistics of its own, as a layer calls it."""
    mean, variance = torch.zeros(channels, device=device), torch.ones(channels, device=device)

    def forward(x: Tensor, weight: Tensor, bias: Tensor, **more: Any) -> Tensor:
        return tk.batch_norm_lif(x, mean, variance, weight, bias, training, **options, **more)

    return forward


def others(
    step: Make, x: Tensor, tolerances: dict[str, float], training: bool = True
) -> Iterator[Variant | Absent]:
    """What else there is: two layers of ours, a ReLU for the neuron, SpikingJelly's layers."""
    channels, device = x.shape[2], x.device
    norm = partial(NormLIF, channels, device, training)
    expected = Expected(step(fused(channels, device, training, backend="reference")), **tolerances)
    yield Variant(SEPARATE, step(norm(tk.lif)), expected)
    yield Variant("BatchNorm2d + relu", step(norm(torch.relu)))
    for implementation in ("auto",) if device.type == "cpu" else ("cuda", "triton"):
        name = "SpikingJelly" if device.type == "cpu" else f"SpikingJelly {implementation}"

        def make(implementation: str = implementation) -> tuple[Function, Function]:
            neuron, _ = peers.spikingjelly(device, implementation)
            options = {"fire_at_threshold": True, "backend": "reference"}
            layer = peers.spikingjelly_norm(channels, device, training)
            return layer(neuron), fused(channels, device, training, **options)

        tolerance = tolerances["gradient"], tolerances["output"]
        yield optional(name, partial(library, name, make, *tolerance, step))


def make_case(
    table: str,
    name: str,
    best: Variant,
    rest: list[Variant | Absent],
    x: Tensor,
    steps: int,
    moved: int,
) -> Case:
    """`moved` in tensors of x's size."""
    elements = x.numel() if x.ndim == 5 else x.numel() * steps
    about = {"steps": steps, "dtype": str(x.dtype), "x": x.nbytes}
    return Case(table, name, best, rest, moved * x.nbytes, elements, "neuron-step", x.nbytes, about)


@pytest.mark.parametrize(
    "shape,dtype,layout",
    [*cases(QUICK, ON_CPU), *cases(FULL, ON_CPU, pytest.mark.full), *cases(ON_A_GPU, ON_GPU)],
)
def test_training(
    measured: Measured, device: torch.device, shape: Shape, dtype: torch.dtype, layout: str
) -> None:
    """Forward and backward, the running statistics updated."""
    channels = shape[2]
    x = random(shape, device, dtype, layout).requires_grad_()
    grad = random(shape, device, dtype, layout)
    inputs = [x, *affine(channels, device)]

    def step(function: Callable[..., Any]) -> Step:
        return Step(function, inputs, [grad])

    # Of the gradients of weight and bias: sums of a million terms that nearly cancel.
    gradient = max(1e-4, rounding(dtype))
    expected = Expected(
        step(fused(channels, device, backend="reference")), ONE_IN_A_MILLION, gradient
    )
    best, rest = ours(fused(channels, device), device, step, expected)
    tolerances = {"output": ROUNDED[dtype], "gradient": ROUNDED[dtype]}
    rest += others(step, x, tolerances)
    name = named(shape, dtype, layout)
    measured(make_case(BLOCK, name, best, rest, x, shape[0], TRAINING))


@pytest.mark.parametrize(
    "shape,dtype,layout",
    [*cases([(MIDDLE, SINGLE, PLAIN)], ON_CPU), *cases([(LARGE, HALF, PLAIN)], ON_GPU)],
)
def test_inference(
    measured: Measured, device: torch.device, shape: Shape, dtype: torch.dtype, layout: str
) -> None:
    """Forward alone, by the running statistics."""
    channels = shape[2]
    x = random(shape, device, dtype, layout)
    inputs = [x, *(p.detach() for p in affine(channels, device))]

    def step(function: Callable[..., Any]) -> Step:
        return Step(function, inputs)

    expected = Expected(step(fused(channels, device, False, backend="reference")))
    best, rest = ours(fused(channels, device, False), device, step, expected)
    rest += others(step, x, {"output": ROUNDED[dtype], "gradient": 0.0}, training=False)
    name = named(shape, dtype, layout)
    measured(make_case(BLOCK_INFERENCE, name, best, rest, x, shape[0], INFERENCE))


@pytest.mark.parametrize(
    "shape,steps",
    [
        pytest.param((32, 64, 32, 32), 4, id="first", marks=ON_CPU),
        pytest.param((256, 64, 32, 32), 4, id="large", marks=ON_GPU),
    ],
)
def test_constant(measured: Measured, device: torch.device, shape: Shape, steps: int) -> None:
    """The first layer of a network that is shown an image: the same x at every step."""
    channels = shape[1]
    x = random(shape, device, SINGLE, PLAIN).requires_grad_()
    grad = random((steps, *shape), device, SINGLE, PLAIN)
    inputs = [x, *affine(channels, device)]

    def step(function: Callable[..., Any]) -> Step:
        return Step(function, inputs, [grad])

    def repeated(function: Callable[..., Any]) -> Step:
        return step(lambda x, *affine: function(x.expand(steps, *x.shape), *affine))

    constant = fused(channels, device, steps=steps, backend="reference")
    expected = Expected(step(constant), ONE_IN_A_MILLION, 1e-4)
    best, rest = ours(fused(channels, device, steps=steps), device, step, expected)
    rounded = Expected(step(constant), ROUNDED[SINGLE], ROUNDED[SINGLE])
    apart = NormLIF(channels, device, True, partial(tk.lif, steps=steps))
    repeated_apart = NormLIF(channels, device, True, tk.lif)
    rest += [
        Variant("repeated", repeated(fused(channels, device)), rounded),
        Variant("BatchNorm2d + lif, constant", step(apart), rounded),
        Variant(f"repeated, {SEPARATE}", repeated(repeated_apart), rounded),
    ]
    # Twice x and once the spikes; twice x and the spikes' gradient, and once x's.
    moved = 5 + 3 * steps
    name = f"{named(shape, SINGLE)}, T = {steps}"
    measured(make_case(CONSTANT_BLOCK, name, best, rest, x, steps, moved))
