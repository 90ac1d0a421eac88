"""`trt_penalty` and `trt_penalty_` on every backend with kernels, against the reference and
float64."""

import itertools
import math

import pytest
import torch

import trt_kernels as tk
from tests.cases import relative_error

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = ((1,), (7,), (64, 3, 3, 3), (1000,), (130, 257), (0,), (20000,))


def parameters(dtype=torch.float32, scale=0.3):
    return [(torch.randn(s) * scale).to(dtype).requires_grad_() for s in SIZES]


def exact(params, steps, weight, delta, eps):
    """R and its gradients by the closed forms of method.md, in float64."""
    value, grads = 0.0, []
    for p in params:
        w = p.detach().double()
        a, slope = w.abs(), torch.zeros_like(w)
        for t in range(steps):
            c = math.expm1(delta * t) if delta * t < 700 else math.inf
            if math.isinf(c):
                continue
            value += float((w * w / (1 + c * (a + eps))).sum())
            slope += (2 + c * (a + 2 * eps)) / (1 + c * (a + eps)) ** 2
        grads.append(weight / steps * w * slope)
    return weight / steps * value, grads


@pytest.mark.parametrize(
    "steps,delta", ((1, 0.5), (2, 0.0), (6, 0.25), (10, 0.5), (33, 1.0), (100, 3.0))
)
@pytest.mark.parametrize("eps", (0.0, 1e-5, 0.1))
def test_value_and_gradient_against_float64(steps, delta, eps, kernels):
    for dtype, scale in itertools.product((torch.float32, torch.float64), (1e-3, 0.3, 30.0)):
        params = parameters(dtype, scale)
        value = tk.trt_penalty(params, steps=steps, weight=2e-4, delta=delta, eps=eps)
        grads = torch.autograd.grad(3 * value, params)
        true_value, true_grads = exact(params, steps, 2e-4, delta, eps)
        bound = 1e-6 if dtype == torch.float32 else 1e-12
        assert value.dtype == dtype and value.shape == ()
        assert float(value) == pytest.approx(true_value, rel=bound)
        for a, b in zip(grads, true_grads, strict=True):
            assert relative_error(a, 3 * b) < bound


def test_matches_reference(backend):
    for dtype in DTYPES:
        params = parameters(dtype)
        results = []
        for chosen in (backend, "reference"):
            value = tk.trt_penalty(params, steps=6, weight=1e-3, delta=0.4, backend=chosen)
            results.append((value, torch.autograd.grad(value, params)))
        (value, grads), (true_value, true_grads) = results
        assert value.dtype == true_value.dtype
        torch.testing.assert_close(value, true_value, rtol=2e-6, atol=0)
        half = dtype in (torch.bfloat16, torch.float16)
        for a, b in zip(grads, true_grads, strict=True):
            assert a.dtype == dtype
            assert relative_error(a, b) < (1e-2 if half else 1e-6)


def test_gradcheck(backend):
    params = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(
        lambda *p: tk.trt_penalty(p, steps=5, weight=0.7, delta=0.3), params
    )


def test_zero_weights_and_overflowing_steps(backend):
    w = torch.tensor([0.0, -0.0, 1e-30, 1.0], requires_grad=True)
    for eps, delta in itertools.product((0.0, 1e-5), (50.0, 1e3, 1e300)):
        for chosen in (backend, "reference"):
            value = tk.trt_penalty([w], steps=20, weight=1.0, delta=delta, eps=eps, backend=chosen)
            (grad,) = torch.autograd.grad(value, w)
            # Step 0 alone is left: plain L2 over T.
            torch.testing.assert_close(value, torch.tensor(1 / 20))
            torch.testing.assert_close(grad, 2 * w.detach() / 20)


def test_large_weights_stay_finite(kernels):
    """Products of denominators must not overflow where the terms themselves do not."""
    for scale in (1e3, 1e8, 1e12, 1e17):
        w = (torch.randn(3000) * scale).requires_grad_()
        value = tk.trt_penalty([w], steps=10, weight=1e-6, delta=4.0)
        (grad,) = torch.autograd.grad(value, w)
        true_value, (true_grad,) = exact([w], 10, 1e-6, 4.0, 1e-5)
        assert float(value) == pytest.approx(true_value, rel=1e-5)
        assert relative_error(grad, true_grad) < 1e-5


def test_nan_stays_where_it_is(backend):
    w = torch.randn(3000)
    w[5] = float("nan")
    w.requires_grad_()
    value = tk.trt_penalty([w], steps=6, weight=1.0, delta=0.5)
    (grad,) = torch.autograd.grad(value, w)
    assert value.isnan() and grad.isnan().nonzero().tolist() == [[5]]


def test_layouts_and_frozen_parameters(backend):
    weight = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    gapped = torch.randn(20, 6)[:, ::2].requires_grad_()
    frozen = torch.randn(9)
    params = [weight, frozen, gapped]
    results = []
    for chosen in (backend, "reference"):
        value = tk.trt_penalty(params, steps=4, weight=1e-2, delta=0.5, backend=chosen)
        results.append((value, *torch.autograd.grad(value, (weight, gapped))))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-6
    assert results[0][1].stride() == weight.stride()
    assert not tk.trt_penalty([frozen], steps=4, weight=1.0, delta=0.5).requires_grad


def test_repeats_its_bits_for_any_number_of_threads(threads):
    params = [torch.randn(300_001, requires_grad=True), torch.randn(5, requires_grad=True)]
    results = []
    for count in (1, 2, 5, 2):
        threads(count)
        value = tk.trt_penalty(params, steps=6, weight=1e-3, delta=0.5)
        results.append((value.detach(), *torch.autograd.grad(value, params)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_keeps_nothing_but_the_parameters(backend):
    params = parameters()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tk.trt_penalty(params, steps=6, weight=1e-3, delta=0.5)
    assert {t.data_ptr() for t in kept} <= {p.data_ptr() for p in params}


@pytest.mark.parametrize("reference", (False, True))
def test_in_place_adds_the_gradient(backend, reference):
    chosen = "reference" if reference else backend
    settings = {"steps": 6, "weight": 1e-2, "delta": 0.5, "backend": chosen}
    params = [
        torch.randn(40, 30, requires_grad=True),
        torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last).requires_grad_(),
        torch.randn(7, requires_grad=True),
        torch.randn(20, 6)[:, ::2].requires_grad_(),
        torch.randn(5),  # frozen
    ]
    params[0].grad = torch.randn(40, 30)
    params[1].grad = torch.randn(8, 4, 3, 3)  # another layout than its parameter
    before = [None if p.grad is None else p.grad.clone() for p in params]
    kept = params[0].grad
    assert tk.trt_penalty_(params, scale=8.0, **settings) is None
    expected = torch.autograd.grad(8 * tk.trt_penalty(params, **settings), params[:4])
    assert params[0].grad is kept and params[4].grad is None
    for p, old, new in zip(params, before, expected, strict=False):
        assert relative_error(p.grad, new if old is None else old + new) < 1e-6


def test_in_place_adds_again_what_comes_again(backend):
    """A tied weight that is listed twice: no two blocks or threads may share a gradient."""
    settings = {"steps": 6, "weight": 1e-2, "delta": 0.5}
    tied, other = torch.randn(50_000, requires_grad=True), torch.randn(7, requires_grad=True)
    params = [tied, other, tied, tied]
    tk.trt_penalty_(params, **settings)
    once = torch.autograd.grad(tk.trt_penalty([tied], **settings), tied)[0]
    assert relative_error(tied.grad, 3 * once) < 1e-6


def test_double_backward_raises(backend):
    w = torch.randn(5, requires_grad=True)
    settings = {"steps": 4, "weight": 1.0, "delta": 0.5}
    value = tk.trt_penalty([w], **settings, backend="reference")  # plain PyTorch can
    (grad,) = torch.autograd.grad(value, w, create_graph=True)
    assert grad.requires_grad
    value = tk.trt_penalty([w], **settings)
    with pytest.raises(RuntimeError, match="trt_penalty cannot be differentiated twice"):
        torch.autograd.grad(value, w, create_graph=True)


def test_many_tensors_of_mixed_dtypes(backend):
    """More than one launch takes, float64 among the others, at addresses of any alignment."""
    memory = {dtype: torch.randn(20_000).to(dtype) for dtype in DTYPES}
    params = []
    for index in range(250):
        dtype = DTYPES[index % 4] if index < 240 else torch.float32
        start, size = 13 * index % 97, 1 + 7 * index % 50
        params.append(memory[dtype][start : start + size].detach().requires_grad_())
    results = []
    for chosen in (backend, "reference"):
        value = tk.trt_penalty(params, steps=5, weight=1e-2, delta=0.4, backend=chosen)
        results.append((value, torch.autograd.grad(2 * value, params)))
    (value, grads), (true_value, true_grads) = results
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, true_value, rtol=1e-6, atol=0)
    for a, b in zip(grads, true_grads, strict=True):
        half = a.dtype in (torch.bfloat16, torch.float16)
        assert a.dtype == b.dtype and relative_error(a, b) < (1e-2 if half else 1e-6)


W = torch.zeros(3)
GOOD = {"steps": 4, "weight": 1.0, "delta": 0.5}


@pytest.mark.parametrize("function", (tk.trt_penalty, tk.trt_penalty_))
@pytest.mark.parametrize(
    "params,changed,error,message",
    [
        ([], {}, ValueError, "params: got an empty list"),
        (None, {}, TypeError, "params: got NoneType"),
        (torch.nn.Linear(2, 2), {}, TypeError, "params: got Linear"),
        ([torch.nn.UninitializedParameter()], {}, ValueError, r"params\[0\]: got an uninit"),
        (W, {}, TypeError, "params: got Tensor"),
        ([W, 1.0], {}, TypeError, r"params\[1\]: got float"),
        ([W, W.long()], {}, TypeError, r"params\[1\]: got dtype torch.int64"),
        ([W.to_sparse()], {}, ValueError, r"params\[0\]: got layout"),
        ([W, W.to("meta")], {}, ValueError, r"params\[1\]: got a tensor on meta"),
        ([W], {"steps": 0}, ValueError, "steps: got 0"),
        ([W], {"steps": 2.0}, TypeError, "steps: got 2.0"),
        ([W], {"steps": True}, TypeError, "steps: got True"),
        ([W], {"weight": float("nan")}, ValueError, "weight: got nan"),
        ([W], {"delta": -0.1}, ValueError, "delta: got -0.1"),
        ([W], {"delta": float("inf")}, ValueError, "delta: got inf"),
        ([W], {"eps": -1e-5}, ValueError, "eps: got -1e-05"),
        ([W], {"eps": "0"}, TypeError, "eps: got '0'"),
        ([W], {"backend": "cuda"}, RuntimeError, "trt_penalty: backend 'cuda' cannot serve"),
    ],
)
def test_bad_input(function, params, changed, error, message):
    with pytest.raises(error, match=message):
        function(params, **{**GOOD, **changed})


def test_in_place_with_gradients_of_another_dtype():
    for dtype, grad_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        p = torch.nn.Parameter(torch.ones(8, dtype=dtype))
        p.grad_dtype = grad_dtype
        p.grad = torch.zeros(8, dtype=grad_dtype)
        tk.trt_penalty_([p], **GOOD)
        q = torch.ones(8, requires_grad=True)
        (expected,) = torch.autograd.grad(tk.trt_penalty([q], **GOOD), q)
        assert relative_error(p.grad, expected) < 1e-2


def test_in_place_refuses_before_it_changes_anything():
    good = torch.nn.Parameter(torch.ones(3))
    good.grad = torch.zeros(3)
    sparse = torch.nn.Parameter(torch.ones(3))
    sparse.grad = torch.zeros(3).to_sparse()
    with pytest.raises(ValueError, match=r"params\[1\].grad: got layout"):
        tk.trt_penalty_([good, sparse], **GOOD)
    with pytest.raises(ValueError, match=r"params\[1\]: not a leaf"):
        tk.trt_penalty_([good, good * 2], **GOOD)
    assert good.grad.eq(0).all()


def test_in_place_is_seen_by_autograd_and_needs_no_default_device():
    p = torch.nn.Parameter(torch.tensor([3.0]))
    (p**3).sum().backward(create_graph=True)
    value = (p.grad**2).sum()
    with torch.device("meta"):
        tk.trt_penalty_([p], **GOOD)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_upstream_gradient_that_is_a_zero_tensor():
    p = torch.ones(5, requires_grad=True)
    zero = torch._efficientzerotensor(())
    (grad,) = torch.autograd.grad(tk.trt_penalty([p], **GOOD), p, zero)
    assert grad.eq(0).all()


def test_bad_scale():
    with pytest.raises(ValueError, match="scale: got nan"):
        tk.trt_penalty_([W], **GOOD, scale=float("nan"))
