"""`nn.LIF`: thin over `lif`, with a state where asked to."""

import copy
import pickle

import pytest
import torch

import trt_kernels as tk


def test_is_lif():
    x = torch.randn(6, 3, 40)
    settings = {"decay": 0.8, "reset": "soft", "surrogate": tk.ATan(), "time_dim": 1}
    assert torch.equal(tk.nn.LIF(**settings)(x), tk.lif(x, **settings))
    out = tk.nn.LIF(return_state=True)(x)
    assert isinstance(out, tk.LIFOutput) and out.state.shape == (3, 40)


def test_stateful_equals_one_long_call():
    x = torch.randn(9, 50, requires_grad=True)
    layer = tk.nn.LIF(stateful=True)
    spikes = torch.cat([layer(chunk) for chunk in x.split(4)])
    assert torch.equal(spikes, tk.lif(x))
    ours = torch.autograd.grad(spikes.sum(), x)[0]
    assert torch.equal(ours, torch.autograd.grad(tk.lif(x).sum(), x)[0])
    first = layer(x)
    layer.reset()
    assert layer.state is None
    assert torch.equal(layer(x), tk.lif(x)) and not torch.equal(first, tk.lif(x))


def test_detach_cuts_the_graph():
    x = torch.randn(4, 50, requires_grad=True)
    layer = tk.nn.LIF(stateful=True)
    layer(x).sum().backward()
    layer.detach()
    layer(x).sum().backward()  # would otherwise go back through a freed graph
    assert not layer.state.requires_grad or layer.state.grad_fn is not None


def test_stateful_extras():
    x = torch.randn(4, 7)
    penalty = tk.MembranePenalty("square", [1.0] * 4)
    out = tk.nn.LIF(stateful=True, penalty=penalty)(x)
    assert out.penalty is not None and out.state is None and out.potential is None
    out = tk.nn.LIF(stateful=True, return_potential=True, return_state=True)(x)
    assert out.state is not None and out.potential is not None
    assert tk.nn.LIF(stateful=True, return_state=True)(x).state.shape == (7,)


def test_copies_and_pickles():
    layer = tk.nn.LIF(stateful=True, decay=0.7, penalty=tk.MembranePenalty("trt", [1.0, 2.0]))
    x = torch.randn(2, 5, requires_grad=True)
    layer(x)
    assert layer.state.requires_grad
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.state, layer.state) and not other.state.requires_grad
        assert torch.equal(other(x).spikes, copy.deepcopy(layer)(x).spikes)
        other.reset()
        assert layer.state is not None
    assert layer.state.requires_grad


def test_prints_its_settings():
    text = repr(tk.nn.LIF(decay=0.25, surrogate=tk.ATan(3.0)))
    for part in (
        "decay=0.25",
        "threshold=1.0",
        "ATan(alpha=3.0)",
        "reset='hard'",
        "stateful=False",
    ):
        assert part in text


def test_has_no_parameters_and_an_empty_state_dict():
    layer = tk.nn.LIF(stateful=True)
    layer(torch.randn(2, 3))
    assert not list(layer.parameters()) and not layer.state_dict()


def test_moves_with_its_network():
    layer = tk.nn.LIF(stateful=True, penalty=tk.MembranePenalty("square", [1.0, 1.0]))
    layer(torch.randn(2, 3))
    before = layer.state.clone()
    network = torch.nn.Sequential(layer).half()
    assert layer.state.dtype == torch.float32 and torch.equal(layer.state, before)
    network.to("meta")
    assert layer.state.device.type == "meta"
    assert layer.lif_options["penalty"].weight.device.type == "meta"


def test_bad_input():
    with pytest.raises(TypeError, match=r"unknown options \['tau'\]"):
        tk.nn.LIF(tau=2.0)
    with pytest.raises(TypeError, match="stateful: got 1"):
        tk.nn.LIF(stateful=1)
    layer = tk.nn.LIF(stateful=True, v_init=0.5, return_potential=True, reset="none")
    x = torch.zeros(1, 3)
    assert [layer(x).potential[0, 0].item() for _ in range(2)] == [0.25, 0.125]
    layer.reset()
    assert layer(x).potential[0, 0].item() == 0.25
    with pytest.raises(ValueError, match="v_init: a stateful layer"):
        tk.nn.LIF(stateful=True, v_init=torch.zeros(3))
    for options, error, message in (
        ({"reset": "zero"}, ValueError, "reset: got 'zero'"),
        ({"decay": float("nan")}, ValueError, "decay: got nan"),
        ({"surrogate": "atan"}, TypeError, "surrogate: got 'atan'"),
        ({"memory": "bits"}, ValueError, "memory: 'bits'"),
        ({"backend": "tpu"}, ValueError, "backend: got 'tpu'"),
        ({"penalty": 1.0}, TypeError, "penalty: got float"),
    ):
        with pytest.raises(error, match=message):
            tk.nn.LIF(**options)
    with pytest.raises(ValueError, match="time_dim: got 5"):
        tk.nn.LIF(time_dim=5)(torch.zeros(2, 3))
    layer = tk.nn.LIF(stateful=True)
    layer(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"state does not fit.*\(3,\).*call reset\(\)"):
        layer(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"call reset\(\)"):
        layer(torch.zeros(2, 3, dtype=torch.float64))
