"""`lif` on every backend with kernels, against the reference."""

import gc
import itertools
import multiprocessing
import resource
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import trt_kernels as tk
from tests.cases import (
    PHIS,
    RESETS,
    SHAPES,
    SURROGATES,
    at_potentials,
    charges,
    lif_gradients,
    quantised,
    random_grads,
    relative_error,
    without_time,
)
from trt_kernels import LIFOutput, functional
from trt_kernels.backends.reference.lif import Fire

NEURONS = list(itertools.product(RESETS, (False, True)))  # (reset, detach_reset)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def inputs_of(shape, time_dim, dtype=torch.float32):
    state = torch.float64 if dtype == torch.float64 else torch.float32
    x = quantised(shape).to(dtype).requires_grad_()
    v_init = quantised(without_time(shape, time_dim)).to(state).requires_grad_()
    return x, v_init


def compare(inputs, **options):
    """The default backend against the reference: forward bit for bit, backward norm-wise."""
    reference, _ = lif_gradients(inputs, None, backend="reference", **options)
    grads = random_grads(reference)
    out, ours = lif_gradients(inputs, grads, **options)
    reference, theirs = lif_gradients(inputs, grads, backend="reference", **options)
    for name in ("spikes", "state", "potential"):
        a, b = getattr(out, name), getattr(reference, name)
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    assert out.spikes.stride() == reference.spikes.stride()
    if out.penalty is not None:
        torch.testing.assert_close(out.penalty, reference.penalty, rtol=2e-6, atol=1e-7)
    bound = 1e-2 if inputs[0].dtype in (torch.bfloat16, torch.float16) else 2e-6
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert relative_error(a, b) < bound


@pytest.mark.parametrize("reset,detach_reset", NEURONS)
@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda s: s.name)
def test_matches_reference_for_every_neuron(reset, detach_reset, surrogate, kernels):
    kinds = itertools.product(charges(reset), (False, True))
    for (charge, at), phi in zip(kinds, itertools.cycle(PHIS)):
        shape, time_dim = ((6, 5, 43), 0)
        compare(
            inputs_of(shape, time_dim),
            decay=1 / 3,
            threshold=0.7,
            v_reset=-0.1,
            reset=reset,
            detach_reset=detach_reset,
            surrogate=surrogate,
            charge=charge,
            fire_at_threshold=at,
            time_dim=time_dim,
            penalty=tk.MembranePenalty(phi, torch.rand(6), delta=0.3),
        )


@pytest.mark.parametrize("shape,time_dim", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_for_every_shape_and_dtype(shape, time_dim, dtype, kernels):
    compare(inputs_of(shape, time_dim, dtype), time_dim=time_dim)
    compare(
        inputs_of(shape, time_dim, dtype),
        time_dim=time_dim - len(shape),
        reset="soft",
        surrogate=tk.Sigmoid(4.0),
        penalty=tk.MembranePenalty("square", torch.rand(shape[time_dim])),
    )


@pytest.mark.parametrize("steps", (100, 1000))
def test_long_sequences(steps, backend):
    steps = min(steps, 170) if backend == "triton" else steps  # its interpreter is slow
    compare(inputs_of((steps, 300), 0), decay=0.9)
    compare(inputs_of((3, steps, 50), 1), decay=0.9, time_dim=1, reset="soft")


@pytest.mark.parametrize("steps", (15, 16, 17, 31, 32, 33, 48, 49))
def test_segments_of_time(steps, backend):
    """A GPU's backward pass takes a sequence in segments of 16 steps: their borders."""
    penalty = tk.MembranePenalty("trt", torch.rand(steps), delta=0.1)
    for shape, time_dim in (((steps, 5, 8), 0), ((3, steps, 9), 1)):
        compare(inputs_of(shape, time_dim), time_dim=time_dim, decay=0.9)
        compare(inputs_of(shape, time_dim), time_dim=time_dim, penalty=penalty, charge="divide")


@pytest.mark.parametrize("steps", (1, 5, 15, 16, 17, 33, 49))
@pytest.mark.parametrize("reset", RESETS)
def test_spikes_and_states_alone(steps, reset, backend):
    """The kernels of a GPU that know nothing else are not those that write potentials too."""
    for shape, time_dim, detach in (((steps, 5, 8), 0, False), ((3, steps, 9), 1, True)):
        x, v_init = inputs_of(shape, time_dim)
        options = {"decay": 0.9, "reset": reset, "detach_reset": detach, "time_dim": time_dim}
        for leaves, more in (
            ((x,), {}),
            ((x, v_init), {"v_init": v_init}),
            ((x, v_init), {"v_init": v_init, "return_state": True}),
        ):
            results, grads = [], None
            for chosen in (backend, "reference"):
                out = tk.lif(x, backend=chosen, **options, **more)
                out = (out.spikes, out.state) if "return_state" in more else (out,)
                grads = [torch.randn_like(t) for t in out] if grads is None else grads
                results.append((out, torch.autograd.grad(out, leaves, grads)))
            (ours, our_grads), (theirs, their_grads) = results
            assert all(map(torch.equal, ours, theirs))
            for a, b in zip(our_grads, their_grads, strict=True):
                assert relative_error(a, b) < 2e-6


def test_bits_over_1e8_neuron_steps():
    """Spikes and potentials, half of them on inputs quantised to 0.1 that meet the threshold."""
    count = 0
    settings = itertools.cycle(
        [
            {},
            {"reset": "soft", "decay": 0.9, "fire_at_threshold": True},
            {"charge": "divide", "decay": 1 / 3},
            {"reset": "none", "decay": 0.7},
        ]
    )
    while count < 100_000_000:
        options = next(settings)
        for x in (torch.randn(10, 640_000), quantised((10, 640_000))):
            with torch.no_grad():
                ours = tk.lif(x, return_potential=True, backend="cpu", **options)
                theirs = tk.lif(x, return_potential=True, backend="reference", **options)
            assert torch.equal(ours.spikes, theirs.spikes)
            assert torch.equal(ours.potential, theirs.potential)
            count += x.numel()


@pytest.mark.parametrize("reset,detach_reset", NEURONS)
@pytest.mark.parametrize("phi", (None, *PHIS))
def test_gradients_against_float64_at_the_same_potentials(reset, detach_reset, phi, backend):
    for surrogate in SURROGATES:
        x, v_init = inputs_of((10, 4000 if backend == "cpu" else 400), 0)
        options = {
            "decay": 0.5,
            "threshold": 1.0,
            "v_reset": 0.0,
            "reset": reset,
            "detach_reset": detach_reset,
            "surrogate": surrogate,
            "fire_at_threshold": False,
            "time_dim": 0,
        }
        if phi is not None:
            options["penalty"] = tk.MembranePenalty(phi, torch.rand(10))
        out, _ = lif_gradients((x, v_init), None, **options)
        grads = random_grads(out)
        _, ours = lif_gradients((x, v_init), grads, **options)
        grad_spikes, grad_state, *rest = grads
        grad_penalty, grad_potential = rest if phi is not None else (None, rest[0])
        exact = at_potentials(
            x.detach(),
            v_init.detach(),
            (grad_spikes, grad_state, grad_penalty, grad_potential),
            out.potential.detach(),
            **options,
        )
        for a, b in zip(ours, exact, strict=True):
            assert relative_error(a, b) < 1e-6, surrogate


@pytest.mark.parametrize("phi", PHIS[:3])
def test_gradcheck_where_smooth(phi, backend):
    """Below the threshold, and without a surrogate's slope, everything is differentiable."""
    x = (torch.rand(4, 6, dtype=torch.float64) * 0.3 + 0.05).requires_grad_()
    v_init = (torch.rand(6, dtype=torch.float64) * 0.1).requires_grad_()
    penalty = tk.MembranePenalty(phi, torch.rand(4, dtype=torch.float64))

    def smooth(x, v_init):
        out = tk.lif(
            x,
            v_init=v_init,
            threshold=5.0,
            surrogate=tk.Triangle(1.0),
            penalty=penalty,
            return_state=True,
            return_potential=True,
        )
        return out.state, out.penalty, out.potential

    assert torch.autograd.gradcheck(smooth, (x, v_init))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_is_as_good_as_plain_torch(dtype, backend):
    """Error against float32 at most twice that of the same loop with half inputs in plain torch."""
    x = torch.randn(8, 5000).to(dtype)
    exact = x.float().requires_grad_()
    grad = torch.randn(8, 5000).to(dtype)
    tk.lif(exact, reset="none", surrogate=tk.ATan(), backend="reference").backward(grad.float())

    ours = x.clone().requires_grad_()
    tk.lif(ours, reset="none", surrogate=tk.ATan()).backward(grad)
    plain = x.clone().requires_grad_()
    v, spikes = torch.zeros_like(plain[0]), []
    for x_t in plain:
        v = 0.5 * v + x_t
        spikes.append(Fire.apply(v, 1.0, False, tk.ATan()))
    torch.stack(spikes).backward(grad)
    assert relative_error(ours.grad, exact.grad) <= 2 * relative_error(plain.grad, exact.grad)


@pytest.mark.parametrize("delta,eps", ((0.5, 2.0), (200.0, 0.1)), ids=("eps", "overflow"))
def test_the_decaying_penalty_at_its_limits(delta, eps, backend):
    """An eps that is large, and a factor of 1 / expm1(δt) that overflows: those terms are 0."""
    x = torch.randn(6, 90)
    x[:, :10] = 0  # potentials that are 0, too
    results = []
    for chosen in (backend, "reference"):
        leaf = x.clone().requires_grad_()
        penalty = tk.MembranePenalty("trt", torch.full((6,), 0.7), delta=delta, eps=eps)
        out = tk.lif(leaf, penalty=penalty, backend=chosen)
        results.append((out.penalty, torch.autograd.grad(out.penalty, leaf)[0]))
    (value, grad), (their_value, their_grad) = results
    torch.testing.assert_close(value, their_value, rtol=2e-6, atol=0)
    assert grad.isfinite().all() and relative_error(grad, their_grad) < 2e-6
    if delta > 100:
        torch.testing.assert_close(value, 0.7 * x[0].square().mean(), rtol=1e-5, atol=0)


def test_layouts_are_read_in_place_and_kept(backend):
    for time_dim, order in ((0, (0, 1, 3, 4, 2)), (1, (0, 1, 3, 4, 2)), (1, (1, 0, 2, 3, 4))):
        base = torch.randn(4, 3, 6, 5, 2)
        inverse = [order.index(i) for i in range(5)]
        x = base.permute(order).contiguous().permute(inverse).requires_grad_()
        assert not x.is_contiguous()
        v_init = torch.randn(without_time(x.shape, time_dim), requires_grad=True)
        compare((x, v_init), time_dim=time_dim)
        out = tk.lif(x, time_dim=time_dim, return_potential=True)
        assert out.spikes.stride() == out.potential.stride() == x.stride()


def test_views_at_odd_offsets_write_nothing_outside(backend):
    for dtype, offset in itertools.product(DTYPES, (1, 2, 3, 5)):
        base = torch.randn(200).to(dtype)
        x = base[offset : offset + 5 * 33].view(5, 33)
        before = base.clone()
        out = tk.lif(x)
        assert torch.equal(out, tk.lif(x.clone()))
        assert torch.equal(base, before)


def test_kernel_writes_between_sentinels():
    """The binding is given memory inside a larger buffer: what lies around it must survive."""
    from trt_kernels.backends.native import DTYPES as native_dtypes
    from trt_kernels.backends.native import lif_handle

    tk.functional._checked.clear()
    tk.lif(torch.zeros(1, 1))
    ((options, _),) = tk.functional._checked.values()
    for columns, offset in itertools.product((1, 7, 33, 129, 300), (1, 3)):
        x, g = torch.randn(6, columns), torch.randn(6, columns)
        buffer = torch.full((6 * columns + 64,), 7.0)
        target = buffer[offset : offset + 6 * columns].view(6, columns)
        head = (native_dtypes[x.dtype], x.shape, 0, x.data_ptr())
        lif_handle(options).cpu_forward_plain(*head, target.data_ptr(), 2)
        assert torch.equal(target, tk.lif(x))
        lif_handle(options).cpu_backward_plain(*head, g.data_ptr(), target.data_ptr(), 2)
        outside = torch.cat([buffer[:offset], buffer[offset + 6 * columns :]])
        assert (outside == 7).all()


def test_gradients_of_any_layout(backend):
    x = torch.randn(4, 3, 5, requires_grad=True)
    dense = torch.autograd.grad(tk.lif(x), x, torch.ones(4, 3, 5))[0]
    expanded = torch.autograd.grad(tk.lif(x), x, torch.ones(()).expand(4, 3, 5))[0]
    transposed = torch.ones(5, 3, 4).permute(2, 1, 0)
    permuted = torch.autograd.grad(tk.lif(x), x, transposed)[0]
    gapped = torch.autograd.grad(tk.lif(x), x, torch.ones(4, 3, 10)[..., ::2])[0]
    for other in (expanded, permuted, gapped):
        assert torch.equal(dense, other)
    assert torch.equal(torch.autograd.grad(tk.lif(x).sum(), x)[0], dense)


def test_gapped_and_expanded_inputs(backend):
    x = torch.randn(4, 3, 10)[..., ::2].requires_grad_()
    compare((x, torch.randn(3, 5, requires_grad=True)))
    constant = torch.randn(3, 5, requires_grad=True)
    ours = torch.autograd.grad(tk.lif(constant.expand(4, 3, 5)).sum(), constant)[0]
    theirs = torch.autograd.grad(
        tk.lif(constant.expand(4, 3, 5), backend="reference").sum(), constant
    )[0]
    assert relative_error(ours, theirs) < 1e-6


def test_only_some_outputs_used(backend):
    x, v_init = inputs_of((4, 50), 0)
    penalty = tk.MembranePenalty("trt", torch.rand(4))
    for name in ("spikes", "state", "penalty", "potential"):
        grads = []
        for chosen in (backend, "reference"):
            out = tk.lif(
                x,
                v_init=v_init,
                penalty=penalty,
                return_state=True,
                return_potential=True,
                backend=chosen,
            )
            grads.append(torch.autograd.grad(getattr(out, name).sum(), (x, v_init)))
        for a, b in zip(*grads, strict=True):
            assert relative_error(a, b) < 2e-6, name


def test_v_init_as_a_number(backend):
    x = quantised((4, 5, 6))
    for time_dim, shape in ((0, (5, 6)), (1, (4, 6)), (2, (4, 5))):
        for value in (0.0, -0.4):
            options = {"time_dim": time_dim, "return_potential": True}
            ours = tk.lif(x, v_init=value, **options)
            full = tk.lif(x, v_init=torch.full(shape, value), **options)
            assert torch.equal(ours.spikes, full.spikes)
            assert torch.equal(ours.potential, full.potential)


def test_only_v_init_needs_a_gradient(backend):
    v_init = torch.rand(5, requires_grad=True)
    (grad,) = torch.autograd.grad(tk.lif(torch.rand(3, 5), v_init=v_init).sum(), v_init)
    assert grad.shape == (5,) and grad.isfinite().all()


def test_float64_is_float64_throughout():
    """No number is rounded to float32 on the way, in the reference neither."""
    x = torch.tensor([[1 / 3, 0.7]] * 2, dtype=torch.float64)
    for chosen in ("cpu", "reference"):
        options = {"decay": 0.3, "threshold": 0.2, "return_potential": True, "backend": chosen}
        potential = tk.lif(x, charge="delayed", reset="none", **options).potential
        assert torch.equal(potential[1], x[0] * 0.3 + x[1] - 0.2)


def test_chunks_carry_the_state_exactly(backend):
    x = torch.randn(12, 77)
    whole = tk.lif(x, return_state=True)
    state, spikes = None, []
    for chunk in x.split(5):
        out = tk.lif(chunk, v_init=state, return_state=True)
        state = out.state
        spikes.append(out.spikes)
    assert torch.equal(torch.cat(spikes), whole.spikes)
    assert torch.equal(state, whole.state)


def test_nonfinite_inputs_propagate_as_in_the_reference(backend):
    special = (float("nan"), float("inf"), -float("inf"))
    for value, reset, detach, surrogate in itertools.product(
        special, RESETS, (False, True), SURROGATES
    ):
        x = torch.randn(6, 100)
        x[torch.rand_like(x) < 0.1] = value
        results = []
        for chosen in (backend, "reference"):
            leaf = x.clone().requires_grad_()
            out = tk.lif(
                leaf,
                reset=reset,
                detach_reset=detach,
                surrogate=surrogate,
                return_potential=True,
                backend=chosen,
            )
            out.spikes.sum().backward()
            results.append((out.spikes.detach(), out.potential.detach(), leaf.grad))
        (s, h, g), (s_ref, h_ref, g_ref) = results
        assert torch.equal(s, s_ref)
        torch.testing.assert_close(h, h_ref, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(g, g_ref, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("reference", (False, True))
def test_empty(backend, reference):
    for shape, time_dim in (((0, 5), 0), ((4, 0), 0), ((2, 0, 3), 1), ((0, 4, 3), 1), ((17, 0), 0)):
        x = torch.zeros(shape, requires_grad=True)
        v_init = torch.ones(without_time(shape, time_dim), requires_grad=True)
        out = tk.lif(
            x,
            v_init=v_init,
            time_dim=time_dim,
            penalty=tk.MembranePenalty("square", torch.ones(shape[time_dim])),
            return_state=True,
            return_potential=True,
            backend="reference" if reference else backend,
        )
        assert out.spikes.shape == out.potential.shape == torch.Size(shape)
        assert torch.equal(out.state, v_init)
        assert out.penalty == 0
        gx, gv = torch.autograd.grad(
            out.spikes.sum() + out.state.sum(), (x, v_init), allow_unused=True
        )
        assert gx is None or gx.shape == x.shape
        assert torch.equal(gv, torch.ones_like(v_init))


def test_results_do_not_depend_on_threads(threads):
    for shape, time_dim in (((6, 70001), 0), ((9, 6, 5000), 1), ((3000, 6, 20), 1)):
        x = torch.randn(shape, requires_grad=True)
        penalty = tk.MembranePenalty("trt", torch.rand(6))
        results = []
        for count in (1, 2, 5, 2):
            threads(count)
            out = tk.lif(x, time_dim=time_dim, penalty=penalty)
            (grad,) = torch.autograd.grad(out.spikes.sum() + out.penalty, x)
            results.append((out.spikes.detach(), out.penalty.detach(), grad))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


def _in_child(x, queue):
    # Large enough for our threads, too small for torch's own, which hang in a fork by themselves.
    tk.lif(x).backward(torch.ones_like(x))
    queue.put(float(x.grad.max()))


def test_works_in_a_forked_child():
    """libgomp hangs in a fork after its threads were started, unless the kernel runs serially."""
    x = torch.ones(4, 8000, requires_grad=True)
    assert x.numel() > 16 * 1024
    tk.lif(torch.ones(4, 100_000))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(x, queue))
    child.start()
    child.join(timeout=60)
    hung = child.is_alive()
    child.kill()
    assert not hung
    tk.lif(x).backward(torch.ones_like(x))
    assert queue.get() == float(x.grad.max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keeps_one_tensor_like_x(dtype, backend):
    x = torch.randn(6, 1000).to(dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tk.lif(x, penalty=tk.MembranePenalty("square", torch.ones(6)), return_state=True)
    big = [t for t in kept if t is not None and t.numel() > 6]
    assert [t.data_ptr() for t in big] == [x.data_ptr()]
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tk.lif(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_sequence_keeps_a_state_every_16_steps_on_a_gpu(dtype, backend):
    x = torch.randn(100, 30).to(dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tk.lif(x)
    state = 8 if dtype == torch.float64 else 4
    extra = 0 if backend == "cpu" else 6 * 30 * state
    assert sum(t.nbytes for t in kept if t is not None) == x.nbytes + extra
    with torch.no_grad():
        kept.clear()
        tk.lif(x)
    assert not kept


def test_the_short_way_with_a_state_gives_the_same(kernels):
    """As above, from a state and into state and potentials; a single step has no time at all."""
    if kernels == "triton":
        pytest.skip("Triton has no shorter path")
    asked = itertools.product((False, True), (False, True), (False, True))
    for dtype, (starts, state, potential) in itertools.product(DTYPES, asked):
        x = torch.randn(4, 5, 41).to(dtype).requires_grad_()
        v = torch.randn(5, 41, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
        leaves = [x, v] if starts else [x]
        options = {"surrogate": tk.ATan(), "charge": "leak", "v_init": v if starts else None}
        returned = {"return_state": state, "return_potential": potential}
        short = tk.lif(x, **options, **returned)
        long = tk.lif(x, **options, **returned, statistics=True)._replace(rate=None)
        if not (state or potential):
            short = LIFOutput(short, None, None, None, None)
        if starts or state or potential:
            assert type(short.spikes.grad_fn).__name__ == "LIFCarriedBackward"
        grads = [None if t is None else torch.randn_like(t) for t in short]
        results = []
        for out in (short, long):
            pairs = [(t, g) for t, g in zip(out, grads, strict=True) if t is not None]
            outputs, arriving = zip(*pairs, strict=True)
            results.append(torch.autograd.grad(outputs, leaves, arriving))
        for a, b in zip(short, long, strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_single_steps_are_those_of_a_sequence(backend):
    x = quantised((4, 5, 8)).requires_grad_()
    for charge, reset in (("decay", "hard"), ("delayed", "none"), ("leak_divide", "soft")):
        options = {"charge": charge, "reset": reset, "decay": 0.6, "threshold": 0.7}
        whole = tk.lif(x, **options, return_state=True, return_potential=True)
        for layout in (x, x.transpose(1, 2)):
            v, spikes, potentials = None, [], []
            for current in layout.unbind():
                out = functional.lif_step(current, v, options, return_potential=True)
                v = out.state
                spikes.append(out.spikes)
                potentials.append(out.potential)
            back = (lambda t: t) if layout is x else (lambda t: t.transpose(-1, -2))
            results = [back(t) for t in (torch.stack(spikes), v, torch.stack(potentials))]
            expected = (whole.spikes, whole.state, whole.potential)
            for a, b in zip(results, expected, strict=True):
                assert torch.equal(a, b)
            scales = [torch.randn_like(t) for t in expected]
            # What arrives through an expansion is not contiguous; and half of it may be nothing.
            for chosen in ((0, 1, 2), (0,), (1,), (2,)):
                ours, theirs = (
                    torch.autograd.grad(
                        sum((t[i] * scales[i]).sum() + t[i].sum() for i in chosen),
                        x,
                        retain_graph=True,
                    )[0]
                    for t in (results, expected)
                )
                assert relative_error(ours, theirs) < 1e-6
    with pytest.raises(ValueError, match=r"v_init: got shape \(3,\)"):
        functional.lif_step(x[0], torch.zeros(3), {})
    with pytest.raises(ValueError, match="decay: got"):
        functional.lif_step(x[0], None, {"decay": float("nan")})


def test_the_short_way_gives_the_same(kernels):
    """Spikes alone of a contiguous tensor take a shorter path: both paths, bit for bit."""
    if kernels == "triton":
        pytest.skip("Triton has no shorter path")
    for dtype, time_dim, reset in itertools.product(DTYPES, (0, 1, 2), RESETS):
        x = torch.randn(3, 5, 41).to(dtype).requires_grad_()
        options = {"time_dim": time_dim, "reset": reset, "surrogate": tk.ATan()}
        short = tk.lif(x, **options)
        long = tk.lif(x, statistics=True, **options).spikes
        assert type(short.grad_fn).__name__ == "LIFSpikesBackward"
        assert type(long.grad_fn).__name__ == "LIFFunctionBackward"
        assert torch.equal(short, long)
        grad = torch.randn(3, 5, 41).to(dtype)
        for g in (grad, grad.transpose(0, 1).contiguous().transpose(0, 1), torch._neg_view(grad)):
            a, b = (torch.autograd.grad(out, x, g, retain_graph=True)[0] for out in (short, long))
            assert torch.equal(a, b)


def test_hooks_may_bring_what_is_kept_in_another_order(backend):
    """As torch.autograd.graph.save_on_cpu does with pinned memory."""
    for steps, repack in itertools.product(
        (4, 33), (torch.clone, other_order, torch.Tensor.contiguous)
    ):
        base = torch.randn(3, 6, 5, steps)
        for x in (base.permute(3, 0, 2, 1), base.permute(3, 0, 1, 2).contiguous()):
            x = x.detach().requires_grad_()
            expected = torch.autograd.grad(tk.lif(x), x, torch.ones(x.shape))[0]
            with torch.autograd.graph.saved_tensors_hooks(repack, lambda t: t):
                out = tk.lif(x)
            assert torch.equal(torch.autograd.grad(out, x, torch.ones(x.shape))[0], expected)


def other_order(kept):
    """The same values, with the last dimension outermost in memory."""
    return kept.movedim(-1, 0).contiguous().movedim(0, -1)


def test_changing_x_in_place_is_caught():
    x = torch.randn(4, 5, requires_grad=True)
    y = x * 1
    out = tk.lif(y)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_custom_surrogate_runs_on_the_reference_only():
    def boxcar(u):
        return (u.abs() < 0.5).to(u.dtype)

    x = torch.randn(4, 50, requires_grad=True)
    mine = tk.lif(x, surrogate=boxcar, backend="reference")
    known = tk.lif(x, surrogate=tk.Rectangle(1.0), backend="reference")
    grads = [torch.autograd.grad(out.sum(), x)[0] for out in (mine, known)]
    assert torch.equal(*grads)
    for backend in (None, "cpu", "auto"):
        with pytest.raises(ValueError, match=r"boxcar.*backend='reference'"):
            tk.lif(x, surrogate=boxcar, backend=backend)


def test_surrogate_derived_from_ours_is_the_users_own():
    class Seven(tk.Triangle):
        def __call__(self, u):
            return torch.full_like(u, 7.0)

    x = torch.randn(1, 5, requires_grad=True)
    with pytest.raises(ValueError, match="runs on backend='reference' only"):
        tk.lif(x, surrogate=Seven())
    out = tk.lif(x, surrogate=Seven(), backend="reference")
    assert torch.autograd.grad(out.sum(), x)[0].eq(7).all()
    with pytest.raises(TypeError, match="base class"):
        tk.Surrogate()


def test_user_surrogates_are_not_kept_alive():
    def make():
        big = torch.zeros(3)
        return weakref.ref(big), lambda u: u * 0 + big.sum()

    ref, surrogate = make()
    tk.lif(torch.zeros(2, 3), surrogate=surrogate, backend="reference")
    del surrogate
    gc.collect()
    assert ref() is None


def test_tensors_whose_memory_is_not_their_value():
    """A negative view, and a wrapper subclass anywhere among the arguments, go through the op."""
    x = torch.randn(4, 6)
    assert torch.equal(tk.lif(torch._neg_view(x)), tk.lif(-x))
    y = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(tk.lif(y), y, torch._neg_view(torch.ones(4, 6)))
    (expected,) = torch.autograd.grad(tk.lif(y), y, -torch.ones(4, 6))
    assert torch.equal(grad, expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert tk.lif(x, v_init=torch.ones(6)).shape == x.shape


def test_few_neurons_and_many_steps_take_no_more_memory_than_x():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x = torch.zeros(3_000_000, 1, requires_grad=True)
    tk.lif(x).backward(torch.ones_like(x))
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < 20 * x.nbytes


def test_double_backward_raises(backend):
    x = torch.randn(4, 5, requires_grad=True)
    for chosen in (backend, "reference"):
        with pytest.raises(RuntimeError, match="lif cannot be differentiated twice"):
            torch.autograd.grad(tk.lif(x, backend=chosen).sum(), x, create_graph=True)


X = torch.zeros(4, 3)
BITS = {"memory": "bits", "surrogate": tk.Rectangle(1.0), "detach_reset": True}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    "x,options,error,message",
    [
        (None, {}, TypeError, "x: got NoneType"),
        (X.long(), {}, TypeError, "x: got dtype torch.int64"),
        (X.cfloat(), {}, TypeError, "x: got dtype torch.complex64"),
        (X.to_sparse(), {}, ValueError, "x: got layout torch.sparse_coo"),
        ("quantised", {}, TypeError, "x: got dtype torch.qint8"),
        (torch.zeros(()), {}, ValueError, "x: got a scalar"),
        (X, {"time_dim": 2}, ValueError, "time_dim: got 2"),
        (X, {"time_dim": -3}, ValueError, "time_dim: got -3"),
        (X, {"time_dim": 0.0}, TypeError, "time_dim: got 0.0"),
        (X, {"decay": float("nan")}, ValueError, "decay: got nan"),
        (X, {"decay": float("inf")}, ValueError, "decay: got inf"),
        (X, {"decay": "a"}, TypeError, "decay: got 'a'"),
        (X, {"decay": 10**400}, ValueError, "decay: got 1000"),
        (
            X,
            {"decay": 1e300},
            ValueError,
            "decay: .* not finite in torch.float32",
        ),
        (X, {"threshold": True}, TypeError, "threshold: got True"),
        (X, {"charge": ["decay"]}, ValueError, "charge: got"),
        (X, {"backend": ["cpu"]}, ValueError, "backend: got"),
        (X, {"time_dim": 2**70}, ValueError, "time_dim: got"),
        (torch.nn.UninitializedParameter(), {}, ValueError, "x: got an uninitialised"),
        (X, {"decay": [0.5]}, TypeError, r"decay: got \[0.5\]"),
        (X, {"decay": 0.0, "charge": "divide"}, ValueError, "decay: got 0"),
        (X, {"threshold": float("-inf")}, ValueError, "threshold: got -inf"),
        (X, {"v_reset": float("nan")}, ValueError, "v_reset: got nan"),
        (X, {"reset": "zero"}, ValueError, "reset: got 'zero', needs one of 'hard'"),
        (X, {"detach_reset": 1}, TypeError, "detach_reset: got 1"),
        (X, {"fire_at_threshold": "yes"}, TypeError, "fire_at_threshold: got 'yes'"),
        (X, {"charge": "spikingjelly"}, ValueError, "charge: got 'spikingjelly'"),
        (X, {"surrogate": "triangle"}, TypeError, "surrogate: got 'triangle'"),
        (X, {"surrogate": tk.Triangle}, TypeError, "surrogate: got <class"),
        (X, {"v_init": torch.zeros(4)}, ValueError, r"v_init: got shape \(4,\), needs \(3,\)"),
        (X, {"v_init": torch.zeros(3).double()}, TypeError, "v_init: got dtype torch.float64"),
        (X.half(), {"v_init": torch.zeros(3).half()}, TypeError, "v_init: got dtype"),
        (X, {"v_init": torch.zeros(3, device="meta")}, ValueError, "v_init: got a tensor on meta"),
        (X, {"v_init": "rest"}, TypeError, "v_init: got 'rest'"),
        (X, {"v_init": 1e39}, ValueError, "v_init: got 1e.39, which is not finite"),
        (X, {"charge": "delayed"}, ValueError, "reset: got 'hard', but charge 'delayed'"),
        (X, {"penalty": 0.1}, TypeError, "penalty: got float"),
        (X, {"penalty": tk.MembranePenalty("trt", [1.0])}, ValueError, "penalty: .* 1 entries"),
        (X, {"backend": "gpu"}, ValueError, "backend: got 'gpu', needs one of 'cpu'"),
        (X, {"backend": "cuda"}, RuntimeError, "lif: backend 'cuda' cannot serve"),
        (X.to("meta"), {}, RuntimeError, "no compiled backend serves device meta"),
        (X, {"decay": torch.ones(3)}, ValueError, "decay: .* needs a scalar .*channel_dim"),
        (X, {"threshold": torch.ones(4), "channel_dim": 1}, ValueError, "threshold: .* 3 channels"),
        (X, {"v_reset": torch.ones(1, 3), "channel_dim": 1}, ValueError, "v_reset: got a tensor"),
        (
            X,
            {"decay": torch.ones(3, device="meta"), "channel_dim": 1},
            ValueError,
            "decay: .* meta",
        ),
        (X, {"decay": torch.ones(3).long(), "channel_dim": 1}, TypeError, "decay: got dtype"),
        (X, {"channel_dim": 0}, ValueError, "channel_dim: got 0, which is the time dimension"),
        (X, {"channel_dim": 2}, ValueError, "channel_dim: got 2"),
        (X, {"channel_dim": 1.0}, TypeError, "channel_dim: got 1.0"),
        (X, {"steps": 0}, ValueError, "steps: got 0"),
        (X, {"steps": 2.0}, TypeError, "steps: got 2.0"),
        (X, {"steps": True}, TypeError, "steps: got True"),
        (X, {"steps": 4, "time_dim": 3}, ValueError, "time_dim: got 3"),
        (X, {"steps": 4, "v_init": torch.zeros(3)}, ValueError, r"v_init: .* needs \(4, 3\)"),
        (X, {"statistics": 1}, TypeError, "statistics: got 1"),
        (X, {"memory": "bits"}, ValueError, "memory: 'bits' needs surrogate: Rectangle"),
        (X, {**BITS, "detach_reset": False}, ValueError, "memory: .* detach_reset=True"),
        (
            X,
            {**BITS, "penalty": tk.MembranePenalty("square", torch.ones(4))},
            ValueError,
            "memory: .* 'spike', not 'square'",
        ),
        (X, {**BITS, "backend": "reference"}, ValueError, "memory: .* a backend with kernels"),
        (
            X,
            {**BITS, "decay": torch.tensor(0.5, requires_grad=True)},
            ValueError,
            "memory: 'bits' needs a decay without gradient",
        ),
        (X, {"memory": "none"}, ValueError, "memory: got 'none'"),
        (X, {"return_state": None}, TypeError, "return_state: got None"),
    ],
)
def test_bad_input(x, options, error, message):
    if isinstance(x, str):
        x = torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)
    for _ in range(2):  # a remembered call must not pass the second time
        with pytest.raises(error, match=message):
            tk.lif(x, **options)


@pytest.mark.parametrize(
    "good,bad",
    (
        ({"time_dim": 0}, {"time_dim": 0.0}),
        ({"time_dim": 0}, {"time_dim": False}),
        ({"threshold": 1.0}, {"threshold": True}),
        ({"detach_reset": True}, {"detach_reset": 1}),
        ({"return_state": False}, {"return_state": 0}),
    ),
    ids=str,
)
def test_a_remembered_call_does_not_admit_what_equals_it(good, bad):
    tk.lif(X, **good)
    with pytest.raises(TypeError, match=f"{next(iter(bad))}: got"):
        tk.lif(X, **bad)


def test_penalty_changed_after_it_was_made():
    penalty = tk.MembranePenalty("square", [1.0] * 4)
    penalty.weight = penalty.weight.to("meta")
    with pytest.raises(ValueError, match="penalty: got a tensor on meta, needs x's device cpu"):
        tk.lif(X, penalty=penalty)
    penalty = tk.MembranePenalty("square", torch.ones(4))
    penalty.weight.requires_grad_()
    with pytest.raises(ValueError, match="penalty: its weight requires grad"):
        tk.lif(X, penalty=penalty)


def test_remembered_calls_are_bounded(monkeypatch):
    monkeypatch.setattr(tk.functional, "_MOST_CHECKED", 5)
    for threshold in range(1, 20):
        tk.lif(X, threshold=threshold)
        assert len(tk.functional._checked) <= 5


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        (("cube", [1.0]), ValueError, "phi: got 'cube'"),
        (("square", torch.ones(2, 2)), ValueError, r"weight: got shape \(2, 2\)"),
        (("square", torch.ones(2).long()), TypeError, "weight: got dtype"),
        (("square", [1.0, float("nan")]), ValueError, "weight: got nan"),
        (("square", 5), TypeError, "weight: got 5"),
        (("square", torch.tensor([float("inf")])), ValueError, "weight: got"),
        (("square", torch.ones(2, requires_grad=True)), ValueError, "weight: requires grad"),
    ],
)
def test_bad_membrane_penalty(arguments, error, message):
    with pytest.raises(error, match=message):
        tk.MembranePenalty(*arguments)
    with pytest.raises(ValueError, match="delta: got -1"):
        tk.MembranePenalty("trt", [1.0], delta=-1)
    with pytest.raises(ValueError, match="eps: got -1"):
        tk.MembranePenalty("trt", [1.0], eps=-1)
