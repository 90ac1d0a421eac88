"""`lif` of a constant current, with bits for its memory, with statistics, in chunks of time."""

import itertools

import pytest
import torch

import trt_kernels as tk
from tests.cases import RESETS, charges, quantised, random_grads, relative_error

KEEPING = ("state", "penalty", "potential", "rate")


def kept_by(call):
    """What autograd saves of a call, and its result."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = call()
    return sum({t.untyped_storage().data_ptr(): t.nbytes for t in kept}.values()), result


# --- Constant current.
@pytest.mark.parametrize(
    "shape,time_dim", (((3, 5, 7), 0), ((3, 5, 7), 1), ((2, 64), 2), ((9,), 0))
)
def test_constant_current_is_the_repeated_one(shape, time_dim, backend):
    for steps, dtype in itertools.product((1, 6, 20), (torch.float32, torch.bfloat16)):
        x = quantised(shape).to(dtype).requires_grad_()
        v_init = quantised(shape).requires_grad_()
        options = {
            "time_dim": time_dim,
            "v_init": v_init,
            "penalty": tk.MembranePenalty("square", [1.0] * steps),
            "return_state": True,
            "return_potential": True,
            "statistics": True,
        }
        repeated = torch.stack([x.detach()] * steps, time_dim).requires_grad_()
        theirs = tk.lif(repeated, **options)
        ours = tk.lif(x, steps=steps, **options)
        for name in ("spikes", *KEEPING):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        outputs = [(o, p) for o, p in zip(ours, theirs, strict=True) if o.requires_grad]
        grads = [torch.randn_like(o) for o, _ in outputs]
        found = torch.autograd.grad([o for o, _ in outputs], (x, v_init), grads)
        exact = torch.autograd.grad([o for _, o in outputs], (repeated, v_init), grads)
        bound = 1e-6 if dtype == torch.float32 else 1e-2
        assert relative_error(found[0], exact[0].float().sum(time_dim)) < bound
        assert relative_error(found[1], exact[1]) < 1e-6
        assert found[0].shape == x.shape


def test_constant_current_keeps_and_reads_x_once(backend):
    x = torch.randn(8, 100, requires_grad=True)
    size, out = kept_by(lambda: tk.lif(x, steps=5))
    assert size == x.nbytes and out.shape == (5, 8, 100)


def test_constant_current_in_other_layouts(backend):
    for x, time_dim in (
        (quantised((3, 5, 4, 6)).contiguous(memory_format=torch.channels_last), 0),
        (quantised((3, 5, 4, 6)).contiguous(memory_format=torch.channels_last), 1),
        (quantised((5, 3, 4)).transpose(0, 1), 1),
        (quantised((5, 3, 8))[..., ::2], 0),
        (quantised((5, 1)).expand(5, 6), 1),
    ):
        expected = tk.lif(torch.stack([x] * 4, time_dim), time_dim=time_dim)
        out = tk.lif(x, steps=4, time_dim=time_dim)
        assert torch.equal(out, expected)
    last = quantised((3, 5, 4, 6)).contiguous(memory_format=torch.channels_last)
    assert tk.lif(last, steps=4)[0].stride() == last.stride()


# --- Bits.
@pytest.mark.parametrize("charge", charges("hard"))
def test_bits_give_the_same_gradients(charge, backend):
    if backend == "triton" and charge not in ("decay", "leak_divide"):
        pytest.skip("its interpreter is slow")
    for (reset, detach), (shape, time_dim, channel_dim) in itertools.product(
        (("hard", True), ("soft", False), ("soft", True), ("none", False)),
        (((4, 3, 5, 7), 0, 2), ((3, 17, 6), 1, 2), ((3, 40, 7), 0, 2), ((5, 1), 0, None)),
    ):
        if backend == "triton" and (reset == "none") != (len(shape) == 4):
            continue  # its interpreter is slow
        channels = 1 if channel_dim is None else shape[channel_dim]
        x = quantised(shape).requires_grad_()
        threshold = torch.rand(channels, requires_grad=True)
        v_reset = (torch.rand(channels) * 0.2).requires_grad_()
        results, grads = [], None
        for memory in ("recompute", "bits"):
            out = tk.lif(
                x,
                decay=0.6,
                threshold=threshold,
                v_reset=v_reset,
                charge=charge,
                reset=reset,
                detach_reset=detach,
                surrogate=tk.Rectangle(1.5),
                memory=memory,
                time_dim=time_dim,
                channel_dim=channel_dim,
                penalty=tk.MembranePenalty("spike", torch.ones(shape[time_dim])),
                return_state=True,
                return_potential=True,
            )
            grads = random_grads(out) if grads is None else grads
            outputs = [o for o in out if o is not None]
            gradients = torch.autograd.grad(outputs, (x, threshold, v_reset), grads)
            results.append((*(o.detach() for o in outputs), *gradients))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_bits_keep_a_quarter_of_a_byte(dtype, backend):
    for shape, steps in (((6, 800), None), ((800,), 6)):
        x = torch.randn(shape).to(dtype).requires_grad_()
        options = {"surrogate": tk.Rectangle(), "detach_reset": True, "steps": steps}
        size, out = kept_by(lambda x=x, o=options: tk.lif(x, memory="bits", **o))
        assert size == 0.25 * 6 * 800
        grad = torch.randn(out.shape).to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
        (ours,) = torch.autograd.grad(out, x, grad)
        assert torch.equal(ours, torch.autograd.grad(tk.lif(x, **options), x, grad)[0])


def test_bits_without_a_gradient_at_the_spikes(backend):
    x = torch.randn(4, 30, requires_grad=True)
    options = {"surrogate": tk.Rectangle(), "detach_reset": True, "return_state": True}
    for name in ("state", "spikes"):
        both = [
            torch.autograd.grad(getattr(tk.lif(x, memory=memory, **options), name).sum(), x)[0]
            for memory in ("bits", "recompute")
        ]
        assert torch.equal(*both)


# --- Statistics.
@pytest.mark.parametrize("shape,time_dim", (((5, 3, 70), 0), ((4, 6, 9), 1), ((3, 4, 2), 2)))
def test_statistics_are_the_mean_of_the_spikes(shape, time_dim, backend):
    x = torch.randn(shape, requires_grad=True)
    out = tk.lif(x, time_dim=time_dim, statistics=True)
    others = [dim for dim in range(3) if dim != time_dim]
    assert torch.equal(out.rate, out.spikes.double().mean(others).float())
    assert not out.rate.requires_grad and out.state is None
    assert torch.equal(out.spikes, tk.lif(x, time_dim=time_dim))
    (grad,) = torch.autograd.grad(out.spikes.sum(), x)
    assert torch.equal(grad, torch.autograd.grad(tk.lif(x, time_dim=time_dim).sum(), x)[0])
    # Below a threshold of less than 0 nothing fires that is not there, in the rest of a block.
    out = tk.lif(x, time_dim=time_dim, statistics=True, threshold=-0.5)
    assert torch.equal(out.rate, out.spikes.double().mean(others).float())


def test_statistics_of_nothing(backend):
    for shape in ((4, 0), (0, 4)):
        out = tk.lif(torch.zeros(shape), statistics=True)
        assert out.rate.shape == (shape[0],) and not out.rate.any()


# --- Long sequences.
@pytest.mark.parametrize("reset", RESETS)
def test_truncated_backpropagation(reset, backend):
    """Chunks from a detached state: the whole forward, and within a chunk the whole backward."""
    x = torch.randn(50, 40, requires_grad=True)
    whole = tk.lif(x, reset=reset, decay=0.9, return_state=True)
    state, spikes = None, []
    for chunk in x.split(20):
        out = tk.lif(chunk, v_init=state, reset=reset, decay=0.9, return_state=True)
        state = out.state.detach()
        spikes.append(out.spikes)
    assert torch.equal(torch.cat(spikes), whole.spikes)
    assert torch.equal(state, whole.state)
    last = torch.autograd.grad(spikes[-1].sum(), x)[0][40:]
    theirs = torch.autograd.grad(whole.spikes[40:].sum(), x)[0]
    assert torch.equal(last, theirs[40:]) and theirs[:40].any()


@pytest.mark.parametrize("dtype,bound", ((torch.float32, 4.25), (torch.bfloat16, 2.25)))
def test_a_thousand_steps_keep_little(dtype, bound, backend):
    steps = 1000 if backend != "triton" else 100
    x = torch.randn(steps, 64).to(dtype).requires_grad_()
    size, _ = kept_by(lambda: tk.lif(x))
    assert size <= bound * x.numel()
