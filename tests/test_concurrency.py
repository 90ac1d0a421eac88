"""Calls from several Python threads at once, and from the workers of a DataLoader."""

import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import trt_kernels as tk
from tests.cases import quantised

THREADS = 6


def work(index):
    """One of every operator, forward and backward, on inputs of this index."""
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(6, 5000 + index, generator=generator, requires_grad=True)
    decay = torch.rand((), generator=generator, requires_grad=True)
    weight = torch.randn(20_000 + index, generator=generator, requires_grad=True)
    logits = torch.randn(4, 16, 10, generator=generator, requires_grad=True)
    target = torch.randint(10, (16,), generator=generator)
    images = torch.randn(3, 2, 8, 9, 9, generator=generator, requires_grad=True)
    penalty = tk.MembranePenalty("square", torch.ones(6))
    with tk.pack_saved_spikes():
        out = tk.lif(x, penalty=penalty, threshold=0.5 + index)
        total = out.penalty + (out.spikes * x).sum()
        total = total + tk.lif(x, decay=decay, return_state=True).state.sum()
        total = total + tk.batch_norm_lif(images, None, None, training=True).sum()
        total = total + tk.trt_penalty([weight], steps=6, weight=1.0, delta=0.3)
        total = total + tk.temporal_loss(logits, target, mse_ratio=0.1)
        return total.detach(), *torch.autograd.grad(total, (x, decay, weight, logits, images))


@pytest.mark.parametrize("remembered", (False, True))
def test_threads_at_once(remembered):
    """What calls are remembered by, and the memory that threads keep, is no call's alone."""
    expected = [work(index) for index in range(THREADS)]
    if not remembered:
        tk.functional._checked.clear()
    start, failures = threading.Barrier(THREADS), []

    def run(index):
        start.wait()
        for round_ in range(8):
            mine = (index + round_) % THREADS
            for a, b in zip(work(mine), expected[mine], strict=True):
                if not torch.equal(a, b):
                    failures.append((index, mine))

    team = [threading.Thread(target=run, args=(index,)) for index in range(THREADS)]
    for member in team:
        member.start()
    for member in team:
        member.join(timeout=120)
    assert not any(member.is_alive() for member in team) and not failures


def test_the_default_backend_is_set_while_others_run():
    """A call meets one default or the other, and nothing in between."""
    x, stop, results = quantised((4, 300)), threading.Event(), []
    expected = tk.lif(x)

    def switch():
        while not stop.is_set():
            with tk.use_backend("reference"):
                pass

    switcher = threading.Thread(target=switch)
    switcher.start()
    try:
        for _ in range(300):
            results.append(tk.lif(x))
    finally:
        stop.set()
        switcher.join()
    assert all(torch.equal(result, expected) for result in results)


class Spikes(Dataset):
    """Samples that are encoded by `lif` in whatever process loads them."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return tk.lif(torch.full((4, 30_000), 0.3 * index), decay=1.0)


@pytest.mark.parametrize("start", ("fork", "spawn"))
def test_workers_of_a_data_loader(start):
    """After the kernels had threads in this process, which forked children do not have."""
    tk.lif(torch.ones(4, 100_000))
    loader = DataLoader(
        Spikes(), batch_size=2, num_workers=2, multiprocessing_context=start, timeout=100
    )
    for batch, expected in zip(loader, DataLoader(Spikes(), batch_size=2), strict=True):
        assert torch.equal(batch, expected)
