"""Measures the variants of one case in turn, after their results have been checked.

A round times every variant once, one after the other, so that whatever disturbs the machine
disturbs all of them; medians are compared. A variant whose result is wrong gets no time: it stops
the case, or on a GPU, where nobody is watching, is left out and told of.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.clocks import Call, HostClock
from benchmarks.steps import Expected, Mismatch, Step

# A timed round lasts at least this long: shorter calls are repeated within it.
SHORTEST_ROUND = 4e-3
FEWEST_ROUNDS, MOST_ROUNDS = 3, 40


def said(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


@dataclass
class Variant:
    """One way to compute a case. `expected` None: a yardstick that computes something else.

    An `optional` variant that cannot run is left out with a note. A wrong result is never let pass.
    """

    name: str
    step: Step
    expected: Expected | None = None
    optional: bool = False
    compiled: bool = False

    def first(self, clock: HostClock) -> float:
        """Runs the very first call and checks its result; returns its seconds."""
        start = time.perf_counter()
        results = self.step.results()
        clock.synchronize()
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
    """What `make` gives, or `Absent` where a package is not installed, or fails as it is set up."""
    try:
        variant = make()
    except ImportError as error:
        return Absent(name, f"not installed ({error})")
    except Exception as error:
        return Absent(name, said(error))
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
    # At least and at most. Ours has as many as the fastest: for a call of seconds, the copy.
    rounds: tuple[int, int] = (FEWEST_ROUNDS, MOST_ROUNDS)


# The fixture that measures a case, on a GPU by a clock of that name.
Measured = Callable[..., None]


def copy_of(size: int, device: torch.device) -> Step:
    """A copy of `size` bytes between two tensors that exist already."""
    source = torch.rand(max(1, size // 4), device=device)
    target = torch.rand(max(1, size // 4), device=device)
    return Step(torch.Tensor.copy_, [target, source])


def repeated(step: Callable[[], Any], calls: int) -> Callable[[], None]:
    """`step`, `calls` times."""

    def run() -> None:
        for _ in range(calls):
            step()

    return run


def rounds_within(
    budget: float, costs: dict[str, float], fewest: int = FEWEST_ROUNDS, most: int = MOST_ROUNDS
) -> dict[str, int]:
    """Rounds of each variant: all share the budget equally, and a slow one gets fewer rounds."""
    share = budget / len(costs)
    return {name: min(most, max(fewest, int(share / cost))) for name, cost in costs.items()}


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


@dataclass
class Checked:
    """The variants of a case that ran and gave the right result."""

    variants: dict[str, Variant] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)  # seconds of the first call
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # left out, but should have run


def check(case: Case, clock: HostClock) -> Checked:
    """Runs every variant once and checks its result."""
    checked = Checked()
    for variant in (case.ours, *case.others):
        if isinstance(variant, Absent):
            checked.skipped[variant.name] = variant.reason
            continue
        try:
            first = variant.first(clock)
            call = clock.prepare(variant.step)
        except Exception as error:
            spared = clock.keeps_going and variant is not case.ours
            if not spared and (isinstance(error, Mismatch) or not variant.optional):
                raise
            (checked.skipped if variant.optional else checked.failed)[variant.name] = said(error)
            continue
        checked.variants[variant.name] = variant
        checked.calls[variant.name], checked.first[variant.name] = call, first
    return checked


def measure(
    benchmark: Any, case: Case, budget: float, clock: HostClock | None = None
) -> dict[str, Any]:
    """Checks and measures a case with the `benchmark` fixture; returns its record (extra_info).

    Raises:
        Mismatch: a wrong result, of ours or of a competitor; then nothing is measured. A GPU's
            clock keeps going without the competitor, whose name and error go into the record.
    """
    clock = clock or HostClock()
    checked = check(case, clock)
    running, first = checked.variants, checked.first
    copy = "copy"
    copied = clock.copied(case.copied, case.moved)
    each = {**checked.calls, copy: clock.prepare(copy_of(copied, clock.device))}
    steps = {name: call.run for name, call in each.items()}
    steps[copy]()
    # A first call that was slow without compiling is not repeated for its cost.
    cost = {
        name: first[name]
        if clock.trusts_first_call and first.get(name, 0.0) > 1.0 and not running[name].compiled
        else clock.seconds(step)
        for name, step in steps.items()
    }
    calls = {
        name: int(min(math.ceil(SHORTEST_ROUND / cost[name]), clock.most_calls(step)))
        for name, step in steps.items()
    }
    costs = {name: calls[name] * cost[name] for name in steps}
    rounds = rounds_within(budget, costs, *case.rounds)
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
                times[name].append(clock.seconds(loops[name]))
        index += 1
        warm_up(ours)

    def timed() -> None:
        times[ours].append(clock.seconds(loops[ours]))

    # What other packages have loaded is not searched for garbage in the middle of a call.
    gc.collect()
    gc.freeze()
    try:
        benchmark.pedantic(timed, setup=others, rounds=total)
    finally:
        gc.unfreeze()
    results = {name: summary(times[name], calls[name] * each[name].calls) for name in steps}
    for name, variant in running.items():
        results[name].update(variant.step.facts(results[name]["median"]))
        if variant.compiled:
            results[name]["compile"] = max(0.0, first[name] - results[name]["median"])
    record = {
        "table": case.table,
        "case": case.name,
        "ours": ours,
        "moved": case.moved,
        "elements": case.elements,
        "element": case.element,
        "copy": {**results.pop(copy), "moved": 2 * copied},
        "variants": results,
        "checked": [name for name, v in running.items() if v.expected is not None],
        "skipped": checked.skipped,
        "host_timed": [name for name, step in steps.items() if clock.times_host(step)],
        **({"failed": checked.failed} if clock.keeps_going else {}),
        **clock.about,
        **case.about,
    }
    benchmark.extra_info.update(record)
    return record
