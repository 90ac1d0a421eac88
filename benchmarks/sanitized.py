"""Every operator at tiny sizes on one backend, for compute-sanitizer to watch.

Inputs are made on the CPU, and results compared there with the CPU's, so that few kernels but
this package's run. `python -m benchmarks.sanitized [BACKEND [DEVICE]]`
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import trt_kernels as tk

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (shape, time_dim): odd and even rows, more steps than one segment of the backward pass.
SHAPES = (((1, 1), 0), ((5, 33), 0), ((6, 2, 128), 0), ((3, 4, 65), 1), ((40, 130), 0))
# [T, B, C, *]: channels that are a tile, one cut short, runs of whole vectors, and odd runs.
BLOCKS = ((3, 5, 64), (18, 4, 5), (3, 2, 4, 8), (2, 3, 130, 7), (4, 40, 3, 49))
SIZES = ((1,), (7,), (8, 3, 3, 3), (1030,), (0,), (130, 33))
CLASSES = (2, 33, 1000, 3000)
# Of gradients: relative, and half precision is rounded once more.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}

Compute = Callable[[str, list[Tensor]], list[Tensor]]  # backend, inputs -> outputs


def both(name: str, inputs: list[Tensor], compute: Compute, backend: str, device: str) -> None:
    """Outputs and gradients on the backend and on the CPU; raises where they differ."""
    results = []
    for where, chosen in ((device, backend), ("cpu", "cpu")):
        leaves = [i.detach().to(where).requires_grad_(i.is_floating_point()) for i in inputs]
        outputs = compute(chosen, leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        grads = torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs])
        results.append([r.detach().cpu() for r in (*outputs, *grads)])
    for index, (got, expected) in enumerate(zip(*results, strict=True)):
        tolerance = TOLERANCES[got.dtype]
        error = float((got.double() - expected.double()).norm())
        if not error <= tolerance * max(1.0, float(expected.double().norm())):
            raise AssertionError(f"{name}: result {index} is off by {error:.3g}")


def lif_cases() -> Iterator[tuple[str, list[Tensor], Compute]]:
    resets = itertools.cycle(("hard", "soft", "none"))
    phis = itertools.cycle(("square", "trt", "range", "spike"))
    for (shape, time_dim), dtype in itertools.product(SHAPES, DTYPES):
        x = torch.randn(shape).to(dtype)
        state = torch.float64 if dtype == torch.float64 else torch.float32
        v_init = torch.randn([n for d, n in enumerate(shape) if d != time_dim]).to(state)
        options: dict[str, Any] = {"time_dim": time_dim, "reset": next(resets)}
        penalty = tk.MembranePenalty(next(phis), torch.rand(shape[time_dim]))

        def plain(backend: str, leaves: list[Tensor], options: Any = options) -> list[Tensor]:
            return [tk.lif(leaves[0], backend=backend, **options)]

        def full(
            backend: str, leaves: list[Tensor], options: Any = options, penalty: Any = penalty
        ) -> list[Tensor]:
            x, v_init = leaves
            out = tk.lif(
                x,
                v_init=v_init,
                penalty=penalty,
                return_state=True,
                return_potential=True,
                backend=backend,
                **options,
            )
            return [o for o in out if o is not None]

        yield f"lif {shape} {dtype}", [x], plain
        yield f"lif with everything {shape} {dtype}", [x, v_init], full


def block_cases() -> Iterator[tuple[str, list[Tensor], Compute]]:
    """Normalised input and neurons by channel, a constant current, bits."""

    def block(backend: str, leaves: list[Tensor], training: bool) -> list[Tensor]:
        x, mean, variance, weight, bias, gains, decay, threshold, v_reset = leaves
        running = (None, None) if training else (mean.detach(), variance.detach() + 0.5)
        out = tk.batch_norm_lif(
            x,
            *running,
            weight,
            bias,
            training,
            gains=gains,
            decay=decay,
            threshold=threshold,
            v_reset=v_reset,
            charge="leak",
            statistics=True,
            backend=backend,
        )
        return [out.spikes + 0 * (mean + variance).sum().to(x.dtype)]

    def constant(backend: str, leaves: list[Tensor]) -> list[Tensor]:
        return [tk.lif(leaves[0][0].contiguous(), steps=18, backend=backend)]

    def bits(backend: str, leaves: list[Tensor]) -> list[Tensor]:
        options: dict[str, Any] = {"surrogate": tk.Rectangle(1.0), "reset": "soft"}
        memory = "recompute" if backend == "reference" else "bits"
        return [tk.lif(leaves[0], memory=memory, backend=backend, **options)]

    def packed(backend: str, leaves: list[Tensor]) -> list[Tensor]:
        with tk.use_backend(backend), tk.pack_saved_spikes():
            return [tk.lif(leaves[0]).clone() * leaves[0], tk.lif(leaves[0]) * leaves[0]]

    dtypes = itertools.cycle(DTYPES)
    for shape, training in itertools.product(BLOCKS, (True, False)):
        for dtype in DTYPES[:3]:
            sizes = [shape[2:3]] * 8
            sizes[4] = (shape[0], shape[2]) if training else shape[:1]
            given = [torch.rand(size) for size in sizes]

            def compute(b: str, leaves: list[Tensor], training: bool = training) -> list[Tensor]:
                return block(b, leaves, training)

            yield f"batch_norm_lif {shape} {dtype}", [torch.randn(shape).to(dtype), *given], compute
        x = torch.randn(shape).to(next(dtypes))
        for function in (constant, bits, packed):
            yield f"lif {function.__name__} {shape} {x.dtype}", [x], function


def penalty_cases() -> Iterator[tuple[str, list[Tensor], Compute]]:
    settings = {"steps": 6, "weight": 1e-2, "delta": 0.5}

    def value(backend: str, leaves: list[Tensor]) -> list[Tensor]:
        return [tk.trt_penalty(leaves, backend=backend, **settings)]

    def in_place(backend: str, leaves: list[Tensor]) -> list[Tensor]:
        params = [leaf.detach().requires_grad_() for leaf in leaves]
        tk.trt_penalty_(params, backend=backend, **settings)
        return [leaf + p.grad for leaf, p in zip(leaves, params, strict=True)]

    for dtype in DTYPES:
        params = [torch.randn(size).to(dtype) for size in SIZES]
        yield f"trt_penalty {dtype}", params, value
        yield f"trt_penalty_ {dtype}", params, in_place


def loss_cases() -> Iterator[tuple[str, list[Tensor], Compute]]:
    def loss(backend: str, leaves: list[Tensor]) -> list[Tensor]:
        logits, target = leaves
        options = {"mse_ratio": 0.1, "label_smoothing": 0.1, "ignore_index": 1}
        return [tk.temporal_loss(logits, target, backend=backend, **options)]

    for classes, dtype in itertools.product(CLASSES, DTYPES):
        logits, target = torch.randn(3, 5, classes).to(dtype), torch.randint(classes, (5,))
        target[0] = 0
        yield f"temporal_loss {classes} {dtype}", [logits, target], loss


def main(backend: str = "cuda", device: str = "") -> int:
    torch.manual_seed(0)
    device = device or ("cpu" if backend == "cpu" else "cuda")
    wrong = count = 0
    cases = itertools.chain(lif_cases(), block_cases(), penalty_cases(), loss_cases())
    for name, inputs, compute in cases:
        count += 1
        try:
            both(name, inputs, compute, backend, device)
        except Exception as error:
            wrong += 1
            print(f"WRONG {name}: {type(error).__name__}: {error}".splitlines()[0])
    print(f"{count - wrong} of {count} cases of backend {backend} are right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
