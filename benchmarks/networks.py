"""Parameters of the published networks."""

import torch
from torch import Tensor


def resnet19(device: torch.device | None = None) -> list[tuple[str, Tensor]]:
    """Named parameters of the paper's ResNet-19 for CIFAR10: 12,630,858, at their initial scale."""
    shapes: list[tuple[str, tuple[int, ...]]] = []

    def convolution(name: str, inputs: int, outputs: int, kernel: int) -> None:
        shapes.append((f"{name}.weight", (outputs, inputs, kernel, kernel)))
        shapes.append((f"{name}.norm.weight", (outputs,)))
        shapes.append((f"{name}.norm.bias", (outputs,)))

    convolution("stem", 3, 64, 3)
    before = 64
    for width, blocks in ((128, 3), (256, 3), (512, 2)):
        for block in range(blocks):
            name = f"stage{width}.{block}"
            convolution(f"{name}.first", before, width, 3)
            convolution(f"{name}.second", width, width, 3)
            if before != width:
                convolution(f"{name}.shortcut", before, width, 1)
            before = width
    for name, inputs, outputs in (("hidden", 512, 256), ("output", 256, 10)):
        shapes.append((f"{name}.weight", (outputs, inputs)))
        shapes.append((f"{name}.bias", (outputs,)))
    return [(name, initial(name, shape).to(device).requires_grad_()) for name, shape in shapes]


def initial(name: str, shape: tuple[int, ...]) -> Tensor:
    """Ones for gains, zeros for biases, normal weights scaled by their fan-in."""
    if "bias" in name:
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    weight = torch.randn(shape)
    return weight * (2 / weight[0].numel()) ** 0.5
