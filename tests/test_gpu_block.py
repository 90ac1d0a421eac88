"""The fused block on a GPU, by both of its backends, against the CPU's kernels: neurons learned by
channel, normalised input, bits. What is common to every operator is in test_gpu.py, which also says
how these run.
"""

import itertools

import pytest
import torch

import trt_kernels as tk
from tests import test_gpu
from tests.cases import RESETS, charges, quantised, relative_error
from tests.test_gpu import DEVICE, DTYPES, equal, leaf, same, tolerance
from trt_kernels import functional

pytestmark = test_gpu.pytestmark
backend = test_gpu.backend
# Channels that make a tile, a run of whole vectors, and neither: [T, B, C, *].
SHAPES = ((4, 3, 64, 7, 7), (6, 2, 5, 4, 8), (17, 2, 130, 3), (4, 9, 3), (33, 5, 64))


def ordered(x, order):
    """x with its dimensions in that order in memory."""
    return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])


def layouts(shape):
    """A quantised x of that shape, with channels before positions and behind them."""
    x = quantised(shape)
    return (x, ordered(x, (0, 1, *range(3, x.ndim), 2))) if x.ndim > 3 else (x,)


def by_channel(channels, dtype=torch.float32):
    """decay, threshold and v_reset to be learned."""
    state = torch.float64 if dtype == torch.float64 else torch.float32
    rows = zip((0.3, 0.6, -0.4), (0.6, 0.8, 0.4), strict=True)
    return [(low + width * torch.rand(channels)).to(state).requires_grad_() for low, width in rows]


def affine(channels):
    return [(torch.rand(channels) + shift).requires_grad_() for shift in (0.5, -0.3)]


def compare(compute, tensors, backend):
    """Outputs bit for bit, and all gradients, of compute(tensors, backend) against the CPU's."""
    results, grads = [], None
    for chosen in ("cpu", backend):
        leaves = tensors if chosen == "cpu" else [leaf(t) for t in tensors]
        spikes, *others = compute(leaves, chosen)
        if grads is None:
            grads = torch.randn_like(spikes.detach(), memory_format=torch.preserve_format)
        results.append(
            (
                [o.detach().cpu() for o in (spikes, *others)],
                torch.autograd.grad(spikes, leaves, grads.to(spikes.device)),
            )
        )
    (expected, expected_grads), (out, out_grads) = results
    for a, b in zip(out, expected, strict=True):
        assert a.stride() == b.stride()
        equal(a, b)
    for a, b in zip(out_grads, expected_grads, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert relative_error(a.cpu(), b) < tolerance(tensors[0].dtype)


@pytest.fixture
def cpu_statistics(monkeypatch):
    """Statistics of the CPU on every device: a mean that is rounded otherwise flips spikes."""
    real = functional._batch_stats

    def statistics(x, channel_dim, eps, repeat, backend, group):
        return real(x.detach().cpu(), channel_dim, eps, repeat, "cpu", group).to(x.device)

    monkeypatch.setattr(functional, "_batch_stats", statistics)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_neurons_by_channel(backend, shape):
    kinds = [
        (charge, reset, detach)
        for reset, detach in itertools.product(RESETS, (False, True))
        for charge in charges(reset)
    ]
    some = (("leak", "hard", False), ("decay", "soft", False))
    for (charge, reset, detach), x in itertools.product(
        kinds if backend == "cuda" else some, layouts(shape)
    ):

        def compute(leaves, chosen, charge=charge, reset=reset, detach=detach):
            x, decay, threshold, v_reset = leaves
            out = tk.lif(
                x,
                decay=decay,
                threshold=threshold,
                v_reset=v_reset,
                charge=charge,
                reset=reset,
                detach_reset=detach,
                channel_dim=2,
                return_state=True,
                return_potential=True,
                backend=chosen,
            )
            return out.spikes, out.state, out.potential

        compare(compute, [x.requires_grad_(), *by_channel(shape[2])], backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", (True, False))
def test_batch_norm_lif(backend, cpu_statistics, dtype, training):
    for shape in SHAPES if dtype == torch.float32 else SHAPES[1:3]:
        steps, channels = shape[0], shape[2]
        running = [torch.rand(channels) + shift for shift in (-0.5, 0.5)]
        for index, x in enumerate(layouts(shape)):
            gains = (0.5 + torch.rand((steps, channels) if index else (steps,))).requires_grad_()

            def compute(leaves, chosen, running=running):
                x, weight, bias, gains, decay, threshold, v_reset = leaves
                out = tk.batch_norm_lif(
                    x,
                    *(r.clone().to(x.device) for r in running),
                    weight,
                    bias,
                    training,
                    gains=gains,
                    scale=0.75,
                    decay=decay,
                    threshold=threshold,
                    v_reset=v_reset,
                    return_potential=True,
                    backend=chosen,
                )
                return out.spikes, out.potential

            leaves = [x.to(dtype).requires_grad_(), *affine(channels), gains]
            compare(compute, [*leaves, *by_channel(channels, dtype)], backend)


def test_batch_norm_lif_in_its_other_forms(backend, cpu_statistics):
    """Time behind the batch, no weight or bias, and a current that is constant in time."""
    x = quantised((5, 6, 12, 4)).requires_grad_()
    for options in ({"time_dim": 1}, {"steps": 20}, {"steps": 3, "reset": "soft"}):

        def compute(leaves, chosen, options=options):
            x = leaves[0] if "time_dim" in options else leaves[0][:, :, :, 0].contiguous()
            spikes = tk.batch_norm_lif(x, None, None, training=True, backend=chosen, **options)
            return (spikes,)

        compare(compute, [x], backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_of_a_batch(backend, dtype):
    for shape in (*SHAPES, (64, 32, 16, 9), (2, 1, 70_001)):
        for x in layouts(shape):
            x = (x + 3).to(dtype)
            expected = functional._batch_stats(x, 2, 1e-5, 1, "cpu", None)
            got = functional._batch_stats(x.to(DEVICE), 2, 1e-5, 1, backend, None)
            again = functional._batch_stats(x.to(DEVICE), 2, 1e-5, 1, backend, None)
            assert torch.equal(got, again) and got.dtype == expected.dtype
            mean, inverse, variance = got[0].double() + got[1].double(), got[2], got[3]
            wanted = expected[0].double() + expected[1].double()
            torch.testing.assert_close(mean.cpu(), wanted, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(inverse.cpu(), expected[2], rtol=1e-5, atol=0)
            torch.testing.assert_close(variance.cpu(), expected[3], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_from_bits_are_exactly_those_from_x(backend, dtype):
    some = (("soft", False), ("hard", True), ("none", False))
    for (reset, detach), (shape, time_dim) in itertools.product(
        some if backend == "cuda" else some[:1], (((20, 3, 67), 0), ((9, 17, 8), 1))
    ):
        x = quantised(shape).to(dtype)
        grad = torch.randn(shape).to(DEVICE, dtype)
        gradients = []
        for memory in ("recompute", "bits"):
            there = x.to(DEVICE).requires_grad_()
            spikes = tk.lif(
                there,
                surrogate=tk.Rectangle(1.0),
                reset=reset,
                detach_reset=detach,
                time_dim=time_dim,
                memory=memory,
                backend=backend,
            )
            gradients.append(torch.autograd.grad(spikes, there, grad)[0])
            equal(spikes.detach(), tk.lif(x, reset=reset, time_dim=time_dim, backend="cpu"))
        assert torch.equal(*gradients)


def test_constant_current_and_rates(backend):
    for steps, time_dim in ((1, 0), (6, 0), (6, 1), (33, 0)):

        def compute(leaves, chosen, steps=steps, time_dim=time_dim):
            out = tk.lif(leaves[0], steps=steps, time_dim=time_dim, statistics=True, backend=chosen)
            return out.spikes, out.rate

        for shape in ((7, 130), (3, 64)):
            compare(compute, [quantised(shape).requires_grad_()], backend)


def test_spikes_kept_as_bits(backend):
    """By the bits that `lif` wrote, and by a pass where it wrote none."""
    for shape, packed in (((4, 2, 1000), False), ((5, 77, 3), False), ((4, 2, 1000), True)):
        x, weight = (torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(2))
        with tk.use_backend(backend):
            spikes = tk.lif(x)
            expected = torch.autograd.grad((spikes * weight).sum(), (x, weight))
            with tk.pack_saved_spikes() as report:
                spikes = tk.lif(x)
                kept = spikes.clone() if packed else spikes
                product = (kept * weight).sum()
            same(torch.autograd.grad(product, (x, weight)), expected)
        assert (report.by_pass if packed else report.from_lif) == 1


# --- How they run.
class Block:
    """Everything that the fused block does, and its gradients."""

    def __init__(self, backend):
        self.backend = backend
        sizes = ((20, 3, 24, 5), (24,), (24,), (20, 24), (24,))
        self.leaves = [torch.rand(size, device=DEVICE, requires_grad=True) for size in sizes]
        self.running = [torch.zeros(24, device=DEVICE), torch.ones(24, device=DEVICE)]

    def __call__(self):
        x, weight, bias, gains, decay = self.leaves
        out = tk.batch_norm_lif(
            x,
            *self.running,
            weight,
            bias,
            True,
            gains=gains,
            decay=decay,
            charge="leak",
            statistics=True,
            return_state=True,
            backend=self.backend,
        )
        bits = tk.lif(
            x, surrogate=tk.Rectangle(1.0), reset="soft", memory="bits", backend=self.backend
        )
        # Weighted sums: equal weights would hide one element in another's place.
        weights = torch.arange(x.numel(), device=x.device).view_as(x).remainder(7).to(x.dtype)
        scalar = ((out.spikes + bits) * weights).sum() + out.state.sum()
        grads = torch.autograd.grad(scalar, self.leaves)
        return scalar.detach(), out.rate, *grads

    @torch.no_grad()
    def refill(self):
        for old in self.leaves:
            old.copy_(torch.rand(old.shape), non_blocking=True)


def on_a_side_stream(function, times=1):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            result = function()
    torch.cuda.current_stream().wait_stream(side)
    return result


def test_graph_of_the_block(backend):
    block = Block(backend)
    on_a_side_stream(block, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = block()
    for _ in range(3):
        block.refill()
        expected = [r.clone() for r in block()]
        for result in captured:
            result.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        same(captured, expected)


def test_streams_of_the_block(backend):
    """New inputs arrive on a side stream after a wait; two blocks at once keep apart."""
    first, second = Block(backend), Block(backend)
    expected = [first(), second()]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in expected]
    results = []
    for _ in range(20):
        for block, stream in zip((first, second), streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(block())
    torch.cuda.synchronize()
    for index, result in enumerate(results):
        same(result, expected[index % 2])

    def late():
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        first.refill()
        return first()

    results = on_a_side_stream(late)
    torch.cuda.synchronize()
    same(results, first())
