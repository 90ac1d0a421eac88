"""Every operator on a GPU, by both of its backends, against the CPU's kernels.

Bit for bit where spikes are decided, norm-wise elsewhere. Needs a CUDA device; `make gpu` runs it.
"""

import contextlib
import fcntl
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import trt_kernels as tk
from tests.cases import (
    PHIS,
    RESETS,
    SHAPES,
    SURROGATES,
    lif_gradients,
    quantised,
    random_grads,
    relative_error,
    without_time,
)
from trt_kernels import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
BACKENDS = ("cuda", "triton")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
STEPS = (1, 2, 4, 6, 10, 16, 17, 32, 33, 100, 1000)  # more than 16 need checkpoints
PENALTY = {"steps": 6, "weight": 1e-2, "delta": 0.5}
GIB = 1 << 30


@pytest.fixture(params=BACKENDS)
def backend(request):
    reason = tk.report().unavailable[request.param]["lif"]
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


def leaf(tensor):
    """The same on the device, a leaf of its own graph."""
    return tensor.detach().to(DEVICE).requires_grad_(tensor.requires_grad)


def tolerance(dtype):
    """Of a gradient: one in half precision is rounded once more."""
    return 1e-2 if dtype in HALVES else 5e-6


def equal(a, b):
    """Bit for bit, NaN for NaN."""
    torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True)


def lif_inputs(shape, time_dim, dtype=torch.float32):
    state = torch.float64 if dtype == torch.float64 else torch.float32
    x = quantised(shape).to(dtype).requires_grad_()
    return x, quantised(without_time(shape, time_dim)).to(state).requires_grad_()


def compare_lif(inputs, backend, **options):
    """Forward bit for bit and backward norm-wise against the CPU; returns what the GPU gave."""
    expected, _ = lif_gradients(inputs, None, backend="cpu", **options)
    grads = random_grads(expected)
    expected, expected_grads = lif_gradients(inputs, grads, backend="cpu", **options)
    there = [leaf(i) for i in inputs]
    out, out_grads = lif_gradients(there, [g.to(DEVICE) for g in grads], backend=backend, **options)
    for name in ("spikes", "state", "potential"):
        a, b = getattr(out, name), getattr(expected, name)
        assert a.dtype == b.dtype and a.device.type == DEVICE, name
        assert torch.equal(a.cpu(), b), name
    assert out.spikes.stride() == expected.spikes.stride()
    if out.penalty is not None:
        torch.testing.assert_close(out.penalty.cpu(), expected.penalty, rtol=1e-5, atol=1e-7)
    for a, b in zip(out_grads, expected_grads, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert relative_error(a.cpu(), b) < tolerance(inputs[0].dtype)
    return out, out_grads


# --- What serves.
def test_both_backends_serve():
    """On a machine with a GPU a backend that is missing is a fault of the build."""
    for name in BACKENDS:
        assert set(tk.report().unavailable[name].values()) == {None}, name


def test_auto_chooses_cuda():
    for operator in ("lif", "trt_penalty", "temporal_loss"):
        assert ops.choose_backend(operator, None, torch.device("cuda", 0)) == "cuda"
    x = torch.randn(4, 100, device=DEVICE)
    assert torch.equal(tk.lif(x), tk.lif(x, backend="cuda"))


def test_other_devices_raise(backend):
    x = torch.randn(4, 30)
    there = x.to(DEVICE)
    with pytest.raises(RuntimeError, match=f"lif: backend '{backend}' cannot serve"):
        tk.lif(x, backend=backend)
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot serve"):
        tk.lif(there, backend="cpu")
    with pytest.raises(ValueError, match="v_init: got a tensor on cpu"):
        tk.lif(there, v_init=torch.zeros(30), backend=backend)
    with pytest.raises(ValueError, match=r"params\[1\]: got a tensor on cpu"):
        tk.trt_penalty([there, x], backend=backend, **PENALTY)
    with pytest.raises(ValueError, match="target: got a tensor on cpu"):
        logits = torch.randn(4, 3, 5, device=DEVICE)
        tk.temporal_loss(logits, torch.zeros(3, dtype=torch.int64), backend=backend)


# --- lif
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda s: s.name)
def test_lif_for_every_neuron(backend, reset, surrogate):
    """CUDA in every combination; Triton, which compiles each, in a few with each kind in one."""
    everything = itertools.product((False, True), ("decay", "divide"), (False, True), PHIS)
    some = (
        (False, "divide", True, PHIS[RESETS.index(reset)]),
        (True, "decay", False, PHIS[-1 - SURROGATES.index(surrogate) % 4]),
    )
    for detach, charge, at, phi in everything if backend == "cuda" else some:
        compare_lif(
            lif_inputs((6, 5, 43), 0),
            backend,
            decay=1 / 3,
            threshold=0.7,
            v_reset=-0.1,
            reset=reset,
            detach_reset=detach,
            surrogate=surrogate,
            charge=charge,
            fire_at_threshold=at,
            penalty=tk.MembranePenalty(phi, torch.rand(6), delta=0.3),
        )


@pytest.mark.parametrize("shape,time_dim", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lif_for_every_shape_and_dtype(backend, shape, time_dim, dtype):
    compare_lif(lif_inputs(shape, time_dim, dtype), backend, time_dim=time_dim)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_lif_for_every_number_of_steps(backend, steps, dtype):
    if (backend, dtype) == ("triton", torch.float16) and steps not in (6, 33):
        pytest.skip("compiles for each number of steps, the same code as in float32")
    for neurons in (300, 257):
        compare_lif(lif_inputs((steps, neurons), 0, dtype), backend, decay=0.9)
    compare_lif(lif_inputs((3, steps, 50), 1, dtype), backend, decay=0.9, time_dim=1, reset="soft")


def test_bits_of_many_neuron_steps(backend):
    """Half of them on inputs quantised to 0.1, where potentials meet the threshold exactly."""
    for options in ({}, {"reset": "soft", "decay": 0.9}, {"charge": "divide", "decay": 1 / 3}):
        for x in (torch.randn(10, 640_000), quantised((10, 640_000))):
            expected = tk.lif(x, return_potential=True, backend="cpu", **options)
            out = tk.lif(x.to(DEVICE), return_potential=True, backend=backend, **options)
            reference = tk.lif(x.to(DEVICE), return_potential=True, backend="reference", **options)
            for got in (out, reference):
                equal(got.spikes, expected.spikes)
                equal(got.potential, expected.potential)


def test_large_lif_and_its_gradient(backend):
    """More blocks than run at once, and spikes alone: the short way."""
    for shape in ((4, 3_000_001), (6, 1 << 20), (40, 300_000)):
        x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
        there = leaf(x)
        spikes, out = (tk.lif(i, backend=b) for i, b in ((x, "cpu"), (there, backend)))
        equal(out.detach(), spikes.detach())
        (expected,) = torch.autograd.grad(spikes, x, grad)
        (got,) = torch.autograd.grad(out, there, grad.to(DEVICE))
        assert relative_error(got.cpu(), expected) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_are_read_in_place_and_kept(backend, dtype):
    for time_dim, order in ((0, (0, 1, 3, 4, 2)), (1, (0, 1, 3, 4, 2)), (1, (1, 0, 2, 3, 4))):
        base = torch.randn(4, 3, 6, 5, 2).to(dtype)
        inverse = [order.index(i) for i in range(5)]
        x = base.permute(order).contiguous().permute(inverse).requires_grad_()
        state = torch.float64 if dtype == torch.float64 else torch.float32
        v_init = torch.randn(without_time(x.shape, time_dim)).to(state).requires_grad_()
        out, _ = compare_lif((x, v_init), backend, time_dim=time_dim)
        assert out.spikes.stride() == out.potential.stride() == x.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_at_odd_offsets_write_nothing_outside(backend, dtype):
    for offset, columns in itertools.product((1, 2, 3, 5), (33, 64)):
        base, grads = torch.randn(400).to(dtype), torch.randn(400).to(dtype)
        size = 5 * columns
        views = [t[offset : offset + size].view(5, columns) for t in (base, grads)]
        bases = [t.to(DEVICE) for t in (base, grads)]
        x, grad = (t[offset : offset + size].view(5, columns) for t in bases)
        assert x.storage_offset() == offset
        x.requires_grad_()
        out = tk.lif(x, backend=backend)
        (got,) = torch.autograd.grad(out, x, grad)
        on_cpu = views[0].clone().requires_grad_()
        expected = tk.lif(on_cpu, backend="cpu")
        equal(out.detach(), expected.detach())
        (expected_grad,) = torch.autograd.grad(expected, on_cpu, views[1])
        assert relative_error(got.cpu(), expected_grad) < tolerance(dtype)
        for after, before in zip(bases, (base, grads), strict=True):
            equal(after.detach(), before)


def test_gradients_of_any_layout(backend):
    x = torch.randn(4, 3, 5, device=DEVICE, requires_grad=True)

    def grad(given):
        return torch.autograd.grad(tk.lif(x, backend=backend), x, given)[0]

    ones = torch.ones(4, 3, 10, device=DEVICE)
    dense = grad(ones[..., :5].contiguous())
    assert torch.equal(grad(ones[:1, :1, :1].expand(4, 3, 5)), dense)
    assert torch.equal(grad(ones[..., ::2]), dense)
    assert torch.equal(grad(torch.ones(5, 3, 4, device=DEVICE).permute(2, 1, 0)), dense)
    gapped = torch.randn(4, 3, 10)[..., ::2].requires_grad_()
    compare_lif((gapped, torch.randn(3, 5, requires_grad=True)), backend)
    constant = torch.randn(3, 5, device=DEVICE, requires_grad=True)
    (got,) = torch.autograd.grad(tk.lif(constant.expand(4, 3, 5), backend=backend).sum(), constant)
    assert got.isfinite().all()


def test_only_some_outputs_used(backend):
    x, v_init = lif_inputs((20, 50), 0)
    penalty = tk.MembranePenalty("trt", torch.rand(20))
    for name in ("spikes", "state", "penalty", "potential"):
        grads = []
        for inputs, chosen in (((x, v_init), "cpu"), ((leaf(x), leaf(v_init)), backend)):
            out = tk.lif(
                inputs[0],
                v_init=inputs[1],
                penalty=penalty,
                return_state=True,
                return_potential=True,
                backend=chosen,
            )
            grads.append(torch.autograd.grad(getattr(out, name).sum(), inputs))
        for expected, got in zip(*grads, strict=True):
            assert relative_error(got.cpu(), expected) < 5e-6, name


def test_chunks_carry_the_state_exactly(backend):
    x = torch.randn(36, 77, device=DEVICE)
    whole = tk.lif(x, return_state=True, backend=backend)
    state, spikes = None, []
    for chunk in x.split(17):
        out = tk.lif(chunk, v_init=state, return_state=True, backend=backend)
        state = out.state
        spikes.append(out.spikes)
    assert torch.equal(torch.cat(spikes), whole.spikes)
    assert torch.equal(state, whole.state)


def test_nonfinite_inputs_propagate(backend):
    special = (float("nan"), float("inf"), -float("inf"))
    for value, reset in itertools.product(special, RESETS):
        x = torch.randn(6, 100)
        x[torch.rand_like(x) < 0.1] = value
        x.requires_grad_()
        there = leaf(x)
        results = [
            tk.lif(i, reset=reset, return_potential=True, backend=b)
            for i, b in ((x, "cpu"), (there, backend))
        ]
        expected, out = results
        equal(out.spikes.detach(), expected.spikes.detach())
        equal(out.potential.detach(), expected.potential.detach())
        (a,) = torch.autograd.grad(out.spikes.sum(), there)
        (b,) = torch.autograd.grad(expected.spikes.sum(), x)
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_empty(backend):
    for shape, time_dim in (((0, 5), 0), ((4, 0), 0), ((2, 0, 3), 1), ((0, 4, 3), 1)):
        x = torch.zeros(shape, device=DEVICE, requires_grad=True)
        v_init = torch.ones(without_time(shape, time_dim), device=DEVICE, requires_grad=True)
        out = tk.lif(
            x,
            v_init=v_init,
            time_dim=time_dim,
            penalty=tk.MembranePenalty("square", torch.ones(shape[time_dim])),
            return_state=True,
            backend=backend,
        )
        assert out.spikes.shape == torch.Size(shape)
        assert torch.equal(out.state, v_init) and out.penalty == 0
        (grad,) = torch.autograd.grad(out.spikes.sum() + out.state.sum(), v_init)
        assert torch.equal(grad, torch.ones_like(v_init))


def kept_by(function):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function()
    return kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keeps_x_and_checkpoints_alone(backend, dtype):
    for steps, most in ((16, 0), (33, 2)):
        x = torch.randn(steps, 1000, device=DEVICE).to(dtype).requires_grad_()
        kept = kept_by(lambda x=x: tk.lif(x, backend=backend))
        beside = [t for t in kept if t is not None and t.data_ptr() != x.data_ptr()]
        assert sum(t.numel() for t in beside) <= most * 1000


# --- trt_penalty
def parameters(dtype=torch.float32, scale=0.3):
    sizes = ((1,), (7,), (64, 3, 3, 3), (1000,), (130, 257), (0,), (200_000,))
    return [(torch.randn(s) * scale).to(dtype).requires_grad_() for s in sizes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_penalty_and_its_gradient(backend, dtype):
    for steps, delta, eps in ((1, 0.5, 1e-5), (6, 0.25, 1e-5), (10, 0.5, 0.0), (33, 1.0, 0.1)):
        settings = {"steps": steps, "weight": 2e-4, "delta": delta, "eps": eps}
        params = parameters(dtype)
        there = [leaf(p) for p in params]
        expected = tk.trt_penalty(params, backend="reference", **settings)
        value = tk.trt_penalty(there, backend=backend, **settings)
        assert value.dtype == expected.dtype and value.shape == ()
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=0)
        grads = torch.autograd.grad(3 * value, there)
        for a, b in zip(grads, torch.autograd.grad(3 * expected, params), strict=True):
            assert a.dtype == dtype
            assert relative_error(a.cpu(), b) < tolerance(dtype)


def test_penalty_of_many_tensors(backend):
    """More than one launch's table holds."""
    params = [torch.randn(1 + i % 70).requires_grad_() for i in range(300)]
    there = [leaf(p) for p in params]
    expected = tk.trt_penalty(params, backend="cpu", **PENALTY)
    value = tk.trt_penalty(there, backend=backend, **PENALTY)
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=0)
    grads = torch.autograd.grad(value, there)
    for a, b in zip(grads, torch.autograd.grad(expected, params), strict=True):
        assert relative_error(a.cpu(), b) < 5e-6


def test_penalty_of_zeros_overflow_and_large_weights(backend):
    for weights, delta in (([0.0, -0.0, 1e-30, 1.0], 1e3), ([1e3, 1e12, -1e17, 2.0], 4.0)):
        w = torch.tensor(weights, requires_grad=True)
        there = leaf(w)
        settings = {"steps": 20, "weight": 1.0, "delta": delta}
        expected = tk.trt_penalty([w], backend="reference", **settings)
        value = tk.trt_penalty([there], backend=backend, **settings)
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=0)
        (a,), (b,) = torch.autograd.grad(value, there), torch.autograd.grad(expected, w)
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-30)


def test_penalty_layouts_and_frozen_parameters(backend):
    weight = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    gapped = torch.randn(20, 6)[:, ::2].requires_grad_()
    params = [weight, torch.randn(9), gapped]
    there = [leaf(p) for p in params]
    expected = tk.trt_penalty(params, backend="cpu", **PENALTY)
    value = tk.trt_penalty(there, backend=backend, **PENALTY)
    grads = torch.autograd.grad(value, there[::2])
    for a, b in zip(grads, torch.autograd.grad(expected, params[::2]), strict=True):
        assert relative_error(a.cpu(), b) < 5e-6
    assert grads[0].stride() == weight.stride()


def test_penalty_in_place_between_sentinels(backend):
    """Gradients in views of a buffer, at odd offsets: nothing around them is written."""
    for offset, size in itertools.product((1, 3, 8), (1, 33, 1000, 70_001)):
        p = torch.randn(size).requires_grad_()
        there = leaf(p)
        buffer = torch.full((size + 64,), 7.0, device=DEVICE)
        there.grad = buffer[offset : offset + size]
        there.grad.fill_(2.0)
        tk.trt_penalty_([there], scale=8.0, backend=backend, **PENALTY)
        (more,) = torch.autograd.grad(8 * tk.trt_penalty([p], backend="cpu", **PENALTY), p)
        assert relative_error(there.grad.cpu(), 2.0 + more) < 5e-6
        assert (torch.cat([buffer[:offset], buffer[offset + size :]]) == 7).all()


def test_penalty_in_place_makes_gradients(backend):
    params = parameters()
    there = [leaf(p) for p in params]
    there[0].grad = torch.ones_like(there[0])
    tk.trt_penalty_([*there, torch.randn(5, device=DEVICE)], backend=backend, **PENALTY)
    grads = torch.autograd.grad(tk.trt_penalty(params, backend="cpu", **PENALTY), params)
    for index, (p, more) in enumerate(zip(there, grads, strict=True)):
        assert relative_error(p.grad.cpu(), more + (index == 0)) < 5e-6


# --- temporal_loss
LOSSES = (
    {},
    {"mse_ratio": 0.05},
    {"mse_ratio": 1.0},
    {"mse_ratio": 0.3, "label_smoothing": 0.1},
    {"mse_ratio": 0.2, "class_weight": True, "label_smoothing": 0.2},
    {"mse_ratio": 0.2, "ignore_index": 0},
)


@pytest.mark.parametrize("options", LOSSES, ids=str)
@pytest.mark.parametrize("probabilities", (False, True))
def test_loss_and_its_gradient(backend, options, probabilities):
    everything = itertools.product((2, 10, 33, 1000, 5000), DTYPES)
    some = zip((2, 5000, 33, 1000), DTYPES, strict=True)  # Triton compiles each
    for classes, dtype in everything if backend == "cuda" else some:
        chosen = dict(options)
        if chosen.pop("class_weight", False):
            chosen["class_weight"] = torch.rand(classes) + 0.1
        target = torch.randint(classes, (9,))
        if probabilities:
            chosen.pop("ignore_index", None)
            target = torch.softmax(torch.randn(9, classes), 1)
        compare_loss((torch.randn(6, 9, classes) * 3).to(dtype), target, backend, **chosen)


def compare_loss(logits, target, backend, **options):
    logits = logits.detach().requires_grad_()
    there = leaf(logits)
    moved = {
        key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for key, value in options.items()
    }
    expected = tk.temporal_loss(logits, target, backend="cpu", **options)
    value = tk.temporal_loss(there, target.to(DEVICE), backend=backend, **moved)
    assert value.dtype == expected.dtype and value.shape == ()
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=1e-7)
    (got,), (wanted,) = (
        torch.autograd.grad(5 * v, i) for v, i in ((value, there), (expected, logits))
    )
    assert got.dtype == logits.dtype
    assert relative_error(got.cpu(), wanted) < tolerance(logits.dtype)


def test_loss_layouts(backend):
    target = torch.randint(100, (64,))
    logits = torch.randn(64, 6, 100)
    compare_loss(logits, target, backend, time_dim=1, mse_ratio=0.1)
    compare_loss(logits.transpose(0, 1), target, backend, mse_ratio=0.1)
    compare_loss(torch.randn(6, 64, 200)[..., ::2], target, backend, mse_ratio=0.1)
    compare_loss(torch.randn(6, 64, 203)[..., 3:103], target, backend, mse_ratio=0.1)


def test_loss_of_infinite_logits_and_of_a_class_out_of_range(backend):
    logits = torch.randn(3, 4, 40)
    logits[..., 5:] = -float("inf")
    target = torch.tensor([0, 1, 2, 3])
    expected = tk.temporal_loss(logits, target, backend="cpu")
    value = tk.temporal_loss(logits.to(DEVICE), target.to(DEVICE), backend=backend)
    torch.testing.assert_close(value.cpu(), expected)
    target[1] = 40
    there = torch.randn(3, 4, 40, device=DEVICE), target.to(DEVICE)
    assert tk.temporal_loss(*there, backend=backend).isnan()
    with pytest.raises(ValueError, match="target: got class 40"):
        tk.temporal_loss(*there, backend=backend, check=True)


# --- How they run: streams, graphs, devices, memory.
def everything(x, v_init, params, logits, target, penalty, backend):
    """Every operator into one scalar."""
    out = tk.lif(
        x,
        v_init=v_init,
        penalty=penalty,
        surrogate=tk.Sigmoid(4.0),
        return_state=True,
        return_potential=True,
        backend=backend,
    )
    spikes = tk.lif(x, backend=backend)
    regularizer = tk.trt_penalty(params, backend=backend, **PENALTY)
    loss = tk.temporal_loss(logits, target, mse_ratio=0.1, backend=backend)
    # Weighted sums: equal weights would hide one element in another's place.
    weights = torch.arange(x.numel(), device=x.device).view_as(x).remainder(7).to(x.dtype)
    return (
        (spikes * weights).sum()
        + (out.spikes * weights).mean()
        + out.state.sum()
        + out.penalty
        + out.potential.mean()
        + regularizer
        + loss
    )


class Everything:
    """Leaves for all operators on a device, and one result of all of them."""

    def __init__(self, backend, device=DEVICE):
        self.backend, self.device = backend, device
        self.leaves = [t.to(device).requires_grad_() for t in self.contents()]
        self.target = torch.randint(10, (8,)).to(device)
        # Checked here, where a look at its values may synchronise.
        self.penalty = tk.MembranePenalty("trt", torch.rand(20).to(device))

    @staticmethod
    def contents():
        """x, v_init, two parameters and logits, fresh."""
        sizes = ((20, 300), (300,), (70, 33), (129,), (20, 8, 10))
        return [torch.randn(size) for size in sizes]

    def __call__(self):
        """The scalar and its gradients."""
        x, v_init, *params, logits = self.leaves
        scalar = everything(x, v_init, params, logits, self.target, self.penalty, self.backend)
        return scalar.detach(), *torch.autograd.grad(scalar, self.leaves)

    @torch.no_grad()
    def refill(self, contents):
        for old, new in zip(self.leaves, contents, strict=True):
            old.copy_(new, non_blocking=True)


def same(results, expected):
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_runs_on_the_current_stream(backend):
    """New inputs arrive on a side stream after a wait: a kernel elsewhere would read the old."""
    work = Everything(backend)
    fresh = [t.to(DEVICE) for t in work.contents()]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        work()  # compiled, loaded and its memory cached: nothing synchronises below
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        work.refill(fresh)
        results = work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    same(results, work())


def test_graph_capture_and_replay(backend):
    work = Everything(backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for _ in range(3):
        work.refill(work.contents())
        expected = [r.clone() for r in work()]
        for result in captured:
            result.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        same(captured, expected)


def test_graph_capture_of_the_gradient_in_place(backend):
    params = [leaf(p) for p in parameters()]
    for p in params:
        p.grad = torch.zeros_like(p)
    tk.trt_penalty_(params, backend=backend, **PENALTY)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tk.trt_penalty_(params, backend=backend, **PENALTY)
    for p in params:
        p.grad.zero_()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    more = torch.autograd.grad(tk.trt_penalty(params, backend=backend, **PENALTY), params)
    for p, m in zip(params, more, strict=True):
        assert relative_error(p.grad, 2 * m) < 5e-6


def test_synchronises_nothing(backend):
    """Not even for a regularizer's weight that lies on the CPU."""
    work = Everything(backend)
    work.penalty = tk.MembranePenalty("trt", torch.rand(20))
    params = [leaf(p) for p in parameters()]
    work()
    tk.trt_penalty_(params, backend=backend, **PENALTY)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
        tk.trt_penalty_(params, backend=backend, **PENALTY)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_streams_at_once(backend):
    """Partial sums of one call are not those of another that runs beside it."""
    works = [Everything(backend) for _ in range(2)]
    expected = [work() for work in works]
    streams = [torch.cuda.Stream() for _ in works]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for work, stream in zip(works, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(work())
    torch.cuda.synchronize()
    for index, result in enumerate(results):
        same(result, expected[index % 2])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_a_device_that_is_not_the_current_one(backend):
    first, second = Everything(backend, "cuda:0"), Everything(backend, "cuda:1")
    second.refill(first.leaves)
    second.target = first.target.to("cuda:1")
    second.penalty = tk.MembranePenalty("trt", first.penalty.weight.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    results = second()
    assert {r.device.index for r in results} == {1} and torch.cuda.current_device() == 0
    same([r.to("cuda:0") for r in results], first())


def test_repeats_its_bits(backend):
    x = torch.randn(6, 700_001, device=DEVICE, requires_grad=True)
    params = [torch.randn(300_001, device=DEVICE, requires_grad=True)]
    logits = torch.randn(6, 64, 1000, device=DEVICE, requires_grad=True)
    target = torch.randint(1000, (64,), device=DEVICE)
    penalty = tk.MembranePenalty("square", torch.rand(6, device=DEVICE))
    results = []
    for _ in range(5):
        out = tk.lif(x, penalty=penalty, backend=backend)
        value = tk.trt_penalty(params, backend=backend, **PENALTY)
        loss = tk.temporal_loss(logits, target, mse_ratio=0.1, backend=backend)
        total = out.spikes.sum() + out.penalty + value + loss
        grads = torch.autograd.grad(total, (x, *params, logits))
        results.append((out.penalty.detach(), value.detach(), loss.detach(), *grads))
    for other in results[1:]:
        same(other, results[0])


def test_out_of_memory_raises_and_the_next_call_works(backend):
    # Tensors of a terabyte that take four bytes, until a kernel wants them dense.
    one = torch.ones((), device=DEVICE)
    huge, size = 1 << 38, {"mse_ratio": 0.1}
    target = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    calls = (
        lambda: tk.lif(one.expand(4, huge // 4), backend=backend),
        lambda: tk.trt_penalty([one.expand(huge)], backend=backend, **PENALTY),
        lambda: tk.temporal_loss(one.expand(1, 1, huge), target, backend=backend, **size),
    )
    work = Everything(backend)
    before = work()
    for call in calls:
        with pytest.raises(torch.OutOfMemoryError):
            call()
        same(work(), before)


FAULT = """
import torch, trt_kernels as tk
from trt_kernels.backends import native
x = torch.randn(4, 64, device="cuda")
tk.lif(x, backend="cuda")
torch.cuda.synchronize()
((options, _),) = tk.functional._checked.values()
place = 0, native.CHECKPOINT_EVERY, 0, native.current_stream(0)
handle = native.lif_handle(options)
try:
    handle.cuda_forward_plain(native.DTYPES[x.dtype], x.shape, 0, 4096, x.data_ptr(), *place)
except RuntimeError as error:
    print(error)
"""


def test_a_kernels_error_surfaces_at_its_call():
    """Given an address that is none, in a process of its own, where launches wait for their end."""
    environment = {**os.environ, "CUDA_LAUNCH_BLOCKING": "1"}
    command = [sys.executable, "-c", FAULT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert "launching lif forward: an illegal memory access" in done.stdout, done.stderr


@contextlib.contextmanager
def room(size):
    """Waits until no other test process holds much memory; skips where the GPU has too little."""
    with (Path(tempfile.gettempdir()) / "trt_kernels_gpu_room").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < size:
            pytest.skip(f"needs {size / GIB:.0f} GiB of memory, {free / GIB:.0f} are free")
        # Not filled with NaN, which would take as long again.
        torch.use_deterministic_algorithms(False)
        yield
        torch.cuda.empty_cache()


WIDE = 1 << 29  # four times as many elements are more than an int32 counts


def test_lif_of_more_than_2_31_elements(backend):
    with room(24 * GIB):
        shape = (4, WIDE + 72)
        x = torch.randn(shape, dtype=torch.float16, device=DEVICE).requires_grad_()
        grad = torch.randn(shape, dtype=torch.float16, device=DEVICE)
        out = tk.lif(x, backend=backend)
        (got,) = torch.autograd.grad(out, x, grad)
        for part in (slice(0, 1000), slice(WIDE // 2, WIDE // 2 + 1000), slice(-1000, None)):
            few = x.detach()[:, part].cpu().requires_grad_()
            expected = tk.lif(few, backend="cpu")
            equal(out.detach()[:, part], expected.detach())
            (expected_grad,) = torch.autograd.grad(expected, few, grad[:, part].cpu())
            assert relative_error(got[:, part].cpu(), expected_grad) < 1e-2
        del x, grad, out, got


def test_penalty_of_more_than_2_31_elements(backend):
    with room(14 * GIB):
        w = torch.full((4 * WIDE + 72,), 0.5, dtype=torch.float16, device=DEVICE).requires_grad_()
        one = torch.full((1,), 0.5, requires_grad=True)
        each = tk.trt_penalty([one], backend="cpu", **PENALTY)
        value = tk.trt_penalty([w], backend=backend, **PENALTY)
        assert value.item() == pytest.approx(each.item() * w.numel(), rel=1e-4)
        (got,) = torch.autograd.grad(value, w)
        (expected,) = torch.autograd.grad(each, one)
        for part in (got[:1000], got[-1000:]):
            torch.testing.assert_close(part.float().cpu(), expected.expand(1000), rtol=2e-3, atol=0)
        del w, got, value


def test_loss_of_more_than_2_31_elements(backend):
    with room(14 * GIB):
        batch, classes = 8200, 65536
        logits = torch.randn(4, batch, classes, dtype=torch.float16, device=DEVICE)
        assert logits.numel() > 1 << 31
        logits.requires_grad_()
        target = torch.randint(classes, (batch,), device=DEVICE)
        value = tk.temporal_loss(logits, target, backend=backend)
        (got,) = torch.autograd.grad(value * batch, logits)
        for row in (0, batch - 1):
            few = logits.detach()[:, row : row + 1].cpu().requires_grad_()
            expected = tk.temporal_loss(few, target[row : row + 1].cpu(), backend="cpu")
            (expected_grad,) = torch.autograd.grad(expected, few)
            assert relative_error(got[:, row : row + 1].cpu(), expected_grad) < 1e-2
        del logits, got, value


# --- In training code.
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(backend, dtype):
    """Half in, half out, a float32 loss, and gradients that survive a scaler."""
    torch.use_deterministic_algorithms(False)  # the matrix product would ask for a setting
    weight = torch.randn(20, 12, device=DEVICE, requires_grad=True)
    x = torch.randn(6, 8, 12, device=DEVICE)
    target = torch.randint(20, (8,), device=DEVICE)
    scaler = torch.amp.GradScaler(DEVICE)
    with torch.autocast(DEVICE, dtype=dtype), tk.use_backend(backend):
        current = functional.linear(x, weight)
        spikes = tk.lif(current)
        loss = tk.temporal_loss(spikes, target, mse_ratio=0.05)
        loss = loss + tk.trt_penalty([weight], **PENALTY)
    assert current.dtype == spikes.dtype == dtype and loss.dtype == torch.float32
    equal(spikes.detach(), tk.lif(current.detach().cpu(), backend="cpu"))
    (grad,) = torch.autograd.grad(scaler.scale(loss), weight)
    assert grad.dtype == torch.float32 and grad.isfinite().all() and grad.abs().sum() > 0


@pytest.mark.parametrize("compiler", ("aot_eager", "inductor"))
def test_compiles_without_a_graph_break(backend, compiler):
    if (backend, compiler) == ("triton", "inductor"):
        pytest.skip("compiles for as long again, the same graph")
    work = Everything(backend)
    plain = work()
    torch._dynamo.reset()
    x, v_init, *params, logits = work.leaves

    def scalar(x, v_init, params, logits):
        return everything(x, v_init, params, logits, work.target, work.penalty, backend)

    compiled = torch.compile(scalar, fullgraph=True, backend=compiler)
    value = compiled(x, v_init, params, logits)
    results = value.detach(), *torch.autograd.grad(value, work.leaves)
    for a, b in zip(results, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_training_step_as_on_the_cpu(backend):
    """The objective of the paper over a small network: same losses, step by step."""
    torch.use_deterministic_algorithms(False)  # as above
    losses = []
    for device, chosen in (("cpu", "cpu"), (DEVICE, backend)):
        torch.manual_seed(1)
        network = torch.nn.Sequential(
            torch.nn.Linear(12, 32), tk.nn.LIF(), torch.nn.Linear(32, 5)
        ).to(device)
        x, target = torch.randn(6, 16, 12).to(device), torch.randint(5, (16,)).to(device)
        objective = tk.TRTLoss(network, weight=1e-3, delta=0.25, mse_ratio=0.05)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        with tk.use_backend(chosen):
            for _ in range(3):
                optimizer.zero_grad()
                loss = objective(network(x), target)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=2e-2)
