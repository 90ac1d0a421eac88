"""One process of those that torchrun started; a process that it did not start is alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

RANK, PROCESSES = 0, 1
if distributed.is_available() and distributed.is_torchelastic_launched():
    RANK, PROCESSES = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))


@contextmanager
def process_group(device: str) -> Iterator[Any]:
    """Connects the processes, if there are several; gives their group, or None."""
    if PROCESSES == 1:
        yield None
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    yield distributed.group.WORLD
    # Not after an error: the others may wait in a collective, and this would wait for them.
    distributed.destroy_process_group()


def share(count: int) -> slice:
    """This process's part of `count` samples, which are dealt evenly; it may be empty."""
    return slice(count * RANK // PROCESSES, count * (RANK + 1) // PROCESSES)


def summed(totals: torch.Tensor) -> list[float]:
    """Each number of a tensor summed over all processes."""
    if PROCESSES > 1:
        distributed.all_reduce(totals)
    return totals.tolist()
