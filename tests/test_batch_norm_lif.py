"""`batch_norm_lif` and `nn.BatchNormLIF`: against the reference, `lif` and torch's BatchNorm."""

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import trt_kernels as tk
from tests.cases import RESETS, relative_error
from trt_kernels import ops

# x as [T, B, C, *] or [B, T, C, *]: maps that a vector divides or not, that have rows of their own
# or share them, none, and more channels than a GPU's tile has.
LAYOUTS = (
    ((4, 3, 5, 6, 6), 0),
    ((2, 2, 3, 9, 9), 0),
    ((3, 5, 12, 7), 1),
    ((5, 6, 140), 0),
    ((1, 7, 5, 3, 3), 0),
    ((17, 4, 8, 2), 0),
    ("channels_last", 0),
)


def make_x(shape, dtype=torch.float32):
    if shape != "channels_last":
        return torch.randn(shape).to(dtype)
    x = torch.randn(12, 8, 6, 6).to(dtype).contiguous(memory_format=torch.channels_last)
    return x.unflatten(0, (4, 3))


def leaves_of(x, time_dim, gains, channel_dim=2, steps=None):
    """x, weight, bias, gains; the last None, [T] or [T, C]."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    channels = x.shape[channel_dim]
    steps = steps or x.shape[time_dim]
    shape = {"none": None, "steps": (steps,), "channels": (steps, channels)}[gains]
    leaves = [x, torch.rand(channels, dtype=dtype) + 0.5, torch.randn(channels, dtype=dtype) * 0.2]
    leaves.append(None if shape is None else torch.rand(shape, dtype=dtype) + 0.5)
    return [None if t is None else t.detach().requires_grad_() for t in leaves]


def run(leaves, training, grads=None, running=None, **options):
    x, weight, bias, gains = leaves
    mean, var = (None, None) if running is None else running
    out = tk.batch_norm_lif(
        x,
        mean,
        var,
        weight,
        bias,
        training,
        gains=gains,
        return_state=True,
        return_potential=True,
        **options,
    )
    outputs = [out.spikes, out.state, out.potential]
    given = [t for t in leaves if t is not None]
    grads = [torch.randn_like(o) for o in outputs] if grads is None else grads
    return out, torch.autograd.grad(outputs, given, grads), grads


def running_of(x, channel_dim=2):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    channels = x.shape[channel_dim]
    return torch.randn(channels, dtype=dtype) * 0.1, torch.rand(channels, dtype=dtype) + 0.5


def compare(leaves, training, bound, channel_dim=2, **options):
    running = running_of(leaves[0], channel_dim)
    theirs, exact, grads = run(
        leaves, training, None, [t.clone() for t in running], backend="reference", **options
    )
    ours, found, _ = run(leaves, training, grads, [t.clone() for t in running], **options)
    assert ours.spikes.stride() == theirs.spikes.stride()
    if training:  # sums in another order
        assert torch.equal(ours.spikes, theirs.spikes)
        torch.testing.assert_close(ours.potential, theirs.potential, rtol=1e-5, atol=1e-5)
    else:
        for name in ("spikes", "state", "potential"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for leaf, a, b in zip([t for t in leaves if t is not None], found, exact, strict=True):
        assert a.dtype == leaf.dtype and a.shape == leaf.shape
        scale = max(float(b.double().norm()), leaves[0].numel() ** 0.5 if leaf.ndim < 3 else 0.0)
        assert float((a.double() - b.double()).norm()) < bound * scale


@pytest.mark.parametrize("shape,time_dim", LAYOUTS, ids=str)
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("gains", ("none", "steps", "channels"))
def test_matches_the_reference(shape, time_dim, training, gains, backend):
    x = make_x(shape)
    for number, (reset, detach) in enumerate(itertools.product(RESETS, (False, True))):
        if backend == "triton" and number != len(gains) % 6:  # its interpreter is slow
            continue
        leaves = leaves_of(x, time_dim, gains)
        options = {"reset": reset, "detach_reset": detach, "scale": 1.3, "time_dim": time_dim}
        compare(leaves, training, 5e-6, surrogate=tk.ATan(), **options)


# More columns than a tile has, the last tile narrower; a tile of several blocks; several parts.
@pytest.mark.parametrize("shape", ((2, 3, 701, 3, 3), (3, 2, 300), (2, 70, 40, 2), (2, 9, 1030, 4)))
@pytest.mark.parametrize("dtype,bound", ((torch.float32, 5e-6), (torch.bfloat16, 2e-2)))
def test_many_channels_on_the_cpu(shape, dtype, bound, threads):
    leaves = leaves_of(make_x(shape, dtype), 0, "channels")
    results = []
    for count in (1, 2):
        threads(count)
        torch.manual_seed(0)
        compare(leaves, True, bound, surrogate=tk.ATan())
        out, grads, _ = run(leaves, True, surrogate=tk.ATan())
        results.append([out.spikes, out.state, *grads])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype,bound", ((torch.bfloat16, 2e-2), (torch.float16, 1e-2)))
def test_half_precision(dtype, bound, backend):
    for shape, training in itertools.product(("channels_last", (4, 3, 5, 6, 6)), (True, False)):
        compare(leaves_of(make_x(shape, dtype), 0, "steps"), training, bound)


@pytest.mark.parametrize("training", (True, False))
def test_gradients_are_those_of_the_reference_in_float64(training, backend):
    for shape, time_dim in (((4, 3, 5, 6), 0), ((3, 20, 4), 1)):
        leaves = leaves_of(make_x(shape, torch.float64), time_dim, "channels")
        compare(leaves, training, 1e-11, time_dim=time_dim, surrogate=tk.ATan())


def test_learnable_neurons_in_the_block(backend):
    x = make_x((5, 3, 6, 4))
    given = {"decay": torch.rand(6), "threshold": torch.rand(()), "v_reset": torch.rand(6) * 0.1}
    results, grad = [], torch.randn(x.shape)
    for chosen in (backend, "reference"):
        options = {name: value.clone().requires_grad_() for name, value in given.items()}
        out = tk.batch_norm_lif(x, None, None, training=True, backend=chosen, **options)
        results.append((out, *torch.autograd.grad(out, options.values(), grad)))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1:], results[1][1:], strict=True):
        assert relative_error(a, b) < 1e-5


def test_spikes_are_those_of_lif_given_the_same_statistics(backend):
    """y = (x - mean)·a + b in the state's dtype, and then `lif` bit for bit."""
    for dtype, shape in itertools.product(
        (torch.float32, torch.bfloat16), ((6, 3, 20, 9), "channels_last")
    ):
        x = make_x(shape, dtype)
        channels = x.shape[2]
        weight, bias = torch.rand(channels) + 0.5, torch.randn(channels) * 0.2
        mean, rest, inverse, _ = ops.batch_statistics(x, 2, 1e-5, 1, backend)
        at = [-1 if dim == 2 else 1 for dim in range(x.ndim)]
        a = inverse * weight
        y = (x.float() - mean.view(at)) * a.view(at) + (bias - rest * a).view(at)
        expected = tk.lif(y, return_potential=True)
        out = tk.batch_norm_lif(x, None, None, weight, bias, True, return_potential=True)
        assert torch.equal(out.potential, expected.potential)
        assert torch.equal(out.spikes.float(), expected.spikes)


@pytest.mark.parametrize("layout", ((4, 8, 16, 12, 12), "channels_last"), ids=str)
def test_against_torchs_batch_norm(layout, backend):
    """Its sums run in another order: few spikes differ, and where none does gradients agree."""
    x = make_x(layout).mul_(3).add_(1).requires_grad_()
    norm = torch.nn.BatchNorm2d(x.shape[2])
    block = tk.nn.BatchNormLIF(x.shape[2], surrogate=tk.ATan())
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.3, 0.3)
    block.load_state_dict(norm.state_dict())
    y = norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    theirs, ours = tk.lif(y, surrogate=tk.ATan()), block(x)
    differ = float((ours != theirs).float().mean())
    assert differ <= 1e-4
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(getattr(block, name), buffer, rtol=1e-5, atol=1e-6)
    if differ == 0:
        grad = torch.randn(x.shape)
        for a, b in zip(
            torch.autograd.grad(ours, (x, block.weight, block.bias), grad),
            torch.autograd.grad(theirs, (x, norm.weight, norm.bias), grad),
            strict=True,
        ):
            assert relative_error(a, b) < 1e-5


def test_a_mean_of_a_thousand_deviations(backend):
    """Normalised values and gradients against float64, of the same float32 numbers."""
    x = (torch.randn(4, 8, 3, 9, 9, dtype=torch.float64) + 1000).float().requires_grad_()
    weight, bias = torch.rand(3) + 0.5, torch.randn(3)
    out = tk.batch_norm_lif(
        x, None, None, weight, bias, True, decay=0.0, reset="none", return_potential=True
    )
    exact = x.detach().double().requires_grad_()
    y = F.batch_norm(exact.flatten(0, 1), None, None, weight.double(), bias.double(), True)
    y = y.view_as(exact)
    assert relative_error(out.potential, y) < 1e-6
    grad = torch.randn(x.shape)
    (ours,) = torch.autograd.grad(out.potential, x, grad)
    (theirs,) = torch.autograd.grad(y, exact, grad.double())
    assert relative_error(ours, theirs) < 1e-6


def test_parameters_with_gaps(backend):
    """Each may be a part of a larger tensor."""
    x = torch.randn(4, 3, 5, 6)
    wide = [t.requires_grad_() for t in (torch.rand(5, 2), torch.rand(5, 2), torch.rand(4, 5, 2))]
    results = []
    for own in (lambda t: t[..., 0], lambda t: t[..., 0].contiguous()):
        weight, bias, gains = map(own, wide)
        running = [own(torch.zeros(5, 2)), own(torch.ones(5, 2))]
        out = tk.batch_norm_lif(x, *running, weight, bias, training=True, gains=gains)
        results.append([out, *running, *torch.autograd.grad(out.sum(), wide)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("gains", ("none", "steps", "channels"))
def test_constant_current(training, gains, backend):
    """The reference repeats x; running statistics are those of the repeated x."""
    for shape in ((6, 5, 4, 4), (6, 8), (1, 3, 5)):
        x = make_x(shape)
        leaves = leaves_of(x, 0, gains, channel_dim=1, steps=4)
        compare(leaves, training, 5e-6, channel_dim=1, steps=4, surrogate=tk.ATan())
    running = [running_of(x, 1) for x in (make_x((6, 5)), make_x((6, 5)))]
    running[1] = [t.clone() for t in running[0]]
    x = make_x((6, 5))
    ours = tk.batch_norm_lif(x, *running[0], training=True, steps=4)
    theirs = tk.batch_norm_lif(torch.stack([x] * 4), *running[1], training=True)
    assert torch.equal(ours, theirs)
    for a, b in zip(*running, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_keeps_x_and_vectors(backend):
    x = torch.randn(4, 8, 16, 6, 6, requires_grad=True)
    block, kept = tk.nn.BatchNormLIF(16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block(x)
    assert sum(t.nbytes for t in kept) <= 1.05 * x.nbytes


def test_only_some_gradients_wanted(backend):
    x = torch.randn(4, 3, 5, 6)
    weight, bias = torch.rand(5), torch.rand(5)
    for training in (True, False):
        full = [t.clone().requires_grad_() for t in (x, weight, bias)]
        running = running_of(x)
        out = tk.batch_norm_lif(full[0], *running, full[1], full[2], training)
        expected = torch.autograd.grad(out.sum(), full)
        for index in range(3):
            some = [t.clone().requires_grad_(i == index) for i, t in enumerate((x, weight, bias))]
            out = tk.batch_norm_lif(some[0], *running_of(x), some[1], some[2], True)
            if training:
                (grad,) = torch.autograd.grad(out.sum(), some[index])
                assert torch.equal(grad, expected[index])


def test_results_do_not_depend_on_threads(threads):
    shape = (4, 20, 33, 7, 7)
    for x in (
        torch.randn(shape),
        torch.randn(shape, dtype=torch.float64),  # whose sums no rounding to float32 hides
        make_x("channels_last"),
        torch.randn(4, 300, 260),
    ):
        x = x.requires_grad_()
        results = []
        for count in (1, 2, 5):
            threads(count)
            block = tk.nn.BatchNormLIF(x.shape[2], gain_steps=4)
            out = block(x)
            leaves = (x, block.weight, block.bias, block.gains)
            results.append((out.detach(), *torch.autograd.grad(out.sum(), leaves)))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


# --- The module.
def test_state_dict_of_a_network_with_batch_norm_loads():
    class Before(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)

    class After(Before):
        def __init__(self):
            super().__init__()
            self.norm = tk.nn.BatchNormLIF(8)

    before, after = Before(), After()
    before.norm(before.conv(torch.randn(4, 3, 9, 9)))
    after.load_state_dict(before.state_dict())
    assert after.state_dict().keys() == before.state_dict().keys()
    assert after.norm.num_batches_tracked == 1


def test_module_follows_batch_norm2d():
    x = torch.randn(4, 3, 5, 6, 6)
    for settings in (
        {},
        {"momentum": None},
        {"affine": False},
        {"track_running_stats": False},
        {"momentum": 0.3, "eps": 0.1},
    ):
        norm, block = torch.nn.BatchNorm2d(5, **settings), tk.nn.BatchNormLIF(5, **settings)
        for mode in (True, True, False):
            norm.train(mode)
            block.train(mode)
            y = norm(x.flatten(0, 1)).unflatten(0, (4, 3))
            assert float((block(x) != tk.lif(y)).float().mean()) <= 1e-3
        for name, buffer in norm.named_buffers():
            torch.testing.assert_close(getattr(block, name), buffer)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_momentum_as_a_tensor(dtype):
    x = torch.randn(4, 3, 5, 6) + 2
    running = [
        (
            torch.randn(5, generator=torch.Generator().manual_seed(1)).to(dtype),
            torch.ones(5).to(dtype),
        )
        for _ in range(2)
    ]
    for vectors, momentum in zip(running, (0.25, torch.tensor(0.25).double()), strict=True):
        tk.batch_norm_lif(x, *vectors, training=True, momentum=momentum)
    for ours, expected in zip(*running, strict=True):
        assert torch.equal(ours, expected) and ours.dtype == dtype


def test_stateful_block():
    x = torch.randn(8, 3, 5, 6)
    block = tk.nn.BatchNormLIF(5, stateful=True).eval()
    parts = torch.cat([block(part) for part in x.split(4)])
    assert torch.equal(parts, tk.nn.BatchNormLIF(5).eval()(x))
    block.reset()
    assert block.state is None


def test_compiles(backend):
    block = tk.nn.BatchNormLIF(5, gain_steps=4, threshold=torch.nn.Parameter(torch.tensor(0.9)))
    x = torch.randn(4, 3, 5, 6, requires_grad=True)
    expected = torch.autograd.grad(block(x).sum(), (x, *block.parameters()))
    running = block.running_mean.clone()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x).sum(), (x, *block.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(block.running_mean, running)


def test_double_backward_raises(backend):
    x = torch.randn(4, 3, 5, requires_grad=True)
    for chosen in (backend, "reference"):
        out = tk.batch_norm_lif(x, None, None, training=True, backend=chosen)
        with pytest.raises(RuntimeError, match="lif cannot be differentiated twice"):
            torch.autograd.grad(out.sum(), x, create_graph=True)


X, ONES = torch.zeros(4, 3, 5, 2), torch.ones(5)


@pytest.mark.parametrize(
    "arguments,options,error,message",
    [
        ((None, None, None), {}, TypeError, "x: got NoneType"),
        ((torch.zeros(4, 3), None, None), {}, ValueError, "x: got shape"),
        ((torch.zeros(3), None, None), {"steps": 4}, ValueError, "x: got shape"),
        ((X, None, None), {}, ValueError, "running_mean, running_var: got None"),
        ((X, ONES, None), {}, ValueError, "running_mean, running_var: got one without"),
        (
            (X, torch.ones(()).expand(5), ONES, None, None, True),
            {},
            ValueError,
            "running_mean, running_var: repeat one number",
        ),
        ((X, torch.ones(4), ONES), {}, ValueError, r"running_mean: got shape \(4,\), needs \(5,\)"),
        ((X, ONES, ONES, torch.ones(5, 1)), {}, ValueError, "weight: got shape"),
        ((X, ONES, ONES, ONES, torch.ones(2)), {}, ValueError, "bias: got shape"),
        ((X, ONES, ONES, ONES.long()), {}, TypeError, "weight: got dtype"),
        ((X, ONES, ONES, ONES.to("meta")), {}, ValueError, "weight: got a tensor on meta"),
        ((X, ONES, ONES, None, None, 1), {}, TypeError, "training: got 1"),
        ((X, ONES, ONES, None, None, True, 2.0), {}, ValueError, "momentum: got 2.0"),
        ((X, ONES, ONES, None, None, True, ONES[0].long()), {}, TypeError, "momentum: got dtype"),
        ((X, ONES, ONES, None, None, True, ONES), {}, ValueError, r"momentum: .* needs a scalar"),
        (
            (X, ONES, ONES, None, None, True, torch.ones((), requires_grad=True)),
            {},
            ValueError,
            "momentum: requires grad",
        ),
        ((X, ONES, ONES, None, None, True, 0.1, 0.0), {}, ValueError, "eps: got 0.0"),
        ((X, ONES, ONES, None, None, True, 0.1, -1.0), {}, ValueError, "eps: got -1.0"),
        ((X, ONES, ONES), {"time_dim": 2}, ValueError, "time_dim: got 2"),
        ((X, ONES, ONES), {"scale": float("nan")}, ValueError, "scale: got nan"),
        ((X, ONES, ONES), {"gains": torch.ones(3)}, ValueError, "gains: got shape"),
        ((X, ONES, ONES), {"gains": torch.ones(4, 4)}, ValueError, "gains: got shape"),
        ((X, ONES, ONES), {"gains": 1.0}, TypeError, "gains: got float"),
        ((X, ONES, ONES), {"memory": "bits"}, ValueError, "memory: 'bits'"),
        ((X, ONES, ONES), {"channel_dim": 1}, ValueError, "channel_dim: got 1"),
        ((X, ONES, ONES), {"decay": torch.ones(4)}, ValueError, "decay: .* 5 channels"),
        ((X, ONES, ONES), {"dekay": 0.5}, TypeError, r"unknown options \['dekay'\]"),
        ((X[:1, :1, :, :1], None, None), {}, ValueError, "x: .* more than one value a channel"),
        ((X[:0], None, None), {}, ValueError, "x: .* more than one value a channel"),
    ],
)
def test_bad_input(arguments, options, error, message):
    if "more than one value" in message:
        options = {**options, "training": True}
    if options.get("memory") == "bits":
        options = {**options, "surrogate": tk.Rectangle(), "detach_reset": True}
    with pytest.raises(error, match=message):
        tk.batch_norm_lif(*arguments, **options)


@pytest.mark.parametrize(
    "arguments,options,error,message",
    [
        ((0,), {}, ValueError, "num_features: got 0"),
        ((2.0,), {}, TypeError, "num_features: got 2.0"),
        ((3, 0.0), {}, ValueError, "eps: got 0.0"),
        ((3, 1e-5, 1.5), {}, ValueError, "momentum: got 1.5"),
        ((3,), {"gain_steps": 0}, ValueError, "steps: got 0"),
        ((3,), {"gains_by_channel": True}, ValueError, "gains_by_channel: needs gain_steps"),
        ((3,), {"dekay": 1}, TypeError, "unknown options"),
        (
            (3,),
            {"memory": "bits", "surrogate": tk.Rectangle(), "detach_reset": True},
            ValueError,
            "memory: 'bits'",
        ),
    ],
)
def test_bad_module(arguments, options, error, message):
    with pytest.raises(error, match=message):
        tk.nn.BatchNormLIF(*arguments, **options)


def test_statistics_shared_by_processes():
    """Two processes with unequal halves of a batch against one process with all of it."""
    script = Path(__file__).parent / "batch_norm_group.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(
        [*command, str(script)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same") == 2


WRONG = {
    "v_init": {"v_init": torch.zeros(3)},
    "penalty": {"penalty": tk.MembranePenalty("square", [1.0])},
    "gains": {"gains": torch.ones(3)},
    "decay": {"decay": torch.ones(2)},
    "charge": {"charge": "exponential"},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_call_that_raises_changes_no_statistics(name):
    x, mean, var = torch.randn(4, 5, 6), torch.zeros(6), torch.ones(6)
    with pytest.raises(ValueError, match=name):
        tk.batch_norm_lif(x, mean, var, training=True, **WRONG[name])
    assert torch.equal(mean, torch.zeros(6)) and torch.equal(var, torch.ones(6))


@pytest.mark.parametrize("momentum", (0.1, None))
def test_a_module_that_raises_counts_no_batch(momentum):
    module = tk.nn.BatchNormLIF(6, momentum=momentum, penalty=WRONG["penalty"]["penalty"])
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="penalty"):
        module(torch.randn(4, 5, 6))
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key
    module(torch.randn(1, 5, 6))
    assert module.num_batches_tracked == 1
