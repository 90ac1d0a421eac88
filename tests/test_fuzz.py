"""Every operator on drawn calls, against the reference in float64.

Float32 potentials may be rounded, so a spike may differ from float64's where the potential is
within rounding of the threshold, and only there; from the reference's in the same dtype nowhere.
"""

import contextlib

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

import trt_kernels as tk
from tests import fuzzing
from tests.fuzzing import Call, cases, lay
from trt_kernels.backends import native

BUDGET = {"cpu": 6000, "cuda": 800, "triton": 300}  # elements: the others are slow on the host
# Of a gradient, as a share of its norm and of what it is summed from.
BOUNDS = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def run(function, call: Call, leaves, backend, **changed):
    """The outputs by name, and the gradients of the wanted leaves for those given."""
    out = function(**leaves, **{**call.options, **changed}, backend=backend)
    if isinstance(out, torch.Tensor):
        return {"spikes": out}
    return {name: o for name, o in out._asdict().items() if o is not None}


def arriving(call: Call, outputs) -> dict[str, torch.Tensor]:
    """A gradient for some of the outputs, in a layout of its own."""
    chosen = {}
    for (name, out), arrives in zip(outputs.items(), call.arriving, strict=False):
        if arrives and out.requires_grad:
            values = call.values(out.shape, out.dtype)
            if name in ("spikes", "potential"):
                values, _ = lay(values, call.upstream)
            chosen[name] = values
    return chosen


def gradients(call: Call, outputs, grads, leaves):
    """By leaf; zeros where nothing depends on it."""
    wanted = [name for name in leaves if name in call.wanted]
    if not wanted or not grads:
        return {}
    # The reference's state of an empty sequence depends on nothing.
    grads = {name: g for name, g in grads.items() if outputs[name].requires_grad}
    if not grads:
        return {name: torch.zeros_like(leaves[name]) for name in wanted}
    found = torch.autograd.grad(
        [outputs[name] for name in grads],
        [leaves[name] for name in wanted],
        [g.to(outputs[name].dtype) for name, g in grads.items()],
        allow_unused=True,
    )
    return {
        name: torch.zeros_like(leaves[name]) if g is None else g
        for name, g in zip(wanted, found, strict=True)
    }


def unharmed(call: Call, before, written=()) -> None:
    for name, memory in call.memory.items():
        if name not in written:
            assert memory.view(torch.uint8).equal(before[name].view(torch.uint8)), name


# Off the grid potentials are rounded, and a steep surrogate makes that 50 times as much.
OFF_GRID = 20


def assert_close(name, ours, exact, call):
    """Norm-wise; a sum over many numbers is compared with the size of what it is summed from."""
    assert ours.shape == exact.shape, name
    bound = max(BOUNDS[ours.dtype], BOUNDS[call.tensors["x"].dtype] if name == "x" else 0)
    bound = bound if call.values.grid else bound * OFF_GRID
    if (exact.abs() > 1e30).any():  # a leak that grows: float32 may have overflowed on the way
        return
    ours, exact = ours.double(), exact.to(ours.dtype).double()
    if not exact.isfinite().all():  # half precision, or float32, overflows in both
        same = ours == exact
        ours, exact = ours.masked_fill(same, 0), exact.masked_fill(same, 0)
    difference = (ours - exact).norm()
    count = ours.numel()
    if name not in ("x", "v_init"):  # a sum over neurons and steps, which may cancel
        count = call.tensors["x"].numel() * call.options.get("steps", 1)
    scale = exact.norm() + max(1.0, count**0.5)
    assert difference <= bound * scale, (name, float(difference / scale))


def differs_near_threshold(spikes, exact, time_dim, threshold) -> bool:
    """Whether the first spikes of each neuron that differ are within rounding of the threshold."""
    wrong = (spikes.double() != exact["spikes"]).movedim(time_dim, 0)
    first = wrong & (wrong.cumsum(0) == 1)
    distance = (exact["potential"] - threshold).abs().movedim(time_dim, 0)
    size = exact["potential"].abs().movedim(time_dim, 0) + 1
    return bool((distance[first] <= 1e-5 * size[first]).all())


def thresholds(call: Call, shape) -> torch.Tensor:
    """The threshold of every potential."""
    threshold = call.tensors.get("threshold", call.options.get("threshold"))
    threshold = torch.as_tensor(threshold).double()
    if threshold.numel() == 1:
        return threshold.reshape(())
    time_dim, dim = call.options["time_dim"] % len(shape), call.options.get("channel_dim")
    if dim is None:  # batch_norm_lif
        dim = 1 if "steps" in call.options else 2
    dim = dim % call.tensors["x"].ndim
    if "steps" in call.options:
        dim += dim >= time_dim
    return threshold.reshape([-1 if d == dim else 1 for d in range(len(shape))])


def jumps(call: Call) -> bool:
    """Whether a derivative is not continuous in the potential."""
    penalty = call.options.get("penalty")
    edges = isinstance(call.options["surrogate"], (tk.Rectangle, tk.SignedStep))
    return edges or (penalty is not None and penalty.phi == "range")


def check(function, call: Call, backend: str, packed: bool) -> None:
    before = {name: memory.clone() for name, memory in call.memory.items()}
    leaves = call.leaves()
    with tk.pack_saved_spikes() if packed else contextlib.nullcontext():
        ours = run(function, call, leaves, backend)
        grads = arriving(call, ours)
        found = gradients(call, ours, grads, leaves)
    running = {name: t.clone() for name, t in leaves.items() if name.startswith("running")}
    unharmed(call, before, written=running)
    for name in running:
        call.memory[name].copy_(before[name])

    # The same dtype: bit for bit, but for statistics, whose sums have another order.
    plain = {"memory": "recompute"} if "memory" in call.options else {}
    twin = call.leaves()
    same = run(function, call, twin, "reference", **plain, return_potential=True)
    assert ours.keys() | {"potential"} == same.keys()
    x = leaves["x"]
    if function is tk.lif:
        for name in ours.keys() & {"spikes", "state", "potential"}:
            assert ours[name].dtype == same[name].dtype
            assert torch.equal(ours[name], same[name]), name
        if torch.empty_like(x).stride() == x.stride() and "steps" not in call.options:
            assert ours["spikes"].stride() == x.stride()
    for name in running:
        call.memory[name].copy_(before[name])

    # Float64.
    doubles = call.leaves(torch.float64)
    options = {**plain, "return_potential": True}
    if penalty := call.options.get("penalty"):
        options["penalty"] = tk.MembranePenalty(
            penalty.phi, penalty.weight.double(), delta=penalty.delta, eps=penalty.eps
        )
    exact = run(function, call, doubles, "reference", **options)
    for name, t in running.items():
        torch.testing.assert_close(t.double(), doubles[name].double(), rtol=1e-5, atol=1e-5)
    assert ours["spikes"].shape == exact["spikes"].shape
    threshold = thresholds(call, exact["spikes"].shape)
    assert differs_near_threshold(ours["spikes"], exact, call.options["time_dim"], threshold)
    steady = torch.equal(ours["spikes"].double(), exact["spikes"])
    if jumps(call):  # rounding may decide there too
        steady = steady and torch.equal(same["potential"].double(), exact["potential"])
    if steady:
        event("the spikes of float64")
        for name in ours.keys() - {"spikes"}:
            bound = 1e-5 if call.values.grid else OFF_GRID * 1e-5
            largest = max(exact[name].detach().abs().flatten().tolist(), default=0)
            torch.testing.assert_close(
                ours[name].double(), exact[name].double(), rtol=bound, atol=bound * (1 + largest)
            )
        expected = gradients(call, exact, grads, doubles)
    elif function is tk.lif:
        event("rounding decides")
        expected = gradients(call, same, grads, twin)
    else:
        return
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert grad.dtype == leaves[name].dtype
        assert_close(name, grad, expected[name], call)


@pytest.fixture
def drawn_settings(level_setter, threads):
    """Sets what the bits may not depend on, from what was drawn."""

    def choose(data):
        level_setter(data.draw(st.sampled_from(native._C.cpu_levels()), label="level"))
        threads(data.draw(st.integers(1, 3), label="threads"))

    return choose


@cases(60)
@given(data=st.data())
def test_lif(data, backend, drawn_settings):
    if backend == "cpu":
        drawn_settings(data)
    call = data.draw(fuzzing.lif_calls(BUDGET[backend]))
    check(tk.lif, call, backend, packed=data.draw(st.booleans(), label="packed"))


def batch_norm_lif(x, running_mean=None, running_var=None, weight=None, bias=None, **options):
    return tk.batch_norm_lif(x, running_mean, running_var, weight, bias, **options)


@cases(40)
@given(data=st.data())
def test_batch_norm_lif(data, backend, drawn_settings):
    if backend == "cpu":
        drawn_settings(data)
    call = data.draw(fuzzing.batch_norm_lif_calls(BUDGET[backend]))
    check(batch_norm_lif, call, backend, packed=data.draw(st.booleans(), label="packed"))


@cases(40)
@given(data=st.data())
def test_trt_penalty(data, backend, drawn_settings):
    if backend == "cpu":
        drawn_settings(data)
    call = data.draw(fuzzing.penalty_calls(BUDGET[backend]))
    before = {name: memory.clone() for name, memory in call.memory.items()}
    leaves, doubles = call.leaves(), call.leaves(torch.float64)
    names = [name for name in leaves if name.startswith("p")]
    wanted = [name for name in names if name in call.wanted]
    scale = data.draw(st.sampled_from((1.0, -3.0, 0.0)), label="scale")

    value = tk.trt_penalty([leaves[n] for n in names], **call.options, backend=backend)
    exact = tk.trt_penalty([doubles[n] for n in names], **call.options, backend="reference")
    torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=1e-12)
    if not wanted:
        return
    found = torch.autograd.grad(value * scale, [leaves[n] for n in wanted])
    expected = torch.autograd.grad(exact * scale, [doubles[n] for n in wanted])
    unharmed(call, before)
    for name, grad, other in zip(wanted, found, expected, strict=True):
        assert grad.dtype == leaves[name].dtype
        tolerance = 4 * torch.finfo(grad.dtype).eps
        torch.testing.assert_close(grad.double(), other, rtol=max(tolerance, 2e-15), atol=1e-7)

    # The same into .grad, of which a part may be there already.
    for name in wanted:
        leaves[name].grad = leaves.get(name.replace("p", "g"))
    tk.trt_penalty_([leaves[n] for n in names], **call.options, scale=scale, backend=backend)
    unharmed(call, before, written=[name for name in leaves if name.startswith("g")])
    for name, other in zip(wanted, expected, strict=True):
        grad, old = leaves[name].grad, doubles.get(name.replace("p", "g"))
        total = other if old is None else other + old
        bound = 4 * torch.finfo(grad.dtype).eps
        torch.testing.assert_close(
            grad.double(), total, rtol=bound, atol=bound * (1 + abs(scale)) + 1e-7
        )
    for name in set(names) - set(wanted):
        assert leaves[name].grad is None


@cases(40)
@given(data=st.data())
def test_temporal_loss(data, backend, drawn_settings):
    if backend == "cpu":
        drawn_settings(data)
    call = data.draw(fuzzing.loss_calls(BUDGET[backend]))
    before = {name: memory.clone() for name, memory in call.memory.items()}
    leaves, exact = call.leaves(), call.leaves()
    for name, t in exact.items():
        if t.is_floating_point():
            exact[name] = t.detach().double().requires_grad_(t.requires_grad)
    values, grads = [], []
    for given_, chosen in ((leaves, backend), (exact, "reference")):
        value = tk.temporal_loss(**given_, **call.options, backend=chosen)
        values.append(value.detach())
        if "logits" in call.wanted:
            grads += torch.autograd.grad(value * 3, given_["logits"])
    unharmed(call, before)
    torch.testing.assert_close(values[0].double(), values[1], rtol=5e-6, atol=1e-6, equal_nan=True)
    if grads:
        assert grads[0].dtype == leaves["logits"].dtype
        bound = max(5e-6, torch.finfo(grads[0].dtype).eps)
        torch.testing.assert_close(
            grads[0].double(), grads[1], rtol=bound, atol=1e-6, equal_nan=True
        )


@cases(40)
@given(data=st.data())
def test_packed_spikes(data, backend, drawn_settings):
    """What a product keeps of its factors: spikes or not, of lif or not, in any layout."""
    if backend == "cpu":
        drawn_settings(data)
    dtype = data.draw(st.sampled_from(fuzzing.DTYPES), label="dtype")
    shape = data.draw(fuzzing.sizes(1, 4, BUDGET[backend]), label="shape")
    values = fuzzing.Values(data.draw(st.integers(0, 2**32 - 1)), grid=True)
    kind = data.draw(st.sampled_from(("lif", "lif", "binary", "numbers", "nearly")), label="kind")
    if kind == "lif":
        layout = data.draw(fuzzing.layouts(len(shape)))
        time_dim = data.draw(st.integers(0, len(shape) - 1))
        x, _ = lay(values(shape, dtype), layout)
        make = lambda: tk.lif(x.requires_grad_(), time_dim=time_dim, threshold=0.25)  # noqa: E731
    else:
        numbers = values(shape, dtype)
        if kind != "numbers":
            numbers = (numbers > 0.5).to(dtype)
        if kind == "nearly" and numbers.numel():
            numbers.view(-1)[data.draw(st.integers(0, numbers.numel() - 1))] = data.draw(
                st.sampled_from((-0.0, 0.5, float("nan"), 2.0))
            )
        made, _ = lay(numbers, data.draw(fuzzing.layouts(len(shape))))
        make = lambda: made  # noqa: E731
    factor = values(shape, dtype).requires_grad_()
    view = data.draw(st.sampled_from(("whole", "flat", "transposed", "detached")), label="view")

    def seen(spikes):
        if view == "flat":
            return spikes.flatten(), factor.flatten()
        if view == "transposed":
            return spikes.transpose(0, -1), factor.transpose(0, -1)
        return (spikes.detach() if view == "detached" else spikes), factor

    grads = []
    for packs in (False, True):
        with tk.pack_saved_spikes() if packs else contextlib.nullcontext():
            spikes, other = seen(make())
            product = spikes * other
        grads.append(torch.autograd.grad(product, factor, torch.ones_like(product))[0])
    same = [grad.flatten().view(torch.uint8) for grad in grads]
    assert torch.equal(*same)
