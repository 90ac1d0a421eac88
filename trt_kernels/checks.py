"""Checks that public functions share: each names the argument, what it got, what it needs."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that states and sums have for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def finite(name: str, value: Any) -> float:
    """`value` as a finite float."""
    if isinstance(value, Tensor):
        raise NotImplementedError(
            f"{name}: got a tensor of shape {tuple(value.shape)}; a learnable or per-channel "
            f"{name} is not part of this version, which needs a float"
        )
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, needs a float")
    if not math.isfinite(value):
        raise ValueError(f"{name}: got {value!r}, needs a finite number")
    return float(value)


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


def steps(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"steps: got {value!r}, needs an int >= 1")
    if value < 1:
        raise ValueError(f"steps: got {value}, needs at least 1")
    return value


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, needs one of {', '.join(map(repr, allowed))}")
    return str(value)


def dimension(name: str, value: Any, ndim: int) -> int:
    """`value` as a dimension counted from 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}, needs an int")
    if not -ndim <= value < ndim:
        raise ValueError(f"{name}: got {value} for a tensor with {ndim} dimensions")
    return value % ndim


def tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Tensor:
    """`value` as a plain strided tensor of one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, needs a torch.Tensor")
    if value.layout is not torch.strided:
        raise ValueError(f"{name}: got layout {value.layout}, needs a dense (strided) tensor")
    if value.dtype not in dtypes:
        needed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: got dtype {value.dtype}, needs one of {needed}")
    return value


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name}: got a tensor on {value.device}, needs {other_name}'s device {other.device}"
        )


def single_backward(function: str) -> None:
    """Refuses a backward pass that is itself recorded (create_graph=True).

    Without this, gradients of gradients would lack the path through the saved input in silence.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{function} cannot be differentiated twice: call backward without create_graph=True"
        )
