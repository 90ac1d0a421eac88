"""Copies, pickles, files and other processes: what comes back does the same."""

import copy
import io
import pickle

import pytest
import torch
from torch import multiprocessing, nn

import trt_kernels as tk

T, B, C = 3, 4, 6
WEIGHT = torch.rand(C) + 0.3


def graph(shape):
    """A tensor that a graph leads to, which torch does not deepcopy."""
    return 1 * torch.rand(shape, requires_grad=True)


def saved(thing, **options):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **options)


WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": lambda thing: saved(thing, weights_only=False),
}
LAYERS = {
    "LIF": tk.nn.LIF,
    "stateful": lambda: tk.nn.LIF(stateful=True, decay=0.9),
    "buffer": lambda: tk.nn.LIF(decay=WEIGHT, channel_dim=2),
    "buffer with a graph": lambda: tk.nn.LIF(threshold=graph(C), channel_dim=2),
    "parameter": lambda: tk.nn.LIF(v_reset=nn.Parameter(-WEIGHT), channel_dim=2),
    "start": lambda: tk.nn.LIF(v_init=torch.rand(B, C)),
    "start with a graph": lambda: tk.nn.LIF(v_init=graph((B, C))),
    "penalty": lambda: tk.nn.LIF(penalty=tk.MembranePenalty("trt", torch.rand(T))),
    "PLIF": lambda: tk.nn.PLIF(channels=C, channel_dim=2, stateful=True),
    "BatchNormLIF": lambda: tk.nn.BatchNormLIF(C, gain_steps=T, stateful=True),
    "SpikingJelly's": lambda: tk.nn.LIF(**tk.presets.spikingjelly_lif(tau=2.0)),
    "snnTorch's": lambda: tk.nn.LIF(**tk.presets.snntorch_leaky(0.9), stateful=True),
    "Norse's": lambda: tk.nn.LIF(**tk.presets.norse_lif_box()),
    "the paper's": lambda: tk.nn.LIF(**tk.presets.official_trt()),
}


def results(layer, x):
    """Spikes and gradients of a call, and what it leaves."""
    x = x.clone().requires_grad_()
    out = layer(x)
    value = out if isinstance(out, torch.Tensor) else out.spikes + out.penalty
    (value * torch.linspace(-1, 1, value.numel()).view_as(value)).sum().backward()
    left = [t.detach() for t in (layer.state, *layer.buffers()) if t is not None]
    return [value.detach(), x.grad, *left]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("way", WAYS)
def test_copies_do_the_same(way, name):
    layer = LAYERS[name]()
    layer(torch.randn(T, B, C, requires_grad=True))  # which leaves a state with a graph
    other = WAYS[way](layer)
    assert other.state is None or not other.state.requires_grad
    if way != "copy":  # which shares what is inside
        inside = {t.data_ptr() for t in other.state_dict().values()}
        assert inside.isdisjoint(t.data_ptr() for t in layer.state_dict().values())
    again = WAYS[way](other)
    x = torch.randn(T, B, C)
    if way == "copy":  # running statistics are shared too
        other.eval(), again.eval(), layer.eval()
    expected = results(again, x)
    layer.detach()
    for found in (results(other, x), results(layer, x)):
        assert all(map(torch.equal, found, expected)) and len(found) == len(expected)


@pytest.mark.parametrize("name", LAYERS)
def test_weights_only(name):
    layer, other = LAYERS[name](), LAYERS[name]()
    state = {key: torch.rand(value.shape).to(value) for key, value in layer.state_dict().items()}
    other.load_state_dict(saved(state, weights_only=True))
    for key, value in other.state_dict().items():
        assert torch.equal(value, state[key]), key


THINGS = {
    "surrogate": lambda: tk.Sigmoid(3.0),
    "penalty": lambda: tk.MembranePenalty("trt", [1.0, 2.0], delta=0.3),
    "TETLoss": lambda: tk.TETLoss(mean=1.0, weight=0.1, time_dim=1),
    "report": tk.report,
    "preset": lambda: tk.presets.spikingjelly_lif(tau=2.0),
    "output": lambda: tk.lif(torch.randn(T, B), return_state=True),
}


@pytest.mark.parametrize("name", THINGS)
@pytest.mark.parametrize("way", WAYS)
def test_other_things(way, name):
    thing = THINGS[name]()
    other = WAYS[way](thing)
    assert type(other) is type(thing) and str(other) == str(thing)


@pytest.mark.parametrize("way", ("deepcopy", "pickle", "torch.save"))
@pytest.mark.parametrize("named", (False, True))
def test_a_loss_goes_with_its_model(way, named):
    model = nn.Sequential(nn.Linear(C, 3), tk.nn.LIF())
    source = list(model.named_parameters()) if named else model
    objective = tk.TRTLoss(source, weight=1.0, delta=0.1, mse_ratio=0.1)
    copied, loss = WAYS[way]((model, objective))
    assert loss.regularized()[0] is copied[0].weight
    x, target = torch.randn(T, B, C), torch.arange(B) % 3
    assert torch.equal(loss(copied(x), target), objective(model(x), target))
    # By itself it keeps a copy of the parameters.
    alone = WAYS[way](objective)
    assert torch.equal(alone.regularized()[0], model[0].weight)


def work(network, x, queue):
    with torch.no_grad():
        current = network[0](x)
    queue.put([t.numpy() for t in results(network[1], current)])
    with torch.no_grad():
        network[0].weight.zero_()


def test_another_process():
    """What was sent computes there what it does here; `share_memory` shares its parameters."""
    network = nn.Sequential(nn.Linear(C, C), tk.nn.BatchNormLIF(C, gain_steps=T, stateful=True))
    network[1](torch.randn(T, B, C))
    x = torch.randn(T, B, C)
    with torch.no_grad():
        current = network[0](x)
    expected = results(copy.deepcopy(network[1]), current)
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    network[0].share_memory()
    child = context.Process(target=work, args=(network, x, queue))
    child.start()
    child.join(100)  # what it sends fits into the pipe
    assert child.exitcode == 0
    found = [torch.from_numpy(array) for array in queue.get()]
    assert all(map(torch.equal, found, expected))
    assert not network[0].weight.any()
