"""Training with `trt_penalty_` after the backward pass equals training with R in the loss."""

import copy

import pytest
import torch
from torch import nn

import trt_kernels as tk
from tests.cases import relative_error

STEPS, LAMBDA, DELTA = 4, 1e-2, 0.5
REGULARIZER = {"steps": STEPS, "weight": LAMBDA, "delta": DELTA}
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
}


class Net(nn.Module):
    """With a weight of two names, a frozen layer, and a weight that no forward pass reads."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.first.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.readout = nn.Linear(6, 3)
        self.unused = nn.Parameter(torch.randn(5, 2))

    def forward(self, x):
        spikes = tk.lif(self.first(x), surrogate=tk.Sigmoid(2.0))
        return self.readout(self.frozen(self.again(spikes)).tanh())


def batches(count=10, micro=1):
    """Of each step its `micro` batches: (x [T, B, 6], classes [B])."""
    torch.manual_seed(5)
    return [
        [(torch.randn(STEPS, 8, 6) * 2, torch.randint(3, (8,))) for _ in range(micro)]
        for _ in range(count)
    ]


def assert_same_training(start, ours, theirs, bound):
    """The distance between two ends is small beside the way to them."""
    for (name, p), q, before in zip(
        ours.named_parameters(), theirs.parameters(), start.parameters(), strict=True
    ):
        if not p.requires_grad:
            assert torch.equal(p, before) and torch.equal(q, before), name
            continue
        assert not torch.equal(q, before), name
        assert relative_error(p - before, q - before) < bound, name


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("micro", (1, 3))
def test_equals_the_loss_term(name, micro):
    """Over ten steps of one batch, or of three whose gradients are accumulated."""
    start = Net().double()
    ends = []
    for in_place in (True, False):
        net = copy.deepcopy(start)
        # Without the regularizer in it, the loss gives `unused` no gradient.
        loss_of = tk.TRTLoss(net, weight=0 if in_place else LAMBDA, delta=DELTA, mse_ratio=0.1)
        optimizer = OPTIMIZERS[name](net.parameters())
        for step in batches(micro=micro):
            optimizer.zero_grad()
            for x, target in step:
                (loss_of(net(x.double()), target) / micro).backward()
            if in_place:
                assert net.unused.grad is None
                tk.trt_penalty_(loss_of.regularized(), **REGULARIZER)
            optimizer.step()
        ends.append(net)
    assert_same_training(start, *ends, 1e-12)


def overflow(gradient):
    return torch.full_like(gradient, float("inf"))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("unscales", (True, False))
def test_equals_the_loss_term_under_a_grad_scaler(name, unscales):
    """In half precision, with a step that the scaler skips."""
    start = Net()
    ends, scales = [], []
    for in_place in (True, False):
        net = copy.deepcopy(start)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        optimizer = OPTIMIZERS[name](net.parameters())
        regularized = [p for n, p in net.named_parameters() if "bias" not in n]
        seen = []
        for index, [(x, target)] in enumerate(batches()):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                logits = net(x)
                assert logits.dtype == torch.float16
                if index == 4:
                    logits.register_hook(overflow)
                loss = tk.temporal_loss(logits, target)
            if not in_place:
                loss = loss + tk.trt_penalty(regularized, **REGULARIZER)
            scaler.scale(loss).backward()
            if unscales:
                scaler.unscale_(optimizer)
            if in_place:
                scale = 1.0 if unscales else scaler.get_scale()
                tk.trt_penalty_(regularized, scale=scale, **REGULARIZER)
            before = [p.detach().clone() for p in net.parameters()]
            scaler.step(optimizer)
            skipped = all(map(torch.equal, before, net.parameters()))
            assert skipped == (index == 4)
            scaler.update()
            seen.append(scaler.get_scale())
        ends.append(net)
        scales.append(seen)
    # Doubled after three good steps, halved by the bad one.
    assert scales[0] == scales[1] == [1024.0] * 2 + [2048.0] * 2 + [1024.0] * 3 + [2048.0] * 3
    assert_same_training(start, *ends, 1e-4)
