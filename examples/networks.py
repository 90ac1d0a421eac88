"""The paper's networks, on fused blocks of BatchNorm and LIF neurons.

    ResNet19     CIFAR           12,630,858 parameters for 10 classes, 18 layers of neurons
    VGGSNN       event cameras    9,268,746 parameters for 10 classes,  8 layers of neurons
    SEWResNet34  ImageNet-100    21,335,972 parameters for 100 classes, 36 layers of neurons
    SmallNet     8x8 digits and the event streams made of them

As in the official code (arXiv 2506.19256): convolutions without bias, kaiming_normal_ by fan_out, a
BatchNorm over time and batch ("tdBN" there), neurons that are reset to 0 through the gradient.

All of them map images x [B, C, H, W], shown as the same current at each of `steps` timesteps, or,
where `steps` is None, sequences x [T, B, C, H, W], to logits [T, B, classes]. An image is convolved
once, not T times as in the official code; the first neurons repeat its current.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import trt_kernels as tk


def over_time(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer that knows no time, on [T, B, *]: it sees T·B images."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """Keeps the size of the image, up to its stride."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


class SpikingConv(nn.Module):
    """Convolution, then BatchNorm and LIF neurons in one operator.

    [T, B, C, H, W] -> spikes [T, B, C', H', W']. With the option `steps` the input has no time,
    [B, C, H, W], and is the neurons' current at each of so many steps.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, **options: Any
    ) -> None:
        super().__init__()
        self.conv = convolution(inputs, outputs, kernel, stride)
        self.neurons = tk.nn.BatchNormLIF(outputs, **options)

    def forward(self, x: Tensor) -> Tensor:
        current = self.conv(x) if x.ndim == 4 else over_time(self.conv, x)
        spikes: Tensor = self.neurons(current)
        return spikes


class Normalised(nn.Sequential):
    """Convolution and BatchNorm, whose result is summed with another before neurons see it."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(convolution(inputs, outputs, kernel, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return over_time(super().forward, x)


class ResidualBlock(nn.Module):
    """Two convolutions; the input is added to the current of the second one's neurons.

    Where the shape changes, a convolution of 1x1 and a BatchNorm fit the input to it; with
    `spiking_shortcut` neurons follow these. Neurons after a sum are a layer of their own.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        spiking_shortcut: bool,
        norm_options: dict[str, Any],
        **options: Any,
    ) -> None:
        super().__init__()
        both = {**norm_options, **options}
        self.first = SpikingConv(inputs, outputs, stride=stride, **both)
        self.second = Normalised(outputs, outputs)
        self.neurons = tk.nn.LIF(**options)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            if spiking_shortcut:
                self.shortcut = SpikingConv(inputs, outputs, kernel=1, stride=stride, **both)
            else:
                self.shortcut = Normalised(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        # In place: a BatchNorm's backward pass does not read its result.
        current = self.second(self.first(x)).add_(self.shortcut(x))
        spikes: Tensor = self.neurons(current)
        return spikes


class SpikingNet(nn.Module):
    """Layers of neurons, in the order of the forward pass, and a readout of the last one's spikes.

    Args:
        steps: T for images; None for sequences.
        tau: the neurons' time constant; the decay of their potential is 1 / tau.
        process_group: share the statistics of BatchNorms that are fused with neurons.
        lif_options: other options of `trt_kernels.lif`.
    """

    def __init__(
        self, steps: int | None, tau: float = 2.0, process_group: Any = None, **lif_options: Any
    ) -> None:
        super().__init__()
        self.steps = steps
        published = tk.presets.official_trt(
            v_threshold=1.0, tau=tau, surrogate_type="triangle", surrogate_param=1.0
        )
        self.neuron = {**published, **lif_options, "time_dim": 0}
        self.norm = {"process_group": process_group}
        self.layers = nn.Sequential()
        self.readout: nn.Module = nn.Identity()

    def add_conv(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        """A convolution with neurons; the first of all repeats an image's current."""
        repeated = {} if len(self.layers) else {"steps": self.steps}
        self.layers.append(
            SpikingConv(inputs, outputs, kernel, stride, **repeated, **self.norm, **self.neuron)
        )

    def add_residuals(
        self, inputs: int, outputs: int, blocks: int, stride: int, spiking_shortcut: bool
    ) -> None:
        """Residual blocks, the first of which changes the shape."""
        for block in range(blocks):
            before, step = (inputs, stride) if block == 0 else (outputs, 1)
            self.layers.append(
                ResidualBlock(before, outputs, step, spiking_shortcut, self.norm, **self.neuron)
            )

    def add_pool(self, pool: nn.Module) -> None:
        self.layers.append(OverTime(pool))

    def forward(self, x: Tensor) -> Tensor:
        dimensions = 5 if self.steps is None else 4
        if x.ndim != dimensions:
            shape = "[T, B, C, H, W]" if self.steps is None else "[B, C, H, W]"
            raise ValueError(f"x: got shape {tuple(x.shape)}, needs {shape}")
        logits: Tensor = self.readout(self.layers(x).flatten(2))
        return logits


class OverTime(nn.Module):
    """A module that knows no time, on [T, B, *]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return over_time(self.layer, x)


class ResNet19(SpikingNet):
    """A convolution, three stages of residual blocks and two linear layers, the first spiking."""

    def __init__(
        self, classes: int = 10, steps: int | None = 6, channels: int = 3, **options: Any
    ) -> None:
        super().__init__(steps, **options)
        self.add_conv(channels, 64)
        for inputs, outputs, blocks, stride in (
            (64, 128, 3, 1),
            (128, 256, 3, 2),
            (256, 512, 2, 2),
        ):
            self.add_residuals(inputs, outputs, blocks, stride, spiking_shortcut=False)
        self.add_pool(nn.AdaptiveAvgPool2d(1))
        hidden, neurons = nn.Linear(512, 256), tk.nn.LIF(**self.neuron)
        self.readout = nn.Sequential(hidden, neurons, nn.Linear(256, classes))


class SEWResNet34(SpikingNet):
    """ResNet-34 as the official code trains it for ImageNet-100, under the name SEW-ResNet-34.

    There the shortcut's spikes are added to the current of a block's last neurons, as here. In the
    SEW block as published (Fang et al., arXiv 2102.04159) they are added to those neurons' spikes.
    """

    def __init__(
        self, classes: int = 100, steps: int | None = 4, channels: int = 3, **options: Any
    ) -> None:
        super().__init__(steps, **options)
        self.add_conv(channels, 64, kernel=7, stride=2)
        self.add_pool(nn.MaxPool2d(3, stride=2, padding=1))
        for inputs, outputs, blocks, stride in (
            (64, 64, 3, 1),
            (64, 128, 4, 2),
            (128, 256, 6, 2),
            (256, 512, 3, 2),
        ):
            self.add_residuals(inputs, outputs, blocks, stride, spiking_shortcut=True)
        self.add_pool(nn.AdaptiveAvgPool2d(1))
        self.readout = nn.Linear(512, classes)


class VGGSNN(SpikingNet):
    """Eight convolutions, an average pooling after every second one, and a linear readout.

    `size`: height and width of the frames, a multiple of 16.
    """

    def __init__(
        self,
        classes: int = 10,
        steps: int | None = None,
        channels: int = 2,
        size: int = 48,
        **options: Any,
    ) -> None:
        if size < 16 or size % 16:
            raise ValueError(f"size: got {size}, needs a multiple of 16")
        super().__init__(steps, **options)
        widths = (64, 128, 256, 256, 512, 512, 512, 512)
        for index, outputs in enumerate(widths):
            self.add_conv(widths[index - 1] if index else channels, outputs)
            if index % 2:
                self.add_pool(nn.AvgPool2d(2))
        self.readout = nn.Linear(512 * (size // 16) ** 2, classes)


class SmallNet(SpikingNet):
    """Three convolutions and a linear readout, for small images: it trains in seconds."""

    def __init__(
        self,
        classes: int = 10,
        steps: int | None = 6,
        channels: int = 1,
        size: int = 8,
        **options: Any,
    ) -> None:
        super().__init__(steps, **options)
        self.add_conv(channels, 32)
        self.add_conv(32, 64)
        self.add_pool(nn.AvgPool2d(2))
        self.add_conv(64, 64)
        self.readout = nn.Linear(64 * (size // 2) ** 2, classes)


NETWORKS: dict[str, type[SpikingNet]] = {
    "resnet19": ResNet19,
    "vggsnn": VGGSNN,
    "sew-resnet34": SEWResNet34,
    "small": SmallNet,
}
