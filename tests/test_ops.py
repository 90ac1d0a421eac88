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
from trt_kernels.options import LIFGrads, LIFResults, LIFTensors, LIFWanted

CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def lif_cases(backend="cpu"):
    """x, everything else that `lif` reads, and options."""
    for x, time_dim in (
        (torch.randn(4, 6), 0),
        (torch.randn(2, 20, 3), 1),
        (torch.randn(3, 4, 5).permute(2, 0, 1), 1),
        (torch.randn(4, 6, 2)[..., 0], 0),
        (torch.randn(0, 6), 0),
    ):
        plain = LIF._replace(time_dim=time_dim, backend=backend)
        yield x, LIFTensors(), plain
        if x.ndim == 3 and time_dim == 0:
            continue
        shape = [n for dim, n in enumerate(x.shape) if dim != time_dim]
        full = plain._replace(
            phi="trt",
            delta=0.5,
            return_state=True,
            return_potential=True,
            statistics=True,
            bits=1,
            channel_dim=len(shape) - 1,
        )
        weight, neuron = torch.rand(x.shape[time_dim]), torch.rand(3, shape[-1])
        yield x, LIFTensors(torch.randn(shape), weight, neuron), full
        vectors = torch.rand(2, shape[-1]).unbind(0)
        gains = torch.rand(x.shape[time_dim], shape[-1])
        normalised = LIFTensors(None, None, None, torch.rand(4, shape[-1]), *vectors, gains)
        yield x, normalised, full._replace(phi="", bits=0, batch=True)
        if time_dim == 1:
            constant = x.select(1, 0).contiguous()
            yield constant, LIFTensors(), plain._replace(steps=5)
            bits = {"surrogate": "rectangle", "detach_reset": True, "bits": 2}
            yield x, LIFTensors(), plain._replace(**bits)


def test_opcheck_lif(backend):
    registered = torch.ops.trt_kernels
    for x, tensors, options in lif_cases(backend):
        opcheck(registered.lif_forward, (x, *tensors, True, *options), test_utils=CHECKS)
        results = LIFResults(*registered.lif_forward(x, *tensors, True, *options))
        steps = options.steps or x.shape[options.time_dim]
        needs = backend != "cpu" and steps > 16 and options.bits < 2
        assert (results.checkpoints.numel() > 0) == needs
        grads = LIFGrads(torch.randn(results.spikes.shape))
        if tensors.v_init is not None:
            state, potential = torch.randn(tensors.v_init.shape), torch.randn(x.shape)
            grads = LIFGrads(grads.spikes, state, potential, torch.ones(()))
        everything = LIFWanted(
            v_init=tensors.v_init is not None,
            neuron=tensors.neuron is not None,
            affine=tensors.stats is not None,
            gains=tensors.gains is not None,
        )
        kept = (results.checkpoints if needs else None, results.bits if options.bits > 1 else None)
        arguments = (x, *tensors, *kept, None, *grads, *everything, *options)
        opcheck(registered.lif_backward, arguments, test_utils=CHECKS)


def test_opcheck_batch_statistics(backend):
    for x, dim in ((torch.randn(4, 3, 5), 1), (torch.randn(4, 6, 5)[..., ::2].double(), 2)):
        arguments = (x, dim, 1e-5, 2, backend)
        opcheck(torch.ops.trt_kernels.batch_statistics, arguments, test_utils=CHECKS)


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
        (LOSS._replace(constant=2.0), torch.tensor([0, 3, 2])),
    ):
        options = options._replace(backend=backend)
        logits, class_weight = torch.randn(5, 3, 4), torch.rand(4)
        if options.time_dim:
            class_weight = None
            logits = logits.mT.contiguous().mT  # classes are not neighbours
        elif options.constant:
            logits = torch.randn(3, 5, 4).transpose(0, 1)  # the gradient keeps this order
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
    for x, tensors, options in lif_cases():
        direct = ops.lif_forward(x, tensors, True, options)
        through_op = torch.ops.trt_kernels.lif_forward(x, *tensors, True, *options)
        for a, b in zip(direct, through_op, strict=True):
            assert torch.equal(a, b) if a is not None else b.numel() == 0


def test_the_op_refuses_a_weight_without_phi():
    with pytest.raises(ValueError, match="a penalty's weight needs a phi"):
        given = LIFTensors(penalty_weight=torch.ones(4))
        torch.ops.trt_kernels.lif_forward(torch.zeros(4, 6), *given, False, *LIF)


def test_cuda_refuses_a_long_sequence_without_checkpoints(on_host):
    options = LIF._replace(backend="cuda")
    x = torch.zeros(17, 3)
    with pytest.raises(ValueError, match="a sequence of 17 steps needs the forward's checkpoints"):
        nothing = (LIFTensors(), None, None, None)
        ops.lif_backward(x, *nothing, LIFGrads(x), LIFWanted(), options)


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
