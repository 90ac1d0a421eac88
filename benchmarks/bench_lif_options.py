"""What the options of `lif` cost: learned parameters, two bits, a constant current, the rates."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import trt_kernels as tk
from benchmarks import baselines, peers
from benchmarks.bench_lif import (
    FORWARD,
    ON_CPU,
    ON_GPU,
    TRAINING,
    M,
    Shape,
    leaves,
    library,
    make_case,
    named,
    reference,
    rounding,
    training,
)
from benchmarks.measure import Absent, Case, Measured, Variant, optional
from benchmarks.ours import ours
from benchmarks.steps import Expected, Step
from benchmarks.targets import CONSTANT, LEARNED, PLIF, RATES, TWO_BITS

# [T, B, C, H, W], and [T, neurons] where there are no channels.
CHANNELS = [
    pytest.param((6, 32, 32, 32, 32), id="6x32x32x32x32", marks=ON_CPU),
    pytest.param((6, 256, 64, 32, 32), id="large", marks=ON_GPU),
]
FLAT = [
    pytest.param((6, M), id="6x1048576", marks=ON_CPU),
    pytest.param((6, 16 * M), id="large", marks=ON_GPU),
]
DTYPES = [torch.float32, torch.bfloat16]
# Gradients of decay and threshold: sums of a million terms that nearly cancel.
SUMMED = 1e-4


@pytest.mark.parametrize("shape", CHANNELS)
def test_learned(measured: Measured, device: torch.device, shape: Shape) -> None:
    """Decay and threshold of every channel, with their gradients, against two numbers."""
    x, grad = leaves(shape, device)
    decay, threshold = (0.3 + torch.rand(shape[2], device=device) for _ in range(2))
    learned = [x, decay.clamp(max=0.95).requires_grad_(), threshold.requires_grad_()]

    def by_channel(x: Tensor, decay: Tensor, threshold: Tensor, **options: Any) -> Tensor:
        return tk.lif(x, decay=decay, threshold=threshold, channel_dim=2, **options)

    def given(x: Tensor) -> Tensor:
        return by_channel(x, decay, threshold.detach())

    def step(function: Callable[..., Any]) -> Step:
        return Step(function, learned, [grad])

    plain = training(x, grad)
    expected = Expected(step(lambda *t: by_channel(*t, backend="reference")), gradient=SUMMED)
    best, rest = ours(by_channel, device, step, expected)
    others = [
        *rest,
        Variant("given by channel", plain(given)),
        Variant("two numbers", plain(tk.lif), Expected(plain(reference()))),
        Variant("plain loop", step(baselines.learned_lif), expected),
    ]
    measured(make_case(LEARNED, named(shape), best, others, x, TRAINING))


@pytest.mark.parametrize("shape", FLAT)
def test_time_constant(measured: Measured, device: torch.device, shape: Shape) -> None:
    """One learned time constant, as in PLIF, against SpikingJelly's."""
    x, grad = leaves(shape, device)
    w = torch.tensor(0.3, device=device, requires_grad=True)

    def plif(x: Tensor, w: Tensor, **options: Any) -> Tensor:
        return tk.lif(x, decay=w.sigmoid(), charge="leak", **options)

    def step(function: Callable[..., Any]) -> Step:
        return Step(function, [x, w], [grad])

    expected = Expected(step(lambda *t: plif(*t, backend="reference")), gradient=SUMMED)
    best, rest = ours(plif, device, step, expected)

    def make() -> Variant:
        return library("SpikingJelly", lambda: peers.spikingjelly_plif(device), SUMMED, 0.0, step)

    plain = training(x, grad)
    others: list[Variant | Absent] = [
        *rest,
        Variant("two numbers", plain(tk.lif), Expected(plain(reference()))),
        optional("SpikingJelly", make),
    ]
    measured(make_case(PLIF, named(shape), best, others, x, TRAINING))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", FLAT)
def test_two_bits(measured: Measured, device: torch.device, shape: Shape, dtype: Any) -> None:
    """Two bits a neuron-step kept in the place of x."""
    x, grad = leaves(shape, device, dtype)
    step = training(x, grad)
    options: dict[str, Any] = {"surrogate": tk.Rectangle(1.0), "detach_reset": True}
    expected = Expected(step(reference(**options)), gradient=rounding(dtype))

    def with_memory(memory: str) -> Callable[..., Tensor]:
        return lambda x, **more: tk.lif(x, memory=memory, **options, **more)

    best, rest = ours(with_memory("bits"), device, step, expected)
    others = [
        *rest,
        Variant("x kept", step(with_memory("recompute")), expected),
        Variant("relu", step(torch.relu)),
    ]
    case = make_case(TWO_BITS, named(shape, dtype), best, others, x, TRAINING)
    # x read, spikes and bits written; a gradient and bits read, and one written.
    case.moved = 4 * x.nbytes + x.numel() // 2
    measured(case)


@pytest.mark.parametrize(
    "shape,steps",
    [
        pytest.param((M,), 6, id="1048576", marks=ON_CPU),
        pytest.param((16 * M,), 6, id="large", marks=ON_GPU),
    ],
)
def test_constant(measured: Measured, device: torch.device, shape: Shape, steps: int) -> None:
    """x without time, the same at every step, against the repeated x."""
    x = torch.randn(shape, device=device, requires_grad=True)
    grad = torch.randn((steps, *shape), device=device)
    step = training(x, grad)

    def constant(x: Tensor, **options: Any) -> Tensor:
        return tk.lif(x, steps=steps, **options)

    def repeated(x: Tensor) -> Tensor:
        return tk.lif(x.expand(steps, *x.shape))

    expected = Expected(step(lambda x: constant(x, backend="reference")))
    best, rest = ours(constant, device, step, expected)
    others = [*rest, Variant("repeated", step(repeated), expected)]
    # x read, spikes written; x and the spikes' gradient read, x's written.
    moved = (3 + 2 * steps) * x.nbytes
    about = {"steps": steps, "dtype": str(x.dtype)}
    name, elements = f"{named(shape)}, T = {steps}", steps * x.numel()
    measured(Case(CONSTANT, name, best, others, moved, elements, "neuron-step", x.nbytes, about))


@pytest.mark.parametrize("shape", FLAT)
def test_rates(measured: Measured, device: torch.device, shape: Shape) -> None:
    """The firing rate of every step from the same pass, forward alone."""
    x = torch.randn(shape, device=device)

    def rates(x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out = tk.lif(x, statistics=True, **options)
        return out.spikes, out.rate

    def afterwards(x: Tensor) -> tuple[Tensor, Tensor]:
        spikes = tk.lif(x)
        return spikes, spikes.mean(1)

    def step(function: Callable[..., Any]) -> Step:
        return Step(function, [x])

    # A rate is a sum; of spikes one that differs would be far more than this.
    expected = Expected(step(lambda x: rates(x, backend="reference")), output=1e-6)
    best, rest = ours(rates, device, step, expected)
    others = [
        *rest,
        Variant("without", step(tk.lif), Expected(step(reference()))),
        Variant("mean of the spikes", step(afterwards), expected),
    ]
    measured(make_case(RATES, named(shape), best, others, x, FORWARD))
