"""Checks that public functions share: each names the argument, what it got, what it needs."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

# Whether a transform of torch.func runs (grad, vjp, vmap, ...): then tensors may have no memory.
transforming = torch._C._are_functorch_transforms_active
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that states and sums have for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def finite(name: str, value: Any) -> float:
    """`value` as a finite float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        got = (
            f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        )
        raise TypeError(f"{name}: got {got}, needs a float")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    # Not math.isfinite: torch.compile cannot trace it once a float has changed between calls.
    if not -math.inf < number < math.inf:
        raise ValueError(f"{name}: got {value!r}, needs a finite number")
    return number


def neuron_parameter(name: str, value: Any, dtype: torch.dtype) -> float:
    """`value` as a float that is finite in the state dtype of `dtype` too."""
    number = finite(name, value)
    if abs(number) > torch.finfo(state_dtype(dtype)).max:
        raise ValueError(f"{name}: got {value!r}, which is not finite in {state_dtype(dtype)}")
    return number


def non_negative(name: str, value: Any) -> float:
    number = finite(name, value)
    if number < 0:
        raise ValueError(f"{name}: got {value!r}, needs a number >= 0")
    return number


def fraction(name: str, value: Any) -> float:
    number = finite(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name}: got {value!r}, needs a number in [0, 1]")
    return number


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, needs True or False")
    return value


def integer(name: str, value: Any) -> int:
    """`value` as an int that the kernels can hold."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: got {value!r}, needs an int")
    number = int(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name}: got {value!r}, needs an int of 64 bits")
    return number


def steps(value: Any) -> int:
    number = integer("steps", value)
    if number < 1:
        raise ValueError(f"steps: got {value}, needs at least 1")
    return number


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: got {value!r}, needs one of {', '.join(map(repr, allowed))}")
    return value


def dimension(name: str, value: Any, ndim: int) -> int:
    """`value` as a dimension counted from 0."""
    number = integer(name, value)
    if not -ndim <= number < ndim:
        raise ValueError(f"{name}: got {value} for a tensor with {ndim} dimensions")
    return number % ndim


def tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Tensor:
    """`value` as a plain strided tensor of one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, needs a torch.Tensor")
    if isinstance(value, UninitializedTensorMixin):
        raise ValueError(f"{name}: got an uninitialised parameter, needs one with values")
    if value.is_nested:
        raise ValueError(f"{name}: got a nested tensor, needs a dense (strided) one")
    if value.layout is not torch.strided:
        raise ValueError(f"{name}: got layout {value.layout}, needs a dense (strided) tensor")
    if value.dtype not in dtypes:
        needed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: got dtype {value.dtype}, needs one of {needed}")
    return value


def channels(name: str, value: Tensor, count: int | None, dtype: torch.dtype, x: Tensor) -> Tensor:
    """`value`, a scalar or one number a channel of x, as [1] or [count] in `dtype`.

    `count` is None where x has no channel dimension.
    """
    tensor(name, value)
    same_device(name, value, "x", x)
    allowed = (1,) if count is None else (1, count)
    if value.ndim > 1 or value.numel() not in allowed:
        needed = "a scalar (one a channel needs channel_dim)"
        if count is not None:
            needed = f"a scalar or one number for each of {count} channels"
        raise ValueError(f"{name}: got a tensor of shape {tuple(value.shape)}, needs {needed}")
    return value.reshape(-1).to(dtype)


def scalar(name: str, value: Tensor) -> Tensor:
    """`value` as a tensor of one number, without gradient."""
    tensor(name, value)
    if value.ndim:
        raise ValueError(f"{name}: got a tensor of shape {tuple(value.shape)}, needs a scalar")
    if value.requires_grad:
        raise ValueError(f"{name}: requires grad, but there is no gradient for it")
    return value


def positive(name: str, value: Any) -> float:
    number = finite(name, value)
    if number <= 0:
        raise ValueError(f"{name}: got {value!r}, needs a number > 0")
    return number


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name}: got a tensor on {value.device}, needs {other_name}'s device {other.device}"
        )


def refuse_forward_mode(function: str) -> Any:
    raise RuntimeError(
        f"{function} has no derivative in forward mode (torch.autograd.forward_ad, torch.func.jvp, "
        "jacfwd, hessian): take reverse mode, torch.autograd.grad or torch.func.vjp and jacrev"
    )


def no_forward_mode(function: str) -> Callable[[Any], Any]:
    """Makes an autograd Function refuse forward mode by name.

    Not by a `jvp` of its own: torch.compile traces no Function that has one.
    """

    def decorated(kind: Any) -> Any:
        kind._backward_cls.apply_jvp = lambda *_: refuse_forward_mode(function)
        return kind

    return decorated


def single_backward(function: str) -> None:
    """Refuses a backward pass that is itself recorded (create_graph=True).

    Without this, gradients of gradients would lack the path through the saved input in silence.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        refuse_second(function)


def refuse_second(function: str) -> Any:
    raise RuntimeError(
        f"{function} cannot be differentiated twice: call backward without create_graph=True"
    )
