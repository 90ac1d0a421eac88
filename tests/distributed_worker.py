"""A process of `test_distributed.py`; run by torchrun, two of them.

Every check compares with the same computation on whole tensors, which each process makes itself.
"""

import contextlib
import copy
import sys

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import trt_kernels as tk
from tests.cases import relative_error

SETTINGS = {"steps": 6, "weight": 1e-2, "delta": 0.5}


@contextlib.contextmanager
def communicates(count):
    """Demands so many all-reduces inside, and nothing else that communicates."""
    with CommDebugMode() as seen:
        yield
    counts = {str(operator): number for operator, number in seen.get_comm_counts().items()}
    assert sum(counts.values()) == count, counts
    assert all("all_reduce" in name or "allreduce" in name for name in counts), counts


def network(dtype=torch.float64):
    """The last layer has one row: with two processes the second has an empty shard of it."""
    torch.manual_seed(1)
    layers = (nn.Linear(6, 9), tk.nn.LIF(), nn.Linear(9, 5), nn.Linear(5, 1))
    return nn.Sequential(*layers).to(dtype)


def sharded(net, mesh):
    """FSDP2 of two layers and of the last, which stays whole from the forward to the backward."""
    fully_shard(net[0], mesh=mesh)
    fully_shard(net[2], mesh=mesh)
    return fully_shard(net, mesh=mesh)


def assert_whole_penalty(ours, whole, all_reduces, **options):
    """Value and gradients of DTensors (or a mixture) are those of whole tensors, once each."""
    for p in (*ours, *whole):
        p.grad = None
    expected = tk.trt_penalty(whole, **SETTINGS, **options)
    (3 * expected).backward()
    with communicates(all_reduces):
        value = tk.trt_penalty(ours, **SETTINGS, **options)
    with communicates(0):
        (3 * value).backward()
    assert type(value) is torch.Tensor and value.dtype == expected.dtype
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    every = [torch.empty_like(value.detach()) for _ in range(distributed.get_world_size())]
    distributed.all_gather(every, value.detach())
    assert torch.equal(*every)
    in_backward = [p.grad for p in ours]
    for p in ours:
        p.grad = None
    for times in (1, 2):
        with communicates(0):
            tk.trt_penalty_(ours, scale=3.0, **SETTINGS, **options)
        for p, true, first in zip(ours, whole, in_backward, strict=True):
            if not p.requires_grad:
                assert p.grad is None and first is None
                continue
            for grad, factor in ((first, 1), (p.grad, times)):
                assert type(grad) is type(p.data)
                if isinstance(grad, DTensor):
                    assert grad.placements == p.placements
                    grad = grad.full_tensor()
                assert relative_error(grad, factor * true.grad) < 1e-6


def fsdp(backend):
    """Of the last layer one process has nothing at all."""
    net, whole = network(), network()
    sharded(net, init_device_mesh("cpu", (2,)))
    assert list(net.parameters())[-2].to_local().shape[0] == 1 - distributed.get_rank()
    assert_whole_penalty(list(net.parameters()), list(whole.parameters()), 1, backend=backend)
    last = (list(model.parameters())[-1:] for model in (net, whole))
    assert_whole_penalty(*last, 1, backend=backend)


def test_fsdp():
    fsdp("cpu")


def test_fsdp_on_the_reference():
    fsdp("reference")


def test_replicas_are_not_summed():
    for shape, all_reduces in (((2, 1), 0), ((1, 2), 1)):
        net, whole = network(), network()
        sharded(net, init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))
        assert_whole_penalty(list(net.parameters()), list(whole.parameters()), all_reduces)


def test_mixture():
    """Sharded, sharded by columns, replicated, ordinary and frozen ones, of several dtypes."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(2)
    tensors = [torch.randn(size).mul(0.3) for size in ((7, 3), (4, 5), (6, 2), (8,), (3, 3))]
    tensors[2] = tensors[2].double()
    placements = [[Shard(0)], [Shard(1)], [Replicate()], None, [Shard(0)]]
    for last in (5, 2):
        ours, whole = [], []
        for index, (tensor, placement) in enumerate(zip(tensors[:last], placements, strict=False)):
            own = (
                tensor.clone() if placement is None else distribute_tensor(tensor, mesh, placement)
            )
            ours.append(nn.Parameter(own, requires_grad=index != 4))
            whole.append(nn.Parameter(tensor.clone(), requires_grad=index != 4))
        assert_whole_penalty(ours, whole, 1)
    assert_whole_penalty(
        [nn.Parameter(distribute_tensor(tensors[1], mesh, [Replicate()]))], whole[1:2], 0
    )


def test_several_meshes():
    """One all-reduce for each group of processes, and two groups where two dimensions shard."""
    first, second = (distributed.new_group([0, 1]) for _ in range(2))
    rows, columns = (DeviceMesh.from_group(group, "cpu") for group in (first, second))
    torch.manual_seed(3)
    whole = [nn.Parameter(torch.randn(5, 4)) for _ in range(3)]
    ours = [
        nn.Parameter(distribute_tensor(whole[0].detach(), rows, [Shard(0)])),
        nn.Parameter(distribute_tensor(whole[1].detach(), columns, [Shard(1)])),
        nn.Parameter(distribute_tensor(whole[2].detach(), rows, [Shard(1)])),
    ]
    assert_whole_penalty(ours, whole, 2)
    # What FSDP2 over tensor parallelism needs four processes for.
    values = [torch.tensor(1.0, requires_grad=True), torch.tensor(10.0, requires_grad=True)]
    with communicates(2):
        total = tk.sharding.SumOverGroups.apply(((first, second), (second,)), *values)
    assert total == 4 * 1 + 2 * 10
    assert torch.autograd.grad(2 * total, values) == (2, 2)


def test_compiled():
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    compiled = torch.compile(tk.trt_penalty, backend="aot_eager", fullgraph=True)
    grads = []
    for function in (tk.trt_penalty, compiled):
        value = function([p], **SETTINGS)
        grads.append(torch.autograd.grad(value, p)[0].to_local())
        torch.testing.assert_close(value, tk.trt_penalty([torch.ones(4, 2)], **SETTINGS))
    assert torch.equal(*grads)


def test_refusals():
    mesh = init_device_mesh("cpu", (2,))
    ordinary = nn.Parameter(torch.ones(2, 2))
    partial = DTensor.from_local(torch.ones(2, 2), mesh, [Partial()])
    for function in (tk.trt_penalty, tk.trt_penalty_):
        with pytest.raises(ValueError, match=r"params\[1\]: got placements \(Partial.*, needs Sh"):
            function([ordinary, partial], **SETTINGS)
        outside = DTensor.from_local(torch.ones(2), DeviceMesh("cpu", [0]), [Shard(0)])
        if distributed.get_rank():
            with pytest.raises(ValueError, match=r"params\[0\]: got a DTensor of a mesh without"):
                function([outside], **SETTINGS)
    p = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Replicate()]))
    p.grad = DTensor.from_local(torch.ones(4, 2), mesh, [Partial()])
    with pytest.raises(ValueError, match=r"params\[1\].grad: got placements \(Partial.*, needs th"):
        tk.trt_penalty_([ordinary, p], **SETTINGS)
    assert ordinary.grad is None
    with pytest.raises(RuntimeError, match="trt_penalty cannot be differentiated twice"):
        torch.autograd.grad(tk.trt_penalty([p], **SETTINGS), p, create_graph=True)


def test_in_place_is_seen_by_autograd():
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    tk.trt_penalty_([p], **SETTINGS)
    kept, before = p.grad, p.grad._version
    tk.trt_penalty_([p], **SETTINGS)
    assert p.grad is kept and kept._version > before


def test_gradient_that_is_still_on_its_way():
    """Tensor parallelism leaves gradients that a collective has yet to finish."""
    mesh = init_device_mesh("cpu", (2,))
    whole = nn.Parameter(torch.ones(4, 2))
    whole.grad = torch.full((4, 2), 2.0)
    tk.trt_penalty_([whole], **SETTINGS)
    for backend in ("cpu", "reference"):
        p = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Replicate()]))
        partial = DTensor.from_local(torch.ones(4, 2), mesh, [Partial()])
        p.grad = partial.redistribute(placements=[Replicate()], async_op=True)
        assert type(p.grad.to_local()) is not torch.Tensor
        tk.trt_penalty_([p], **SETTINGS, backend=backend)
        assert relative_error(p.grad.full_tensor(), whole.grad) < 1e-6


def steps_of_training(model, forward, rows, in_place):
    """Five steps of TRT; `rows` of each batch are this process's. Returns the losses."""
    loss_of = tk.TRTLoss(model, weight=0 if in_place else 1e-2, delta=0.5, mse_ratio=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    torch.manual_seed(4)
    losses = []
    for _ in range(5):
        x, target = torch.randn(4, 8, 6).double(), torch.rand(8, 1).double()
        loss = loss_of(forward(x[:, rows]), target[rows])
        optimizer.zero_grad()
        loss.backward()
        if in_place:
            tk.trt_penalty_(loss_of.regularized(), steps=4, weight=1e-2, delta=0.5)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def assert_trains_as_one_process(wrap, whole_tensor):
    """The mean of equal shares' losses is the batch's: all must agree, the regularizer once."""
    rank = distributed.get_rank()
    start = network()
    for in_place in (False, True):
        expected = copy.deepcopy(start)
        their_losses = steps_of_training(expected, expected, slice(None), in_place)
        model = copy.deepcopy(start)
        forward = wrap(model)
        losses = steps_of_training(model, forward, slice(4 * rank, 4 * rank + 4), in_place)
        distributed.all_reduce(losses)
        torch.testing.assert_close(losses / 2, their_losses, rtol=1e-9, atol=0)
        pairs = zip(model.parameters(), expected.parameters(), start.parameters(), strict=True)
        for index, (ours, theirs, before) in enumerate(pairs):
            ours = whole_tensor(ours.detach())
            assert relative_error(ours - before, theirs - before) < 1e-9, index


def test_training_by_fsdp():
    mesh = init_device_mesh("cpu", (2,))
    assert_trains_as_one_process(lambda model: sharded(model, mesh), DTensor.full_tensor)


def test_training_by_ddp():
    """Both processes add the same gradient, and DDP averages: it counts once."""
    assert_trains_as_one_process(DistributedDataParallel, lambda tensor: tensor)


def main():
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN
    distributed.init_process_group("gloo")
    for name, check in list(globals().items()):
        if name.startswith("test_"):
            check()
            sys.stdout.write(f"passed {name}\n")  # in one piece: both processes write
    distributed.barrier()  # nobody leaves while the other still talks
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
