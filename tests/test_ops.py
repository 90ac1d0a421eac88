"""The registered operators: schemas, fake kernels, tracing, and the choice of a backend."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import trt_kernels as tk
from tests.cases import LIF, LOSS, PENALTY
from trt_kernels import ops

CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def lif_cases(backend="cpu"):
    for x, time_dim in (
        (torch.randn(4, 6), 0),
        (torch.randn(2, 20, 3), 1),
        (torch.randn(3, 4, 5).permute(2, 0, 1), 1),
        (torch.randn(4, 6, 2)[..., 0], 0),
        (torch.randn(0, 6), 0),
    ):
        plain = LIF._replace(time_dim=time_dim, backend=backend)
        yield x, None, None, plain
        shape = [n for dim, n in enumerate(x.shape) if dim != time_dim]
        full = plain._replace(phi="trt", delta=0.5, return_state=True, return_potential=True)
        yield x, torch.randn(shape), torch.rand(x.shape[time_dim]), full


def test_opcheck_lif(backend):
    registered = torch.ops.trt_kernels
    for x, v_init, weight, options in lif_cases(backend):
        arguments = (x, v_init, weight)
        for for_backward in (False, True):
            opcheck(registered.lif_forward, (*arguments, for_backward, *options), test_utils=CHECKS)
        *_, checkpoints = registered.lif_forward(*arguments, True, *options)
        assert (checkpoints.numel() > 0) == (backend != "cpu" and x.shape[options.time_dim] > 16)
        checkpoints = checkpoints if checkpoints.numel() else None
        grads = (torch.randn(x.shape), None, None, None)
        if v_init is not None:
            grads = (grads[0], torch.randn(v_init.shape), torch.randn(x.shape), torch.ones(()))
        for needs_v_init in {False, v_init is not None}:
            opcheck(
                registered.lif_backward,
                (*arguments, checkpoints, *grads, needs_v_init, *options),
                test_utils=CHECKS,
            )


def test_opcheck_penalty(backend):
    params = [torch.randn(5, 3), torch.randn(8, 2)[:, :1], torch.randn(4).double()]
    registered = torch.ops.trt_kernels
    options = PENALTY._replace(backend=backend)
    opcheck(registered.trt_penalty_forward, (params, *options), test_utils=CHECKS)
    grad = torch.ones((), dtype=torch.float64)
    opcheck(registered.trt_penalty_backward, (grad, params, *options), test_utils=CHECKS)
    grads = [torch.randn(p.shape, dtype=p.dtype) for p in params]
    opcheck(registered.trt_penalty_accumulate, (params, grads, 2.0, *options), test_utils=CHECKS)


def test_opcheck_loss(backend):
    registered = torch.ops.trt_kernels
    for options, target in (
        (LOSS, torch.tensor([0, 3, 2])),
        (LOSS._replace(time_dim=1, constant=1.0), torch.rand(5, 4)),
    ):
        options = options._replace(backend=backend)
        logits, class_weight = torch.randn(5, 3, 4), torch.rand(4)
        if options.time_dim:
            class_weight = None
            logits = logits.mT.contiguous().mT  # classes are not neighbours
        tensors = (logits, target, class_weight)
        opcheck(registered.temporal_loss_forward, (*tensors, *options), test_utils=CHECKS)
        _, normalizer, divisors = registered.temporal_loss_forward(*tensors, *options)
        opcheck(
            registered.temporal_loss_backward,
            (torch.ones(()), *tensors, normalizer, divisors, *options),
            test_utils=CHECKS,
        )


def test_op_and_direct_call_agree():
    """Eager calls bypass the op; both must give the same."""
    for x, v_init, weight, options in lif_cases():
        direct = ops.lif_forward(x, v_init, weight, True, options)
        through_op = torch.ops.trt_kernels.lif_forward(x, v_init, weight, True, *options)
        for a, b in zip(direct, through_op, strict=True):
            assert torch.equal(a, b) if a is not None else b.numel() == 0


def test_the_op_refuses_a_weight_without_phi():
    with pytest.raises(ValueError, match="a penalty's weight needs a phi"):
        torch.ops.trt_kernels.lif_forward(torch.zeros(4, 6), None, torch.ones(4), False, *LIF)


def test_cuda_refuses_a_long_sequence_without_checkpoints(on_host):
    options = LIF._replace(backend="cuda")
    x = torch.zeros(17, 3)
    with pytest.raises(ValueError, match="a sequence of 17 steps needs the forward's checkpoints"):
        ops.lif_backward(x, None, None, None, (x, None, None, None), False, options)


def test_fake_tensors_go_through_the_op():
    with FakeTensorMode():
        out = tk.lif(torch.empty(4, 6, dtype=torch.half), return_state=True)
    assert out.spikes.dtype == torch.half and out.state.dtype == torch.float32
    assert out.state.shape == (6,)


def everything(x, v_init, weight, logits, target):
    out = tk.lif(
        x,
        v_init=v_init,
        surrogate=tk.Sigmoid(4.0),
        penalty=tk.MembranePenalty("trt", torch.ones(x.shape[0])),
        return_state=True,
        return_potential=True,
    )
    loss = tk.temporal_loss(logits, target, mse_ratio=0.1)
    penalty = tk.trt_penalty([weight], steps=4, weight=1e-3, delta=0.5)
    return out.spikes.sum() + out.state.sum() + out.penalty + out.potential.mean() + loss + penalty


@pytest.mark.parametrize("steps", (4, 20))
def test_compiles_without_a_graph_break(backend, steps):
    def inputs(batch):
        torch.manual_seed(batch)
        tensors = [
            torch.randn(steps, batch),
            torch.randn(batch),
            torch.randn(7),
            torch.randn(4, 3, 5),
        ]
        return [t.requires_grad_() for t in tensors]

    target = torch.tensor([0, 4, 2])
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for batch in (8, 16):
        tensors = inputs(batch)
        ours = torch.autograd.grad(compiled(*tensors, target), tensors)
        plain = torch.autograd.grad(everything(*tensors, target), tensors)
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b)


def test_module_compiles_with_inductor():
    network = torch.nn.Sequential(torch.nn.Linear(6, 8), tk.nn.LIF(), torch.nn.Linear(8, 3))
    x = torch.randn(4, 5, 6)
    torch.testing.assert_close(torch.compile(network, fullgraph=True)(x), network(x))


def test_use_backend():
    x = torch.randn(4, 30, requires_grad=True)
    with tk.use_backend("reference"):
        assert "LIF" not in type(tk.lif(x).grad_fn).__name__
        with tk.use_backend("cpu"):
            out = tk.lif(x)
            assert type(out.grad_fn).__name__ == "LIFSpikesBackward"
        assert "LIF" not in type(tk.lif(x).grad_fn).__name__
        out.sum().backward()  # runs where its forward ran
    assert type(tk.lif(x).grad_fn).__name__ == "LIFSpikesBackward"
    with pytest.raises(RuntimeError), tk.use_backend("cuda"):
        tk.lif(x)
    assert ops.default_backend == "auto"
    with pytest.raises(ValueError, match="backend: got 'tpu'"), tk.use_backend("tpu"):
        pass


def test_environment_chooses_the_backend():
    code = "import torch, trt_kernels as tk; tk.lif(torch.zeros(2, 3))"
    for value, expected in (
        ("reference", ""),
        ("cuda", "cuda"),
        ("tpu", "TRT_KERNELS_BACKEND: got 'tpu'"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**__import__("os").environ, "TRT_KERNELS_BACKEND": value},
            capture_output=True,
            text=True,
        )
        assert (done.returncode == 0) == (not expected), done.stderr
        assert expected in done.stderr
