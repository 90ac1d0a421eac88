"""What autograd keeps is changed, moved, freed or asked for in another way: the gradient is right,
or an error says what is wrong."""

import threading

import pytest
import torch
from torch import nn
from torch.autograd import graph
from torch.utils.checkpoint import checkpoint

import trt_kernels as tk
from tests.conftest import serve

PENALTY = {"steps": 4, "weight": 1.0, "delta": 0.5}
# Tensors without a gradient.
FIXED = {"running_mean", "running_var", "penalty", "target", "probabilities", "class_weight"}
BITS = {"memory": "bits", "surrogate": tk.Rectangle(), "detach_reset": True}


def tensors(names):
    """New ones with the same values every time."""
    seed = torch.Generator().manual_seed(0)  # of its own: threads call this
    every = {
        "x": torch.randn(4, 5, 6, generator=seed),
        "v_init": torch.randn(5, 6, generator=seed),
        "decay": torch.rand(6, generator=seed),
        "threshold": torch.rand(6, generator=seed) + 0.3,
        "weight": torch.rand(6, generator=seed),
        "bias": torch.rand(6, generator=seed),
        "gains": torch.rand(4, generator=seed),
        "running_mean": torch.zeros(6),
        "running_var": torch.ones(6),
        "penalty": torch.rand(4, generator=seed),
        "target": torch.tensor([0, 5, 3, 1, 2]),
        "probabilities": torch.randn(5, 6, generator=seed).softmax(1),
        "class_weight": torch.rand(6, generator=seed) + 0.5,
    }
    given = {name: every[name] for name in names}
    for name in given.keys() - FIXED:
        given[name].requires_grad_()
    return given


def full(x, v_init, decay, threshold, penalty):
    return tk.lif(
        x,
        v_init=v_init,
        decay=decay,
        threshold=threshold,
        channel_dim=2,
        penalty=tk.MembranePenalty("trt", penalty),
        return_state=True,
        return_potential=True,
    )


def normalised(training):
    def function(x, running_mean, running_var, weight, bias, gains):
        return tk.batch_norm_lif(x, running_mean, running_var, weight, bias, training, gains=gains)

    return function


NORM = ("x", "running_mean", "running_var", "weight", "bias", "gains")
# A function, its tensors, and those of them that the kernels copy or do not keep.
CASES = {
    "lif": (tk.lif, ("x",), ()),
    "lif, with a state": (
        lambda x, v_init: tk.lif(x, v_init=v_init, return_state=True, return_potential=True),
        ("x", "v_init"),
        (),
    ),
    "lif, with everything": (
        full,
        ("x", "v_init", "decay", "threshold", "penalty"),
        ("decay", "threshold"),
    ),
    "lif, bits": (lambda x: tk.lif(x, **BITS), ("x",), ("x",)),
    "batch_norm_lif": (normalised(True), NORM, ("running_mean", "running_var")),
    "batch_norm_lif, in evaluation": (normalised(False), NORM, ("running_mean", "running_var")),
    "trt_penalty": (lambda x, bias: tk.trt_penalty([x, bias], **PENALTY), ("x", "bias"), ()),
    "temporal_loss": (
        lambda x, target, class_weight: tk.temporal_loss(
            x, target, class_weight=class_weight, mse_ratio=0.2
        ),
        ("x", "target", "class_weight"),
        (),
    ),
    "temporal_loss of probabilities": (
        lambda x, probabilities: tk.temporal_loss(x, probabilities, mse_ratio=0.2),
        ("x", "probabilities"),
        (),
    ),
}
EVERY = [
    (name, case)
    for name in ("reference", "cpu", "cuda", "triton")
    for case in CASES
    if (name, case) != ("reference", "lif, bits")
    and (name != "triton" or case in ("lif, with a state", "trt_penalty", "temporal_loss"))
]
every_case = pytest.mark.parametrize(("backend", "case"), EVERY, indirect=["backend"])


@pytest.fixture
def backend(request):
    with serve(request.param, request):
        yield request.param


def value(out, change=None):
    """A scalar that every output has a part in."""
    outputs = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
    weights = [torch.linspace(-1, 1, t.numel()).reshape(t.shape) for t in outputs]
    for output in outputs if change is not None else ():
        change(output)
    return sum((t * w).sum() for t, w in zip(outputs, weights, strict=True))


def leaves(given):
    return [t for name, t in given.items() if name not in FIXED]


def gradients(case, between=lambda given: None, call=lambda f, *tensors: f(*tensors)):
    """Of everything that has one; `between` runs between the two passes."""
    function, names, _ = CASES[case]
    given = tensors(names)
    total = value(call(function, *given.values()))
    between(given)
    return torch.autograd.grad(total, leaves(given))


def same(found, expected):
    return all(map(torch.equal, found, expected))


@every_case
def test_changed_between_the_passes(case, backend):
    _, names, copied = CASES[case]
    expected = gradients(case)
    for name in names:

        def change(given, name=name):
            with torch.no_grad():
                given[name].zero_()

        if backend != "reference" and name not in copied:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradients(case, change)
            continue
        try:
            assert same(gradients(case, change), expected), name
        except RuntimeError as error:  # the reference keeps what its operations keep
            assert "modified by an inplace operation" in str(error) and backend == "reference"


def test_views_of_x_and_operations_in_place():
    for make in (
        lambda y: (z := 1 * y, tk.lif(z), z.relu_()),
        lambda y: (z := 1 * y, tk.lif(z[:, :2]), z.relu_()),
        lambda y: (z := 1 * y, tk.lif(z.mT), z[0].relu_()),
    ):
        y = torch.randn(4, 5, 6, requires_grad=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            make(y)[1].sum().backward()


@every_case
def test_results_changed_in_place(case, backend):
    function, names, _ = CASES[case]
    given = tensors(names)
    total = value(function(*given.values()), lambda out: out.mul_(2))
    doubled = torch.autograd.grad(total, leaves(given))
    assert same([grad / 2 for grad in doubled], gradients(case))


def test_views_of_results_changed_in_place():
    x, expected = tensors(["x"])["x"], gradients("lif")[0]
    spikes = tk.lif(x)
    spikes[1:].mul_(4)
    found = torch.autograd.grad(value(spikes), x)[0]
    weights = torch.linspace(-1, 1, x.numel()).reshape(x.shape)
    weights[1:] *= 4
    assert torch.equal(found, torch.autograd.grad(tk.lif(x), x, weights)[0])
    assert not torch.equal(found, expected)


WAYS = {
    "save_on_cpu": graph.save_on_cpu,
    "hooks": lambda: graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t),
    "no hooks": lambda: graph.disable_saved_tensors_hooks("none here"),
    "mutation allowed": graph.allow_mutation_on_saved_tensors,
    "anomaly": torch.autograd.detect_anomaly,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "one thread": lambda: torch.autograd.set_multithreading_enabled(False),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@every_case
def test_kept_in_other_ways(case, backend):
    expected = gradients(case)
    for name, mode in WAYS.items():
        with mode():
            assert same(gradients(case), expected), name

    def checkpointed(function, *given):
        return checkpoint(function, *given, use_reentrant=False)

    if case == "batch_norm_lif":  # it has changed what checkpoint would start from again
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(case, call=checkpointed)
    else:
        assert same(gradients(case, call=checkpointed), expected)
    given = tensors(CASES[case][1])
    value(checkpoint(CASES[case][0], *given.values(), use_reentrant=True)).backward()
    assert same([leaf.grad for leaf in leaves(given)], expected)


@every_case
def test_backward_again_and_for_some(case, backend):
    expected = gradients(case)
    function, names, _ = CASES[case]
    given = tensors(names)
    total = value(function(*given.values()))
    for _ in range(2):
        again = torch.autograd.grad(total, leaves(given), retain_graph=True)
        assert same(again, expected)
    total.backward(inputs=leaves(given)[-1:], retain_graph=True)
    assert [t.grad is not None for t in leaves(given)][:-1] == [False] * (len(expected) - 1)
    assert torch.equal(leaves(given)[-1].grad, expected[-1])
    total.backward()
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


@every_case
def test_inference_mode(case, backend):
    function, names, _ = CASES[case]
    expected = value(function(*tensors(names).values())).detach()
    with torch.inference_mode():
        made_inside = {name: t.detach() for name, t in tensors(names).items()}
        assert torch.equal(value(function(*made_inside.values())), expected)
    others = {n: t for n, t in made_inside.items() if n not in ("x", *FIXED)}
    if others and backend != "reference":  # whose operations keep less
        given = tensors(names) | others
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            function(*given.values())


def test_a_state_from_inference_mode():
    x, layer = torch.randn(4, 3, requires_grad=True), tk.nn.LIF(stateful=True)
    with torch.inference_mode():
        layer(x)
    before = layer.state.clone()
    spikes = layer(x)
    assert torch.equal(spikes, tk.lif(x, v_init=before)) and layer.state.requires_grad
    expected = torch.autograd.grad(tk.lif(x, v_init=before).sum(), x)[0]
    assert torch.equal(torch.autograd.grad(spikes.sum(), x)[0], expected)


@pytest.mark.parametrize("backend", ("reference", "cpu"), indirect=True)
@pytest.mark.parametrize("reentrant", (False, True))
def test_a_state_under_checkpoint(reentrant, backend):
    """The second forward pass went on from the state of the first: another gradient, in silence."""
    x, layer = torch.randn(4, 5, 6, requires_grad=True), tk.nn.LIF(stateful=True, decay=0.9)

    def fresh(x):
        layer.reset()
        return layer(x)

    value(checkpoint(fresh, x, use_reentrant=reentrant)).backward()
    assert torch.equal(x.grad, torch.autograd.grad(value(tk.lif(x, decay=0.9)), x)[0])
    total = value(checkpoint(layer, x, use_reentrant=reentrant))
    with pytest.raises(RuntimeError, match=r"state: .*checkpoint.*reset\(\)"):
        total.backward()


@pytest.mark.parametrize("backend", ("reference", "cpu"), indirect=True)
def test_penalty_in_place_under_inference_mode(backend):
    """A gradient made there could not be added to afterwards."""
    p = nn.Parameter(torch.randn(7))
    expected = torch.autograd.grad(tk.trt_penalty([p], **PENALTY), p)[0]
    with torch.inference_mode():
        tk.trt_penalty_([p], **PENALTY)
        tk.trt_penalty_([p], **PENALTY)
        made_inside = nn.Parameter(p.detach().clone())
        tk.trt_penalty_([made_inside], **PENALTY)
    p.sum().backward()
    torch.testing.assert_close(p.grad, 2 * expected + 1)
    torch.testing.assert_close(made_inside.grad.clone(), expected)


def test_threads():
    """Forward and backward passes of several Python threads at once."""
    expected = {case: gradients(case) for case in CASES}
    wrong = []

    def work(case):
        wrong.extend(case for _ in range(20) if not same(gradients(case), expected[case]))

    threads = [threading.Thread(target=work, args=(case,)) for case in CASES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
