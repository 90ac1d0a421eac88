"""torch.func: grad, vjp, jacrev and vmap give what a loop gives; forward mode is refused."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, functional
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp

import trt_kernels as tk
from tests.conftest import serve

T, B, C = 18, 2, 3  # long enough for a GPU's checkpoints
LOSS = {"steps": 4, "weight": 1.0, "delta": 0.5}
WEIGHTS = torch.randn(T, B, C, generator=torch.Generator().manual_seed(0))
EVERY_EXTRA = {
    "penalty": tk.MembranePenalty("trt", torch.linspace(1, 2, T)),
    "return_state": True,
    "return_potential": True,
    "statistics": True,
}


@pytest.fixture
def every(request):
    with serve(request.param, request):
        yield request.param


def weighted(out):
    """A scalar that every output of `lif` has a part in."""
    if isinstance(out, torch.Tensor):
        return (out * WEIGHTS).sum()
    return sum((o * o).sum() for o in out if o is not None) + (out.spikes * WEIGHTS).sum()


# A scalar of x [T, B, C], by the functions that it calls.
CASES = {
    "lif": lambda x: weighted(tk.lif(x)),
    "lif, with a state": lambda x: weighted(tk.lif(x, v_init=x[0], return_state=True)),
    "lif, every extra": lambda x: weighted(tk.lif(x, **EVERY_EXTRA)),
    "lif, constant": lambda x: weighted(tk.lif(x[0], steps=T, reset="soft")),
    "lif, learned": lambda x: weighted(
        tk.lif(x, decay=x[0, 0].sigmoid(), threshold=x[0, 1].exp(), channel_dim=2)
    ),
    "lif, fixed by channel": lambda x: weighted(
        tk.lif(x, threshold=torch.linspace(0.5, 1, C), channel_dim=2)
    ),
    "batch_norm_lif": lambda x: weighted(
        tk.batch_norm_lif(x, None, None, x[0, 0], x[0, 1], True, gains=x[:, 0, 0])
    ),
    "batch_norm_lif, in evaluation": lambda x: weighted(
        tk.batch_norm_lif(x, torch.zeros(C), torch.ones(C), x[0, 0], x[0, 1])
    ),
    "trt_penalty": lambda x: tk.trt_penalty([x, x[0]], **LOSS),
    "temporal_loss": lambda x: tk.temporal_loss(x, torch.tensor([0, 2]), mse_ratio=0.3),
}


def gradients(function, xs):
    leaves = [x.clone().requires_grad_() for x in xs]
    return torch.stack([torch.autograd.grad(function(x), x)[0] for x in leaves])


def in_pairs(x):
    return x.unflatten(0, (2, -1))


def outer(function, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def batched_gradients(function, x):
    """By the vmap that autograd has of its own."""
    leaf = x.clone().requires_grad_()
    up = torch.tensor([1.0, 2.0])
    return torch.autograd.grad(function(leaf), leaf, up, is_grads_batched=True)[0]


# Triton's interpreter is slow.
FEW = ("lif, with a state", "trt_penalty", "temporal_loss")
EVERY = [
    (name, case)
    for name in ("reference", "cpu", "cuda", "triton")
    for case in (CASES if name != "triton" else FEW)
]


@pytest.mark.parametrize(("every", "case"), EVERY, indirect=["every"])
def test_as_in_a_loop(case, every):
    function, xs = CASES[case], torch.randn(4, T, B, C)
    values, grads = torch.stack([function(x) for x in xs]), gradients(function, xs)
    close = (torch.testing.assert_close) if every == "reference" else torch.equal
    twice = torch.stack([grads[0], 2 * grads[0]])
    for name, found, expected in (
        ("grad", lambda: grad(function)(xs[0]), grads[0]),
        ("vjp", lambda: vjp(function, xs[0])[1](torch.ones(()))[0], grads[0]),
        ("vmap", lambda: torch.vmap(function, in_dims=-1)(xs.movedim(0, -1)), values),
        ("vmap of grad", lambda: torch.vmap(grad(function))(xs), grads),
        ("grad of vmap", lambda: grad(lambda x: torch.vmap(function)(x).sum())(xs), grads),
        (
            "vmap of vmap",
            lambda: torch.vmap(torch.vmap(grad(function)))(in_pairs(xs)),
            in_pairs(grads),
        ),
        ("autograd of vmap", lambda: outer(torch.vmap(function), xs), grads),
        (
            "jacrev",
            lambda: jacrev(lambda x: torch.stack([function(x), 2 * function(x)]))(xs[0]),
            twice,
        ),
        ("batched gradients", lambda: batched_gradients(function, xs[0]), twice),
    ):
        if name == "batched gradients" and case == "trt_penalty" and every != "reference":
            with pytest.raises(RuntimeError, match="trt_penalty_backward"):
                found()
        else:
            assert close(found(), expected) in (None, True), name


def test_the_state_alone_has_samples(backend):
    x, states = torch.randn(T, B, C), torch.randn(3, B, C)

    def run(v):
        return tk.lif(x, v_init=v, return_state=True)[:2]

    looped = [torch.stack(several) for several in zip(*map(run, states), strict=True)]
    for found, expected in zip(torch.vmap(run)(states), looped, strict=True):
        assert torch.equal(found, expected)


def test_one_call_for_all_samples(monkeypatch):
    calls = []
    forward = tk.ops.lif_forward
    monkeypatch.setattr(tk.ops, "lif_forward", lambda *a: calls.append(a[0].shape) or forward(*a))
    torch.vmap(tk.lif)(torch.randn(5, T, B, C))
    assert calls[-1] == (5, T, B, C)


def test_bits_are_not_kept():
    options = {"memory": "bits", "surrogate": tk.Rectangle(), "detach_reset": True}

    def function(x):
        return weighted(tk.lif(x, **options))

    xs = torch.randn(3, T, B, C)
    with tk.pack_saved_spikes():
        expected = gradients(function, xs)
        assert torch.equal(outer(torch.vmap(function), xs), expected)
    assert torch.equal(torch.vmap(grad(function))(xs), expected)
    with pytest.raises(RuntimeError, match="lif cannot be differentiated twice"):
        grad(lambda x: grad(function)(x).square().sum())(xs[0])


@pytest.mark.parametrize(("every", "case"), EVERY, indirect=["every"])
def test_derivatives_of_gradients_are_refused(case, every):
    function, x = CASES[case], torch.randn(T, B, C)
    name = case.split(",")[0]
    if every == "reference" and name in ("trt_penalty", "temporal_loss"):  # plain torch: they exist
        assert grad(lambda x: grad(function)(x).square().sum())(x).any()
        return
    with pytest.raises(RuntimeError, match=f"{name.split('_')[-1]} cannot be differentiated twice"):
        grad(lambda x: grad(function)(x).square().sum())(x)


@pytest.mark.parametrize("case", CASES)
def test_jacobians_and_hessians_of_autograd(case):
    function, x = CASES[case], torch.randn(T, B, C)
    name = case.split(",")[0].split("_")[-1]
    expected = gradients(function, x[None])[0]
    assert torch.equal(functional.jacobian(function, x), expected)
    for run in (
        lambda: functional.jacobian(function, x, create_graph=True),
        lambda: functional.hessian(function, x),
        lambda: functional.vhp(function, x, x),
        lambda: torch.autograd.gradgradcheck(function, x.double().requires_grad_()),
    ):
        with pytest.raises(RuntimeError, match=f"{name} cannot be differentiated twice"):
            run()


def tangents(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@pytest.mark.parametrize(("every", "case"), EVERY, indirect=["every"])
def test_forward_mode_is_refused(case, every):
    function, x = CASES[case], torch.randn(T, B, C)
    name = case.split(",")[0]
    ways = {
        "jvp": lambda: jvp(function, (x,), (torch.ones_like(x),))[1],
        "jacfwd": lambda: jacfwd(function)(x).sum(),
        "dual": lambda: tangents(function, x),
        "dual, no_grad": torch.no_grad()(lambda: tangents(function, x)),
    }
    if every == "reference" and name in ("trt_penalty", "temporal_loss"):
        expected = grad(function)(x).sum()
        for run in ways.values():
            torch.testing.assert_close(run().float(), expected)
        return
    ways["hessian"] = lambda: hessian(function)(x)
    for run in ways.values():
        with pytest.raises(RuntimeError, match=f"{name.split('_')[-1]} has no derivative in forw"):
            run()


def test_operators_refuse_what_they_cannot_differentiate():
    """A tangent or gradient of 0 came from the registered operators."""
    from tests.test_compile import registered

    for op, arguments, which in registered():
        first, name = arguments[0], str(op).split(".")[1].rsplit("_", 1)[0]
        many = isinstance(first, list)

        def call(x, op=op, arguments=arguments, many=many):
            out = op([x] if many else x, *arguments[1:])
            return out.sum() if isinstance(out, torch.Tensor) else out[0].sum()

        x = first[0] if many else first
        assert 0 in which
        with pytest.raises(RuntimeError, match=f"{name} has no derivative in forward mode"):
            jvp(call, (x,), (x,))
        with pytest.raises(RuntimeError, match=f"{name} has no derivative in forward mode"):
            tangents(call, x)
        with pytest.raises(RuntimeError, match=f"{name}: torch.func does not differentiate"):
            grad(call)(x)


def test_the_penalty_in_place_is_refused():
    p = torch.randn(3)
    with pytest.raises(RuntimeError, match=r"trt_penalty_: writes into \.grad"):
        grad(lambda p: tk.trt_penalty_([p], **LOSS))(p)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="trt_penalty_ has no deriv"):
        tk.trt_penalty_([forward_ad.make_dual(p, p).requires_grad_()], **LOSS)


def test_user_surrogates_on_the_reference():
    def function(x, surrogate):
        return weighted(tk.lif(x, surrogate=surrogate, backend="reference"))

    x = torch.randn(T, B, C)
    ours = grad(lambda x: function(x, tk.Sigmoid()))(x)
    theirs = grad(lambda x: function(x, tk.Sigmoid().__call__))(x)
    assert torch.equal(ours, theirs)

    def unfinished(u):
        raise NotImplementedError("of the user's own")

    with pytest.raises(NotImplementedError, match="of the user's own"):
        grad(lambda x: function(x, unfinished))(x)


# --- Modules.
class Network(nn.Sequential):
    def __init__(self, **norm):
        block = tk.nn.BatchNormLIF(6, **norm)
        super().__init__(nn.Linear(C, 6), block, tk.nn.PLIF(), nn.Linear(6, 4), tk.nn.LIF())


def objective(network):
    target = torch.tensor([1, 3])

    def loss(parameters, buffers, x):
        logits = functional_call(network, (parameters, buffers), (x,))
        regularizer = tk.trt_penalty(list(parameters.values()), **LOSS)
        return tk.temporal_loss(logits, target) + regularizer

    return loss


def states(network):
    return dict(network.named_parameters()), dict(network.named_buffers())


def test_functional_call_without_transforms():
    network, x = Network(), torch.randn(T, B, C)
    doubled = {name: (2 * p).detach() for name, p in network.named_parameters()}
    found = functional_call(network, doubled, (x,))
    network.load_state_dict(doubled, strict=False)
    network[1].reset_running_stats()
    assert torch.equal(found, network(x))


def test_gradients_of_every_sample():
    network, xs = Network().eval(), torch.randn(5, T, B, C)
    loss, (parameters, buffers) = objective(network), states(network)
    found = torch.vmap(grad(loss), in_dims=(None, None, 0))(parameters, buffers, xs)
    for i, x in enumerate(xs):
        network.zero_grad()
        loss(parameters, buffers, x).backward()
        for name, p in parameters.items():
            torch.testing.assert_close(found[name][i], p.grad)


def test_an_ensemble_in_training():
    networks, x = [Network() for _ in range(3)], torch.randn(T, B, C)
    parameters, buffers = stack_module_state(networks)
    loss = objective(networks[0])
    found = torch.vmap(grad(loss), in_dims=(0, 0, None))(parameters, buffers, x)
    for i, network in enumerate(networks):
        objective(network)(*states(network), x).backward()
        for name, p in network.named_parameters():
            torch.testing.assert_close(found[name][i], p.grad)
        torch.testing.assert_close(buffers["1.running_mean"][i], network[1].running_mean)


def test_shared_running_statistics_are_refused():
    network = Network()
    (parameters, buffers), loss = states(network), objective(network)
    in_dims = (None, None, 0)
    with pytest.raises(
        RuntimeError, match=r"running_mean, running_var: batch_norm_lif .*torch\.func"
    ):
        torch.vmap(loss, in_dims)(parameters, buffers, torch.randn(2, T, B, C))
    free = Network(track_running_stats=False)
    xs = torch.randn(2, T, B, C)
    found = torch.vmap(objective(free), in_dims)(*states(free), xs)
    for value, x in zip(found, xs, strict=True):
        torch.testing.assert_close(value, objective(free)(*states(free), x))
