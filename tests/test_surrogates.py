"""Surrogate derivatives: their values, and their arguments."""

import math

import pytest
import torch

import trt_kernels as tk
from tests.cases import SURROGATES
from trt_kernels.backends import native


def test_values():
    u = torch.tensor([-2.0, -0.25, 0.0, 0.25, 2.0], dtype=torch.float64)
    expected = {
        tk.Triangle(0.5): [0, 1, 2, 1, 0],
        tk.Rectangle(0.5): [0, 0, 2, 0, 0],  # |u| < a/2 is strict
        tk.ATan(2.0): [1 / (1 + (math.pi * v) ** 2) for v in u.tolist()],
        tk.FastSigmoid(4.0): [1 / (1 + 4 * abs(v)) ** 2 for v in u.tolist()],
        tk.Sigmoid(3.0): [3 / (2 + math.exp(3 * v) + math.exp(-3 * v)) for v in u.tolist()],
        tk.SignedStep(0.5): [0.5, 0.5, -0.5, -0.5, -0.5],
    }
    for surrogate, values in expected.items():
        torch.testing.assert_close(surrogate(u), torch.tensor(values, dtype=torch.float64))
    third = tk.SignedStep(1 / 3)(u)  # not a float32 on the way
    assert third.dtype == torch.float64 and third[0] == -third[-1] == 1 / 3


@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_kernel_agrees_everywhere(surrogate, dtype, kernels):
    """One step has dx = σ'(x - threshold): a fine grid, far tails, NaN, infinity."""
    u = torch.cat([torch.linspace(-5, 5, 20001), torch.tensor([-1e4, 1e4, -1e30, 1e30])]).to(dtype)
    payload = torch.tensor([0x7FC00001, 0x7FABCDEF], dtype=torch.int32).view(torch.float32)
    u = torch.cat([u, payload.to(dtype)])  # not every NaN has the same bits
    u = torch.cat([u, torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype)])
    grads = []
    for chosen in (kernels, "reference"):
        x = u[None].clone().requires_grad_()
        tk.lif(x, threshold=0.0, surrogate=surrogate, backend=chosen).sum().backward()
        grads.append(x.grad[0])
    bound = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(
        *grads, rtol=0, atol=bound * abs(surrogate(u[10000:10001]).item()), equal_nan=True
    )
    assert grads[0][-5:-2].isnan().all() and grads[0][-2:].equal(surrogate(u[-2:]))


NUMBERS = ("decay", "tau", "threshold", "v_reset", "delta", "eps", "scale")


def test_every_surrogate_has_a_kernel():
    for surrogate in SURROGATES:
        options = dict.fromkeys(NUMBERS, 1.0)
        native._C.LIF(
            charge="decay",
            reset="hard",
            phi="",
            surrogate=surrogate.name,
            surrogate_parameter=surrogate.parameter,
            detach_reset=False,
            fire_at_threshold=False,
            batch=False,
            bits=0,
            **options,
        )
    assert {type(s) for s in SURROGATES} == set(tk.Surrogate.__subclasses__())


@pytest.mark.parametrize("kind", sorted(tk.Surrogate.__subclasses__(), key=lambda s: s.name))
@pytest.mark.parametrize(
    "value", (0, -1.0, 1e-30, 1e39, float("nan"), float("inf"), "1", None, True)
)
def test_bad_parameter(kind, value):
    with pytest.raises((TypeError, ValueError), match=r"(width|alpha|slope|height): got "):
        kind(value)


def test_values_compare_and_print():
    assert tk.ATan(2.0) == tk.ATan(2) != tk.ATan(3.0)
    assert hash(tk.ATan(2.0)) == hash(tk.ATan(2))
    assert repr(tk.Sigmoid(4.0)) == "Sigmoid(alpha=4.0)"
