"""The ends of the numbers: infinite, denormal and NaN values, overflow, extreme settings."""

import itertools
import math

import pytest
import torch

import trt_kernels as tk
from tests.cases import PHIS, RESETS, SURROGATES, charges, relative_error

NAN, INF = float("nan"), float("inf")
TINY = 1e-40  # denormal in float32


def both(backend, make):
    """The results of a backend and of the reference."""
    return make(backend), make("reference")


def agree(ours, theirs, rtol=1e-5, atol=1e-6):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda s: s.name)
def test_surrogates_far_out(surrogate, kernels):
    """Neither NaN nor a wrong tail where a square or an exponential overflows."""
    u = torch.tensor([1e38, 3e38, 1e30, 100.0, TINY, 1e-45, 0.0])
    u = torch.cat([u, -u])

    def slopes(backend):
        x = u[None].clone().requires_grad_()
        return torch.autograd.grad(
            tk.lif(x, threshold=0.0, surrogate=surrogate, backend=backend).sum(), x
        )

    ours, theirs = both(kernels, slopes)
    agree(ours, theirs, rtol=1e-6, atol=1e-30)
    assert ours[0].isfinite().all()


def states(backend, x, v_init, grads, **options):
    x, v_init = x.clone().requires_grad_(), v_init.clone().requires_grad_()
    out = tk.lif(
        x, v_init=v_init, return_state=True, return_potential=True, backend=backend, **options
    )
    outputs = out.spikes, out.state, out.potential
    return [o.detach() for o in outputs], torch.autograd.grad(outputs, (x, v_init), grads)


@pytest.mark.parametrize("where", ("x", "v_init", "gradient of spikes", "gradient of the state"))
def test_what_is_not_finite_goes_where_the_reference_lets_it(where, backend):
    for value, reset, detach in itertools.product((NAN, INF, -INF), RESETS, (False, True)):
        x, v_init = torch.randn(5, 40), torch.randn(40)
        grads = [torch.randn(5, 40), torch.randn(40), torch.randn(5, 40)]
        given = {
            "x": x,
            "v_init": v_init,
            "gradient of spikes": grads[0],
            "gradient of the state": grads[1],
        }[where]
        given[..., ::7] = value
        for charge in charges(reset) if backend == "cpu" else ("decay",):
            options = {"reset": reset, "detach_reset": detach, "charge": charge}
            ours = states(backend, x, v_init, grads, **options)
            theirs = states("reference", x, v_init, grads, **options)
            agree(ours[0], theirs[0], rtol=0, atol=0)
            for a, b in zip(ours[1], theirs[1], strict=True):
                assert torch.equal(a.isfinite(), b.isfinite())
                if charge == "decay":  # others subtract infinities in an order of their own
                    assert torch.equal(a.isnan(), b.isnan())
                finite = a.isfinite()
                agree([a[finite]], [b[finite]])


@pytest.mark.parametrize("decay", (0.0, 1.0, 1.5, 10.0, -0.5, 1e30))
def test_decays(decay, backend):
    """Potentials may overflow to infinity, and then do so as in the reference."""
    x, v_init = torch.randn(9, 30), torch.randn(30)
    grads = [torch.randn(9, 30), torch.randn(30), torch.randn(9, 30)]
    for reset, charge in itertools.product(RESETS, ("decay", "leak", "rest", "box", "divide")):
        if charge == "divide" and not decay:
            continue
        options = {"decay": decay, "reset": reset, "charge": charge}
        ours, theirs = both(backend, lambda b, o=options: states(b, x, v_init, grads, **o))
        agree(ours[0], theirs[0], rtol=0, atol=0)
        if decay < 1e30:  # there a difference of infinities depends on the order of a sum
            scale = max(float(t.abs().nan_to_num(0, 0, 0).max()) for t in theirs[1])
            agree(ours[1], theirs[1], atol=1e-5 * scale + 1e-6)


def test_denormal_currents(backend):
    """They are not flushed to zero: the threshold may be one."""
    x = torch.tensor([[TINY, 2 * TINY, 3 * TINY]] * 3)
    options = {"threshold": 2.5 * TINY, "return_potential": True}
    ours, theirs = both(backend, lambda b: tk.lif(x, backend=b, **options))
    assert torch.equal(ours.spikes, theirs.spikes) and 0 < ours.spikes.mean() < 1
    assert torch.equal(ours.potential, theirs.potential)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_half_precision_overflows_only_where_it_is_stored(dtype, backend):
    x = torch.full((6, 10), 32768.0, dtype=dtype, requires_grad=True)
    out = tk.lif(x, decay=1.0, threshold=1e30, reset="none", return_state=True, surrogate=tk.ATan())
    assert out.state.eq(6 * 32768.0).all()  # 3 times what float16 holds
    (grad,) = torch.autograd.grad(out.state, x, torch.full((10,), 1e30))
    assert grad.eq(torch.tensor(1e30).to(dtype)).all()  # infinity in float16
    # The gradient through time is float32: it may pass through numbers that half has not.
    small = torch.full((3, 10), 0.25, dtype=dtype, requires_grad=True)
    state = tk.lif(small, decay=1e-3, reset="none", return_state=True).state
    (grad,) = torch.autograd.grad(state, small, torch.full((10,), 1e6))
    assert grad[0].double().allclose(torch.tensor(1.0).double(), rtol=1e-2)


@pytest.mark.parametrize("phi", PHIS)
def test_membrane_penalty_at_extremes(phi, backend):
    """δt to overflow, and potentials of 1e15, whose squares are finite in float32."""
    for delta, size in itertools.product((0.0, 1.0, 30.0, 1e4, 1e300), (1.0, 1e15, 1e-30)):
        x = torch.randn(8, 20) * size
        penalty = tk.MembranePenalty(phi, torch.ones(8), delta=delta)

        def results(b, x=x, penalty=penalty):
            leaf = x.clone().requires_grad_()
            out = tk.lif(leaf, penalty=penalty, backend=b, reset="none")
            return [out.penalty.detach(), *torch.autograd.grad(out.penalty, leaf)]

        ours, theirs = both(backend, results)
        assert ours[0].isfinite() and ours[1].isfinite().all()
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-30)
        assert relative_error(ours[1], theirs[1]) < 1e-5


@pytest.mark.parametrize("delta", (0.0, 0.5, 30.0, 700.0, 1e300))
def test_weight_regularizer_at_extremes(delta, backend):
    """Denormal weights and those of 1e18, whose squares are finite in float32."""
    w = torch.tensor([0.0, TINY, -TINY, 1e-30, -1e-10, 1.0, -1e5, 1e18])
    settings = {"steps": 10, "weight": 1e-3, "delta": delta, "eps": 1e-5}
    leaf, exact = w.clone().requires_grad_(), w.double().requires_grad_()
    value = tk.trt_penalty([leaf], **settings)
    reference = tk.trt_penalty([exact], **settings, backend="reference")
    (grad,) = torch.autograd.grad(value, leaf)
    (expected,) = torch.autograd.grad(reference, exact)
    assert float(value.detach()) == pytest.approx(float(reference.detach()), rel=1e-5)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-37)


def test_loss_at_extremes(backend):
    """Logits of 1e30 give what float64 gives: no exponential overflows."""
    target = torch.tensor([0, 1, 2, 0])
    for size in (1e4, 1e30, TINY):
        logits = torch.randn(3, 4, 5) * size
        leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
        value = tk.temporal_loss(leaf, target)
        reference = tk.temporal_loss(exact, target, backend="reference")
        assert float(value.detach()) == pytest.approx(float(reference.detach()), rel=1e-6)
        (grad,), (expected,) = (
            torch.autograd.grad(v, p) for v, p in ((value, leaf), (reference, exact))
        )
        torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-7)


def test_batch_norm_of_extremes(backend):
    """A channel without deviation, one of 1e18 and a denormal one: finite, as in float64."""
    x = torch.randn(4, 3, 3, 6)
    x[:, :, 0] = 5.0
    x[:, :, 1] *= 1e18
    x[:, :, 2] *= TINY
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    results = []
    for given, b in ((leaf, backend), (exact, "reference")):
        out = tk.batch_norm_lif(
            given, None, None, training=True, return_potential=True, backend=b, reset="none"
        )
        grad = torch.linspace(-1, 1, out.potential.numel()).view_as(out.potential)
        (grad,) = torch.autograd.grad(out.potential, given, grad.to(out.potential.dtype))
        results.append((out.potential.detach(), grad))
    (h, g), (h_exact, g_exact) = results
    torch.testing.assert_close(h.double(), h_exact, rtol=1e-5, atol=1e-5)
    assert g.isfinite().all()
    for channel in range(3):
        assert relative_error(g[:, :, channel], g_exact[:, :, channel]) < 1e-4


def test_long_sums_keep_their_digits(backend):
    """Of 10⁹ weights, by one of them and its repeats; see test_huge.py for 3·2³⁰ different ones."""
    count = 10**6 if backend == "cpu" else 10**4
    w = torch.full((count,), 0.1)
    settings = {"steps": 2, "weight": 1.0, "delta": 0.3}
    each = tk.trt_penalty([w[:1].double()], **settings, backend="reference")
    value = tk.trt_penalty([w] * (1000 if backend == "cpu" else 2), **settings)
    times = count * (1000 if backend == "cpu" else 2)
    # float32 holds 24 bits of the sum; a sum in float32 would have lost ten of them.
    assert float(value) == pytest.approx(float(each) * times, rel=3e-7)
    assert math.isfinite(float(value))
