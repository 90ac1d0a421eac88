"""A user's script: every public name, on a CPU, from outside the tree.

It runs with an installed wheel, and `mypy --strict` takes it: the wheel carries its types.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import trt_kernels as tk
from trt_kernels.compat import trt

report: tk.Report = tk.report()
print(tk.__file__)
print(report)
assert report.versions["trt_kernels"] == tk.__version__
refused = {name: why for name, why in report.unavailable["cpu"].items() if why}
assert not refused, refused

torch.manual_seed(0)
x = torch.randn(6, 8, 64, requires_grad=True)  # [T, B, neurons]
surrogates: list[tk.Surrogate] = [
    tk.ATan(2.0),
    tk.FastSigmoid(25.0),
    tk.Rectangle(1.0),
    tk.Sigmoid(4.0),
    tk.SignedStep(1.0),
    tk.Triangle(1.0),
]
for surrogate in surrogates:
    both = []
    for backend in ("cpu", "reference"):
        with tk.use_backend(backend):
            spikes: Tensor = tk.lif(x, decay=0.5, surrogate=surrogate)
        (grad,) = torch.autograd.grad(spikes.square().sum(), x)
        both.append((spikes, grad))
    (spikes, grad), (expected, expected_grad) = both
    assert 0 < expected.mean() < 1 and torch.equal(spikes, expected), surrogate
    torch.testing.assert_close(grad, expected_grad)

out: tk.LIFOutput = tk.lif(x, penalty=tk.MembranePenalty("square", [0.1] * 6), return_state=True)
assert out.penalty is not None and out.state is not None and out.state.shape == (8, 64)

official: dict[str, Any] = tk.presets.official_trt()
presets = {
    "official": official,
    "spikingjelly": tk.presets.spikingjelly_lif(tau=2.0),
    "spikingjelly without leak": tk.presets.spikingjelly_if(),
    "spikingjelly, learned": tk.presets.spikingjelly_plif(),
    "snntorch": tk.presets.snntorch_leaky(0.9),
    "norse": tk.presets.norse_lif_box(),
}
for name, options in presets.items():
    if name != "spikingjelly, learned":
        assert tk.nn.LIF(**options)(x).shape == x.shape, name

images = torch.randn(4, 3, 8, 8)
norm: nn.Module = tk.nn.BatchNormLIF(5, steps=6)
network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), norm, nn.Flatten(2), tk.nn.PLIF())
network.append(nn.Linear(5 * 64, 10))
target = torch.randint(10, (4,))
objective = tk.TRTLoss(network, weight=1e-3, delta=0.25, mse_ratio=0.05)
with tk.pack_saved_spikes() as packing:
    logits: Tensor = network(images)
loss: Tensor = objective(logits, target)
loss.backward()  # type: ignore[no-untyped-call]
print(packing)
weights = objective.regularized()
penalty = tk.trt_penalty(weights, steps=6, weight=1e-3, delta=0.25)
torch.testing.assert_close(loss, tk.temporal_loss(logits, target, mse_ratio=0.05) + penalty)
tk.trt_penalty_(weights, steps=6, weight=1e-3, delta=0.25)
assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in weights)
assert tk.TETLoss(mean=1.0, weight=0.05)(logits, target).isfinite()

mean, variance = torch.zeros(5), torch.ones(5)
normal: Tensor = tk.batch_norm_lif(torch.randn(6, 2, 5), mean, variance, training=True)
assert normal.shape == (6, 2, 5) and mean.any()

theirs = nn.Sequential(nn.Linear(5, 5), trt.LIFNode())
logits = theirs(torch.randn(2, 6, 5))  # [B, T, K]
labels = torch.tensor([0, 1])
entropy = nn.CrossEntropyLoss()
assert trt.TRT_Loss(theirs, logits, labels, entropy, 0.25, 1e-3, 1e-5).isfinite()
assert trt.TET_Loss(logits, labels, entropy, 1.0, 0.05).isfinite()
accelerated: tk.AccelerationReport = tk.accelerate(copy.deepcopy(theirs))
print(accelerated)
tk.restore(accelerated.model)
print("the whole package works")
