"""`accelerate`: networks of other libraries, against themselves."""

import copy
import itertools
import pickle
import re

import pytest
import torch
from torch import nn

import trt_kernels as tk
from tests import official
from tests.cases import quantised, relative_error
from tests.spikingjelly_models import spikingjelly_network

pytest.importorskip("spikingjelly")
pytest.importorskip("snntorch")
import snntorch
from snntorch import surrogate as snn_surrogate
from snntorch import utils as snn_utils
from spikingjelly.activation_based import functional, layer, neuron, surrogate

from trt_kernels import acceleration


def spikingjelly_net(node=neuron.LIFNode, step_mode="m", **options):
    net = nn.Sequential(
        layer.Conv2d(2, 8, 3, padding=1, bias=False),
        layer.BatchNorm2d(8),
        node(**options),
        layer.Conv2d(8, 8, 3, padding=1, stride=2),
        layer.BatchNorm2d(8),
        node(**options),
        layer.Flatten(),
        layer.Linear(8 * 3 * 3, 4),
        node(**options),
    )
    functional.set_step_mode(net, step_mode)
    return net


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    return [p.grad for p in net.parameters()]


def same_training(theirs, ours, run, steps=20, lr=0.05):
    """The same spikes on the first pass, bit for bit, and losses of `steps` steps within 1e-3."""
    torch.manual_seed(1)
    losses = []
    with torch.no_grad():
        assert torch.equal(run(theirs), run(ours))
    for net in (theirs, ours):
        optimizer = torch.optim.SGD(net.parameters(), lr=lr)
        curve = []
        for step in range(steps):
            torch.manual_seed(step)
            out = run(net)
            loss = ((out - torch.rand_like(out)) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append(torch.tensor(curve))
    assert torch.isfinite(losses[0]).all() and losses[0].std() > 0
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)


# --- SpikingJelly.
NODES = (
    (neuron.IFNode, {}),
    (neuron.LIFNode, {"tau": 3.0}),
    (neuron.LIFNode, {"decay_input": False, "v_reset": None}),
    (neuron.LIFNode, {"v_reset": -0.2, "detach_reset": True, "store_v_seq": True}),
    (neuron.ParametricLIFNode, {"init_tau": 2.5, "surrogate_function": surrogate.ATan()}),
    (neuron.ParametricLIFNode, {"decay_input": False, "surrogate_function": surrogate.Rect(1.5)}),
    (neuron.LIFNode, {"surrogate_function": surrogate.PiecewiseQuadratic(0.7)}),
    (neuron.IFNode, {"surrogate_function": surrogate.PiecewiseLeakyReLU(0.6, 0.0)}),
)


@pytest.mark.parametrize("step_mode", "ms")
@pytest.mark.parametrize("node,options", NODES, ids=lambda v: getattr(v, "__name__", None))
def test_spikingjelly_nodes(node, options, step_mode):
    theirs = node(v_threshold=0.6, step_mode=step_mode, **options)
    ours = copy.deepcopy(theirs)
    report = tk.accelerate(ours, strict=True)
    assert list(report.replaced) == [""] and not report.left
    assert isinstance(ours, node) and type(ours) is not node
    assert "served by trt_kernels" in repr(ours)
    x = quantised((3, 5, 4, 6), 1.5)
    for number in range(4):
        # The state goes on, starts again for another batch, and is reset and detached.
        shape = x if number != 1 else x[:, :2]
        results = []
        for net in (theirs, ours):
            leaf = shape.clone().requires_grad_()
            steps = (leaf,) if step_mode == "m" else leaf.unbind()
            spikes = torch.stack([net(step) for step in steps])
            loss = (spikes * torch.linspace(-1, 2, spikes.numel()).view_as(spikes)).sum()
            kept = [spikes, net.v]
            if net.store_v_seq:
                kept.append(net.v_seq)
                loss = loss + (net.v_seq**2).sum()
            grads = torch.autograd.grad(loss, [leaf, *net.parameters()], retain_graph=True)
            results.append((kept, grads))
        for a, b in zip(*(kept for kept, _ in results), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(*(grads for _, grads in results), strict=True):
            assert relative_error(b, a) < 1e-5
        for net in (theirs, ours):
            if number == 1:
                functional.reset_net(net)
            else:
                functional.detach_net(net)
            assert number != 1 or net.v == (net.v_reset or 0.0)
    assert isinstance(ours.v, torch.Tensor) and not ours.v.requires_grad


def test_attributes_are_read_at_every_call():
    theirs = neuron.LIFNode(step_mode="m")
    ours = copy.deepcopy(theirs)
    tk.accelerate(ours)
    x = quantised((4, 30), 2.0)
    for net in (theirs, ours):
        net.tau, net.v_threshold, net.surrogate_function = 4.0, 0.3, surrogate.ATan(3.0)
    assert torch.equal(theirs(x), ours(x))
    ours.surrogate_function = surrogate.Erf()
    with pytest.raises(ValueError, match="surrogate_function: got Erf, needs one of Sigmoid"):
        ours(x)


def test_half_precision_keeps_a_float32_state():
    node = neuron.LIFNode(step_mode="m")
    tk.accelerate(node)
    for dtype in (torch.bfloat16, torch.float16):
        node.reset()
        x = (torch.randn(4, 100) * 2).to(dtype)
        spikes = node(x)
        assert spikes.dtype == dtype and node.v.dtype == torch.float32
        node(x)  # goes on from it
    assert node(x.float()).dtype == torch.float32


@pytest.mark.parametrize("name", ("sew_resnet18", "spiking_vgg"))
def test_spikingjelly_networks(name):
    torch.manual_seed(0)
    theirs = spikingjelly_network(name)
    ours = copy.deepcopy(theirs)
    keys = list(ours.state_dict())
    names = [n for n, _ in ours.named_modules()]
    report = tk.accelerate(ours, strict=True)
    assert len(report.replaced) == sum(isinstance(m, neuron.BaseNode) for m in theirs.modules())
    assert list(ours.state_dict()) == keys and [n for n, _ in ours.named_modules()] == names
    x = torch.rand(3, 2, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2

    def run(net):
        out = net(x).mean(0)
        functional.reset_net(net)
        return out

    # Rounding of a gradient moves a spike sooner or later, the sooner the larger the steps.
    same_training(theirs, ours, run, lr=0.05 if name == "sew_resnet18" else 1e-3)


# --- BatchNorm.
def test_fused_batch_norm():
    theirs = spikingjelly_net(v_threshold=0.3, decay_input=False)
    ours = copy.deepcopy(theirs)
    report = tk.accelerate(ours, fuse_batch_norm=True)
    assert report.joined == {"1": "2", "4": "5"} and not report.not_joined
    assert isinstance(ours[1], nn.BatchNorm2d) and list(ours.state_dict()) == list(
        theirs.state_dict()
    )
    x = torch.randn(4, 3, 2, 6, 6)
    for training in (True, True, False):
        theirs.train(training), ours.train(training)
        a, b = theirs[:6](x), ours[:6](x)
        assert (a != b).float().mean() < 1e-3 and 0.05 < a.mean() < 0.95
        grads = gradients(theirs, a.sum()), gradients(ours, b.sum())
        for g, h in zip(*grads, strict=True):
            assert (g is None) == (h is None)
            assert g is None or (g - h).norm() <= 0.02 * g.norm() + 1e-3
        for net in (theirs, ours):
            functional.reset_net(net)
    for (name, a), b in zip(theirs.named_buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    # Copies and pickles are joined with their own BatchNorm.
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert clone[2]._joined[0] is clone[1] and clone[1] is not ours[1]
        assert torch.equal(clone.eval()(x), ours(x))
        functional.reset_net(ours)
    tk.restore(ours)
    assert [type(m) for m in ours] == [type(m) for m in theirs]
    expected = copy.deepcopy(theirs)
    expected.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), expected.eval()(x))


@pytest.mark.parametrize("kind", ("step", "container", "official"))
def test_fused_batch_norm_in_other_places(kind):
    x = torch.randn(4, 3, 2, 6, 6)
    if kind == "step":
        theirs = spikingjelly_net(step_mode="s", v_threshold=0.3)[:3]
        x = x[0]
    elif kind == "container":
        convolution = layer.SeqToANNContainer(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8))
        theirs = nn.Sequential(convolution, neuron.LIFNode(v_threshold=0.3, step_mode="m"))
    else:
        convolution = official.SeqToANNContainer(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8))
        theirs = nn.Sequential(convolution, official.LIFNode(v_threshold=0.3))
    ours = copy.deepcopy(theirs)
    report = tk.accelerate(ours, fuse_batch_norm=True)
    assert len(report.joined) == 1, report
    a, b = theirs(x), ours(x)
    assert (a != b).float().mean() < 1e-3 and a.mean() > 0.02


class Unsafe(nn.Module):
    """Every BatchNorm here is before a neuron, and none can be joined with it."""

    def __init__(self):
        super().__init__()
        self.read_twice, self.first = layer.BatchNorm1d(6), neuron.IFNode()
        self.called_twice, self.second = layer.BatchNorm1d(6), neuron.IFNode()
        self.shared, self.third = layer.BatchNorm1d(6), neuron.IFNode()
        self.same = self.shared
        self.hooked, self.fourth = layer.BatchNorm1d(6), neuron.IFNode()
        self.hooked.register_forward_hook(lambda *_: None)
        self.synced, self.fifth = nn.SyncBatchNorm(6), neuron.IFNode()

    def forward(self, x):
        y = self.read_twice(x)
        x = self.first(y) + y
        x = self.second(self.called_twice(self.called_twice(x)))
        x = self.third(self.shared(x))
        return self.fifth(self.synced(self.fourth(self.hooked(x))))


def test_what_is_not_safe_is_not_joined():
    net = Unsafe()
    report = tk.accelerate(net, fuse_batch_norm=True)
    assert not report.joined and len(report.replaced) == 5
    reasons = {
        "read_twice": "something else reads",
        "called_twice": "called more than once",
        "shared": "shared by several modules",
        "hooked": "a hook may see",
        "synced": "it is a SyncBatchNorm",
    }
    for name, reason in reasons.items():
        assert reason in report.not_joined[name]
        assert f"{name}: not joined: " in str(report)


class Looping(nn.Module):
    """Without a graph: its loop depends on a value."""

    def __init__(self):
        super().__init__()
        self.block = spikingjelly_net(v_threshold=0.3)

    def forward(self, x):
        return self.block(x) if x.sum() > -1e9 else x


def test_models_without_a_graph():
    net = Looping()
    report = tk.accelerate(net, fuse_batch_norm=True)
    assert not report.joined and len(report.replaced) == 3
    assert "no graph of it: TraceError" in report.not_joined[""]
    assert "(the model itself): not joined: no graph" in str(report)


class Reading(nn.Module):
    """A model that reads the BatchNorm's output, or changes its input, in one of many ways."""

    def __init__(self, how):
        super().__init__()
        self.how, self.calls, self.kept, self.last = how, 0, [], None
        self.conv, self.norm = layer.Conv2d(2, 8, 3), layer.BatchNorm2d(8)
        self.neuron = neuron.IFNode()

    def forward(self, x):
        self.calls += 1
        x = self.conv(x)
        y = self.norm(x)
        if self.how == "evaluation" and not self.training:
            return self.neuron(y) + y
        if self.how == "attribute":
            self.last = y
        if self.how == "list":
            self.kept.append(y)
        if self.how == "input":
            x += 1
        return self.neuron(y)


def hook(*_):
    pass


@pytest.mark.parametrize(
    "how,reason",
    (
        ("evaluation", "training and evaluation differ|something else reads its output"),
        ("attribute", "something else reads its output"),
        ("list", "something else reads its output"),
        ("input", "something else reads its input"),
        ("neuron hook", "a hook may see"),
        ("norm hook", "a hook may see"),
        ("gradient hook", "a hook may see"),
    ),
)
def test_what_reads_a_batch_norm_is_found(how, reason):
    net = Reading(how)
    if how == "neuron hook":
        net.neuron.register_forward_hook(hook)
    if how == "norm hook":
        net.norm.register_forward_pre_hook(hook)
    if how == "gradient hook":
        net.norm.register_full_backward_hook(hook)
    hooks = list(net.neuron._forward_hooks), list(net.norm._backward_hooks)
    for training in (True, False):
        report = tk.accelerate(net.train(training), fuse_batch_norm=True)
        assert re.search(reason, report.not_joined["norm"]) and not report.joined
        assert net.calls == 0 and net.kept == [] and net.last is None
        assert net.training == net.norm.training == training
    assert (list(net.neuron._forward_hooks), list(net.norm._backward_hooks)) == hooks
    safe = Reading("")
    assert tk.accelerate(safe, fuse_batch_norm=True).joined == {"norm": "neuron"}


def test_a_hook_round_the_batch_norm_alone():
    block = nn.Sequential(layer.Conv2d(2, 8, 3), layer.BatchNorm2d(8))
    net = nn.Sequential(block, neuron.IFNode())
    for module in (net, block):
        module.register_forward_hook(hook)
        joined = tk.accelerate(copy.deepcopy(net), fuse_batch_norm=True).joined
        assert bool(joined) == (module is net)


def test_batch_norms_that_are_called_apart_are_noticed():
    def joined():
        net = spikingjelly_net()
        tk.accelerate(net, fuse_batch_norm=True)
        return net

    x = torch.rand(2, 3, 2, 6, 6)
    net = joined()
    net[:2](x)
    with pytest.raises(RuntimeError, match="and then its neuron was not"):
        net[:2](x)
    net(x)  # goes on
    with pytest.raises(RuntimeError, match="called without the BatchNorm"):
        net[2](torch.rand(2, 3, 8, 6, 6))
    with torch.no_grad():
        y = net[:2](x)
    with pytest.raises(RuntimeError, match="under no_grad"):
        net[2](y)
    with pytest.raises(RuntimeError, match="functional_forward"):
        net[2].functional_forward((y,), (0.0,))
    tk.restore(net[2])
    assert type(net[1]) is layer.BatchNorm2d and type(net[4]) is not layer.BatchNorm2d


# --- snnTorch.
@pytest.mark.parametrize("reset", ("subtract", "zero", "none"))
@pytest.mark.parametrize("hidden", (False, True))
def test_snntorch_leaky(reset, hidden):
    options = {"reset_mechanism": reset, "init_hidden": hidden, "threshold": 0.6}
    for more in (
        {"beta": 0.9},
        {"beta": 0.9, "learn_beta": True, "learn_threshold": True},
        {"beta": torch.rand(6), "learn_beta": True, "spike_grad": snn_surrogate.fast_sigmoid()},
        {"beta": 0.5, "spike_grad": snn_surrogate.triangular(0.4), "output": True},
    ):
        theirs = snntorch.Leaky(**options, **more)
        ours = copy.deepcopy(theirs)
        tk.accelerate(ours, strict=True)
        assert isinstance(ours, snntorch.Leaky)
        x, results = quantised((5, 3, 6), 0.7), []
        for net in (theirs, ours):
            leaf, mem, kept = x.clone().requires_grad_(), None, []
            net.reset_mem()
            for current in leaf:
                result = net(current) if hidden else net(current, mem)
                mem = net.mem if isinstance(result, torch.Tensor) else result[1]
                spikes = result if isinstance(result, torch.Tensor) else result[0]
                assert isinstance(result, torch.Tensor) == (hidden and not net.output)
                kept += [spikes, mem]
            loss = sum((k * (i + 1)).sum() for i, k in enumerate(kept))
            results.append((kept, torch.autograd.grad(loss, [leaf, *net.parameters()])))
        for a, b in zip(*(kept for kept, _ in results), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(*(grads for _, grads in results), strict=True):
            assert (a - b).norm() < 1e-5 * max(a.norm(), 1)
    if hidden:
        with pytest.raises(TypeError, match="`mem` should not be passed"):
            ours(x[0], x[0])


class SnnNet(nn.Module):
    """As in snnTorch's tutorials: a loop over time in the model."""

    def __init__(self):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(30, 40), snntorch.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(40, 5), snntorch.Leaky(beta=0.9, learn_threshold=True)

    def forward(self, x):
        mem1, mem2, spikes = self.lif1.init_leaky(), self.lif2.init_leaky(), []
        for current in x:
            spike, mem1 = self.lif1(self.fc1(current), mem1)
            spike, mem2 = self.lif2(self.fc2(spike), mem2)
            spikes.append(spike)
        return torch.stack(spikes)


def test_snntorch_networks():
    theirs = SnnNet()
    ours = copy.deepcopy(theirs)
    tk.accelerate(ours, strict=True)
    x = torch.rand(8, 6, 30, generator=torch.Generator().manual_seed(3)) * 3
    same_training(theirs, ours, lambda net: net(x).mean(0))
    hidden = nn.Sequential(nn.Linear(30, 5), snntorch.Leaky(beta=0.9, init_hidden=True))
    tk.accelerate(hidden)
    first = hidden(x[0])
    hidden(x[1])
    snn_utils.reset(hidden)
    assert not hidden[1].mem.any() and torch.equal(hidden(x[0]), first)
    # A changed buffer is seen, in place or not.
    hidden[1].threshold.fill_(1e6)
    assert not hidden(x[0] * 100).any()
    hidden[1].threshold = torch.tensor(-1e6)
    assert hidden(x[0]).all()


# --- The official code.
def test_official_networks():
    def network():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(12, 20), official.LIFNode(), nn.Linear(20, 5), official.LIFNode(tau=2.0)
        )

    theirs, ours = network(), network()
    report = tk.accelerate(ours, strict=True)
    assert list(report.replaced) == ["1", "3"] and isinstance(ours[1], official.LIFNode)
    x = torch.rand(6, 4, 12, generator=torch.Generator().manual_seed(3)) * 3
    same_training(theirs, ours, lambda net: net(x).mean(1))
    ours[1].reset()


# --- What is left, and the way back.
class MyNode(neuron.LIFNode):
    pass


class LIFNode(official.LIFNode):
    """Not the official one, by its name and attributes alone."""

    def forward(self, x):
        return super().forward(x * 2)


@pytest.mark.parametrize(
    "module,reason",
    [
        (neuron.LIFNode(surrogate_function=surrogate.Erf()), "surrogate_function: got Erf"),
        (neuron.IFNode(surrogate_function=surrogate.Sigmoid(spiking=False)), "spiking is False"),
        (neuron.IFNode(surrogate_function=surrogate.PiecewiseLeakyReLU()), "with c != 0"),
        (neuron.IFNode(surrogate_function=surrogate.ATan(torch.tensor(2.0))), "is a tensor"),
        (neuron.QIFNode(), "QIFNode itself is not served: IFNode"),
        (MyNode(), "MyNode itself is not served"),
        (snntorch.Leaky(0.9, inhibition=True), "inhibition: got True"),
        (snntorch.Leaky(0.9, state_quant=torch.round), "state_quant"),
        (snntorch.Leaky(0.9, reset_delay=False), "reset_delay: got False"),
        (snntorch.Leaky(0.9, surrogate_disable=True), "surrogate_disable: got True"),
        (snntorch.Leaky(0.9, graded_spikes_factor=2.0), "graded_spikes_factor"),
        (snntorch.Leaky(0.9, learn_graded_spikes_factor=True), "graded_spikes_factor"),
        (snntorch.Leaky(torch.rand(3, 1, 1)), r"beta: got shape \(3, 1, 1\)"),
        (snntorch.Leaky(0.9, spike_grad=snn_surrogate.SFS()), "spike_grad: got SFS"),
        (snntorch.Leaky(0.9, spike_grad=torch.relu), "spike_grad: got <built-in method relu"),
        (snntorch.Synaptic(0.9, 0.9), "Synaptic itself is not served: Leaky"),
        (official.LIFNode(surrogate_type="zo"), "surrogate_type: got 'zo'"),
        (LIFNode(), "it does not give the spikes of the official LIFNode"),
    ],
)
def test_what_cannot_be_served(module, reason):
    net = nn.Sequential(nn.Linear(2, 2), module)
    kind = type(module)
    report = tk.accelerate(net)
    assert not report.replaced and type(module) is kind
    with pytest.raises(ValueError, match=f"strict: some neurons cannot be served: 1: .*{reason}"):
        tk.accelerate(net, strict=True)
    assert f"1: LEFT: {report.left['1']}" in str(report)


def test_a_library_of_another_version_is_named(monkeypatch):
    monkeypatch.setattr(acceleration, "version", lambda name: "0.0.0.0.14")
    report = tk.accelerate(nn.Sequential(neuron.LIFNode(), snntorch.Leaky(0.9)))
    assert report.left == {
        "0": "SpikingJelly 0.0.0.0.14 is not known bit for bit, SpikingJelly 2.0 is",
        "1": "snnTorch 0.0.0.0.14 is not known bit for bit, snnTorch 1.0 is",
    }


def test_replaced_forwards_and_precisions_are_left():
    nodes = nn.Sequential(neuron.IFNode(), snntorch.Leaky(0.9), neuron.IFNode())
    nodes[0].forward = nodes[0].forward
    nodes[1].forward = nodes[1].forward
    nodes[2]._neuron_precision = (torch.float16, "fp32", "fp32")
    left = tk.accelerate(nodes).left
    assert left["0"] == left["1"] == "its forward was replaced" and "precision" in left["2"]


def test_strict_changes_nothing_where_it_raises():
    net = nn.Sequential(neuron.LIFNode(), neuron.QIFNode())
    with pytest.raises(ValueError, match="strict"):
        tk.accelerate(net, strict=True)
    assert type(net[0]) is neuron.LIFNode


def test_restore():
    net = spikingjelly_net(neuron.ParametricLIFNode)
    x = torch.randn(3, 2, 2, 6, 6)
    with torch.no_grad():
        net(x)
    types, w, v = [type(m) for m in net], net[2].w, net[2].v
    tk.accelerate(net, fuse_batch_norm=True)
    assert net[2].w is w and net[2].v is v
    again = tk.accelerate(net, fuse_batch_norm=True)
    assert len(again.replaced) == 3 and not again.joined and not again.left
    assert tk.restore(net) is net and tk.restore(net) is net
    assert [type(m) for m in net] == types and net[2].w is w and net[2].v is v
    assert not {"_joined", "_waits", "in_steps"} & {key for m in net for key in vars(m)}


def test_a_copy_is_accelerated_on_request():
    net = spikingjelly_net()
    report = tk.accelerate(net, inplace=False)
    assert report.model is not net and type(net[2]) is neuron.LIFNode
    assert isinstance(report.model[2], acceleration.Served)
    assert pickle.loads(pickle.dumps(report.model))[2].tau == net[2].tau
    assert not tk.accelerate(nn.Linear(2, 2)).replaced


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: tk.accelerate([1]), "model: got list"),
        (lambda: tk.restore(None), "model: got NoneType"),
        (lambda: tk.accelerate(nn.ReLU(), inplace=1), "inplace: got 1"),
        (lambda: tk.accelerate(nn.ReLU(), strict="yes"), "strict: got 'yes'"),
        (lambda: tk.accelerate(nn.ReLU(), fuse_batch_norm=None), "fuse_batch_norm: got None"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(TypeError, match=message):
        call()


class Raising(official.LIFNode):
    def forward(self, x, labels):
        return x


Raising.__name__ = "LIFNode"


def test_an_official_neuron_is_tried_in_any_mode():
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert tk.accelerate(official.LIFNode()).replaced
    seen = []
    node = official.LIFNode()
    node.register_forward_hook(lambda *_: seen.append(1))
    assert tk.accelerate(node).replaced and not seen and node.mem == 0
    assert "its forward fails on a small input: TypeError" in tk.accelerate(Raising()).left[""]


# --- What users do to a snnTorch neuron afterwards.
def both_leaky(**options):
    # Not a copy: the library has a list of all that were constructed.
    theirs, ours = (
        snntorch.Leaky(**{"beta": 0.9, "init_hidden": True, **options}) for _ in range(2)
    )
    tk.accelerate(ours, strict=True)
    return theirs, ours


@pytest.mark.parametrize("reset", ("subtract", "zero"))
def test_changed_states_and_settings_are_seen(reset):
    def detach(leaky):
        leaky.mem.detach_()

    def detach_hidden(leaky):
        type(leaky).detach_hidden()

    def data(leaky):
        leaky.mem.data.zero_()

    def threshold(leaky):
        leaky.threshold.data.fill_(0.3)

    def beta(leaky):
        leaky.beta.data = torch.tensor(0.3)

    def in_place(leaky):
        leaky.beta.fill_(0.7)

    def setting(leaky):
        leaky.reset_mechanism = "none"  # which the library does not look at again

    changes = (detach, detach_hidden, data, threshold, beta, in_place, setting)
    for change, learn in itertools.product(changes, (False, True)):
        if learn and change is in_place:
            continue  # autograd refuses it
        pair = both_leaky(reset_mechanism=reset, learn_threshold=learn)
        x = torch.rand(4, 3, 6, generator=torch.Generator().manual_seed(1)) * 3
        results = []
        for leaky in pair:
            leaf = x.clone().requires_grad_()
            spikes = [leaky(leaf[0]), leaky(leaf[1])]
            change(leaky)
            spikes += [leaky(leaf[2]), leaky(leaf[3])]
            loss = leaky.mem.sum() + torch.stack(spikes).sum()
            results.append((torch.stack(spikes), leaky.mem, torch.autograd.grad(loss, leaf)[0]))
        (a, m, g), (b, n, h) = results
        assert torch.equal(a, b) and torch.equal(m, n), change.__name__
        assert (g - h).norm() < 1e-5 * g.norm(), change.__name__


def test_settings_that_are_switched_on_afterwards_raise():
    x = torch.rand(3, 6)
    for name, value in (
        ("inhibition", True),
        ("state_quant", torch.round),
        ("reset_delay", False),
        ("graded_spikes_factor", torch.tensor(2.0)),
    ):
        _, leaky = both_leaky()
        leaky(x)
        setattr(leaky, name, value)
        with pytest.raises(ValueError, match=f"{name}: got .*restore"):
            leaky(x)
    node = neuron.LIFNode()
    tk.accelerate(node)
    node._neuron_precision = (torch.float16, "fp32", "fp32")
    with pytest.raises(ValueError, match="its precision is set"):
        node(x)


@pytest.mark.parametrize("reset", ("subtract", "zero"))
def test_inference_mode(reset):
    x = torch.rand(3, 6) * 3
    with torch.inference_mode():
        theirs, ours = both_leaky(reset_mechanism=reset)
        for _ in range(3):
            assert torch.equal(theirs(x), ours(x))
    theirs, ours = both_leaky(reset_mechanism=reset)
    node = neuron.LIFNode()
    tk.accelerate(node)
    with torch.inference_mode():
        theirs(x), ours(x), node(x)
    leaf = x.clone().requires_grad_()
    assert torch.equal(theirs(leaf), ours(leaf))
    (ours(leaf).sum() + node(leaf).sum()).backward()  # from the states of before


def test_dtypes_of_snntorch():
    theirs, ours = both_leaky(output=True)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for net in (theirs, ours):
            net.mem = torch.zeros(0)
        a, b = theirs(torch.rand(3, 6).to(dtype)), ours(torch.rand(3, 6).to(dtype))
        assert a[0].dtype == b[0].dtype == torch.float32
    _, ours = both_leaky(beta=torch.rand(6, dtype=torch.float64))
    ours(torch.rand(3, 6))
    with pytest.raises(ValueError, match=r"beta: got dtype torch\.float64"):
        ours(torch.rand(3, 6))
    _, ours = both_leaky()
    ours(torch.rand(3, 6).double())
    with pytest.raises(ValueError, match=r"mem: got dtype torch\.float64"):
        ours(torch.rand(3, 6))
    whole = snntorch.Leaky(0.9, threshold=torch.ones(6, dtype=torch.int64))
    assert "threshold: got dtype torch.int64" in tk.accelerate(whole).left[""]


# --- With the rest of PyTorch.
@pytest.mark.parametrize("fuse", (False, True))
def test_compiled_networks_have_no_graph_break(fuse):
    net = spikingjelly_net(neuron.ParametricLIFNode, v_threshold=0.3)
    tk.accelerate(net, fuse_batch_norm=fuse)
    eager = copy.deepcopy(net)
    x = torch.randn(4, 3, 2, 6, 6)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the state goes on
        out, expected = compiled(x), eager(x)
        assert torch.equal(out, expected)
    a, b = gradients(net, out.sum()), gradients(eager, expected.sum())
    for g, h in zip(a, b, strict=True):
        assert (g - h).norm() <= 1e-5 * h.norm() + 1e-6


def test_compiled_loops_of_single_steps():
    leaky = nn.Sequential(nn.Linear(6, 4), snntorch.Leaky(0.9, init_hidden=True))
    tk.accelerate(leaky)
    eager = copy.deepcopy(leaky)
    compiled = torch.compile(leaky, fullgraph=True, backend="aot_eager")
    for x in torch.rand(3, 2, 6) * 3:
        assert torch.equal(compiled(x), eager(x))
    official_net = nn.Sequential(nn.Linear(6, 4), official.LIFNode())
    tk.accelerate(official_net)
    x = torch.rand(2, 5, 6) * 3
    compiled = torch.compile(official_net, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), official_net(x))


@pytest.mark.parametrize("fuse", (False, True))
def test_autocast(fuse):
    net = spikingjelly_net(v_threshold=0.3, decay_input=False)
    tk.accelerate(net, fuse_batch_norm=fuse)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(torch.randn(4, 3, 2, 6, 6))
    assert out.dtype == torch.bfloat16 and net[2].v.dtype == torch.float32
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


def test_a_batch_norm_that_was_exchanged_is_noticed():
    net = spikingjelly_net()
    tk.accelerate(net, fuse_batch_norm=True)
    other = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    with pytest.raises(RuntimeError, match="called without the BatchNorm"):
        other.eval()[2](torch.rand(4, 3, 8, 6, 6))
    net = spikingjelly_net()
    tk.accelerate(net, fuse_batch_norm=True)
    functional.set_step_mode(net, "s")
    net[1].step_mode = "m"
    with pytest.raises(RuntimeError, match="step_mode: a neuron and the BatchNorm joined"):
        net[:3](torch.rand(3, 2, 6, 6))


def test_copies_of_accelerated_leaky():
    leaky = snntorch.Leaky(0.9, reset_mechanism="zero", init_hidden=True)
    tk.accelerate(leaky)
    x = torch.rand(4, 3, 6) * 3
    with torch.no_grad():
        for current in x[:2]:
            leaky(current)
        other = copy.deepcopy(leaky)
        for current in x[2:]:
            assert torch.equal(leaky(current), other(current))
    assert type(tk.restore(other)) is snntorch.Leaky
    assert not {"_numbers", "_our_surrogate"} & vars(other).keys()
