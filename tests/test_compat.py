"""`compat.trt` against the official code's formulas, operation by operation (tests/official.py)."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests import official
from tests.cases import quantised, relative_error
from trt_kernels.compat import trt

SETTINGS = {"decay": 0.5, "lamb": 1e-2, "epsilon": 1e-5}


def network(node):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), node(), nn.Linear(20, 5))


@pytest.mark.parametrize("v_reset", (0.0, -0.2, None))
@pytest.mark.parametrize("surrogate", (("sigmoid", 2.0), ("triangle", 0.8), ("pseudo", 0.5)))
def test_neuron(v_reset, surrogate):
    settings = dict(zip(("surrogate_type", "surrogate_param"), surrogate, strict=True))
    for tau, threshold in ((5, 0.5), (1.0, 0.7)):
        nodes = [
            node(v_threshold=threshold, v_reset=v_reset, tau=tau, **settings)
            for node in (official.LIFNode, trt.LIFNode)
        ]
        x = quantised((3, 6, 4, 5), 1.2).requires_grad_()
        theirs, ours = (node(x) for node in nodes)
        assert torch.equal(theirs, ours)
        grads = torch.randn_like(theirs)
        a, b = (torch.autograd.grad(s, x, grads)[0] for s in (ours, theirs))
        assert relative_error(a, b) < 1e-6
        nodes[1].reset()
        assert torch.equal(nodes[1](x), theirs)
    assert "tau=1.0" in repr(nodes[1])


def test_neuron_defaults():
    x = quantised((3, 6, 50), 1.2)
    assert torch.equal(trt.LIFNode()(x), official.LIFNode()(x))
    node = trt.LIFNode()
    node.v_threshold = 0.9  # read at every call, as there
    assert torch.equal(node(x), official.LIFNode(0.9)(x))


CRITERIA = {
    "function": lambda: functional.cross_entropy,
    "module": lambda: nn.CrossEntropyLoss(),
    "smoothed": lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
    "weighted": lambda: nn.CrossEntropyLoss(weight=torch.rand(5) + 0.5),
    "ignoring": lambda: nn.CrossEntropyLoss(ignore_index=2),
    "other": lambda: lambda logits, y: functional.multi_margin_loss(logits, y),
    "summed": lambda: nn.CrossEntropyLoss(reduction="sum"),
}


def both(run):
    """Values and gradients of `run` with the official names, and with ours."""
    results = []
    for names in (official, trt):
        model = network(names.LIFNode)
        x = torch.rand(7, 4, 12, generator=torch.Generator().manual_seed(1)) * 2
        outputs = model(x)
        labels = torch.tensor([0, 1, 2, 3, 4, 2, 1])
        loss = run(names, model, outputs, labels)
        results.append((loss.detach(), torch.autograd.grad(loss, [outputs, *model.parameters()])))
    (value, grads), (our_value, our_grads) = results
    torch.testing.assert_close(our_value, value, rtol=2e-6, atol=1e-7)
    for a, b in zip(our_grads, grads, strict=True):
        assert relative_error(a, b) < 2e-6


@pytest.mark.parametrize("criterion", CRITERIA)
def test_trt_loss(criterion):
    torch.manual_seed(0)
    chosen = CRITERIA[criterion]()
    for eta in (0.05, 0.0, 1.0):
        both(lambda names, *rest, eta=eta: names.TRT_Loss(*rest, chosen, **SETTINGS, eta=eta))
    both(lambda names, *rest: names.TRT_Loss(*rest, chosen, 0.25, 1e-5, 1e-5))


# Ignored rows are left out of the squared term too, as documented.
@pytest.mark.parametrize("criterion", sorted(CRITERIA.keys() - {"ignoring"}))
def test_tet_loss(criterion):
    torch.manual_seed(0)
    chosen = CRITERIA[criterion]()
    for lamb in (0.05, 0.0, 1.0):
        both(lambda names, model, *rest, lamb=lamb: names.TET_Loss(*rest, chosen, 1.0, lamb))


def test_launches(monkeypatch):
    """One call each of the loss and the regularizer for a cross entropy."""
    calls = []
    for name in ("temporal_loss", "trt_penalty", "mixed_loss"):
        function = getattr(trt, name)
        monkeypatch.setattr(
            trt,
            name,
            lambda *a, _f=function, _n=name, **k: calls.append(_n) or _f(*a, **k),
        )
    model = network(trt.LIFNode)
    outputs, labels = model(torch.rand(3, 4, 12)), torch.tensor([0, 1, 2])
    trt.TRT_Loss(model, outputs, labels, nn.CrossEntropyLoss(), **SETTINGS)
    assert sorted(calls) == ["temporal_loss", "trt_penalty"]
    calls.clear()
    trt.TET_Loss(outputs, labels, functional.cross_entropy, 1.0, 0.05)
    assert calls == ["mixed_loss"]


def test_half_logits_reduce_in_float32():
    logits = torch.randn(6, 4, 5, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    model = network(trt.LIFNode)
    for dtype in (torch.bfloat16, torch.float16):
        half = logits.to(dtype)
        loss = trt.TRT_Loss(model, half, labels, functional.cross_entropy, **SETTINGS)
        expected = official.TRT_Loss(model, half, labels, functional.cross_entropy, **SETTINGS)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-7)


LOGITS, LABELS = torch.zeros(2, 3, 5), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: trt.LIFNode(surrogate_type="zo"), ValueError, "surrogate_type: got 'zo'"),
        (lambda: trt.LIFNode(tau=0), ValueError, "tau: got 0"),
        (lambda: trt.LIFNode(decay=0.5), TypeError, "decay"),
        (lambda: trt.LIFNode()(torch.zeros(3)), ValueError, r"X: got shape \(3,\), needs \[B, T"),
        (lambda: trt.LIFNode()([1.0]), TypeError, "X: got list"),
        (
            lambda: trt.TRT_Loss(
                nn.Linear(2, 2), LOGITS[0], LABELS, functional.cross_entropy, 0.5, 1e-5, 1e-5
            ),
            ValueError,
            r"outputs: got shape \(3, 5\), needs \[B, T, K\]",
        ),
        (
            lambda: trt.TRT_Loss(
                nn.Linear(2, 2), LOGITS[:, :0], LABELS, functional.cross_entropy, 0.5, 1e-5, 1e-5
            ),
            ValueError,
            "outputs: .* needs at least one timestep",
        ),
        (
            lambda: trt.TRT_Loss(
                nn.Linear(2, 2), LOGITS, LABELS, functional.cross_entropy, 0.5, 1e-5, 1e-5, eta=2
            ),
            ValueError,
            "eta: got 2",
        ),
        (
            lambda: trt.TET_Loss(LOGITS, LABELS, functional.cross_entropy, 1.0, -0.1),
            ValueError,
            "lamb: got -0.1",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_model_without_weights():
    loss = trt.TRT_Loss(
        nn.ReLU(), LOGITS, LABELS, functional.cross_entropy, 0.5, 1e-5, 1e-5, eta=0.0
    )
    torch.testing.assert_close(loss, torch.tensor(5.0).log())
