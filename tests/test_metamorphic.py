"""What may be changed about a call of `lif` without a change of one bit, on drawn calls."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import trt_kernels as tk
from tests import fuzzing
from tests.fuzzing import cases
from trt_kernels.backends import native


@st.composite
def neurons(draw):
    """x [T, B, C, N], v_init, gradients that arrive, and options without anything by channel."""
    values = fuzzing.Values(draw(st.integers(0, 2**32 - 1)), draw(st.booleans()))
    steps = draw(st.sampled_from((1, 2, 3, 5, 16, 17, 20)))
    shape = (steps, draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 33)))
    drawing = fuzzing.Drawing(draw, values.grid)
    dtype = draw(st.sampled_from(fuzzing.DTYPES))
    drawing.tensors["x"] = values(shape, dtype)
    options: dict = {}
    fuzzing.neuron(drawing, options, None)
    for name in ("decay", "threshold", "v_reset"):  # those drawn as tensors
        options.setdefault(name, 0.5)
    state = fuzzing.state_of(dtype)
    grads = values(shape, dtype), values(shape[1:], state)
    return drawing.tensors["x"], values(shape[1:], state), grads, options


def run(x, v_init, grads, **options):
    """Spikes, potentials, the last state, and the gradients of x and v_init."""
    x, v_init = x.detach().requires_grad_(), v_init.detach().requires_grad_()
    out = tk.lif(x, v_init=v_init, return_state=True, return_potential=True, **options)
    dx, dv = torch.autograd.grad((out.spikes, out.state), (x, v_init), grads)
    return out.spikes.detach(), out.potential.detach(), out.state.detach(), dx, dv


def same(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@cases(20)
@given(call=neurons(), data=st.data())
def test_time_in_chunks(call, data, backend):
    """Forward from state to state, and backward from the gradient of one to that of the next."""
    x, v_init, grads, options = call
    whole = run(*call[:3], **options)
    cut = data.draw(st.integers(0, len(x)))
    v_leaf, x_leaf = v_init.clone().requires_grad_(), x.clone().requires_grad_()
    state, parts = v_leaf, []
    for chunk in (x_leaf[:cut], x_leaf[cut:]):
        parts.append(
            tk.lif(chunk, v_init=state, return_state=True, return_potential=True, **options)
        )
        state = parts[-1].state
    spikes = torch.cat([part.spikes for part in parts])
    potential = torch.cat([part.potential for part in parts])
    dx, dv = torch.autograd.grad((spikes, state), (x_leaf, v_leaf), grads)
    same((spikes, potential, state, dx, dv), whole)


@cases(20)
@given(call=neurons(), data=st.data())
def test_neurons_in_another_order(call, data, backend):
    """And so at other places of vectors and blocks, and in another layout."""
    x, v_init, grads, options = call
    whole = run(x, v_init, grads, **options)
    dim = data.draw(st.integers(1, 3))
    order = torch.randperm(x.shape[dim])
    last = data.draw(st.permutations((1, 2, 3)))

    def moved(t):
        dims = last if t.ndim == 4 else [d - 1 for d in last]
        return t.index_select(dim - (t.ndim == 3), order).permute(
            ([0] if t.ndim == 4 else []) + dims
        )

    grads = tuple(map(moved, grads))
    same(run(moved(x), moved(v_init), grads, **options), map(moved, whole))


@cases(20)
@given(call=neurons(), data=st.data())
def test_batches_apart(call, data, backend):
    x, v_init, grads, options = call
    whole = run(x, v_init, grads, **options)
    dim = data.draw(st.integers(1, 3))
    index = data.draw(st.integers(0, x.shape[dim] - 1))

    def part(t):
        return t.narrow(dim - (t.ndim == 3), index, 1).clone()

    same(run(part(x), part(v_init), tuple(map(part, grads)), **options), map(part, whole))


@cases(20)
@given(call=neurons(), power=st.integers(-20, 20))
def test_everything_twice_as_large(call, power, backend):
    """Currents, thresholds and potentials in another unit, a power of two: the same spikes."""
    x, v_init, grads, options = call
    state = fuzzing.state_of(x.dtype)
    x = x.to(state)  # half precision has not the range
    grads = tuple(grad.to(state) for grad in grads)
    unit = 2.0**power
    spikes, potential, last, *_ = run(x, v_init, grads, **options)
    for name in ("threshold", "v_reset"):
        options[name] = options[name] * unit
    scaled = run(x * unit, v_init * unit, grads, **options)
    same(scaled[:3], (spikes, potential * unit, last * unit))


@cases(60)
@given(
    call=neurons(),
    level=st.sampled_from(native._C.cpu_levels()),
    count=st.integers(2, 5),
    repeats=st.sampled_from((1, 7, 300)),
)
def test_threads_and_processors(call, level, count, repeats, level_setter, threads):
    """Enough neurons for several threads; spikes and potentials at every instruction-set level."""
    x, v_init, grads, options = call

    def tiled(t):
        return t.repeat(*[1] * (t.ndim - 1), repeats)

    given_ = tiled(x), tiled(v_init), tuple(map(tiled, grads))
    level_setter(level)
    results = []
    for number in (1, count):
        threads(number)
        results.append(run(*given_, backend="cpu", **options))
    same(*results)
    level_setter("baseline")
    same(run(*given_, backend="cpu", **options)[:3], results[0][:3])
