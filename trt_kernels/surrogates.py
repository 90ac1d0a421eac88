"""Surrogate derivatives σ'(u) of the spike, u = h - threshold (method.md, section 1).

Each class is the plain PyTorch definition that the reference backend computes with; the kernels
have their own under the same name (csrc/math/surrogate.h). Any callable that gives σ'(u) serves as
a surrogate on the reference backend.
"""

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from . import checks

# Beyond these a square of the parameter leaves the range of float32.
SMALLEST, LARGEST = 1e-15, 1e15


@dataclass(frozen=True)
class Surrogate:
    """A surrogate that every backend knows. Calling it gives σ'(u), shape and dtype of `u`."""

    name: ClassVar[str] = "custom"

    def __post_init__(self) -> None:
        if type(self) is Surrogate:
            raise TypeError("Surrogate is a base class: make a Triangle, Sigmoid, ATan, ...")
        for field in fields(self):
            value = checks.finite(field.name, getattr(self, field.name))
            if not SMALLEST <= value <= LARGEST:
                raise ValueError(
                    f"{field.name}: got {value}, needs a number > 0, "
                    f"from {SMALLEST:g} to {LARGEST:g}"
                )
            object.__setattr__(self, field.name, value)

    @property
    def parameter(self) -> float:
        """The one shape parameter."""
        return float(getattr(self, fields(self)[0].name))

    def __call__(self, u: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Triangle(Surrogate):
    """σ'(u) = max(0, width - |u|) / width². Used by TRT, TET, TAB."""

    width: float = 1.0
    name: ClassVar[str] = "triangle"

    def __call__(self, u: Tensor) -> Tensor:
        return (self.width - u.abs()).clamp(min=0) / self.width**2


@dataclass(frozen=True)
class Sigmoid(Surrogate):
    """σ'(u) = α·s(αu)·(1 - s(αu)), s the logistic function. Used by TRT, SpikingJelly."""

    alpha: float = 4.0
    name: ClassVar[str] = "sigmoid"

    def __call__(self, u: Tensor) -> Tensor:
        s = torch.sigmoid(self.alpha * u)
        return self.alpha * s * torch.sigmoid(-self.alpha * u)


@dataclass(frozen=True)
class ATan(Surrogate):
    """σ'(u) = (α/2) / (1 + (παu/2)²). Used by SpikingJelly, snnTorch."""

    alpha: float = 2.0
    name: ClassVar[str] = "atan"

    def __call__(self, u: Tensor) -> Tensor:
        return (self.alpha / 2) / (1 + (math.pi / 2 * self.alpha * u) ** 2)


@dataclass(frozen=True)
class Rectangle(Surrogate):
    """σ'(u) = 1/width where |u| < width/2, else 0. Used by STBP, MPBN, temporal fusion."""

    width: float = 1.0
    name: ClassVar[str] = "rectangle"

    def __call__(self, u: Tensor) -> Tensor:
        inside = (u.abs() < self.width / 2).to(u.dtype) / self.width
        return torch.where(u.isnan(), u, inside)


@dataclass(frozen=True)
class FastSigmoid(Surrogate):
    """σ'(u) = 1 / (1 + slope·|u|)². Used by snnTorch, SuperSpike, Norse."""

    slope: float = 25.0
    name: ClassVar[str] = "fast_sigmoid"

    def __call__(self, u: Tensor) -> Tensor:
        return 1 / (1 + self.slope * u.abs()) ** 2


@dataclass(frozen=True)
class SignedStep(Surrogate):
    """σ'(u) = height where u < 0, else -height. snnTorch's "triangular"."""

    height: float = 1.0
    name: ClassVar[str] = "signed_step"

    def __call__(self, u: Tensor) -> Tensor:
        # Not where(u < 0, height, -height): of two numbers it makes float32, whatever u is.
        return torch.where(u < 0, self.height, torch.where(u.isnan(), u, -self.height))


# Those that every backend knows; a class derived from one of them is the user's own.
WITH_KERNELS = (Triangle, Sigmoid, ATan, Rectangle, FastSigmoid, SignedStep)
