"""Mixed precision: half tensors as autocast makes them, float32 states, and a GradScaler."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import trt_kernels as tk
from tests.cases import relative_error
from tests.conftest import serve
from trt_kernels.backends.reference.lif import Fire

T = 4
HALVES = (torch.bfloat16, torch.float16)
TRT = {"weight": 1e-3, "delta": 0.3}
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


@pytest.fixture(params=("cpu", "cuda", "reference"))
def backend(request):
    """Those quick to run, and the reference, whose plain operations autocast might cast."""
    with serve(request.param, request):
        yield request.param


def operators(current, v_init, gains):
    """Results of every operator, by name, for a current [T, B, C]."""
    penalty = tk.MembranePenalty("trt", [1.0, 0.5, 0.25, 2.0])
    every = {"return_state": True, "return_potential": True, "statistics": True}
    decay = gains.mean().sigmoid()
    out = tk.lif(current, v_init=v_init, decay=decay, penalty=penalty, **every)
    block = tk.batch_norm_lif(
        current, None, None, gains, gains, True, gains=gains[:T], return_state=True
    )
    target = torch.arange(current.shape[1]) % current.shape[2]
    constant = tk.lif(current[0], steps=T, charge="divide", return_state=True)
    loss = tk.temporal_loss(current, target, mse_ratio=0.1, label_smoothing=0.1)
    wide = tk.temporal_loss(current, functional.one_hot(target, current.shape[2]).to(current))
    regularizer = tk.trt_penalty([current, gains], steps=T, **TRT)
    return {
        "spikes": out.spikes,
        **{name: value for name, value in out._asdict().items() if name != "spikes"},
        "block spikes": block.spikes,
        "block state": block.state,
        "constant spikes": constant.spikes,
        "constant state": constant.state,
        "loss": loss,
        "wide loss": wide,
        "regularizer": regularizer,
        "plain spikes": tk.lif(current),
    }


@halves
def test_autocast_casts_nothing(dtype, backend):
    """Inside it as outside, bit for bit: spikes have x's dtype, the rest is float32."""
    for own in (dtype, torch.float32):
        values = torch.randn(T, 5, 6).to(own), torch.randn(5, 6), torch.rand(6)
        found = []
        for enabled in (False, True):
            leaves = [t.clone().requires_grad_() for t in values]
            with torch.autocast("cpu", dtype, enabled=enabled):
                results = operators(*leaves)
                torch.manual_seed(1)
                value = sum((r.float() * torch.randn(r.shape)).sum() for r in results.values())
            grads = torch.autograd.grad(value, leaves)
            assert [g.dtype for g in grads] == [own, torch.float32, torch.float32]
            found.append((results, grads))
        (plain, plain_grads), (cast, cast_grads) = found
        for name, result in cast.items():
            assert result.dtype == (own if name.endswith("spikes") else torch.float32), name
            assert torch.equal(result, plain[name]), name
        assert all(map(torch.equal, cast_grads, plain_grads))


@halves
def test_modules_take_what_autocast_makes(dtype):
    linear, x = nn.Linear(6, 6), torch.randn(T, 5, 6)
    for make in (
        lambda: tk.nn.LIF(stateful=True),
        lambda: tk.nn.PLIF(stateful=True),
        lambda: tk.nn.BatchNormLIF(6, stateful=True, gain_steps=T),
        lambda: tk.nn.BatchNormLIF(6, stateful=True, momentum=None).eval(),
    ):
        module = make()
        plain = copy.deepcopy(module)
        for _ in range(2):  # the second call starts from the state
            with torch.autocast("cpu", dtype):
                current = linear(x)
                spikes = module(current)
                loss = tk.TETLoss(mean=1.0, weight=0.1)(linear(spikes), torch.arange(5))
            assert current.dtype == spikes.dtype == dtype
            assert module.state.dtype == loss.dtype == torch.float32
            assert torch.equal(spikes, plain(current.detach()))
        loss.backward()
        for t in (*module.parameters(), *module.buffers()):
            assert t.dtype in (torch.float32, torch.int64)
        assert all(p.grad.any() and p.grad.dtype == torch.float32 for p in module.parameters())


class Plain(nn.Module):
    """What plain torch makes of a normalisation and a neuron in half precision."""

    def __init__(self, block):
        super().__init__()
        self.norm = nn.BatchNorm1d(block.num_features)

    def forward(self, x):
        y = self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        v, spikes = torch.zeros_like(y[0]), []
        for y_t in y:
            v = 0.5 * v + y_t
            spikes.append(Fire.apply(v, 1.0, False, tk.ATan()))
        return torch.stack(spikes)


@halves
def test_gradients_are_as_good_as_plain_torch(dtype):
    """Through a block and the loss: error against float32 at most twice that of plain torch."""
    x, target = torch.randn(T, 64, 32).to(dtype), torch.randint(32, (64,))
    block = tk.nn.BatchNormLIF(32, reset="none", surrogate=tk.ATan())
    ours = tk.TETLoss(mean=0.0, weight=0.0)

    def plain_loss(spikes, target):
        return torch.stack([functional.cross_entropy(s, target) for s in spikes]).mean()

    def gradient(module, loss, x, enabled):
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=enabled):
            value = loss(module(x), target)
        return torch.autograd.grad(value * 2**10, x)[0]

    exact = gradient(Plain(block), plain_loss, x.float(), False)
    assert relative_error(gradient(block, ours, x.float(), False), exact) < 1e-5
    error = relative_error(gradient(block, ours, x, True), exact)
    assert 0 < error <= 2 * relative_error(gradient(Plain(block), plain_loss, x, True), exact)


@halves
def test_loss_gradients_are_as_good_as_plain_torch(dtype, backend):
    logits, target = torch.randn(T, 64, 10).to(dtype), torch.randint(10, (64,))
    hot = functional.one_hot(target, 10)

    def plain(logits):
        steps = [functional.cross_entropy(o, target) for o in logits]
        return 0.9 * torch.stack(steps).mean() + 0.1 * ((logits - hot) ** 2).mean()

    def gradient(function, logits):
        leaf = logits.clone().requires_grad_()
        return torch.autograd.grad(function(leaf) * 2**10, leaf)[0]

    exact = gradient(plain, logits.double())
    ours = gradient(lambda o: tk.temporal_loss(o, target, mse_ratio=0.1), logits)
    assert relative_error(ours, exact) <= 2 * relative_error(gradient(plain, logits), exact)


def network():
    torch.manual_seed(0)
    layers = (
        nn.Linear(6, 16, bias=False),
        tk.nn.BatchNormLIF(16),
        nn.Linear(16, 8),
        tk.nn.PLIF(threshold=0.1),
    )
    return nn.Sequential(*layers, nn.Linear(8, 5))


def batch(seed=0):
    torch.manual_seed(seed)
    return torch.randn(T, 32, 6), torch.randint(5, (32,))


def half_loss(model, objective, x, target):
    with torch.autocast("cpu", torch.float16):
        return objective(model(x), target)


def test_scaled_gradients():
    """Unscaled again, they are those without a scaler; `trt_penalty_` adds its own, scaled."""
    found = []
    for scale, into in ((None, False), (2.0**10, False), (2.0**10, True)):
        model = network()
        weights = [p for name, p in model.named_parameters() if "bias" not in name]
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        objective = tk.TETLoss(mean=0.0, weight=0.0)
        if not into:
            objective = tk.TRTLoss(model, mse_ratio=0.0, **TRT)
        scaler.scale(half_loss(model, objective, *batch())).backward()
        if into:
            tk.trt_penalty_(weights, steps=T, scale=scaler.get_scale(), **TRT)
        scaler.unscale_(optimizer)
        found.append([p.grad for p in model.parameters()])
    for plain, scaled, into in zip(*found, strict=True):
        assert plain.any()
        assert relative_error(scaled, plain) < 2**-10 and relative_error(into, plain) < 2**-10


def test_scaler_skips_steps_that_overflow():
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**28)
    objective = tk.TRTLoss(model, mse_ratio=0.1, **TRT)
    skipped = 0
    for _ in range(20):
        optimizer.zero_grad()
        loss = half_loss(model, objective, *batch())
        assert loss.dtype == torch.float32 and loss.isfinite()
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() == scale:
            break
        skipped += 1
        assert scaler.get_scale() == scale / 2
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert skipped > 1
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model[0].weight, before["0.weight"])


@pytest.mark.parametrize("memory", ("recompute", "bits"))
def test_an_infinite_gradient_is_never_lost(memory, backend):
    """A scaler that does not see it would not skip the step."""
    if memory == "bits" and backend == "reference":
        pytest.skip("keeps what autograd keeps")
    for surrogate in (tk.Rectangle(), tk.Triangle(), tk.ATan()):
        if memory == "bits" and not isinstance(surrogate, tk.Rectangle):
            continue
        x = torch.randn(T, 40).half().requires_grad_()
        spikes = tk.lif(x, memory=memory, surrogate=surrogate, detach_reset=True)
        spikes.backward(torch.full_like(spikes, torch.inf))
        assert not x.grad.isfinite().any()


def test_compiled_under_autocast():
    torch._dynamo.reset()
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        model = network()
        objective = tk.TRTLoss(model, mse_ratio=0.1, **TRT)

        def loss(x, target, model=model, objective=objective):
            with torch.autocast("cpu", torch.bfloat16):
                return objective(model(x), target)

        value = wrap(loss)(*batch())
        value.backward()
        with torch.autocast("cpu", torch.bfloat16):  # around the compiled function
            model.eval()
            logits = wrap(model)(batch()[0])
        assert logits.dtype == torch.bfloat16
        results.append([value.detach(), logits.detach(), *(p.grad for p in model.parameters())])
        results[-1] += list(model.buffers())
    for ours, eager in zip(*results, strict=True):
        assert torch.equal(ours, eager)
