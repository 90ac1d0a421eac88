"""What the fuzz tests draw: tensors in any layout, and calls of every operator.

Everything but the values is drawn by hypothesis; they come from a generator whose seed is drawn.
`TRT_KERNELS_FUZZ` multiplies the number of cases (`make fuzz`).
"""

import math
import os
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

import trt_kernels as tk
from tests.cases import PHIS, RESETS, charges

LONGER = int(os.environ.get("TRT_KERNELS_FUZZ", "1"))
DTYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = (0, 1, 1, 2, 3, 4, 5, 8, 9, 17, 33, 64, 130)
STEPS = (0, 1, 1, 2, 3, 4, 5, 8, 15, 16, 17, 33)


def cases(count: int) -> Any:
    """So many cases of a test, the same at every run but in the long mode."""
    return settings(
        max_examples=count * LONGER,
        derandomize=LONGER == 1,
        database=None,
        deadline=None,
        print_blob=True,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


class Layout(NamedTuple):
    """How a tensor lies in memory."""

    order: tuple[int, ...]  # its dimensions, from the outermost on
    gaps: tuple[int, ...]  # of every dimension: 1, 2 leaves out every other number, 0 repeats one
    offset: int  # in elements


@st.composite
def layouts(draw, ndim: int, repeats: bool = True) -> Layout:
    if draw(st.booleans()):
        return Layout(tuple(range(ndim)), (1,) * ndim, draw(st.sampled_from((0, 0, 1, 2, 3, 4))))
    order = draw(st.permutations(range(ndim)))
    gaps = st.sampled_from((1, 1, 1, 1, 2, 0) if repeats else (1, 1, 1, 1, 2))
    return Layout(
        tuple(order), tuple(draw(gaps) for _ in range(ndim)), draw(st.sampled_from((0, 0, 1, 3, 8)))
    )


def lay(values: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The values in memory of that layout, and the memory; where it repeats, those of index 0."""
    strides, count = [0] * values.ndim, 1
    for dim in reversed(layout.order):
        if layout.gaps[dim]:
            strides[dim] = count * layout.gaps[dim]
            count *= max(1, values.shape[dim]) * layout.gaps[dim]
    stranger = float("nan") if values.is_floating_point() else 10**6
    memory = torch.full((layout.offset + count + 3,), stranger, dtype=values.dtype)
    once = values
    for dim, gap in enumerate(layout.gaps):
        if gap == 0 and once.shape[dim]:
            once = once.narrow(dim, 0, 1)
    memory.as_strided(once.shape, strides, layout.offset).copy_(once)
    return memory.as_strided(values.shape, strides, layout.offset), memory


class Values:
    """Random tensors. On the grid, sums and products with powers of two are exact in float32, and
    potentials meet the threshold again and again."""

    def __init__(self, seed: int, grid: bool) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.grid = grid

    def __call__(self, shape: Any, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        if self.grid:
            whole = torch.randint(-8, 9, tuple(shape), generator=self.generator)
            return (whole / 4).to(dtype)
        return (torch.randn(tuple(shape), generator=self.generator) * scale).to(dtype)


def state_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@st.composite
def sizes(draw, least: int, most: int, budget: int) -> tuple[int, ...]:
    """A shape of `least` to `most` dimensions and about `budget` elements at most."""
    shape = []
    for _ in range(draw(st.integers(least, most))):
        size = min(draw(st.sampled_from(SIZES)), max(1, budget))
        budget //= max(1, size)
        shape.append(size)
    return tuple(draw(st.permutations(shape)))


class Call(NamedTuple):
    """A call of an operator: its tensors by name, those that require grad, and all the rest."""

    tensors: dict[str, Tensor]
    memory: dict[str, Tensor]  # around each
    wanted: frozenset[str]
    options: dict[str, Any]
    upstream: Layout  # of the gradients that arrive
    arriving: tuple[bool, ...]  # which outputs a gradient arrives at
    values: Values

    def __repr__(self) -> str:
        tensors = ", ".join(
            f"{name} {t.dtype} {tuple(t.shape)} by {t.stride()} at {t.storage_offset()}"
            for name, t in self.tensors.items()
        )
        return f"{tensors}; grad of {set(self.wanted)}; {self.options}; {self.arriving}"

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensors as leaves: as they lie, or packed in another dtype."""
        leaves = {}
        for name, t in self.tensors.items():
            leaf = t.detach() if dtype is None else t.detach().to(dtype).clone()
            leaves[name] = leaf.requires_grad_(name in self.wanted)
        return leaves


class Drawing:
    """Collects the tensors of a call while it is drawn."""

    def __init__(self, draw: Any, grid: bool) -> None:
        self.draw = draw
        self.values = Values(draw(st.integers(0, 2**32 - 1)), grid)
        self.tensors: dict[str, Tensor] = {}
        self.memory: dict[str, Tensor] = {}
        self.wanted: set[str] = set()

    def add(self, name: str, values: Tensor, grad: bool = True) -> None:
        """A tensor in a drawn layout; one that may be written to repeats no number."""
        layout = self.draw(layouts(values.ndim, repeats=grad))
        self.tensors[name], self.memory[name] = lay(values, layout)
        if grad and self.draw(st.sampled_from((True, True, False))):
            self.wanted.add(name)

    def call(self, options: dict[str, Any], ndim: int) -> Call:
        return Call(
            self.tensors,
            self.memory,
            frozenset(self.wanted),
            options,
            self.draw(layouts(ndim)),
            tuple(self.draw(st.lists(st.booleans(), min_size=5, max_size=5))),
            self.values,
        )


SURROGATES = st.one_of(
    st.builds(tk.Triangle, st.sampled_from((0.5, 1.0, 2.0))),
    st.builds(tk.Rectangle, st.sampled_from((0.5, 1.0, 2.0))),
    st.builds(tk.Sigmoid, st.sampled_from((0.5, 4.0))),
    st.builds(tk.ATan, st.sampled_from((0.5, 2.0))),
    st.builds(tk.FastSigmoid, st.sampled_from((1.0, 25.0))),
    st.builds(tk.SignedStep, st.sampled_from((0.3, 1.0))),
)


def neuron(
    drawing: Drawing, options: dict[str, Any], channels: int | None, grows: bool = True
) -> None:
    """Options of a neuron; its parameters are floats, scalars or, where there are channels, one
    for each. Its potential may grow from step to step where it `grows`."""
    draw, grid = drawing.draw, drawing.values.grid
    options["reset"] = draw(st.sampled_from(RESETS))
    options["detach_reset"] = draw(st.booleans())
    options["charge"] = charge = draw(st.sampled_from(charges(options["reset"])))
    options["surrogate"] = draw(SURROGATES)
    options["fire_at_threshold"] = draw(st.booleans())
    decays = (0.5, 1.0, 0.25, 0.0, 2.0) if grid else (0.5, 0.9, 1 / 3, 1.0, 0.0, 1.1, -0.3)
    if not grows:
        decays = tuple(decay for decay in decays if 0 <= decay <= 1)
    if "divide" in charge:
        decays = tuple(decay for decay in decays if decay)
    thresholds = (1.0, 0.5, 0.25, 1.5, 0.0) if grid else (1.0, 0.7, 0.0, -0.2)
    resets = (0.0, 0.5, -0.25) if grid else (0.0, 0.1, -0.3)
    dtype = drawing.tensors["x"].dtype
    for name, choices in (("decay", decays), ("threshold", thresholds), ("v_reset", resets)):
        kind = draw(st.sampled_from(("float", "float", "float", "scalar", "channels")))
        if kind == "float" or (kind == "channels" and channels is None):
            options[name] = draw(st.sampled_from(choices))
        elif kind == "scalar":
            value = torch.tensor(draw(st.sampled_from(choices)), dtype=state_of(dtype))
            drawing.add(name, value)
        else:
            picked = torch.randint(len(choices), (channels,), generator=drawing.values.generator)
            drawing.add(name, torch.tensor(choices, dtype=state_of(dtype))[picked])


def extras(drawing: Drawing, options: dict[str, Any], steps: int, dtype: torch.dtype) -> None:
    draw = drawing.draw
    for name in ("return_state", "return_potential", "statistics"):
        options[name] = draw(st.booleans())
    if draw(st.booleans()):
        phi = draw(st.sampled_from(PHIS))
        weight = torch.rand(steps, generator=drawing.values.generator, dtype=state_of(dtype))
        delta = draw(st.sampled_from((0.0, 0.3, 2.0)))
        options["penalty"] = tk.MembranePenalty(phi, weight, delta=delta)


@st.composite
def lif_calls(draw, budget: int) -> Call:
    drawing = Drawing(draw, draw(st.booleans()))
    dtype = draw(st.sampled_from(DTYPES))
    steps = draw(st.sampled_from(STEPS))
    constant = steps > 0 and draw(st.sampled_from((False, False, True)))
    state = draw(sizes(0 if not constant else 1, 4, max(1, budget // max(1, steps))))
    time_dim = draw(st.integers(0, len(state)))
    shape = state if constant else (*state[:time_dim], steps, *state[time_dim:])
    drawing.add("x", drawing.values(shape, dtype))
    options: dict[str, Any] = {"time_dim": time_dim}
    if draw(st.booleans()):
        options["time_dim"] -= len(state) + 1
    if constant:
        options["steps"] = steps
    channels = None
    if state and draw(st.booleans()):
        channel = draw(st.integers(0, len(state) - 1))
        channels = state[channel]
        dim = channel if constant or channel < time_dim else channel + 1
        options["channel_dim"] = draw(st.sampled_from((dim, dim - len(shape))))
    neuron(drawing, options, channels)
    start = draw(st.sampled_from(("zero", "float", "tensor", "tensor")))
    if start == "float":
        options["v_init"] = 0.75
    elif start == "tensor":
        drawing.add("v_init", drawing.values(state, state_of(dtype)))
    extras(drawing, options, steps, dtype)
    spike_only = "penalty" not in options or options["penalty"].phi == "spike"
    two_bits = (
        isinstance(options["surrogate"], tk.Rectangle)
        and options["charge"] != "delayed"
        and (options["reset"] != "hard" or options["detach_reset"])
        and spike_only
        and "decay" not in drawing.wanted
    )
    if two_bits and draw(st.booleans()):
        options["memory"] = "bits"
    return drawing.call(options, len(state) + 1)


@st.composite
def batch_norm_lif_calls(draw, budget: int) -> Call:
    """On the grid, statistics are such that the normalisation is exact."""
    drawing = Drawing(draw, draw(st.booleans()))
    dtype = draw(st.sampled_from(DTYPES))
    steps = draw(st.sampled_from(STEPS[1:]))
    constant = draw(st.sampled_from((False, False, True)))
    training = draw(st.booleans())
    batch, channels, *rest = draw(sizes(2, 4, max(2, budget // steps)))
    channels = max(1, channels)
    batch = max(1, batch) if training else batch
    rest = [max(1, size) for size in rest] if training else rest
    options: dict[str, Any] = {"time_dim": draw(st.sampled_from((0, 1))), "training": training}
    options["eps"] = 0.1  # a channel of one number has no deviation to divide by
    if constant:
        shape, options["steps"], channel_dim = (batch, channels, *rest), steps, 1
    else:
        shape = (steps, batch) if options["time_dim"] == 0 else (batch, steps)
        shape, channel_dim = (*shape, channels, *rest), 2
    count = math.prod(shape) // channels
    if training and count * (steps if constant else 1) < 2:
        shape = (2, *shape[1:])
        count *= 2
        if options["time_dim"] == 0 and not constant:
            steps = 2
    values, state = drawing.values, state_of(dtype)
    per_channel = [-1 if dim == channel_dim else 1 for dim in range(len(shape))]
    if values.grid and training:
        # As many numbers above the mean as below: a deviation of 1/2, and an eps of 3/4 to 1.
        signs = torch.where(torch.arange(count) % 2 == 0, 0.5, -0.5)
        signs[count - count % 2 :] = 0
        columns = [
            signs[torch.randperm(count, generator=values.generator)] for _ in range(channels)
        ]
        x = torch.stack(columns, -1).reshape(
            *[n for d, n in enumerate(shape) if d != channel_dim], channels
        )
        x = x.movedim(-1, channel_dim) + values((channels,), torch.float32).reshape(per_channel)
        options["eps"] = 0.75
        values_x = x.to(dtype)
    else:
        values_x = values(shape, dtype)
    layout = draw(layouts(len(shape), repeats=not (values.grid and training)))
    drawing.tensors["x"], drawing.memory["x"] = lay(values_x, layout)
    if draw(st.sampled_from((True, True, False))):
        drawing.wanted.add("x")
    if not training:
        drawing.add("running_mean", values((channels,), state), grad=False)
        var = 4 - 2.0**-10 if values.grid else 0.7
        drawing.add("running_var", torch.full((channels,), var, dtype=state), grad=False)
        options["eps"] = 2.0**-10
    elif draw(st.booleans()):
        for name in ("running_mean", "running_var"):
            drawing.add(name, torch.ones(channels, dtype=state), grad=False)
        options["momentum"] = draw(st.sampled_from((0.1, 0.5, 1.0, 0.0)))
    if draw(st.booleans()):
        weights = torch.tensor([1.0, 2.0, 0.5, -1.0], dtype=state)
        drawing.add("weight", weights[torch.randint(4, (channels,), generator=values.generator)])
    if draw(st.booleans()):
        drawing.add("bias", values((channels,), state))
    gains = draw(st.sampled_from(("none", "steps", "channels")))
    if gains != "none":
        size = (steps,) if gains == "steps" else (steps, channels)
        drawing.add("gains", torch.full(size, 0.5, dtype=state))
    options["scale"] = draw(st.sampled_from((1.0, 2.0)))
    # The gradient of x is a difference, of numbers that would grow.
    neuron(drawing, options, channels, grows=False)
    if draw(st.booleans()):
        time_dim = options["time_dim"]
        outside = shape if constant else (*shape[:time_dim], *shape[time_dim + 1 :])
        drawing.add("v_init", values(outside, state))
    extras(drawing, options, steps, dtype)
    return drawing.call(options, len(shape) + constant)


@st.composite
def penalty_calls(draw, budget: int) -> Call:
    """Parameters p0, p1, ... of mixed dtypes; some already have a gradient, named g0, g1, ..."""
    drawing = Drawing(draw, draw(st.booleans()))
    for index in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(sizes(0, 3, budget // 4))
        drawing.add(f"p{index}", drawing.values(shape, dtype, 0.1))
    for index in range(len(drawing.tensors)):
        p = drawing.tensors[f"p{index}"]
        if f"p{index}" in drawing.wanted and draw(st.booleans()):
            drawing.add(f"g{index}", drawing.values(p.shape, p.dtype), grad=False)
    options = {
        "steps": draw(st.sampled_from((1, 2, 4, 7, 10, 40))),
        "weight": draw(st.sampled_from((1.0, 1e-3, 0.0, -2.0))),
        "delta": draw(st.sampled_from((0.0, 0.25, 0.5, 3.0, 200.0))),
        "eps": draw(st.sampled_from((1e-5, 0.0, 1.0))),
    }
    return drawing.call(options, 1)


@st.composite
def loss_calls(draw, budget: int) -> Call:
    drawing = Drawing(draw, draw(st.booleans()))
    dtype = draw(st.sampled_from(DTYPES))
    steps = draw(st.sampled_from((1, 2, 3, 6, 10)))
    batch = draw(st.sampled_from((1, 2, 3, 8, 17)))
    classes = max(1, min(draw(st.sampled_from((1, 2, 3, 10, 33, 100))), budget // (steps * batch)))
    time_dim = draw(st.sampled_from((0, 1, -2, -3)))
    shape = (steps, batch) if time_dim in (0, -3) else (batch, steps)
    drawing.add("logits", drawing.values((*shape, classes), dtype, 4.0))
    options: dict[str, Any] = {
        "time_dim": time_dim,
        "mse_ratio": draw(st.sampled_from((0.0, 0.05, 1.0))),
        "label_smoothing": draw(st.sampled_from((0.0, 0.0, 0.1, 1.0))),
    }
    generator = drawing.values.generator
    if draw(st.sampled_from((True, True, False))):
        target = torch.randint(classes, (batch,), generator=generator)
        if draw(st.booleans()):
            options["ignore_index"] = int(draw(st.sampled_from((-100, 0, -1, classes))))
            ignored = torch.rand(batch, generator=generator) < 0.3
            ignored[0] = False
            target[ignored] = options["ignore_index"]
            if options["ignore_index"] == 0:
                target[0] = classes - 1
        drawing.add("target", target, grad=False)
    else:
        probabilities = torch.rand(batch, classes, generator=generator).softmax(1)
        drawing.add("target", probabilities.to(draw(st.sampled_from(DTYPES))), grad=False)
    if draw(st.booleans()):
        weight = torch.rand(classes, generator=generator) + 0.25
        drawing.add("class_weight", weight.to(draw(st.sampled_from(DTYPES))), grad=False)
    return drawing.call(options, 1)
