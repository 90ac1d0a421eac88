"""What a convolutional network keeps for its backward pass, with and without packed spikes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import trt_kernels as tk
from benchmarks.baselines import NormLIF
from benchmarks.bench_batch_norm_lif import TRAINING, affine, fused
from benchmarks.bench_lif import ON_CPU, ON_GPU, Shape
from benchmarks.measure import Absent, Case, Measured, Variant
from benchmarks.ours import Function, ours
from benchmarks.steps import Expected, Step
from benchmarks.targets import PACKED, SEPARATE_NETWORK

# Images [T, B, 3, H, W] through three blocks of so many channels.
WIDTHS, CLASSES = (32, 64, 64), 10
# A spike that differs by a sum's order makes others differ in the layers above.
SPREAD = {torch.float32: 2e-2, torch.bfloat16: 0.1}


def network(blocks: list[Function]) -> Function:
    """Convolution, normalisation and neurons for each block, and a convolution to ten numbers.

    Parameters come with the images; the result is [T·B, 10].
    """

    def forward(x: Tensor, *parameters: Tensor, **options: Any) -> Tensor:
        for index, block in enumerate(blocks):
            kernel, weight, bias = parameters[3 * index : 3 * index + 3]
            current = functional.conv2d(x.flatten(0, 1), kernel, padding=1)
            x = block(current.unflatten(0, x.shape[:2]), weight, bias, **options)
        return functional.conv2d(x.flatten(0, 1), parameters[-1]).mean((2, 3))

    return forward


def packed(forward: Function) -> Function:
    """The same inside `pack_saved_spikes`, whose backend is that of the neurons."""

    def inside(*inputs: Tensor, backend: str = "auto") -> Tensor:
        with tk.use_backend(backend), tk.pack_saved_spikes():
            return forward(*inputs)

    return inside


def parameters(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Of every block a kernel, and weight and bias of its normalisation; and the last kernel."""
    made: list[Tensor] = []
    for before, width in zip((3, *WIDTHS), WIDTHS, strict=False):
        kernel = torch.randn(width, before, 3, 3, device=device) / (3 * before**0.5)
        made += [kernel.to(dtype).requires_grad_(), *affine(width, device)]
    last = torch.randn(CLASSES, WIDTHS[-1], 1, 1, device=device).to(dtype)
    return [*made, last.requires_grad_()]


@pytest.mark.parametrize(
    "shape,dtype",
    [
        pytest.param((4, 16, 3, 16, 16), torch.float32, id="float32", marks=ON_CPU),
        pytest.param((4, 128, 3, 32, 32), torch.float32, id="large", marks=ON_GPU),
        pytest.param((4, 128, 3, 32, 32), torch.bfloat16, id="large-bfloat16", marks=ON_GPU),
    ],
)
def test_training(
    measured: Measured, device: torch.device, shape: Shape, dtype: torch.dtype
) -> None:
    """Forward and backward, with blocks that are fused and with two layers each."""
    x = torch.rand(shape, device=device).to(dtype)
    inputs = [x.requires_grad_(), *parameters(device, dtype)]
    grad = torch.randn(shape[0] * shape[1], CLASSES, device=device).to(dtype)

    def step(function: Callable[..., Any]) -> Step:
        return Step(function, inputs, [grad])

    ours_fused = network([fused(width, device) for width in WIDTHS])
    apart = network([NormLIF(width, device, True, tk.lif) for width in WIDTHS])
    reference = network([fused(width, device, backend="reference") for width in WIDTHS])
    truth = Expected(step(reference), SPREAD[dtype], SPREAD[dtype])
    # Packed it is the same, but for the order in which a GPU's convolutions may sum.
    close = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    same, same_apart = (Expected(step(f), close, close) for f in (ours_fused, apart))
    best, rest = ours(packed(ours_fused), device, step, same)
    others: list[Variant | Absent] = [
        *rest,
        Variant("ours, not packed", step(ours_fused), truth),
        Variant(f"{SEPARATE_NETWORK}, packed", step(packed(apart)), same_apart),
        Variant(SEPARATE_NETWORK, step(apart)),
    ]
    pixels = shape[0] * shape[1] * shape[3] * shape[4]
    elements = pixels * sum(WIDTHS)
    # Of the neurons' blocks alone: what convolutions move is their own.
    moved = TRAINING * elements * x.element_size()
    name = (
        f"{shape[3]}×{shape[4]} images, {len(WIDTHS)} blocks, {str(dtype).removeprefix('torch.')}"
    )
    copied = pixels * WIDTHS[-1] * x.element_size()
    about = {"steps": shape[0], "dtype": str(dtype)}
    measured(Case(PACKED, name, best, others, moved, elements, "neuron-step", copied, about))
