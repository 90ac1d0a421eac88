"""Measures the variants of one case in turn, after their results have been checked.

A round times every variant once, one after the other, so that whatever disturbs the machine
disturbs all of them; medians are compared. A variant whose result is wrong stops the case: it gets
no time.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# A timed round lasts at least this long: shorter calls are repeated within it.
SHORTEST_ROUND = 4e-3
FEWEST_ROUNDS, MOST_ROUNDS = 3, 40


class Mismatch(AssertionError):
    """A result that differs from the reference by more than its tolerance."""


class Step:
    """One forward pass of `function(*inputs)`, and one backward pass where `grads` are given.

    The results are allocated and freed within the step, as in training.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor] | None = None,
    ) -> None:
        self.function, self.inputs, self.grads = function, tuple(inputs), grads

    def __call__(self) -> None:
        outputs = self.function(*self.inputs)
        if self.grads is not None:
            torch.autograd.grad(outputs, self.inputs, self.grads)

    def results(self) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs and the gradients of the inputs."""
        outputs = self.function(*self.inputs)
        listed = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        grads = [] if self.grads is None else torch.autograd.grad(listed, self.inputs, self.grads)
        return [o.detach() for o in listed], list(grads)

    def kept(self) -> int:
        """Bytes of the distinct storages that the forward pass keeps for the backward pass."""
        storages: dict[int, Any] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage  # held, so that no address is given out twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = self.function(*self.inputs)
        total = sum(storage.nbytes() for storage in storages.values())
        del outputs
        return total


@dataclass
class Expected:
    """The result that a step is held to: that of `step`, computed once, within relative errors.

    An output tolerance of 0 demands equality bit for bit.
    """

    step: Step
    output: float = 0.0
    gradient: float = 2e-6
    _results: tuple[list[Tensor], list[Tensor]] | None = field(default=None, repr=False)

    def check(self, name: str, results: tuple[list[Tensor], list[Tensor]]) -> None:
        """Raises `Mismatch` with the size of the error if `results` are not these."""
        if self._results is None:
            self._results = self.step.results()
        for kind, got, wanted in zip(("output", "gradient"), results, self._results, strict=True):
            if len(got) != len(wanted):
                raise Mismatch(f"{name}: {len(got)} results of kind {kind}, expected {len(wanted)}")
            for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
                compare(f"{name}: {kind} {index}", a, b, getattr(self, kind))


def compare(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises `Mismatch` unless the relative error ‖got - expected‖ / ‖expected‖ is in tolerance."""
    if got.shape != expected.shape:
        raise Mismatch(f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    if tolerance == 0:
        wrong = int((got != expected).sum())
        if wrong:
            raise Mismatch(f"{name}: {wrong} of {got.numel()} elements differ from the reference")
        return
    got, expected = got.double(), expected.double()
    error = float((got - expected).norm()) / max(float(expected.norm()), torch.finfo().tiny)
    if not error <= tolerance:  # a NaN is a mismatch
        raise Mismatch(f"{name}: relative error {error:.2e} to the reference, allowed {tolerance}")


@dataclass
class Variant:
    """One way to compute a case. `expected` None: a yardstick that computes something else.

    An `optional` variant that cannot run is left out with a note; a wrong result is never let pass.
    """

    name: str
    step: Step
    expected: Expected | None = None
    optional: bool = False
    compiled: bool = False

    def first(self) -> float:
        """Runs the very first call and checks its result; returns its seconds."""
        start = time.perf_counter()
        results = self.step.results()
        seconds = time.perf_counter() - start
        if self.expected is not None:
            self.expected.check(self.name, results)
        return seconds


@dataclass
class Absent:
    """A variant that cannot run here, and why."""

    name: str
    reason: str


def optional(name: str, make: Callable[[], Variant]) -> Variant | Absent:
    """What `make` gives, or `Absent` where a package is not installed."""
    try:
        variant = make()
    except ImportError as error:
        return Absent(name, f"not installed ({error})")
    variant.optional = True
    return variant


@dataclass
class Case:
    """Ours, the variants that it is compared with, and the bytes that must move at least."""

    table: str
    name: str
    ours: Variant
    others: Sequence[Variant | Absent]
    moved: int  # bytes, from the byte ledger
    elements: int
    element: str  # what one element is: "neuron-step", "parameter", "logit"
    copied: int  # bytes of the tensor whose copy is the yardstick of bandwidth
    about: dict[str, Any] = field(default_factory=dict)


# The fixture that measures a case.
Measured = Callable[[Case], None]


def copy_of(size: int) -> Callable[[], Any]:
    """A copy of `size` bytes between two tensors that exist already."""
    source = torch.rand(max(1, size // 4))
    target = torch.rand(max(1, size // 4))
    return lambda: target.copy_(source)


def repeated(step: Callable[[], Any], calls: int) -> Callable[[], None]:
    """`step`, `calls` times."""

    def run() -> None:
        for _ in range(calls):
            step()

    return run


def seconds_of(run: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rounds_within(budget: float, costs: dict[str, float]) -> dict[str, int]:
    """Rounds of each variant: all share the budget equally, and a slow one gets fewer rounds."""
    share = budget / len(costs)
    return {
        name: min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(share / cost)))
        for name, cost in costs.items()
    }


def is_due(index: int, rounds: int, total: int) -> bool:
    """Whether a variant with `rounds` rounds, spread evenly over `total`, runs in round `index`."""
    return index * rounds % total < rounds


def summary(times: list[float], calls: int) -> dict[str, Any]:
    """Median and interquartile range, seconds of one call."""
    each = [seconds / calls for seconds in times]
    low, _, high = (
        statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    )
    return {"median": statistics.median(each), "iqr": high - low, "rounds": len(each)}


def measure(benchmark: Any, case: Case, budget: float) -> dict[str, Any]:
    """Checks and measures a case with the `benchmark` fixture; returns its record (extra_info).

    Raises:
        Mismatch: a wrong result, of ours or of a competitor; then nothing is measured.
    """
    skipped = {v.name: v.reason for v in case.others if isinstance(v, Absent)}
    running: dict[str, Variant] = {}
    first: dict[str, float] = {}
    for variant in (case.ours, *case.others):
        if isinstance(variant, Absent):
            continue
        try:
            first[variant.name] = variant.first()
            running[variant.name] = variant
        except Mismatch:
            raise
        except Exception as error:
            if not variant.optional:
                raise
            skipped[variant.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    steps: dict[str, Callable[[], Any]] = {name: v.step for name, v in running.items()}
    copy = "copy"
    steps[copy] = copy_of(case.copied)
    steps[copy]()
    # A first call that was slow without compiling is not repeated for its cost.
    cost = {
        name: first[name]
        if first.get(name, 0.0) > 1.0 and not running[name].compiled
        else seconds_of(step)
        for name, step in steps.items()
    }
    calls = {name: math.ceil(SHORTEST_ROUND / seconds) for name, seconds in cost.items()}
    rounds = rounds_within(budget, {name: calls[name] * cost[name] for name in steps})
    ours = case.ours.name
    rounds[ours] = total = max(rounds.values())
    loops = {name: repeated(step, calls[name]) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    index = 0

    turn = [name for name in loops if name != ours]

    def warm_up(name: str) -> None:
        # A short call also pays for what its predecessor left in the caches.
        if calls[name] > 1:
            steps[name]()

    def others() -> None:
        nonlocal index
        start = index % len(turn)  # so that nobody always runs after the same one
        for name in turn[start:] + turn[:start]:
            if is_due(index, rounds[name], total):
                warm_up(name)
                times[name].append(seconds_of(loops[name]))
        index += 1
        warm_up(ours)

    def timed() -> None:
        times[ours].append(seconds_of(loops[ours]))

    # What other packages have loaded is not searched for garbage in the middle of a call.
    gc.collect()
    gc.freeze()
    try:
        benchmark.pedantic(timed, setup=others, rounds=total)
    finally:
        gc.unfreeze()
    results = {name: summary(times[name], calls[name]) for name in steps}
    for name, variant in running.items():
        if variant.step.grads is not None:
            results[name]["kept"] = variant.step.kept()
        if variant.compiled:
            results[name]["compile"] = max(0.0, first[name] - results[name]["median"])
    record = {
        "table": case.table,
        "case": case.name,
        "ours": ours,
        "moved": case.moved,
        "elements": case.elements,
        "element": case.element,
        "copy": {**results.pop(copy), "moved": 2 * case.copied},
        "variants": results,
        "checked": [name for name, v in running.items() if v.expected is not None],
        "skipped": skipped,
        **case.about,
    }
    benchmark.extra_info.update(record)
    return record
