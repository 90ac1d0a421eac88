"""The settings of `lif` and `temporal_loss`, checked once and passed down as plain values."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .surrogates import WITH_KERNELS

RESETS = ("hard", "soft", "none")
CHARGES = ("decay", "divide")
# The largest δt of a term: one divided by more than 2⁶⁰ is nothing, and its square may overflow.
LARGEST_EXPONENT = math.log(2.0**60)
PHIS = ("square", "trt", "range", "spike")
MEMORIES = ("recompute",)


# The arguments of `lif` that are checked together, in the order that `make_lif_options` takes them.
LIF_SETTINGS = (
    "decay",
    "threshold",
    "v_reset",
    "reset",
    "detach_reset",
    "surrogate",
    "fire_at_threshold",
    "charge",
    "steps",
    "time_dim",
    "channel_dim",
    "return_state",
    "return_potential",
    "statistics",
    "memory",
)


class LIFOptions(NamedTuple):
    """Everything about a `lif` call but its tensors: plain values, in the op's schema order."""

    time_dim: int
    decay: float
    threshold: float
    v_reset: float
    reset: str
    detach_reset: bool
    surrogate: str
    surrogate_parameter: float
    fire_at_threshold: bool
    charge: str
    phi: str  # "" for no regularizer
    delta: float
    eps: float
    return_state: bool
    return_potential: bool
    backend: str


class LossOptions(NamedTuple):
    """Everything about a temporal loss but its tensors: plain values, in the op's schema order."""

    time_dim: int
    entropy_ratio: float
    square_ratio: float
    constant: float | None  # the squared term's target where it is not the label
    label_smoothing: float
    ignore_index: int
    backend: str


class PenaltyOptions(NamedTuple):
    """Everything about a `trt_penalty` but its tensors, in the op's schema order."""

    steps: int
    weight: float
    delta: float
    eps: float
    backend: str


class MembranePenalty:
    """The in-pass temporal regularizer of `lif`: R = Σ_t weight_t · mean over neurons of φ(h_t).

    Args:
        phi: φ, one of "square" (h², TMPR), "trt" (h² / (1 + expm1(δt)(|h| + ε)), the TRT paper's
            factor on the potential), "range" (min(|h|, |1-h|)², RMP-Loss), "spike" (s, firing rate;
            its gradient goes through the surrogate).
        weight: [T] floating tensor, or a sequence of T floats; any schedule. Not differentiable.
            From the CPU it is copied to a GPU at every call, which a CUDA graph cannot capture:
            give a tensor on x's device there.
        delta: δ >= 0 of "trt".
        eps: ε >= 0 of "trt".

    Raises:
        ValueError, TypeError: naming the argument; a `weight` that requires grad is refused.
    """

    def __init__(
        self, phi: str, weight: Tensor | Sequence[float], *, delta: float = 0.5, eps: float = 1e-5
    ) -> None:
        self.phi = checks.choice("phi", phi, PHIS)
        self.delta = checks.non_negative("delta", delta)
        self.eps = checks.non_negative("eps", eps)
        if not isinstance(weight, Tensor):
            if not isinstance(weight, Iterable):
                raise TypeError(f"weight: got {weight!r}, needs a tensor or a sequence of floats")
            values = [checks.finite("weight", w) for w in weight]
            weight = torch.tensor(values, dtype=torch.float64, device="cpu")
        checks.tensor("weight", weight)
        if weight.ndim != 1:
            raise ValueError(f"weight: got shape {tuple(weight.shape)}, needs [T]")
        if weight.requires_grad:
            raise ValueError("weight: requires grad, but the regularizer has no gradient for it")
        looks = weight.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and not bool(weight.isfinite().all()):
            raise ValueError(f"weight: got {weight.tolist()}, needs finite numbers")
        self.weight = weight

    def __repr__(self) -> str:
        return (
            f"MembranePenalty({self.phi!r}, {self.weight.tolist()}, "
            f"delta={self.delta}, eps={self.eps})"
        )


def make_lif_options(
    settings: tuple[Any, ...],
    phi: str,
    delta: float,
    eps: float,
    backend: str,
    ndim: int,
    dtype: torch.dtype,
) -> LIFOptions:
    """Checks the options of `lif` for an x of `ndim` dimensions on a resolved backend."""
    (
        decay,
        threshold,
        v_reset,
        reset,
        detach_reset,
        surrogate,
        fire_at_threshold,
        charge,
        steps,
        time_dim,
        channel_dim,
        return_state,
        return_potential,
        statistics,
        memory,
    ) = settings
    later = {
        "steps": steps is not None,
        "channel_dim": channel_dim is not None,
        "statistics": statistics is not False,
    }
    for name, asked in later.items():
        if asked:
            raise NotImplementedError(f"{name}: not part of this version; leave it at its default")
    if memory == "bits":
        raise NotImplementedError("memory: 'bits' is not part of this version; use 'recompute'")
    checks.choice("memory", memory, MEMORIES)
    decay = checks.neuron_parameter("decay", decay, dtype)
    charge = checks.choice("charge", charge, CHARGES)
    if charge == "divide" and decay == 0:
        raise ValueError("decay: got 0, but charge 'divide' divides by tau = 1 / decay")
    if type(surrogate) in WITH_KERNELS:
        name, parameter = surrogate.name, surrogate.parameter
    elif callable(surrogate) and not isinstance(surrogate, type):
        if backend != "reference":
            raise ValueError(
                f"surrogate: {surrogate!r} is not one of this package's, so it runs on "
                f"backend='reference' only; got backend {backend!r}"
            )
        name, parameter = "custom", 1.0
    else:
        raise TypeError(
            f"surrogate: got {surrogate!r}, needs an instance such as Triangle(1.0), or a callable "
            "that gives σ'(u)"
        )
    return LIFOptions(
        time_dim=checks.dimension("time_dim", time_dim, ndim),
        decay=decay,
        threshold=checks.neuron_parameter("threshold", threshold, dtype),
        v_reset=checks.neuron_parameter("v_reset", v_reset, dtype),
        reset=checks.choice("reset", reset, RESETS),
        detach_reset=checks.boolean("detach_reset", detach_reset),
        surrogate=name,
        surrogate_parameter=parameter,
        fire_at_threshold=checks.boolean("fire_at_threshold", fire_at_threshold),
        charge=charge,
        phi=phi,
        delta=delta,
        eps=eps,
        return_state=checks.boolean("return_state", return_state),
        return_potential=checks.boolean("return_potential", return_potential),
        backend=backend,
    )
