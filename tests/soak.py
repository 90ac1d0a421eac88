"""Runs mixed operators at changing shapes for a long time, and looks whether memory stays flat.

    python -m tests.soak --minutes 60 --out soak.md

Every second or so it notes the resident memory, after what was freed has gone back to the system;
at the end it compares the last tenth with the second. Run by hand; the exit status says whether the
memory grew.
"""

import argparse
import contextlib
import ctypes
import gc
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import trt_kernels as tk
from tests.cases import PHIS, RESETS, SURROGATES, charges
from trt_kernels import functional

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
GROWTH = 16  # MB that memory may differ by


def shape(most: int) -> tuple[int, ...]:
    """Two to four dimensions, of about `most` elements at most."""
    sizes = []
    for _ in range(random.randint(2, 4)):
        sizes.append(random.randint(1, max(1, min(64, most))))
        most //= sizes[-1]
    return tuple(sizes)


def neuron(dtype: torch.dtype) -> dict:
    reset = random.choice(RESETS)
    options = {
        "reset": reset,
        "charge": random.choice(charges(reset)),
        "detach_reset": random.random() < 0.5,
        "surrogate": random.choice(SURROGATES),
        "decay": random.uniform(0.1, 1.0),  # ever new settings, as of an annealed neuron
        "return_state": random.random() < 0.5,
        "return_potential": random.random() < 0.3,
        "statistics": random.random() < 0.3,
    }
    if random.random() < 0.3:
        options["threshold"] = torch.tensor(0.7, requires_grad=True).to(dtype)
    return options


def total(out) -> torch.Tensor:
    outputs = [out] if isinstance(out, torch.Tensor) else out
    return sum(o.float().sum() for o in outputs if o is not None and o.requires_grad)


def lif() -> None:
    dtype = random.choice(DTYPES)
    x = torch.randn(shape(200_000)).to(dtype)
    x = x.transpose(0, random.randrange(x.ndim)).requires_grad_()
    options = neuron(dtype)
    time_dim = options["time_dim"] = random.randrange(x.ndim)
    if random.random() < 0.3:
        phi = random.choice(PHIS)
        options["penalty"] = tk.MembranePenalty(phi, torch.rand(x.shape[time_dim]))
    with tk.pack_saved_spikes() if random.random() < 0.3 else contextlib.nullcontext():
        out = tk.lif(x, **options)
        if random.random() < 0.9:  # some graphs are never walked back
            total(out).backward()


def constant_current() -> None:
    x = torch.randn(shape(50_000), requires_grad=True)
    bits = {"memory": "bits", "surrogate": tk.Rectangle(), "detach_reset": True}
    tk.lif(
        x, steps=random.randint(1, 12), **(bits if random.random() < 0.5 else {})
    ).sum().backward()


def block() -> None:
    channels = random.randint(1, 40)
    layer = tk.nn.BatchNormLIF(channels, stateful=random.random() < 0.5)
    batch, size = random.randint(1, 5), random.randint(2, 12)
    chunks = [torch.randn(random.randint(1, 6), batch, channels, size, size) for _ in range(3)]
    sum(layer(x.requires_grad_()).sum() for x in chunks).backward()


def penalty() -> None:
    params = [torch.randn(shape(50_000), requires_grad=True) for _ in range(random.randint(1, 30))]
    settings = {"steps": random.randint(1, 12), "weight": 1e-4, "delta": random.random()}
    tk.trt_penalty(params, **settings).backward()
    tk.trt_penalty_(params, **settings)


def loss() -> None:
    steps, batch, classes = (random.randint(1, n) for n in (10, 40, 200))
    logits = torch.randn(steps, batch, classes, requires_grad=True)
    target = torch.randint(classes, (batch,))
    tk.temporal_loss(logits, target, mse_ratio=random.random()).backward()


def refusal() -> None:
    """What raises leaves nothing behind either."""
    x = torch.randn(shape(100_000), requires_grad=True)
    with contextlib.suppress(ValueError):
        tk.lif(x, threshold=torch.ones(99, 99))
    with contextlib.suppress(RuntimeError):
        torch.autograd.grad(tk.lif(x).sum(), x, create_graph=True)


def compiled() -> None:
    """The same graph for every shape."""
    x = torch.randn(4, random.randint(2, 200), requires_grad=True)
    COMPILED(x).sum().backward()


COMPILED = torch.compile(lambda x: tk.lif(x) * 2, backend="aot_eager", dynamic=True)
WORK = (lif, lif, lif, constant_current, block, penalty, loss, refusal, compiled)


def resident() -> float:
    """Megabytes, once what was freed went back to the system."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def soak(minutes: float, seed: int) -> tuple[list[float], int]:
    """Samples of the memory, and the number of calls."""
    random.seed(seed)
    torch.manual_seed(seed)
    samples, calls, begin = [], 0, time.monotonic()
    with tqdm(total=round(minutes * 60), unit="s", disable=not sys.stderr.isatty()) as bar:
        while (passed := time.monotonic() - begin) < minutes * 60:
            end = time.monotonic() + 1
            while time.monotonic() < end:
                torch.set_num_threads(random.randint(1, 3))
                random.choice(WORK)()
                calls += 1
            samples.append(resident())
            bar.update(round(passed) - bar.n)
            bar.set_postfix(MB=f"{samples[-1]:.0f}", calls=calls)
    return samples, calls


def report(samples: list[float], calls: int, minutes: float) -> tuple[str, bool]:
    tenth = max(1, len(samples) // 10)
    tenths = [statistics.median(samples[i * tenth : (i + 1) * tenth]) for i in range(10)]
    growth = tenths[-1] - tenths[1]
    flat = growth <= GROWTH
    text = (
        f"{minutes:g} minutes, {calls:,} calls of {len(set(WORK))} kinds, "
        f"torch {torch.__version__}, Python {platform.python_version()}: "
        f"{'flat' if flat else 'GREW'}, {growth:+.1f} MB from the second tenth to the last.\n\n"
        "| tenth of the time | resident memory, MB (median) |\n|---|---|\n"
        + "".join(f"| {i + 1} | {value:.1f} |\n" for i, value in enumerate(tenths))
        + f"\nRemembered at the end: {len(functional._checked)} checked calls.\n"
    )
    return text, flat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the report")
    arguments = parser.parse_args()
    samples, calls = soak(arguments.minutes, arguments.seed)
    text, flat = report(samples, calls, arguments.minutes)
    print(text)
    if arguments.out:
        arguments.out.write_text(f"# `python -m tests.soak`\n\n{text}")
    sys.exit(not flat)


if __name__ == "__main__":
    main()
