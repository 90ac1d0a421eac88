"""What the parts of a training step cost, forward and backward, by torch's profiler."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

import trt_kernels as tk
from benchmarks.clocks import LAUNCHED_BY_DRIVER
from benchmarks.records import (
    BLOCK,
    COMPILED,
    CONVOLUTION,
    NEURONS,
    NORM,
    OTHER,
    PARTS,
    REGULARIZER,
)

# What has a part of its own wherever it is called, by the beginning of its name.
NAMES = {
    "TRTPenaltyFunction": REGULARIZER,
    "aten::convolution": CONVOLUTION,
    "aten::mkldnn_convolution": CONVOLUTION,
    "CompiledFunction": COMPILED,
    "Torch-Compiled Region": COMPILED,
}
BACKWARD, USER = 1, 7  # torch's RecordScope
# A profiled step is as long as the median to within so much, or is tried again.
NEAR, MOST_TRIES = 0.15, 3


class Neurons(nn.Module):
    """A layer of somebody's neurons over all timesteps."""


KINDS: tuple[tuple[Any, str], ...] = (
    (nn.Conv2d, CONVOLUTION),
    (nn.BatchNorm2d, NORM),
    (tk.nn.BatchNormLIF, BLOCK),
    ((tk.nn.LIF, Neurons), NEURONS),
)


@contextmanager
def ranges(net: nn.Module) -> Iterator[None]:
    """Names the part of every layer's forward pass to the profiler."""
    with ExitStack() as stack:
        for module in net.modules():
            for kind, part in KINDS:
                if isinstance(module, kind):
                    open_ranges: list[Any] = []

                    def enter(*_: Any, part: str = part, opened: list[Any] = open_ranges) -> None:
                        opened.append(record_function(part))
                        opened[-1].__enter__()

                    def leave(*_: Any, opened: list[Any] = open_ranges) -> None:
                        opened.pop().__exit__(None, None, None)

                    for handle in (
                        module.register_forward_pre_hook(enter),
                        module.register_forward_hook(leave),
                    ):
                        stack.callback(handle.remove)
        yield


def costs(step: Any, net: nn.Module, device: torch.device, median: float) -> dict[str, Any]:
    """Seconds of each part, the most bytes that are alive at once, and how much is called.

    `operations` counts torch's and our operators on a CPU, views apart; `launches` kernels on a
    GPU. Parameters and what the optimizer keeps are not in `peak`; gradients are.
    """
    if device.type == "cuda":
        return costs_on_gpu(step, net, device)
    # Whatever disturbed one step would be told of as a part: of some steps the nearest counts.
    tries: list[tuple[float, dict[str, float], int]] = []
    for _ in range(MOST_TRIES):
        step.optimizer.zero_grad()
        with ranges(net), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            step()
        parts = seconds_of_parts(list(seen.events()), on_gpu=False)
        off = abs(sum(parts.values()) / median - 1)
        tries.append((off, parts, most_alive(seen.profiler.kineto_results.events())))
        if off <= NEAR:
            break
    _, parts, peak = min(tries, key=lambda each: each[0])
    with Counting() as counting:
        step()
    return {"parts": parts, "peak": peak, "operations": counting.calls}


def costs_on_gpu(step: Any, net: nn.Module, device: torch.device) -> dict[str, Any]:
    step.optimizer.zero_grad()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    with (
        ranges(net),
        profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen,
    ):
        step()
        torch.cuda.synchronize(device)
    events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CPU]
    launches = sum(len(kernels(event)) for event in events)
    return {"parts": seconds_of_parts(events, on_gpu=True), "peak": peak, "launches": launches}


class Counting(TorchDispatchMode):
    """Counts the operators that are called, backward pass included; a view computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += not func.is_view and func.namespace in ("aten", "trt_kernels")
        return func(*args, **(kwargs or {}))


def most_alive(events: Iterable[Any]) -> int:
    """The most bytes that were allocated and not yet freed, of a profiler's raw events."""
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    alive = most = 0
    for _, change in memory:
        alive += change
        most = max(most, alive)
    return most


def kernels(event: Any) -> list[Any]:
    """The kernels that an event launched itself; a range is shown on the GPU under its own name."""
    return [
        k
        for k in event.kernels
        if k.name != event.name and not k.name.startswith(LAUNCHED_BY_DRIVER)
    ]


def seconds_of_parts(events: list[Any], on_gpu: bool) -> dict[str, float]:
    """Seconds of each part: on a CPU of all the step, on a GPU of its kernels and copies.

    An event belongs to the nearest part around it. A backward event belongs to that of the forward
    event that made its node, which has the same sequence number.
    """
    makers: dict[int, Any] = {}
    for event in sorted(events, key=lambda e: e.time_range.start):
        if event.sequence_nr >= 0 and not is_backward(event):
            makers[event.sequence_nr] = event  # the last one: the number grows with each node
    found: dict[int, str] = {}

    def part_of(event: Any) -> str:
        known = found.get(id(event))
        if known is not None:
            return known
        named = next((part for name, part in NAMES.items() if event.name.startswith(name)), None)
        around = event.cpu_parent
        if event.scope == USER and event.name in PARTS:
            named = event.name
        elif named is None and is_backward(event) and event.sequence_nr in makers:
            around = makers[event.sequence_nr]
        part = named or (OTHER if around is None else part_of(around))
        found[id(event)] = part
        return part

    seconds = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if on_gpu:
            own = sum(k.duration for k in event.kernels if k.name != event.name)
        else:
            own = event.self_cpu_time_total
        seconds[part_of(event)] += own / 1e6
    return {part: number for part, number in seconds.items() if number > 0}


def is_backward(event: Any) -> bool:
    return bool(event.scope == BACKWARD or event.name.startswith("autograd::engine"))
