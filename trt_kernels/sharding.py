"""Sums over parameters that are DTensors, as FSDP2 and tensor parallelism make them.

Every process sums over its own shards, and an all-reduce over each process group that shards gives
the sum over the whole. The gradient of a shard is that of the sum over this shard, and needs none.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import Parameter

from .backends.layout import sum_dtype
from .checks import no_forward_mode
from .typed import Function


def is_dtensor(tensor: Tensor) -> bool:
    """Imports what DTensors are only where a tensor is no ordinary one."""
    if tensor.__class__ is Tensor or tensor.__class__ is Parameter:
        return False
    if not distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def check_parameter(name: str, parameter: Any) -> None:
    """Refuses a DTensor whose elements this process does not hold."""
    if any(placement.is_partial() for placement in parameter.placements):
        raise ValueError(
            f"{name}: got placements {parameter.placements}, needs Shard or Replicate: "
            "redistribute it first"
        )
    if parameter.device_mesh.get_coordinate() is None:
        raise ValueError(f"{name}: got a DTensor of a mesh without this process, needs one with it")


def check_gradient(name: str, parameter: Any) -> None:
    """Refuses a `.grad` that is not sharded as its DTensor is."""
    grad = parameter.grad
    if grad.device_mesh != parameter.device_mesh or grad.placements != parameter.placements:
        raise ValueError(
            f"{name}: got placements {grad.placements} on {grad.device_mesh}, needs the "
            f"parameter's {parameter.placements} on {parameter.device_mesh}: redistribute it first"
        )


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor; where grad mode is off, outside the graph."""
    own: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor
    return own


def sum_over_shards(params: Sequence[Any], own_sum: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """`own_sum` of all elements of `params`, ordinary tensors among them; each is read once.

    `own_sum` returns the sum of a function over all elements of a list, differentiable.
    """
    shards: dict[tuple[Any, ...], list[Tensor]] = {}
    for p in params:
        groups = _sharding_groups(p) if is_dtensor(p) else ()
        shards.setdefault(groups, []).append(local(p))
    dtype = sum_dtype(params)
    value: Tensor = SumOverGroups.apply(
        tuple(shards), *(own_sum(tensors).to(dtype) for tensors in shards.values())
    )
    return value


def _sharding_groups(parameter: Any) -> tuple[Any, ...]:
    """The groups whose processes hold different elements; replicas would count several times."""
    mesh = parameter.device_mesh
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(parameter.placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )


@no_forward_mode("trt_penalty")
class SumOverGroups(Function):
    """The sum of scalars, each summed over its own process groups: one all-reduce a group.

    The gradient passes as it is: every process has the sum, and its graph holds its own part.
    """

    @staticmethod
    def forward(ctx: Any, groups: tuple[tuple[Any, ...], ...], *values: Tensor) -> Tensor:
        totals = list(values)
        # In the order of the parameters, which is the same in every process.
        for group in dict.fromkeys(group for several in groups for group in several):
            members = [index for index, several in enumerate(groups) if group in several]
            parts = torch.stack([totals[index] for index in members])
            distributed.all_reduce(parts, group=group)
            for index, part in zip(members, parts, strict=True):
                totals[index] = part
        return torch.stack(totals).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, *(grad if need else None for need in ctx.needs_input_grad[1:])
