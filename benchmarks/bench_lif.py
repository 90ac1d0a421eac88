"""`lif` against a ReLU, the official loop, torch.compile and the other libraries."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import trt_kernels as tk
from benchmarks import baselines, peers
from benchmarks.measure import Absent, Case, Measured, Variant, optional
from benchmarks.ours import ours
from benchmarks.peers import Forward
from benchmarks.steps import Backward, Expected, Step
from trt_kernels.backends import native

Shape = tuple[int, ...]
Make = Callable[[Callable[..., Any]], Step]
M = 1 << 20
QUICK_SHAPES = ((4, M), (6, M), (100, 16384), (1000, 4096))
FULL_SHAPES = ((10, M), (2, M), (32, 65536))
# Large layers on a GPU: more than 64M neuron-steps, so that the launch is nothing.
GPU_SHAPES = ((4, 16 * M), (6, 11 * M), (10, 7 * M), (32, 2 * M))
ONE_GPU_SHAPE = GPU_SHAPES[1]
# Small ones: launches and Python are everything, or most.
SMALL_GPU_SHAPES = ((4, 64), (4, 16384), (6, 131072))
# As many neuron-steps for any number of steps: at T = 1000 still a million neurons.
GPU_STEPS, GPU_NEURON_STEPS = (4, 10, 16, 32, 100, 250, 1000), 1000 * M
CPU_STEPS, CPU_NEURON_STEPS = (10, 100, 1000), 10_240_000
# Bytes of a GPU on which each of the tensors of so many neuron-steps has room.
ENOUGH_MEMORY = 60 << 30
# The byte ledger: x read and spikes written; x and a gradient read and a gradient written; both.
FORWARD, BACKWARD, TRAINING = 2, 3, 5

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
ON_CPU, ON_GPU = pytest.mark.cpu, pytest.mark.cuda


def sized(shapes: Sequence[Shape], *marks: Any, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Parameters (shape, dtype)."""
    suffix = "" if dtype == torch.float32 else f"-{str(dtype).removeprefix('torch.')}"
    return [pytest.param(s, dtype, id=f"{s[0]}x{s[1]}{suffix}", marks=marks) for s in shapes]


LARGE_ON_GPU = [
    *sized(GPU_SHAPES, ON_GPU),
    *sized(GPU_SHAPES, ON_GPU, dtype=torch.bfloat16),
]
# One pass alone: at few steps and at many.
TWO_ON_GPU = [
    *sized(GPU_SHAPES[1::2], ON_GPU),
    *sized(GPU_SHAPES[1::2], ON_GPU, dtype=torch.bfloat16),
]


def named(shape: Shape, dtype: torch.dtype = torch.float32) -> str:
    """(6, 1M) float32."""
    sizes = (f"{n // M}M" if n % M == 0 else f"{n // 1024}k" if n % 1024 == 0 else n for n in shape)
    return f"({', '.join(map(str, sizes))}) {str(dtype).removeprefix('torch.')}"


def reference(**options: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: tk.lif(x, backend="reference", **options)


def training(x: Tensor, grad: Tensor) -> Make:
    """Steps that run forward and backward from x, with a given gradient of the spikes."""
    return lambda function: Step(function, [x], [grad])


def leaves(
    shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """An input that requires a gradient, and a gradient of the spikes."""
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    return x, torch.randn(shape, device=device).to(dtype)


def rounding(dtype: torch.dtype) -> float:
    """Tolerance of a gradient: one in half precision is rounded once."""
    return 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps


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
    step: Make,
) -> Variant:
    """One library's neuron; an ImportError where it is not installed."""
    forward, same = make()
    return Variant(name, step(forward), Expected(step(same), output, gradient))


def libraries(
    step: Make, device: torch.device, chosen: Sequence[Any] = PEERS
) -> Iterator[Variant | Absent]:
    """The other libraries' neurons, each held to the reference of its own equation."""
    for name, make, gradient, output in chosen:
        yield optional(name, partial(library, name, partial(make, device), gradient, output, step))


def spikingjelly_kernels(step: Make, x: Tensor) -> Iterator[Variant | Absent]:
    """SpikingJelly's kernels, each implementation that it has for a GPU."""
    gradient = max(1e-5, rounding(x.dtype))
    for implementation in ("cuda", "triton"):
        name = f"SpikingJelly {implementation}"
        make = partial(peers.spikingjelly, x.device, implementation)
        yield optional(name, partial(library, name, make, gradient, 0.0, step))


def on_gpu(step: Make, x: Tensor) -> Iterator[Variant | Absent]:
    """What large layers on a GPU meet: SpikingJelly everywhere, other libraries at one shape."""
    yield from spikingjelly_kernels(step, x)
    if x.dtype != torch.float32:
        # A state in half flips some spikes.
        make = partial(peers.spikingjelly_amp, x.device)
        name = "SpikingJelly AMP"
        yield optional(name, partial(library, name, make, 0.1, 0.2, step))
    elif tuple(x.shape) == GPU_SHAPES[0]:
        yield from libraries(step, x.device, PEERS[1:])


@pytest.mark.cuda
def test_bits(measured: Measured, device: torch.device) -> None:
    """Spikes and potentials against the CPU's, half on a grid that meets the threshold exactly."""
    x = torch.randn(10, 2 * M)
    x[:, M:] = (x[:, M:] * 10).round() / 10

    def forward(x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out = tk.lif(x, return_potential=True, **options)
        return out.spikes, out.potential

    here = x.to(device)

    def step(function: Callable[..., Any]) -> Step:
        return Step(function, [here])

    expected = Expected(Step(partial(forward, backend="cpu"), [x]))
    best, rest = ours(forward, device, step, expected)
    on_device = Variant("reference", step(partial(forward, backend="reference")), expected)
    case = make_case("lif, bits of the CPU", named(x.shape), best, [*rest, on_device], here, 3)
    measured(case)


@pytest.mark.parametrize(
    "shape,dtype",
    [
        *sized(QUICK_SHAPES, ON_CPU),
        *sized(FULL_SHAPES, ON_CPU, pytest.mark.full),
        *LARGE_ON_GPU,
    ],
)
def test_training(
    measured: Measured, device: torch.device, shape: Shape, dtype: torch.dtype
) -> None:
    """Forward and backward."""
    x, grad = leaves(shape, device, dtype)
    step = training(x, grad)
    expected = Expected(step(reference()), gradient=rounding(dtype))
    best, rest = ours(tk.lif, device, step, expected)
    others: list[Variant | Absent] = [*rest, Variant("relu", step(torch.relu))]
    if dtype == torch.float32:
        others.append(Variant("official loop", step(baselines.official_lif), expected))
    if device.type == "cpu":
        if shape[0] <= 10:
            others.append(compiled_loop(step, expected))
        others += libraries(step, device)
    else:
        others += on_gpu(step, x)
    measured(make_case("lif, forward and backward", named(shape, dtype), best, others, x, TRAINING))


def compiled_loop(step: Make, expected: Expected) -> Variant:
    torch._dynamo.reset()
    loop = torch.compile(baselines.official_lif, dynamic=False, fullgraph=True)
    return Variant("compiled loop", step(loop), expected, optional=True, compiled=True)


@pytest.mark.cuda
def test_compiled(measured: Measured, device: torch.device) -> None:
    """torch.compile of the official loop, in a case of its own: compiling takes long."""
    shape = GPU_SHAPES[0]
    x, grad = leaves(shape, device)
    step = training(x, grad)
    expected = Expected(step(reference()))
    best, rest = ours(tk.lif, device, step, expected)
    others = [*rest, compiled_loop(step, expected)]
    measured(make_case("lif, torch.compile of the loop", named(shape), best, others, x, TRAINING))


@pytest.mark.parametrize("shape,dtype", [*sized(((6, M), (100, 16384)), ON_CPU), *TWO_ON_GPU])
def test_inference(
    measured: Measured, device: torch.device, shape: Shape, dtype: torch.dtype
) -> None:
    """Forward alone, nothing kept."""
    x = torch.randn(shape, device=device).to(dtype)

    def step(function: Callable[..., Any]) -> Step:
        return Step(function, [x])

    expected = Expected(step(reference()))
    best, rest = ours(tk.lif, device, step, expected)
    others: list[Variant | Absent] = [*rest, Variant("relu", step(torch.relu))]
    if device.type == "cpu":
        others.append(Variant("official loop", step(baselines.official_lif), expected))
        others += libraries(step, device)
    else:
        others += spikingjelly_kernels(step, x)
    measured(make_case("lif, inference", named(shape, dtype), best, others, x, FORWARD))


@pytest.mark.parametrize("shape,dtype", TWO_ON_GPU)
def test_backward(
    measured: Measured, device: torch.device, shape: Shape, dtype: torch.dtype
) -> None:
    """Backward alone, again and again after one forward."""
    x, grad = leaves(shape, device, dtype)

    def step(function: Callable[..., Any]) -> Step:
        return Backward(function, [x], [grad])

    expected = Expected(step(reference()), gradient=rounding(dtype))
    best, rest = ours(tk.lif, device, step, expected)
    others = [*rest, Variant("relu", step(torch.relu))]
    measured(make_case("lif, backward", named(shape, dtype), best, others, x, BACKWARD))


def ends(results: Tensor) -> Tensor:
    """The first and the last neurons over all time: neurons do not know of each other."""
    width = min(4096, results.shape[1] // 2)
    return torch.cat([results[:, :width], results[:, -width:]], 1)


@pytest.mark.parametrize(
    "steps,dtype",
    [
        *(pytest.param(t, torch.float32, marks=ON_CPU) for t in CPU_STEPS),
        *(pytest.param(t, torch.bfloat16, marks=ON_CPU) for t in CPU_STEPS[::2]),
        *(pytest.param(t, torch.float32, marks=ON_GPU) for t in GPU_STEPS),
        *(pytest.param(t, torch.bfloat16, marks=ON_GPU) for t in GPU_STEPS[1::5]),
    ],
)
def test_steps(measured: Measured, device: torch.device, steps: int, dtype: torch.dtype) -> None:
    """From few to very many steps of as many neuron-steps."""
    neuron_steps = CPU_NEURON_STEPS
    if device.type != "cpu":
        room = torch.cuda.get_device_properties(device).total_memory / ENOUGH_MEMORY
        neuron_steps = int(GPU_NEURON_STEPS * min(1.0, room))
    neurons = neuron_steps // steps // 64 * 64
    x, grad = leaves((steps, neurons), device, dtype)
    step = training(x, grad)
    few = ends(x.detach()).requires_grad_()
    expected = Expected(Step(reference(), [few], [ends(grad)]), gradient=rounding(dtype), part=ends)
    best, rest = ours(tk.lif, device, step, expected)
    others = [*rest, Variant("relu", step(torch.relu))]
    name = f"T = {steps}, {neurons:,} neurons, {str(dtype).removeprefix('torch.')}"
    measured(make_case("lif, more and more steps", name, best, others, x, TRAINING))


@pytest.fixture
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native._C.cpu_level()
    native._C.set_cpu_level(request.param)
    yield request.param
    native._C.set_cpu_level(before)


def surrogate_case(shape: Shape, device: torch.device, where: str) -> Case:
    """The other surrogates against the triangle."""
    x, grad = leaves(shape, device)
    step = training(x, grad)
    triangle, *others = (
        Variant(
            name,
            step(lambda x, surrogate=surrogate: tk.lif(x, surrogate=surrogate)),
            Expected(step(reference(surrogate=surrogate))),
        )
        for name, surrogate in SURROGATES.items()
    )
    return make_case(
        "lif, surrogates (against the triangle)",
        f"{named(shape)} {where}",
        triangle,
        others,
        x,
        TRAINING,
    )


@pytest.mark.cpu
@pytest.mark.parametrize("level", native._C.cpu_levels()[-2:], indirect=True)
@pytest.mark.parametrize("shape", [(6, M)], ids=["6x1048576"])
def test_surrogate(measured: Measured, device: torch.device, shape: Shape, level: str) -> None:
    """At the two best instruction-set levels."""
    case = surrogate_case(shape, device, level)
    case.about["level"] = level
    measured(case)


@pytest.mark.cuda
def test_surrogate_on_gpu(measured: Measured, device: torch.device) -> None:
    measured(surrogate_case(ONE_GPU_SHAPE, device, "auto"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((6, M), id="6x1048576", marks=ON_CPU),
        pytest.param(ONE_GPU_SHAPE, id="large", marks=ON_GPU),
    ],
)
def test_half(measured: Measured, device: torch.device, shape: Shape, dtype: torch.dtype) -> None:
    """Half precision, integrated in float32, against float32 and a ReLU in half."""
    x, grad = leaves(shape, device, dtype)
    step = training(x, grad)
    single = training(x.detach().float().requires_grad_(), grad.float())
    # A gradient is rounded to half once.
    expected = Expected(step(reference()), gradient=torch.finfo(dtype).eps)
    best, rest = ours(tk.lif, device, step, expected)
    others = [
        *rest,
        Variant("lif float32", single(tk.lif), Expected(single(reference()))),
        Variant("relu, same dtype", step(torch.relu)),
        Variant("relu float32", single(torch.relu)),
    ]
    measured(make_case("lif, half precision", named(shape, dtype), best, others, x, TRAINING))


@pytest.mark.parametrize(
    "phi",
    ["square", "trt", *(pytest.param(p, marks=pytest.mark.full) for p in ("range", "spike"))],
)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((6, M), id="6x1048576", marks=ON_CPU),
        pytest.param(ONE_GPU_SHAPE, id="large", marks=ON_GPU),
    ],
)
def test_in_pass_penalty(measured: Measured, device: torch.device, shape: Shape, phi: str) -> None:
    """The regularizer inside the pass, against none, and against one on returned potentials."""
    x, grad = leaves(shape, device)
    weight = torch.tensor([1 / (t + 1) for t in range(shape[0])], device=device)
    penalty = tk.MembranePenalty(phi, weight)
    upstream = torch.tensor(3.0, device=device)

    def regularized(**options: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            out = tk.lif(x, penalty=penalty, **options)
            return out.spikes, out.penalty

        return forward

    def outside(x: Tensor) -> tuple[Tensor, Tensor]:
        out = tk.lif(x, return_potential=True)
        return out.spikes, (weight * out.potential.square().mean(1)).sum()

    def step(function: Callable[..., Any]) -> Step:
        return Step(function, [x], [grad, upstream])

    plain = training(x, grad)
    expected = Expected(step(regularized(backend="reference")), output=1e-5)
    others = [Variant("without", plain(tk.lif), Expected(plain(reference())))]
    if phi == "square":
        others.append(Variant("outside, on the potential", step(outside), expected))
    inside = Variant("inside", step(regularized()), expected)
    table = "lif, in-pass regularizer"
    measured(make_case(table, f"{phi} {named(shape)}", inside, others, x, TRAINING))


@pytest.mark.parametrize("clock", ["wall", pytest.param("graph", marks=ON_GPU)])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((4, 64), id="4x64"),
        *(pytest.param(s, id=f"{s[0]}x{s[1]}", marks=ON_GPU) for s in SMALL_GPU_SHAPES[1:]),
    ],
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
def test_small_call(
    measured: Measured, device: torch.device, backward: bool, shape: Shape, clock: str
) -> None:
    """Host overhead: a tensor so small that the call is all there is, or most."""
    x, grad = leaves(shape, device)

    def step(function: Callable[..., Any]) -> Step:
        return Step(function, [x], [grad] if backward else None)

    expected = Expected(step(reference()))
    best, rest = ours(tk.lif, device, step, expected)
    others: list[Variant | Absent] = [
        *rest,
        Variant("do-nothing Function", step(baselines.Nothing.apply)),
        Variant("relu", step(torch.relu)),
        Variant("official loop", step(baselines.official_lif), expected),
    ]
    if device.type != "cpu":
        others += spikingjelly_kernels(step, x)
    what = "forward and backward" if backward else "forward"
    tensors = TRAINING if backward else FORWARD
    table = "lif, small call, graph replay" if clock == "graph" else "lif, small call"
    measured(make_case(table, f"{what} {named(shape)}", best, others, x, tensors), clock)
