"""`lif` with tensors for decay, threshold and v_reset, and `nn.PLIF`: gradients through time."""

import itertools

import pytest
import torch

import trt_kernels as tk
from tests.cases import RESETS, SURROGATES, charges, quantised, relative_error, without_time
from trt_kernels.options import CHARGES

# (shape, time_dim, channel_dim): channels outside and inside of time, next to each other in memory,
# in runs, in runs that no vector divides, more of them than a tile has, and one value for all.
LAYOUTS = (
    ((4, 3, 5, 6, 6), 0, 2),
    ((3, 5, 12, 7), 1, 2),
    ((3, 6, 5, 3), 1, 0),
    ((5, 6, 140), 0, 2),
    ((5, 3, 4, 3), 3, 1),
    ((17, 2, 8, 3), 0, 2),
    ((6, 50), 0, None),
)


def skips(backend, number):
    """Triton's interpreter is slow: it takes a sixth of the cases, another one for each charge."""
    return backend == "triton" and number % 6


def leaves_of(x, time_dim, channels):
    """x, v_init, decay, threshold, v_reset."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    v_init = quantised(without_time(x.shape, time_dim)).to(dtype)
    decay = torch.rand(channels, dtype=dtype) * 0.5 + 0.3
    threshold = torch.rand(channels, dtype=dtype) * 0.4 + 0.5
    v_reset = torch.rand(channels, dtype=dtype) * 0.3 - 0.2
    return [t.detach().requires_grad_() for t in (x, v_init, decay, threshold, v_reset)]


def run(leaves, grads=None, **options):
    x, v_init, decay, threshold, v_reset = leaves
    out = tk.lif(
        x,
        v_init=v_init,
        decay=decay,
        threshold=threshold,
        v_reset=v_reset,
        return_state=True,
        return_potential=True,
        **options,
    )
    outputs = [o for o in (out.spikes, out.state, out.penalty, out.potential) if o is not None]
    if grads is None:
        grads = [torch.randn_like(o) for o in outputs]
    return out, torch.autograd.grad(outputs, leaves, grads, allow_unused=True), grads


def compare(leaves, bound, **options):
    """Forward bit for bit, every gradient norm-wise; in a sum that cancels, by its parts."""
    theirs, exact, grads = run(leaves, backend="reference", **options)
    ours, found, _ = run(leaves, grads, **options)
    for name in ("spikes", "state", "potential"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for leaf, a, b in zip(leaves, found, exact, strict=True):
        if b is None:
            assert a is None or not a.any()
            continue
        assert a.dtype == leaf.dtype and a.shape == leaf.shape
        scale = max(float(b.double().norm()), leaves[0].numel() ** 0.5 if leaf.ndim < 2 else 0.0)
        assert float((a.double() - b.double()).norm()) < bound * scale


@pytest.mark.parametrize("shape,time_dim,channel_dim", LAYOUTS, ids=str)
@pytest.mark.parametrize("charge", CHARGES)
def test_matches_the_reference(shape, time_dim, channel_dim, charge, backend):
    channels = 1 if channel_dim is None else shape[channel_dim]
    for number, (reset, detach) in enumerate(itertools.product(RESETS, (False, True))):
        if charge not in charges(reset) or skips(backend, number + len(charge)):
            continue
        compare(
            leaves_of(quantised(shape), time_dim, channels),
            3e-6,
            time_dim=time_dim,
            channel_dim=channel_dim,
            charge=charge,
            reset=reset,
            detach_reset=detach,
            surrogate=SURROGATES[number % len(SURROGATES)],
            fire_at_threshold=number % 2 == 0,
            penalty=tk.MembranePenalty(("square", "spike")[number % 2], [1.0] * shape[time_dim]),
        )


def test_channels_last_and_half_precision(backend):
    base = quantised((12, 5, 6, 6)).contiguous(memory_format=torch.channels_last)
    for dtype, bound in ((torch.float32, 3e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)):
        x = base.to(dtype).unflatten(0, (4, 3))
        compare(leaves_of(x, 0, 5), bound, channel_dim=2)


@pytest.mark.parametrize("charge", CHARGES)
def test_gradients_are_those_of_the_reference_in_float64(charge, backend):
    for number, (reset, detach) in enumerate(itertools.product(RESETS, (False, True))):
        if charge not in charges(reset) or skips(backend, number + len(charge)):
            continue
        options = {"channel_dim": 2, "reset": reset, "detach_reset": detach, "charge": charge}
        x = torch.randn(6, 2, 3, 5, dtype=torch.float64)
        compare(leaves_of(x, 0, 3), 1e-12, surrogate=tk.ATan(), **options)


def test_gradcheck_where_smooth(backend):
    """Without spikes, and without a surrogate's slope, the gradient is that of differences."""
    x = torch.rand(4, 2, 3, dtype=torch.float64) * 0.3 + 0.05
    # Triton's interpreter is slow, and a form of charge is the same whatever it divides by.
    for charge in ("leak", "divide") if backend == "triton" else charges("hard"):
        leaves = leaves_of(x, 0, 3)

        def smooth(x, v_init, decay, v_reset, charge=charge):
            out = tk.lif(
                x,
                v_init=v_init * 0.1,
                decay=decay,
                threshold=9.0,
                v_reset=v_reset,
                charge=charge,
                channel_dim=2,
                return_state=True,
                return_potential=True,
            )
            return out.state, out.potential

        assert torch.autograd.gradcheck(smooth, (*leaves[:3], leaves[4]))


def test_scalars_and_floats_stand_beside_channels(backend):
    x = quantised((5, 4, 6))
    channels = torch.rand(6)
    mixed = tk.lif(x, decay=torch.tensor(0.5), threshold=channels, v_reset=0.0, channel_dim=2)
    spread = tk.lif(x, decay=torch.full((6,), 0.5), threshold=channels, channel_dim=-1)
    assert torch.equal(mixed, spread)
    one = tk.lif(x, decay=torch.tensor([0.7]), threshold=torch.tensor(0.9))
    assert torch.equal(one, tk.lif(x, decay=0.7, threshold=0.9))


def test_an_annealed_tensor_needs_no_gradient(backend):
    x = quantised((5, 40)).requires_grad_()
    grads = [
        torch.autograd.grad(tk.lif(x, threshold=threshold).sum(), x)[0]
        for threshold in (torch.tensor(0.8), 0.8)
    ]
    assert torch.equal(*grads)


def test_empty(backend):
    """Whatever the strides are, which mean nothing where there are no elements."""
    for shape, strides in (
        ((0, 3, 2), (6, 2, 1)),
        ((0, 3, 2), (6, 0, 0)),
        ((0, 3, 2), (6, 1, 3)),
        ((4, 3, 0), (0, 0, 0)),
        ((17, 3, 0), (0, 0, 1)),
    ):
        x = torch.zeros(0).as_strided(shape, strides).requires_grad_()
        threshold = torch.ones(3, requires_grad=True)
        v_init = torch.rand(shape[1:], requires_grad=True)
        out = tk.lif(x, threshold=threshold, channel_dim=1, v_init=v_init, return_state=True)
        assert torch.equal(out.state, v_init) and out.spikes.shape == shape
        total = out.spikes.sum() + out.state.sum()
        grads = torch.autograd.grad(total, (x, threshold, v_init))
        assert not grads[1].any() and torch.equal(grads[2], torch.ones_like(v_init))


def test_decay_one_integrates_and_fires(backend):
    x = torch.rand(6, 30)
    expected = (x.cumsum(0) > 2).float().cummax(0).values
    assert torch.equal(tk.lif(x, decay=1.0, threshold=2.0, reset="none"), expected)


def test_sums_have_one_order(threads):
    x = torch.randn(5, 30, 70, 9, requires_grad=True)
    for channels, channel_dim in ((1, None), (70, 2)):
        decay = torch.rand(channels, requires_grad=True)
        threshold = torch.rand(channels, requires_grad=True)
        results = []
        for count in (1, 2, 5):
            threads(count)
            out = tk.lif(x, decay=decay, threshold=threshold, channel_dim=channel_dim)
            results.append(torch.autograd.grad(out.sum(), (decay, threshold)))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


def test_plif(backend):
    x = quantised((6, 4, 5)).requires_grad_()
    layer = tk.nn.PLIF(init_tau=2.0)
    assert layer.w.sigmoid().item() == 0.5
    v, spikes = torch.zeros(4, 5), []
    for x_t in x.detach():
        h = v + (x_t - v) * layer.w.sigmoid()
        spikes.append((h > 1).float())
        v = torch.where(h > 1, 0.0, h)
    assert torch.equal(layer(x), torch.stack(spikes))
    layer(x).sum().backward()
    with tk.use_backend("reference"):
        expected = torch.autograd.grad(layer(x).sum(), layer.w)[0]
    assert relative_error(layer.w.grad, expected) < 1e-5
    plain = tk.nn.PLIF(4.0, decay_input=False, channels=5, channel_dim=2, reset="soft")
    assert torch.equal(plain(x), tk.lif(x, decay=0.75, reset="soft"))
    assert list(plain.state_dict()) == ["w"] and plain.w.shape == (5,)


def test_parameters_of_lif_are_the_modules():
    layer = tk.nn.LIF(decay=torch.nn.Parameter(torch.tensor(0.5)), threshold=torch.tensor(0.9))
    assert [name for name, _ in layer.named_parameters()] == ["decay"]
    assert [name for name, _ in layer.named_buffers()] == ["threshold"]
    x = torch.randn(4, 9)
    assert torch.equal(layer(x), tk.lif(x, threshold=0.9))
    assert layer.double()(x.double()).dtype == torch.float64
    stateful = tk.nn.LIF(decay=torch.nn.Parameter(torch.tensor(0.5)), stateful=True)
    assert torch.equal(torch.cat([stateful(part) for part in x.split(2)]), tk.lif(x))


@pytest.mark.parametrize(
    "make,error,message",
    [
        (lambda: tk.nn.PLIF(1.0), ValueError, "init_tau: got 1.0"),
        (lambda: tk.nn.PLIF(decay=0.5), TypeError, "decay: PLIF learns it"),
        (lambda: tk.nn.PLIF(charge="divide"), TypeError, "charge: PLIF learns it"),
        (lambda: tk.nn.PLIF(channels=3), ValueError, "channel_dim: got None"),
        (lambda: tk.nn.PLIF(channels=0, channel_dim=1), ValueError, "channels: got 0"),
        (lambda: tk.nn.PLIF(memory="bits"), ValueError, "memory: 'bits'"),
        (lambda: tk.nn.LIF(decay=torch.ones(2, 2)), ValueError, "decay: got shape"),
        (lambda: tk.nn.LIF(decay=torch.ones(2).long()), TypeError, "decay: got dtype"),
    ],
)
def test_bad_modules(make, error, message):
    with pytest.raises(error, match=message):
        make()
