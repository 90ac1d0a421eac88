"""Each context manager of torch and of this package round the operators, in eager mode and in and
round what torch.compile compiles: the results are the same, or the error says what to do."""

import contextlib

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, graph

import trt_kernels as tk

T = 3
# Whether torch.compile traces it (True), runs it as it is between two graphs (False), or refuses.
MODES = {
    "no_grad": (torch.no_grad, True),
    "enable_grad": (torch.enable_grad, True),
    "inference_mode": (torch.inference_mode, True),
    "set_grad_enabled": (lambda: torch.set_grad_enabled(False), True),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), True),
    "use_backend": (lambda: tk.use_backend("cpu"), True),
    "disable_saved_tensors_hooks": (lambda: graph.disable_saved_tensors_hooks("none"), True),
    "dual_level": (forward_ad.dual_level, True),
    "save_on_cpu": (graph.save_on_cpu, False),
    "saved_tensors_hooks": (
        lambda: graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t),
        False,
    ),
    "detect_anomaly": (torch.autograd.detect_anomaly, False),
    "one thread of backward": (lambda: torch.autograd.set_multithreading_enabled(False), False),
    "pack_saved_spikes": (tk.pack_saved_spikes, "pack_saved_spikes: torch.compile cannot"),
}


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", MODES)
def test_context_managers(name):
    mode, traced = MODES[name]
    network = nn.Sequential(
        nn.Linear(4, 5),
        tk.nn.BatchNormLIF(5),
        tk.nn.LIF(decay=nn.Parameter(torch.rand(5)), channel_dim=2),
    )
    x, target = torch.randn(T, 6, 4), torch.arange(6) % 5

    def loss(x):
        logits = network(x)
        penalty = tk.trt_penalty(list(network.parameters()), steps=T, weight=1.0, delta=0.5)
        return tk.temporal_loss(logits, target, mse_ratio=0.1) + penalty

    def inside(x):
        with mode():
            return loss(x)

    def results(function, around=contextlib.nullcontext):
        network.zero_grad()
        network[1].reset_running_stats()
        with around():
            value = function(x)
        if value.requires_grad:
            value.backward()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        return [value.detach(), *gradients, *(b.clone() for b in network.buffers())]

    def same(found):
        return len(found) == len(expected) and all(map(torch.equal, found, expected))

    expected = results(inside)
    changing = name in ("no_grad", "inference_mode", "set_grad_enabled", "autocast")
    assert changing or same(results(loss))
    assert same(results(torch.compile(loss, backend="aot_eager", fullgraph=True), mode))
    torch._dynamo.reset()
    compiled = torch.compile(inside, backend="aot_eager", fullgraph=traced is True)
    if isinstance(traced, str):
        with pytest.raises(RuntimeError, match=traced):
            results(compiled)
    else:
        assert same(results(compiled))
