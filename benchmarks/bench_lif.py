"""`lif` against a ReLU, the official loop, torch.compile and the other libraries."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import trt_kernels as tk
from benchmarks import baselines, peers
from benchmarks.measure import Absent, Case, Expected, Measured, Step, Variant, optional
from benchmarks.peers import Forward
from trt_kernels.backends import native

Shape = tuple[int, ...]
M = 1 << 20
QUICK_SHAPES = ((4, M), (6, M), (100, 16384), (1000, 4096))
FULL_SHAPES = ((10, M), (2, M), (32, 65536))
# The byte ledger: x read and spikes written; then x and a gradient read and a gradient written.
FORWARD, TRAINING = 2, 5

PEERS = (
    ("SpikingJelly", peers.spikingjelly, 1e-5, 0.0),
    ("snnTorch", peers.snntorch, 1e-5, 0.0),
    ("Norse", peers.norse, 2e-2, 2e-2),
)
SURROGATES = {
    "triangle": tk.Triangle(1.0),
    "sigmoid": tk.Sigmoid(4.0),
    "atan": tk.ATan(2.0),
    "rectangle": tk.Rectangle(1.0),
    "fast_sigmoid": tk.FastSigmoid(25.0),
}

shapes = pytest.mark.parametrize(
    "shape",
    [
        *(pytest.param(s, id=f"{s[0]}x{s[1]}") for s in QUICK_SHAPES),
        *(pytest.param(s, id=f"{s[0]}x{s[1]}", marks=pytest.mark.full) for s in FULL_SHAPES),
    ],
)


def named(shape: Shape, dtype: torch.dtype = torch.float32) -> str:
    """(6, 1M) float32."""
    sizes = (f"{n // M}M" if n % M == 0 else f"{n // 1024}k" if n % 1024 == 0 else n for n in shape)
    return f"({', '.join(map(str, sizes))}) {str(dtype).removeprefix('torch.')}"


def reference(**options: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: tk.lif(x, backend="reference", **options)


def training(x: Tensor, grad: Tensor) -> Callable[[Callable[..., Any]], Step]:
    """Steps that run forward and backward from x, with a given gradient of the spikes."""
    return lambda function: Step(function, [x], [grad])


def make_case(
    table: str,
    name: str,
    ours: Variant,
    others: Sequence[Variant | Absent],
    x: Tensor,
    tensors: int,
) -> Case:
    moved = tensors * x.numel() * x.element_size()
    about = {"steps": x.shape[0], "neurons": x[0].numel(), "dtype": str(x.dtype)}
    return Case(table, name, ours, others, moved, x.numel(), "neuron-step", x.nbytes, about)


def library(
    name: str,
    make: Callable[[], tuple[Forward, Forward]],
    gradient: float,
    output: float,
    step: Callable[[Callable[..., Any]], Step],
) -> Variant:
    """One library's neuron; an ImportError where it is not installed."""
    forward, same = make()
    return Variant(name, step(forward), Expected(step(same), output, gradient))


def libraries(step: Callable[[Callable[..., Any]], Step]) -> Iterator[Variant | Absent]:
    """The other libraries' neurons, each held to the reference of its own equation."""
    for name, make, gradient, output in PEERS:
        yield optional(name, partial(library, name, make, gradient, output, step))


@shapes
def test_training(measured: Measured, shape: Shape) -> None:
    """Forward and backward."""
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    step = training(x, grad)
    expected = Expected(step(reference()))
    others: list[Variant | Absent] = [
        Variant("relu", step(torch.relu)),
        Variant("official loop", step(baselines.official_lif), expected),
    ]
    if shape[0] <= 10:
        torch._dynamo.reset()
        loop = torch.compile(baselines.official_lif, dynamic=False, fullgraph=True)
        others.append(Variant("compiled loop", step(loop), expected, optional=True, compiled=True))
    others += libraries(step)
    ours = Variant("ours", step(tk.lif), expected)
    measured(make_case("lif, forward and backward", named(shape), ours, others, x, TRAINING))


@pytest.mark.parametrize("shape", [(6, M), (100, 16384)], ids=["6x1048576", "100x16384"])
def test_inference(measured: Measured, shape: Shape) -> None:
    """Forward alone, nothing kept."""
    x = torch.randn(shape)

    def step(function: Callable[..., Any]) -> Step:
        return Step(function, [x])

    expected = Expected(step(reference()))
    others = [
        Variant("relu", step(torch.relu)),
        Variant("official loop", step(baselines.official_lif), expected),
        *libraries(step),
    ]
    ours = Variant("ours", step(tk.lif), expected)
    measured(make_case("lif, inference", named(shape), ours, others, x, FORWARD))


@pytest.fixture
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native._C.cpu_level()
    native._C.set_cpu_level(request.param)
    yield request.param
    native._C.set_cpu_level(before)


@pytest.mark.parametrize("level", native._C.cpu_levels()[-2:], indirect=True)
@pytest.mark.parametrize("shape", [(6, M)], ids=["6x1048576"])
def test_surrogate(measured: Measured, shape: Shape, level: str) -> None:
    """The other surrogates against the triangle, at the two best instruction-set levels."""
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    step = training(x, grad)
    ours, *others = (
        Variant(
            name,
            step(lambda x, surrogate=surrogate: tk.lif(x, surrogate=surrogate)),
            Expected(step(reference(surrogate=surrogate))),
        )
        for name, surrogate in SURROGATES.items()
    )
    case = make_case(
        "lif, surrogates (against the triangle)",
        f"{named(shape)} {level}",
        ours,
        others,
        x,
        TRAINING,
    )
    case.about["level"] = level
    measured(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(6, M)], ids=["6x1048576"])
def test_half(measured: Measured, shape: Shape, dtype: torch.dtype) -> None:
    """Half precision, integrated in float32, against float32 and a ReLU in half."""
    x = torch.randn(shape).to(dtype).requires_grad_()
    grad = torch.randn(shape).to(dtype)
    step = training(x, grad)
    single = training(x.detach().float().requires_grad_(), grad.float())
    # A gradient is rounded to half once.
    expected = Expected(step(reference()), gradient=torch.finfo(dtype).eps)
    others = [
        Variant("lif float32", single(tk.lif), Expected(single(reference()))),
        Variant("relu, same dtype", step(torch.relu)),
        Variant("relu float32", single(torch.relu)),
    ]
    ours = Variant("ours", step(tk.lif), expected)
    measured(make_case("lif, half precision", named(shape, dtype), ours, others, x, TRAINING))


@pytest.mark.parametrize(
    "phi",
    ["square", "trt", *(pytest.param(p, marks=pytest.mark.full) for p in ("range", "spike"))],
)
@pytest.mark.parametrize("shape", [(6, M)], ids=["6x1048576"])
def test_in_pass_penalty(measured: Measured, shape: Shape, phi: str) -> None:
    """The regularizer inside the pass, against none, and against one on returned potentials."""
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    weight = torch.tensor([1 / (t + 1) for t in range(shape[0])])
    penalty = tk.MembranePenalty(phi, weight)

    def regularized(**options: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            out = tk.lif(x, penalty=penalty, **options)
            return out.spikes, out.penalty

        return forward

    def outside(x: Tensor) -> tuple[Tensor, Tensor]:
        out = tk.lif(x, return_potential=True)
        return out.spikes, (weight * out.potential.square().mean(1)).sum()

    def step(function: Callable[..., Any]) -> Step:
        return Step(function, [x], [grad, torch.tensor(3.0)])

    plain = training(x, grad)
    expected = Expected(step(regularized(backend="reference")), output=1e-5)
    others = [Variant("without", plain(tk.lif), Expected(plain(reference())))]
    if phi == "square":
        others.append(Variant("outside, on the potential", step(outside), expected))
    ours = Variant("inside", step(regularized()), expected)
    table = "lif, in-pass regularizer"
    measured(make_case(table, f"{phi} {named(shape)}", ours, others, x, TRAINING))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
def test_small_call(measured: Measured, backward: bool) -> None:
    """Host overhead: a tensor so small that the call is all there is."""
    shape = (4, 64)
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)

    def step(function: Callable[..., Any]) -> Step:
        return Step(function, [x], [grad] if backward else None)

    expected = Expected(step(reference()))
    others = [
        Variant("do-nothing Function", step(baselines.Nothing.apply)),
        Variant("relu", step(torch.relu)),
        Variant("official loop", step(baselines.official_lif), expected),
    ]
    ours = Variant("ours", step(tk.lif), expected)
    what = "forward and backward" if backward else "forward"
    tensors = TRAINING if backward else FORWARD
    measured(make_case("lif, small call", f"{what} (4, 64) float32", ours, others, x, tensors))
