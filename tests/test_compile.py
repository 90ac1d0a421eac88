"""torch.compile and torch.export: one graph, the bits of eager, no compilation for every size."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import trt_kernels as tk
from examples.networks import SmallNet
from tests.cases import LIF, LOSS, PENALTY
from trt_kernels import backends, ops
from trt_kernels.backends import native
from trt_kernels.options import LIFTensors

T = 4
BATCHES = (8, 5, 16, 3, 64)
TRT = {"weight": 1e-2, "delta": 0.3}


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing that another test compiled."""
    torch._dynamo.reset()


def one_graph(function, backend="aot_eager"):
    """The function compiled without a graph break, and a count of its compilations."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def outputs_and_gradients(function, tensors):
    """Of leaves with these values: every output, and the gradient of every floating input."""
    leaves = [t.detach().clone() for t in tensors]
    wanted = [t.requires_grad_() for t in leaves if t.is_floating_point()]
    out = function(*leaves)
    out = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
    differentiable = [t for t in out if t.requires_grad]
    torch.manual_seed(0)
    arriving = [torch.randn_like(t) for t in differentiable]
    return [t.detach() for t in out] + list(
        torch.autograd.grad(differentiable, wanted, arriving, materialize_grads=True)
    )


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


EVERY_EXTRA = {
    "penalty": tk.MembranePenalty("trt", [1.0, 0.5, 0.25, 2.0]),
    "return_state": True,
    "return_potential": True,
    "statistics": True,
}
BITS = {"memory": "bits", "surrogate": tk.Rectangle(), "detach_reset": True}


def learned(x, v_init, decay, threshold):
    return tk.lif(
        x,
        decay=decay,
        threshold=threshold,
        v_init=v_init,
        charge="leak",
        channel_dim=2,
        **EVERY_EXTRA,
    )


def penalised(x):
    made_inside = tk.MembranePenalty("square", [1.0, 0.5, 0.25, 2.0])
    return tk.lif(x, penalty=made_inside)


def normalised(x, weight, bias, gains):
    mean, var = torch.zeros(6, device=x.device), torch.ones(6, device=x.device)
    spikes = tk.batch_norm_lif(x, mean, var, weight, bias, True, gains=gains)
    return spikes, mean, var


def inferred(x, weight, bias):
    mean, var = (torch.full((6,), value, device=x.device) for value in (0.1, 0.9))
    return tk.batch_norm_lif(x, mean, var, weight, bias)


def constant(x, weight):
    return tk.batch_norm_lif(x, None, None, weight, None, True, steps=T, return_state=True)


def sequence(batch, *shape):
    return torch.randn(T, batch, 6, *shape)


# A function, its tensors at a batch size, and for each of them the dimension of that size.
CASES = {
    "lif": (tk.lif, lambda b: [sequence(b)], (1,)),
    "extras": (lambda x: tk.lif(x, **EVERY_EXTRA), lambda b: [sequence(b)], (1,)),
    "learned": (
        learned,
        lambda b: [sequence(b), torch.randn(b, 6), torch.rand(6), torch.rand(6)],
        (1, 0, None, None),
    ),
    "steps": (lambda x: tk.lif(x, steps=T, return_state=True), lambda b: [torch.randn(b, 6)], (0,)),
    "bits": (lambda x: tk.lif(x, **BITS), lambda b: [sequence(b)], (1,)),
    "time second": (
        lambda x: tk.lif(x, time_dim=1, charge="divide", reset="soft"),
        lambda b: [sequence(b, 2).permute(1, 0, 3, 2)],
        (0,),
    ),
    "time of any length": (tk.lif, lambda b: [torch.randn(b, 3, 6)], (0,)),
    "penalty made inside": (penalised, lambda b: [sequence(b)], (1,)),
    "batch_norm_lif in training": (
        normalised,
        lambda b: [sequence(b, 3, 2), torch.rand(6), torch.rand(6), torch.rand(T)],
        (1, None, None, None),
    ),
    "batch_norm_lif, channels last": (
        normalised,
        lambda b: [
            torch.randn(T, b, 3, 2, 6).permute(0, 1, 4, 2, 3),
            torch.rand(6),
            torch.rand(6),
            torch.rand(T, 6),
        ],
        (1, None, None, None),
    ),
    "batch_norm_lif in evaluation": (
        inferred,
        lambda b: [sequence(b), torch.rand(6), torch.rand(6)],
        (1, None, None),
    ),
    "batch_norm_lif, constant": (
        constant,
        lambda b: [torch.randn(b, 6, 3, 2), torch.rand(6)],
        (0, None),
    ),
    "trt_penalty": (
        lambda p, q: tk.trt_penalty([p, q], steps=T, **TRT),
        lambda b: [torch.randn(b, 3), torch.randn(b)],
        (0, 0),
    ),
    "temporal_loss": (
        lambda o, y: tk.temporal_loss(o, y, mse_ratio=0.1, label_smoothing=0.1),
        lambda b: [sequence(b), torch.randint(6, (b,))],
        (1, 0),
    ),
    "TETLoss": (
        lambda o, y: tk.TETLoss(mean=1.0, weight=0.1, time_dim=1)(o, y),
        lambda b: [torch.randn(b, T, 6), torch.randint(6, (b,))],
        (0, 0),
    ),
}


def compilations(case, marked):
    """Of all batch sizes, each of which gives the bits of eager."""
    function, make, dims = CASES[case]
    compiled, counter = one_graph(function)

    def call(*tensors):
        for tensor, dim in zip(tensors, dims, strict=True):
            if marked and dim is not None:
                torch._dynamo.mark_dynamic(tensor, dim)
        return compiled(*tensors)

    for batch in BATCHES:
        tensors = make(batch)
        expected = outputs_and_gradients(function, tensors)
        assert_same(outputs_and_gradients(call, tensors), expected)
    return counter.frame_count


@pytest.mark.parametrize("case", CASES)
def test_one_graph_for_every_batch_size(case):
    assert compilations(case, marked=True) == 1


AUTOMATIC = ("extras", "bits", "steps", "batch_norm_lif in training", "trt_penalty", "TETLoss")


@pytest.mark.parametrize("case", AUTOMATIC)
def test_a_second_batch_size_is_the_last_to_compile(case):
    assert compilations(case, marked=False) == 2


@pytest.mark.parametrize("case", CASES)
def test_one_graph_on_every_backend(case, backend):
    """The choice of a backend asks a driver by functions that torch.compile cannot trace."""
    function, make, _ = CASES[case]
    tensors = make(3)
    expected = outputs_and_gradients(function, tensors)
    assert_same(outputs_and_gradients(one_graph(function)[0], tensors), expected)


# These take an entry of a tensor, for which torch asks for a real device, fake tensor or not.
INDEXING = {"bits", "batch_norm_lif in training", "batch_norm_lif, channels last"}


@pytest.mark.parametrize("case", [case for case in CASES if case not in INDEXING])
def test_one_graph_of_cuda_tensors(case, gpu_on_host):
    """As far as this machine can: fake tensors on a GPU, the automatic choice, the forward pass."""
    function, make, _ = CASES[case]
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = [torch.empty_like(t, device="cuda") for t in make(3)]
        out = one_graph(function, "eager")[0](*tensors)
    out = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
    assert {t.device for t in out} == {torch.device("cuda", 0)}


@pytest.mark.parametrize("case", CASES)
def test_one_graph_without_gradients(case):
    function, make, _ = CASES[case]
    tensors = make(3)
    for found, expected in zip(
        *(
            out if isinstance(out, tuple) else (out,)
            for out in (one_graph(function)[0](*tensors), function(*tensors))
        ),
        strict=True,
    ):
        assert found is expected is None or torch.equal(found, expected)


@pytest.mark.parametrize("count", (1, 2, 3, 8))
def test_one_graph_of_penalties_without_gradients(count):
    params = [torch.randn(5) for _ in range(count)]
    compiled, _ = one_graph(lambda p: tk.trt_penalty(p, steps=T, **TRT))
    assert torch.equal(compiled(params), tk.trt_penalty(params, steps=T, **TRT))


@pytest.mark.parametrize("backend", ("cuda", None))
def test_no_graph_where_no_backend_serves(backend, monkeypatch):
    """The reason reaches whoever compiles, as it does in eager mode."""
    monkeypatch.setattr(native, "why_no_cuda", lambda device: "no GPU")
    monkeypatch.setattr(backends, "why_no_triton", lambda device: "no Triton")
    ops._resolve.cache_clear()
    with FakeTensorMode():
        x = torch.empty(T, 3, device="cuda")
        with pytest.raises(Exception, match="lif: backend 'cuda' cannot serve: no GPU"):
            one_graph(lambda x: tk.lif(x, backend=backend), "eager")[0](x)
    ops._resolve.cache_clear()


MODULES = {
    "LIF": lambda: tk.nn.LIF(decay=nn.Parameter(torch.rand(6)), channel_dim=2),
    "LIF with a penalty": lambda: tk.nn.LIF(**EVERY_EXTRA),
    "LIF with a state": lambda: tk.nn.LIF(stateful=True),
    "PLIF": lambda: tk.nn.PLIF(channels=6, channel_dim=2),
    "BatchNormLIF": lambda: tk.nn.BatchNormLIF(6, gain_steps=T),
    "BatchNormLIF with a state": lambda: tk.nn.BatchNormLIF(6, stateful=True),
    "BatchNormLIF, averaging": lambda: tk.nn.BatchNormLIF(6, momentum=None),
    "BatchNormLIF, untracked": lambda: tk.nn.BatchNormLIF(6, track_running_stats=False),
    "BatchNormLIF in evaluation": lambda: tk.nn.BatchNormLIF(6).eval(),
}


def after_training(module, call):
    """Spikes of four calls, then the gradients, the buffers and the state that these left."""
    torch.manual_seed(1)
    results = []
    for _ in range(4):
        module.detach()
        x = (torch.randn(T, 8, 6) + 0.5).requires_grad_()
        out = call(x)
        spikes = out if isinstance(out, torch.Tensor) else out.spikes
        (spikes * torch.randn_like(spikes)).sum().backward()
        results += [spikes.detach(), x.grad]
    results += [p.grad for p in module.parameters()] + list(module.buffers())
    return results + ([module.state.detach()] if module.stateful else [])


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    module = MODULES[name]()
    expected = after_training(other := copy.deepcopy(module), other)
    compiled, counter = one_graph(module)
    assert_same(after_training(module, compiled), expected)
    assert counter.frame_count == 1 + module.stateful  # its first call has no state


def trained(wrap):
    """Losses and parameters of four steps with a new batch size and learning rate in each."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), tk.nn.BatchNormLIF(5), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9)
    losses = (
        tk.TRTLoss(network, mse_ratio=0.1, **TRT),
        tk.TRTLoss(network.named_parameters(), mse_ratio=0.1, **TRT),
        tk.TETLoss(mean=1.0, weight=0.1),
    )

    def objectives(x, target):
        logits = network(x)
        return torch.stack([loss(logits, target) for loss in losses])

    compute = wrap(objectives)
    results = []
    for batch in BATCHES[:4]:
        values = compute(torch.randn(T, batch, 6), torch.randint(3, (batch,)))
        optimizer.zero_grad()
        values.sum().backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.7
        results.append(values.detach())
    return results + [t.detach() for t in network.state_dict().values()]


def test_training():
    counters = []

    def wrap(function):
        compiled, counter = one_graph(function)
        counters.append(counter)
        return compiled

    assert_same(trained(wrap), trained(lambda function: function))
    assert counters[0].frame_count == 2


def test_annealed_tensors():
    x = torch.randn(T, 8, 6)

    def spikes(x, decay, threshold, momentum):
        mean, var = torch.zeros(6), torch.ones(6)
        block = tk.batch_norm_lif(x, mean, var, None, None, True, momentum, decay=decay)
        return tk.lif(x, decay=decay, threshold=threshold), block, mean, var

    compiled, counter = one_graph(spikes)
    for step in range(1, 5):
        annealed = [torch.tensor(1 / step), torch.tensor(0.9**step), torch.tensor(1 / step)]
        assert_same(compiled(x, *annealed), spikes(x, *annealed))
    assert counter.frame_count == 1


def test_annealed_buffer():
    x, module = torch.randn(T, 8, 6), tk.nn.LIF(threshold=torch.tensor(1.0))
    compiled, counter = one_graph(module)
    for value in (1.0, 0.5, 0.2):
        module.threshold.fill_(value)
        assert torch.equal(compiled(x), tk.lif(x, threshold=value))
    assert counter.frame_count == 1


def test_a_changed_float_compiles_again():
    """Every value costs a compilation, but must not be an error."""
    x, logits = torch.randn(T, 8, 6), torch.randn(T, 8, 6)

    def work(x, value):
        loss = tk.temporal_loss(logits, torch.arange(8) % 6, mse_ratio=value)
        penalty = tk.trt_penalty([x], steps=T, weight=value, delta=value)
        surrogate = tk.Sigmoid(value)
        return tk.lif(x, decay=value, threshold=value, surrogate=surrogate), loss, penalty

    compiled, counter = one_graph(work)
    for value in (0.5, 0.6, 0.7):
        assert_same(compiled(x, value), work(x, value))
    assert counter.frame_count >= 3


@pytest.mark.parametrize("given", (False, True), ids=("no gradient yet", "a gradient"))
def test_penalty_into_the_gradients(given):
    results = []
    for wrap in (lambda f: f, lambda f: one_graph(f)[0]):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(4))]
        frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        for p in params:
            p.grad = torch.randn_like(p) if given else None

        def add(params=params, frozen=frozen):
            tk.trt_penalty_([*params, frozen], steps=T, scale=3.0, **TRT)

        add = wrap(add)
        add()
        add()
        assert frozen.grad is None
        results.append([p.grad for p in params])
    assert_same(*results)


def test_checked_calls_are_not_remembered():
    x, settings = torch.randn(T, 8), {"decay": 0.1234}
    before = dict(tk.functional._checked)
    one_graph(lambda x: tk.lif(x, **settings))[0](x)
    assert tk.functional._checked == before
    tk.lif(x, **settings)
    assert tk.functional._checked != before


def test_backend_of_the_moment():
    x = torch.randn(T, 8)
    compiled, counter = one_graph(tk.lif)
    assert torch.equal(compiled(x), tk.lif(x))
    with tk.use_backend("reference"):
        assert torch.equal(compiled(x), tk.lif(x))
    assert counter.frame_count == 2

    def inside(x):
        with tk.use_backend("reference"):
            return tk.lif(x)

    assert torch.equal(one_graph(inside)[0](x), tk.lif(x))
    assert tk.ops.default_backend == "auto"


def test_without_gradients():
    x = torch.randn(T, 8, 6)
    compiled, _ = one_graph(tk.lif)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(compiled(x), tk.lif(x))


def test_example():
    model = SmallNet(steps=3)
    images, labels = torch.rand(9, 1, 8, 8), torch.randint(10, (9,))
    results = []
    for network, wrap in ((copy.deepcopy(model), lambda f: f), (model, lambda f: one_graph(f)[0])):
        objective = tk.TRTLoss(network, mse_ratio=0.05, **TRT)

        def loss(network=network, objective=objective):
            return objective(network(images), labels)

        value = wrap(loss)()
        value.backward()
        results.append([value.detach(), *(p.grad for p in network.parameters())])
        results[-1] += list(network.buffers())
    assert_same(*results)


def test_inductor():
    """Code of the compiler round the operators: the same spikes, sums in another order."""
    network = nn.Sequential(
        tk.nn.BatchNormLIF(6, gain_steps=T), nn.Linear(6, 6), tk.nn.PLIF(threshold=0.1)
    )
    x, labels = torch.randn(T, 8, 6), torch.randint(6, (8,))
    objective = tk.TRTLoss(network, mse_ratio=0.1, **TRT)
    results = []
    for mode in (network, torch.compile(network, fullgraph=True)):
        network.zero_grad()
        network[0].reset_running_stats()
        spikes = mode(x)
        objective(spikes, labels).backward()
        results.append((spikes.detach(), [p.grad for p in network.parameters()]))
    assert torch.equal(results[1][0], results[0][0]) and results[0][0].any()
    torch.testing.assert_close(results[1][1], results[0][1])


# --- The operators where no autograd Function stands round them.
def registered(backend="cpu"):
    """Every operator with a gradient of its own, arguments, and those of them that have one."""
    ops = torch.ops.trt_kernels
    x, vectors = torch.randn(T, 5, 6), torch.rand(2, 6)
    everything = LIF._replace(
        phi="trt", delta=0.5, return_state=True, return_potential=True, channel_dim=1
    )
    lif = LIFTensors(torch.randn(5, 6), torch.rand(T), torch.rand(3, 6))
    yield ops.lif_forward, (x, *lif, True, *everything), (0, 1, 3)
    stats = torch.rand(4, 6)
    block = LIFTensors(None, None, None, stats, *vectors, torch.rand(T))
    options = LIF._replace(channel_dim=1, batch=True, scale=2.0)
    yield ops.lif_forward, (x.bfloat16(), *block, True, *options), (0, 5, 6, 7)
    bits = LIF._replace(bits=2, surrogate="rectangle", reset="soft")
    yield ops.lif_forward, (x, *LIFTensors(), True, *bits), (0,)
    yield ops.trt_penalty_forward, ([x, vectors], *PENALTY), (0,)
    yield ops.temporal_loss_forward, (x, torch.randint(6, (5,)), vectors[0], *LOSS), (0,)


def requiring(arguments, which):
    """The arguments with leaves in the places of `which`, and these leaves."""
    leaves = []

    def leaf(t):
        if isinstance(t, list):
            return [leaf(one) for one in t]
        leaves.append(t.detach().clone().requires_grad_())
        return leaves[-1]

    return [leaf(a) if i in which else a for i, a in enumerate(arguments)], leaves


@pytest.mark.parametrize("index", range(5))
def test_opcheck_with_gradients(index):
    op, arguments, which = list(registered())[index]
    arguments, _ = requiring(arguments, which)
    opcheck(op, tuple(arguments))


def test_operators_have_the_gradients_of_the_functions():
    x, v_init, neuron = torch.randn(T, 5, 6), torch.randn(5, 6), torch.rand(3, 6)
    penalty = tk.MembranePenalty("trt", torch.rand(T), delta=0.5, eps=0.0)
    settings = LIF._replace(
        phi="trt", delta=0.5, return_state=True, return_potential=True, channel_dim=1
    )
    statistics = tk.ops.batch_statistics(x, 2, 1e-5, 1, "cpu")
    batch = LIF._replace(channel_dim=1, batch=True)

    def function(x, v_init, neuron, weight, bias):
        decay, threshold, v_reset = neuron
        options = {"decay": decay, "threshold": threshold, "v_reset": v_reset, "channel_dim": 2}
        every = {"penalty": penalty, "return_state": True, "return_potential": True}
        out = tk.lif(x, v_init=v_init, **options, **every)
        block = tk.batch_norm_lif(x, None, None, weight, bias, True)
        loss = tk.temporal_loss(x, torch.arange(5), mse_ratio=0.1)
        regularizer = tk.trt_penalty([x, bias], **PENALTY._asdict())
        return out.spikes, out.state, out.potential, out.penalty, block, loss, regularizer

    def operators(x, v_init, neuron, weight, bias):
        ops = torch.ops.trt_kernels
        given = LIFTensors(v_init, penalty.weight, neuron)
        out = ops.lif_forward(x, *given, True, *settings)
        given = LIFTensors(stats=statistics, norm_weight=weight, norm_bias=bias)
        block = ops.lif_forward(x, *given, True, *batch)[0]
        loss = ops.temporal_loss_forward(x, torch.arange(5), None, *LOSS)[0]
        return *out[:4], block, loss, ops.trt_penalty_forward([x, bias], *PENALTY)

    tensors = [x, v_init, neuron, torch.rand(6), torch.rand(6)]
    assert_same(outputs_and_gradients(operators, tensors), outputs_and_gradients(function, tensors))


@pytest.mark.parametrize("index", range(5))
def test_operators_refuse_a_second_derivative(index):
    op, arguments, which = list(registered())[index]
    arguments, leaves = requiring(arguments, which)
    out = op(*arguments)
    value = out if isinstance(out, torch.Tensor) else out[0]
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(value.sum(), leaves, create_graph=True, allow_unused=True)


@pytest.mark.parametrize("name", ("lif", "trt_penalty", "temporal_loss"))
def test_transforms_that_differentiate_are_refused_inside(name):
    """It was a gradient of 0 inside torch.compile."""
    function = {
        "lif": lambda x: tk.lif(x).sum(),
        "trt_penalty": lambda x: tk.trt_penalty([x], steps=T, **TRT),
        "temporal_loss": lambda x: tk.temporal_loss(x, torch.arange(5)),
    }[name]
    x = torch.randn(T, 5, 6)

    def in_forward_mode(x):
        with torch.autograd.forward_ad.dual_level():
            return function(torch.autograd.forward_ad.make_dual(x, x))

    for transformed, message in (
        (torch.func.grad(function), "does not differentiate"),
        (lambda x: torch.func.jvp(function, (x,), (x,)), "forward mode"),
        (in_forward_mode, "forward mode"),
    ):
        with pytest.raises(RuntimeError, match=f"{name}.*{message}"):
            one_graph(transformed)[0](x)
        torch._dynamo.reset()
    if name == "trt_penalty":
        with pytest.raises(RuntimeError, match=r"trt_penalty_forward\. We could not generate"):
            one_graph(torch.vmap(function))[0](x.unsqueeze(0))
        return
    compiled = one_graph(torch.vmap(function))[0](x.unsqueeze(0))
    assert torch.equal(compiled, torch.vmap(function)(x.unsqueeze(0)))


# --- torch.export
class Inference(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.block1 = nn.Conv2d(1, 4, 3), tk.nn.BatchNormLIF(4, steps=T)
        self.conv2, self.block2 = nn.Conv2d(4, 6, 3), tk.nn.BatchNormLIF(6, momentum=None)
        self.linear, self.lif, self.plif = nn.Linear(96, 32), tk.nn.LIF(decay=0.9), tk.nn.PLIF()

    def forward(self, images):
        spikes = self.block1(self.conv1(images))
        current = self.conv2(spikes.flatten(0, 1)).unflatten(0, spikes.shape[:2])
        spikes = self.lif(2 * self.linear(self.block2(current).flatten(2)))
        return self.plif(3 * spikes)


@pytest.mark.parametrize("strict", (False, True), ids=("traced", "strict"))
def test_export(strict):
    network = Inference()
    network(torch.randn(9, 1, 8, 8))
    network.eval()
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(
            network, (torch.randn(5, 1, 8, 8),), dynamic_shapes=({0: batch},), strict=strict
        )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for count in (5, 2, 11, 1):
        images = torch.randn(count, 1, 8, 8)
        expected = network(images)
        assert expected.any() and not expected.all()
        for exported in (program.module(), loaded):
            assert torch.equal(exported(images), expected)


@pytest.mark.parametrize("training", (False, True))
def test_export_with_gradients(training):
    """Whoever trains an exported program gets the network's gradients."""
    network, images = Inference(), torch.randn(5, 1, 8, 8)
    network(images)
    network.train(training)
    exported = torch.export.export(copy.deepcopy(network), (images,)).module()
    for model in (network, exported):
        spikes = model(images)
        (spikes * torch.linspace(-1, 1, spikes.numel()).view_as(spikes)).sum().backward()
    expected = dict(network.named_parameters())
    assert expected["conv1.weight"].grad.any()
    for name, p in exported.named_parameters():
        assert torch.equal(p.grad, expected[name].grad), name
