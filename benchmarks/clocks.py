"""How calls are timed: by the host's clock, or on a GPU by its events, by wall clock, or replayed.

A clock readies a step (`prepare`) and times a run of it (`seconds`). On a GPU every clock lets
calls go round among copies of a step's tensors, so that none finds its own in the cache.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from benchmarks.steps import Step, Tensors

# Together the copies of a step's tensors are so many times as large as the L2 cache.
CACHES = 4
FEWEST_COPIES, MOST_COPIES = 2, 16
# Of tensors beyond this size one is enough: the end of a call has long displaced its beginning.
NO_COPIES_FROM = 2 << 30
# Where a driver does not tell.
USUAL_CACHE = 64 << 20
# A copy larger than this is no better a yardstick.
LARGEST_COPY = 1 << 30
# Cycles a second of the waiting kernel: a little above today's clocks, so that it waits enough.
CYCLES = 2e9
LONGEST_WAIT = 1e-2
# It waits so many times as long as the host took for its launches the last time.
SPARE = 1.2
# A graph holds so many calls, or so many seconds of them if that is fewer.
MOST_CAPTURED, SECONDS_CAPTURED = 20, 2e-3


@dataclass
class Call:
    """What a clock runs for a step: one run is so many calls of it."""

    run: Callable[[], Any]
    calls: int = 1


class HostClock:
    """Wall-clock time of calls that have finished when they return."""

    device = torch.device("cpu")
    about: dict[str, Any] = {}  # noqa: RUF012
    # Without cold caches and idle clocks to fear, a first call is a fair guess of the cost.
    trusts_first_call = True
    # Whether a failing variant is left out so that the others are measured: nobody is watching.
    keeps_going = False

    def prepare(self, step: Step) -> Call:
        return Call(step)

    def copied(self, copied: int, moved: int) -> int:
        """Bytes of the tensor whose copy is the yardstick of a case."""
        return copied

    def synchronize(self) -> None:
        """Returns when everything that was called has finished."""

    def seconds(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def most_calls(self, run: Callable[[], Any]) -> float:
        """How many calls of a run that was timed one timing may have."""
        return math.inf

    def times_host(self, run: Callable[[], Any]) -> bool:
        """Whether the time of a run that was timed is that of the host's launches."""
        return False


class Rotation:
    """Calls of copies of a step in turn. Each keeps its results until its next turn, so that fresh
    results lie in other memory than the last ones."""

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps
        self.results: list[Any] = [None] * len(steps)
        self.index = 0

    def __call__(self) -> None:
        index = self.index
        self.index = (index + 1) % len(self.steps)
        self.results[index] = None
        self.results[index] = self.steps[index]()


class GPUClock(HostClock):
    """What the clocks of a GPU share."""

    name = ""
    trusts_first_call = False
    keeps_going = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.about = {"device": device.type, "clock": self.name}
        self._copies: dict[tuple[int, ...], list[Tensors]] = {}

    def cache(self) -> int:
        """Bytes of the L2 cache."""
        if self.device.type != "cuda":
            return USUAL_CACHE
        properties = torch.cuda.get_device_properties(self.device)
        return int(getattr(properties, "L2_cache_size", 0)) or USUAL_CACHE

    def copies(self, size: int) -> int:
        """How many sets of tensors of `size` bytes calls go round among."""
        if size >= NO_COPIES_FROM:
            return 1
        enough = math.ceil(CACHES * self.cache() / max(1, size))
        return min(MOST_COPIES, max(FEWEST_COPIES, enough))

    def rotation(self, step: Step) -> Rotation:
        """Calls among copies; steps over the same tensors share theirs."""
        tensors = (*step.inputs, *(step.grads or ()))
        key = tuple(map(id, tensors))
        if key not in self._copies:
            more = self.copies(sum(t.nbytes for t in tensors)) - 1
            self._copies[key] = [step.cloned_tensors() for _ in range(more)]
        return Rotation([step, *(step.over(*tensors) for tensors in self._copies[key])])

    def prepare(self, step: Step) -> Call:
        return Call(self.rotation(step))

    def copied(self, copied: int, moved: int) -> int:
        # As many bytes as the case moves: a copy reads and writes.
        return min(max(1, moved // 2), LARGEST_COPY)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class WallClock(GPUClock):
    """Wall-clock time until the GPU has finished: what a user waits for, launches and Python
    included."""

    name = "wall"

    def seconds(self, run: Callable[[], Any]) -> float:
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start


class EventClock(GPUClock):
    """Time between two events on the GPU. A kernel that waits goes before them, so that the host
    is ahead with its launches and the GPU works without gaps, as in a deep queue in training.

    The wait has a limit, so a timing has no more calls than the host launches within it. A run
    whose one call takes longer than that is timed at the host's speed, and its record says so.

    `event` makes an event: a test without a GPU brings its own."""

    name = "events"

    def __init__(self, device: torch.device, event: Callable[[], Any] | None = None) -> None:
        super().__init__(device)
        self.event = event or (lambda: torch.cuda.Event(enable_timing=True))
        self._launching: WeakKeyDictionary[Any, float] = WeakKeyDictionary()

    def wait(self, seconds: float) -> None:
        """Keeps the GPU busy so long."""
        if self.device.type == "cuda" and hasattr(torch.cuda, "_sleep"):
            torch.cuda._sleep(int(seconds * CYCLES))

    def seconds(self, run: Callable[[], Any]) -> float:
        first, last = self.event(), self.event()
        known = self._launching.get(run)
        self.wait(LONGEST_WAIT if known is None else min(LONGEST_WAIT, SPARE * known))
        began = time.perf_counter()
        first.record()
        run()
        last.record()
        self._launching[run] = time.perf_counter() - began
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    def most_calls(self, run: Callable[[], Any]) -> float:
        return max(1.0, LONGEST_WAIT // (SPARE * self._launching[run]))

    def times_host(self, run: Callable[[], Any]) -> bool:
        return SPARE * self._launching[run] > LONGEST_WAIT


@dataclass(eq=False)
class Replay:
    """Replays a graph, and holds what it was captured from: the tensors that it reads."""

    graph: Any
    captured: Rotation

    def __call__(self) -> None:
        self.graph.replay()


class GraphClock(EventClock):
    """Time of the replay of a CUDA graph of several calls: neither Python nor launch gaps."""

    name = "graph"

    def prepare(self, step: Step) -> Call:
        run = self.rotation(step)
        for _ in run.steps:
            run()
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        cost = time.perf_counter() - start
        calls = min(MOST_CAPTURED, max(1, int(SECONDS_CAPTURED / cost)))
        return Call(self.capture(run, calls), calls)

    def capture(self, run: Rotation, calls: int) -> "Replay":
        """A graph of `calls` calls."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # autograd's own warm-up must not be captured
            for _ in range(3):
                run()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
        return Replay(graph, run)


CLOCKS = {clock.name: clock for clock in (EventClock, WallClock, GraphClock)}


def clock_of(device: torch.device, name: str) -> Any:
    """The clock of that name on a GPU, the host's on a CPU."""
    return HostClock() if device.type == "cpu" else CLOCKS[name](device)


def launches(step: Step) -> int | None:
    """Kernels that one call launches on the GPU; None where the profiler sees none."""
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    return count_kernels(profiled.events()) or None


# Names of what a profiler shows on the GPU that is no kernel.
LAUNCHED_BY_DRIVER = ("Memcpy", "Memset")


def count_kernels(events: Any) -> int:
    """The kernels among a profiler's events; copies and fills by the driver are none."""
    return sum(
        event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(LAUNCHED_BY_DRIVER)
        for event in events
    )
