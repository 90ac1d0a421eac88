"""A whole training step of the paper's networks: ours, the official code's, and others."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import record_function

import trt_kernels as tk
from benchmarks import baselines, peers
from benchmarks.bench_lif import ON_CPU, ON_GPU
from benchmarks.measure import FEWEST_ROUNDS, MOST_ROUNDS, Absent, Case, Measured, Variant, optional
from benchmarks.parts import Neurons
from benchmarks.records import LOSS, REGULARIZER
from benchmarks.steps import Expected
from benchmarks.targets import OFFICIAL_STEP, RELU_STEP, STEP
from benchmarks.training import TrainingStep, Unguided
from examples.networks import VGGSNN, ResNet19, SpikingNet, over_time
from examples.settings import SETTINGS, Settings

# A step takes about a second there; of three of them the median still varied by a fifth.
CPU_ROUNDS = (9, 9)
# Relative errors of the gradient of each parameter, the spikes being the same.
SPREAD = {None: 5e-3, torch.float16: 0.1, torch.bfloat16: 0.2}
# Of the loss and the size of the gradient, where the spikes are not.
UNGUIDED_SPREAD = 0.1


@dataclass(frozen=True)
class Setting:
    """A network at its published settings; `shape` is that of an image, or of a frame."""

    title: str
    kind: Callable[..., SpikingNet]
    shape: tuple[int, int, int]
    sequences: bool
    published: Settings

    @property
    def steps(self) -> int:
        return self.published.steps

    def network(self, sequences: bool) -> SpikingNet:
        """A network for sequences, or for images, which it shows T times."""
        return self.kind(steps=None if sequences else self.steps)

    def batch(self, size: int) -> Tensor:
        """Images [B, C, H, W], or frames of few events [B, T, C, H, W]."""
        if not self.sequences:
            return torch.rand(size, *self.shape)
        return (torch.rand(size, self.steps, *self.shape) > 0.8).float()


RESNET19 = Setting("ResNet-19", ResNet19, (3, 32, 32), False, SETTINGS["cifar10"])
VGG = Setting("VGGSNN", VGGSNN, (2, 48, 48), True, SETTINGS["dvs-cifar10"])


class Norm(nn.BatchNorm2d):
    """BatchNorm2d over time and batch together."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.ndim == 4 else over_time(super().forward, x)


class Official(Neurons):
    """The official LIF on [B, T, *]."""

    def forward(self, x: Tensor) -> Tensor:
        return baselines.official_lif(x, time_dim=1)


class SpikingJelly(Neurons):
    """SpikingJelly's LIFNode on [T, B, *]."""

    def __init__(self) -> None:
        super().__init__()
        self.node = peers.spikingjelly_node()

    def forward(self, x: Tensor) -> Tensor:
        self.node.reset()
        spikes: Tensor = self.node(x)
        return spikes


class Relu(Neurons):
    """ReLU; an image's is shown at so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        y = x.relu()
        return y if x.ndim != 4 else y.expand(self.steps, *y.shape)


def replaced(net: SpikingNet, neurons: Callable[[], nn.Module]) -> SpikingNet:
    """Puts BatchNorm2d and others' neurons in the place of ours; the weights are the same."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, tk.nn.BatchNormLIF):
                norm = Norm(child.num_features)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, nn.Sequential(norm, neurons()))
            elif isinstance(child, tk.nn.LIF):
                setattr(module, name, neurons())
    return net


def make_case(
    setting: Setting,
    batch: int,
    device: torch.device,
    half: torch.dtype | None = None,
    compiled: bool = False,
) -> Case:
    """A step of every variant, from the same weights, on the same batch.

    `compiled`: with torch.compile of the official step.
    """
    x, target = setting.batch(batch).to(device), torch.randint(10, (batch,)).to(device)
    net = setting.network(setting.sequences).to(device)
    weights = net.state_dict()
    regularizer = {"weight": setting.published.weight, "delta": setting.published.delta}

    def others(neurons: Callable[[], nn.Module], sequences: bool = True) -> SpikingNet:
        same = setting.network(sequences)
        same.load_state_dict(weights)
        return replaced(same, neurons).to(device)

    def time_first(x: Tensor) -> Tensor:
        return x.transpose(0, 1) if setting.sequences else x

    def repeated_first(x: Tensor) -> Tensor:
        return time_first(x) if setting.sequences else x.repeat(setting.steps, 1, 1, 1, 1)

    def repeated_second(x: Tensor) -> Tensor:
        return x if setting.sequences else x.unsqueeze(1).repeat(1, setting.steps, 1, 1, 1)

    def plain(net: nn.Module, time_dim: int, compiled: bool = False) -> Callable[..., Tensor]:
        """The TRT objective by the official operations."""
        loss_of, penalty_of = baselines.official_loss, baselines.official_penalty
        if compiled:
            loss_of, penalty_of = torch.compile(loss_of), torch.compile(penalty_of)

        def objective(logits: Tensor) -> Tensor:
            with record_function(LOSS):
                steps_first = logits.transpose(0, 1) if time_dim else logits
                loss = loss_of(steps_first, target, mse_ratio=setting.published.mse_ratio)
            with record_function(REGULARIZER):
                return loss + penalty_of(
                    list(net.named_parameters()), steps=setting.steps, **regularizer
                )

        return objective

    def entropy(logits: Tensor) -> Tensor:
        with record_function(LOSS):
            return functional.cross_entropy(logits.mean(0), target)

    official = others(Official)
    truth = TrainingStep(
        official, x, plain(official, 1), shown=repeated_second, half=half, time_dim=1
    )
    expected = Expected(truth, SPREAD[half], SPREAD[half])
    channels_last = setting.network(setting.sequences)
    channels_last.load_state_dict(weights)
    channels_last.to(device, memory_format=torch.channels_last)

    def ours(net: SpikingNet, packed: bool = False) -> TrainingStep:
        criterion = tk.TRTLoss(net, mse_ratio=setting.published.mse_ratio, **regularizer)

        def trt(logits: Tensor) -> Tensor:
            with record_function(LOSS):
                loss: Tensor = criterion(logits, target)
                return loss

        return TrainingStep(net, x, trt, shown=time_first, half=half, packed=packed, guide=truth)

    def spikingjelly() -> Variant:
        theirs = others(SpikingJelly)
        step = TrainingStep(
            theirs, x, plain(theirs, 0), shown=repeated_first, half=half, guide=truth
        )
        return Variant("SpikingJelly", step, expected)

    relu = others(lambda: Relu(setting.steps), setting.sequences)
    variants: list[Variant | Absent] = [
        Variant("ours, packed", ours(net, packed=True), expected),
        Variant("ours, channels_last", ours(channels_last), expected),
        Variant(OFFICIAL_STEP, truth),
        optional("SpikingJelly", spikingjelly),
        Variant(RELU_STEP, TrainingStep(relu, x, entropy, shown=time_first, half=half)),
    ]
    if compiled:
        options: dict[str, Any] = {"shown": repeated_second, "half": half, "time_dim": 1}
        torch._dynamo.reset()
        step = Unguided(torch.compile(official), x, plain(official, 1, True), **options)
        same = Expected(
            Unguided(official, x, plain(official, 1), **options), UNGUIDED_SPREAD, UNGUIDED_SPREAD
        )
        variants.append(Variant("compiled", step, same, optional=True, compiled=True))
    elements = batch * setting.steps * neurons_of(net, setting)
    dtype = "float32" if half is None else f"{str(half).removeprefix('torch.')} AMP"
    size = "×".join(map(str, setting.shape))
    return Case(
        STEP,
        f"{setting.title}, T = {setting.steps}, batch {batch}, {size}, {dtype}",
        Variant("ours", ours(net), expected),
        variants,
        # Of the neurons' blocks alone: what convolutions move is their own.
        moved=(32 if half is None else 16) * elements,
        elements=elements,
        element="neuron-step",
        copied=4 * elements,
        about={"network": setting.title, "steps": setting.steps, "batch": batch},
        rounds=CPU_ROUNDS if device.type == "cpu" else (FEWEST_ROUNDS, MOST_ROUNDS),
    )


def neurons_of(net: SpikingNet, setting: Setting) -> int:
    """Neurons a sample has, counted in a forward pass of one sample."""
    counts: list[int] = []
    handles = [
        m.register_forward_hook(lambda *call: counts.append(call[-1][0].numel()))
        for m in net.modules()
        if isinstance(m, tk.nn.LIF | tk.nn.BatchNormLIF)
    ]
    x = setting.batch(1).to(next(net.parameters()).device)
    net.eval()  # no statistics are changed
    with torch.no_grad():
        net(x.transpose(0, 1) if setting.sequences else x)
    net.train()
    for handle in handles:
        handle.remove()
    return sum(counts)


@pytest.mark.parametrize(
    "batch,half",
    [
        pytest.param(4, None, id="float32", marks=ON_CPU),
        pytest.param(64, torch.float16, id="large-float16", marks=ON_GPU),
    ],
)
@pytest.mark.parametrize("setting", [RESNET19, VGG], ids=lambda setting: setting.title)
def test_training(
    measured: Measured,
    device: torch.device,
    pytestconfig: pytest.Config,
    setting: Setting,
    batch: int,
    half: torch.dtype | None,
) -> None:
    """Forward pass, loss, backward pass and Adam; with --full `torch.compile`: it takes minutes."""
    full = pytestconfig.getoption("--full")
    measured(make_case(setting, batch, device, half, full), "wall")
