"""What `accelerate` gains in the networks of other libraries, and in a loop of single steps."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trt_kernels as tk
from benchmarks.bench_lif import ON_CPU, ON_GPU
from benchmarks.measure import Case, Measured, Variant
from benchmarks.steps import Expected, Results, Step
from benchmarks.targets import ACCELERATED, ACCELERATED_STEPS, AS_IT_IS
from tests.spikingjelly_models import spikingjelly_network

# Where a BatchNorm is joined, its rounding moves spikes, and those move spikes of later layers.
SPREAD = 0.1
NAMES = {"sew_resnet18": "SpikingJelly sew_resnet18", "spiking_vgg": "SpikingJelly SpikingVGG (A)"}
# [T, B, 3, H, W].
IMAGES = [
    pytest.param((4, 4, 3, 32, 32), id="4x4x3x32x32", marks=ON_CPU),
    pytest.param((4, 64, 3, 32, 32), id="large", marks=ON_GPU),
]
# [T, B, features].
SEQUENCES = [
    pytest.param((25, 128, 100), id="25x128x100", marks=ON_CPU),
    pytest.param((25, 128, 1000), id="25x128x1000"),
    pytest.param((25, 128, 64, 28, 28), id="large", marks=ON_GPU),
]


class Training(Step):
    """Held to the reference by all gradients together: those of biases before a BatchNorm are 0."""

    def results(self) -> Results:
        outputs, grads = super().results()
        return outputs, [torch.cat([g.flatten() for g in grads])]


def training(net: nn.Module, x: Tensor, grad: Tensor) -> Step:
    """A forward and a backward pass of all parameters, from a state that is reset."""
    from spikingjelly.activation_based import functional

    def forward(*_: Tensor) -> Tensor:
        functional.reset_net(net)
        out: Tensor = net(x).mean(0)
        return out

    return Training(forward, list(net.parameters()), [grad])


def neuron_steps(net: nn.Module, x: Tensor) -> int:
    """How many there are in a forward pass."""
    from spikingjelly.activation_based import neuron

    counts: list[int] = []
    hooks = [
        module.register_forward_hook(lambda *call: counts.append(call[-1].numel()))
        for module in net.modules()
        if isinstance(module, neuron.BaseNode)
    ]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return sum(counts)


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("name", NAMES)
def test_networks(
    measured: Measured, device: torch.device, name: str, shape: tuple[int, ...]
) -> None:
    """A training step but for the optimizer: as it is, served, and with its BatchNorms joined."""
    pytest.importorskip("spikingjelly")
    theirs = spikingjelly_network(name).to(device)
    x, grad = torch.rand(shape, device=device) * 2, torch.randn(shape[1], 10, device=device)
    served, joined = (copy.deepcopy(theirs) for _ in range(2))
    assert not tk.accelerate(served, strict=True).left
    assert tk.accelerate(joined, fuse_batch_norm=True).joined
    truth = training(theirs, x, grad)
    others = [
        Variant(AS_IT_IS, truth),
        Variant("BatchNorm joined", training(joined, x, grad), Expected(truth, SPREAD, SPREAD)),
    ]
    best = Variant("accelerated", training(served, x, grad), Expected(truth, gradient=1e-3))
    elements = neuron_steps(copy.deepcopy(theirs), x)
    # Of the neurons alone: what convolutions and BatchNorms move is their own.
    moved, about = 20 * elements, {"steps": shape[0], "dtype": str(x.dtype)}
    title = f"{NAMES[name]}, T = {shape[0]}, batch {shape[1]}, {shape[3]}×{shape[4]}"
    copied = 4 * elements
    measured(Case(ACCELERATED, title, best, others, moved, elements, "neuron-step", copied, about))


@pytest.mark.parametrize("shape", SEQUENCES)
@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_loops(
    measured: Measured, device: torch.device, shape: tuple[int, ...], reset: str
) -> None:
    """snnTorch's Leaky in its user's loop over time, and without the loop."""
    snntorch = pytest.importorskip("snntorch")
    theirs = snntorch.Leaky(0.9, reset_mechanism=reset).to(device)
    served = copy.deepcopy(theirs)
    tk.accelerate(served, strict=True)
    x = torch.rand(shape, device=device, requires_grad=True)
    grad = torch.randn(shape, device=device)

    def loop(leaky: Any) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            mem, spikes = torch.zeros(0, device=device), []
            for current in x.unbind():
                spike, mem = leaky(current, mem)
                spikes.append(spike)
            return torch.stack(spikes)

        return forward

    def step(function: Callable[[Tensor], Tensor]) -> Step:
        return Step(function, [x], [grad])

    truth = step(loop(theirs))
    options = tk.presets.snntorch_leaky(0.9, reset_mechanism=reset)
    others = [
        Variant(AS_IT_IS, truth),
        Variant("without the loop", step(lambda x: tk.lif(x, **options)), Expected(truth)),
    ]
    best = Variant("accelerated", step(loop(served)), Expected(truth))
    name = f"Leaky, reset {reset!r}, {'×'.join(map(str, shape))}"
    about = {"steps": shape[0], "dtype": str(x.dtype)}
    elements = x.numel()
    # x, state and spikes; then x, state and three gradients in, two out.
    moved = 44 * elements
    measured(
        Case(ACCELERATED_STEPS, name, best, others, moved, elements, "neuron-step", x.nbytes, about)
    )
