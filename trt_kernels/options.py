"""The settings of `lif` and `temporal_loss`, checked once and passed down as plain values."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .surrogates import WITH_KERNELS

RESETS = ("hard", "soft", "none")


class Charge(NamedTuple):
    """How h comes from v and x, by a factor k: the decay, or 1/tau as a division by tau."""

    form: str  # "plain" kv + x, "leaky" v + k(x - (v - v_reset)), "resting" v - k(v - v_reset) + x,
    divides: bool  # "boxed" v + k(x - v), "delayed" plain with the reset of the step before

    @property
    def scales_input(self) -> bool:
        """By k, so that the gradient of k needs x."""
        return self.form in ("leaky", "boxed")


CHARGES = {
    "decay": Charge("plain", divides=False),
    "divide": Charge("plain", divides=True),
    "leak": Charge("leaky", divides=False),
    "leak_divide": Charge("leaky", divides=True),
    "rest": Charge("resting", divides=False),
    "rest_divide": Charge("resting", divides=True),
    "box": Charge("boxed", divides=False),
    "delayed": Charge("delayed", divides=False),
}
# The largest δt of a term: one divided by more than 2⁶⁰ is nothing, and its square may overflow.
LARGEST_EXPONENT = math.log(2.0**60)
PHIS = ("square", "trt", "range", "spike")
MEMORIES = ("recompute", "bits")
LEARNABLE = ("decay", "threshold", "v_reset")  # each a float or a tensor


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

    time_dim: int  # of the spikes
    steps: int  # 0 where x has time; else x is constant over so many steps, and has none
    channel_dim: int  # of x without time, or -1: what is given by channel is given once for all
    decay: float  # these three hold where no `LIFTensors.neuron` is given
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
    scale: float  # of the normalised input
    batch: bool  # its mean and deviation are those of x itself, so the gradient goes through them
    return_state: bool
    return_potential: bool
    statistics: bool
    bits: int  # planes of bits that the forward pass writes: none, spikes, and where σ' is not 0
    backend: str

    @property
    def divides(self) -> bool:
        """The charge divides by tau."""
        return CHARGES[self.charge].divides


class LIFTensors(NamedTuple):
    """What `lif` reads beside x, in the state dtype; C is 1 where nothing is given by channel."""

    v_init: Tensor | None = None  # x's shape without time
    penalty_weight: Tensor | None = None  # [T]
    neuron: Tensor | None = None  # [3, C]: decay (tau where charges divide), threshold, v_reset
    # Batch normalisation of the input: y = gains · ((x - mean)·a + b), a = inverse·scale·weight,
    # b = bias - rest·a, where mean + rest is the mean and inverse 1 / deviation.
    stats: Tensor | None = None  # [4, C]: mean, rest, inverse, unbiased variance (not read here)
    norm_weight: Tensor | None = None  # [C]
    norm_bias: Tensor | None = None  # [C]
    gains: Tensor | None = None  # [T] or [T, C]

    @property
    def channels(self) -> int:
        """C."""
        given = self.neuron if self.stats is None else self.stats
        return 1 if given is None else given.shape[1]


class LIFResults(NamedTuple):
    """What the forward pass writes; None for what is not asked for."""

    spikes: Tensor
    state: Tensor | None = None  # x's shape without time
    potential: Tensor | None = None  # the spikes' shape, before the reset
    penalty: Tensor | None = None  # scalar
    rate: Tensor | None = None  # [T]: mean of the spikes
    checkpoints: Tensor | None = None  # [segments - 1, *state]
    # uint8 [planes, T, ceil(N / 8)]: bit j of byte i is neuron 8i + j in the order of memory.
    bits: Tensor | None = None


class LIFGrads(NamedTuple):
    """What arrives at the results; None is zero."""

    spikes: Tensor | None = None
    state: Tensor | None = None
    potential: Tensor | None = None
    penalty: Tensor | None = None


class LIFWanted(NamedTuple):
    """What the backward pass is to write."""

    x: bool = True
    v_init: bool = False
    neuron: bool = False
    affine: bool = False  # the gradients of weight and bias, and what `batch` needs of them
    gains: bool = False


class LIFGradients(NamedTuple):
    """What the backward pass writes; None for what is not wanted."""

    x: Tensor | None = None
    v_init: Tensor | None = None
    neuron: Tensor | None = None  # [3, C]
    # [2, C]: Σ dz·x̂ and Σ dz, for dz what arrives at (x - mean)·a + b and x̂ = (x - mean)·inverse.
    affine: Tensor | None = None
    gains: Tensor | None = None


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
    packing: bool = False,
) -> LIFOptions:
    """Checks the options of `lif` for an x of `ndim` dimensions on a resolved backend.

    `packing` asks for the spikes as bits too. Tensors among decay, threshold and v_reset are
    replaced by the caller, who checks them.
    """
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
    checks.choice("memory", memory, MEMORIES)
    decay = checks.neuron_parameter("decay", decay, dtype)
    charge = checks.choice("charge", charge, tuple(CHARGES))
    if CHARGES[charge].divides and decay == 0:
        raise ValueError(f"decay: got 0, but charge {charge!r} divides by tau = 1 / decay")
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
    steps = 0 if steps is None else checks.steps(steps)
    time_dim = checks.dimension("time_dim", time_dim, ndim + (steps > 0))
    reset = checks.choice("reset", reset, RESETS)
    detach_reset = checks.boolean("detach_reset", detach_reset)
    if charge == "delayed" and reset != "none":
        raise ValueError(f"reset: got {reset!r}, but charge 'delayed' resets itself: needs 'none'")
    if memory == "bits":
        _check_bits(name, charge, reset, detach_reset, phi, backend)
    return LIFOptions(
        time_dim=time_dim,
        steps=steps,
        channel_dim=_channel_dim(channel_dim, time_dim, steps, ndim),
        decay=decay,
        threshold=checks.neuron_parameter("threshold", threshold, dtype),
        v_reset=checks.neuron_parameter("v_reset", v_reset, dtype),
        reset=reset,
        detach_reset=detach_reset,
        surrogate=name,
        surrogate_parameter=parameter,
        fire_at_threshold=checks.boolean("fire_at_threshold", fire_at_threshold),
        charge=charge,
        phi=phi,
        delta=delta,
        eps=eps,
        scale=1.0,
        batch=False,
        return_state=checks.boolean("return_state", return_state),
        return_potential=checks.boolean("return_potential", return_potential),
        statistics=checks.boolean("statistics", statistics),
        bits=2 if memory == "bits" else int(packing and backend != "reference"),
        backend=backend,
    )


def _channel_dim(channel_dim: Any, time_dim: int, steps: int, ndim: int) -> int:
    """The channel dimension of x, given as one of x, as one of x without time."""
    if channel_dim is None:
        return -1
    dim = checks.dimension("channel_dim", channel_dim, ndim)
    if steps:
        return dim
    if dim == time_dim:
        raise ValueError(f"channel_dim: got {channel_dim}, which is the time dimension")
    return dim - (dim > time_dim)


def _check_bits(
    surrogate: str, charge: str, reset: str, detach_reset: bool, phi: str, backend: str
) -> None:
    """Two bits a step are enough only where the backward pass needs no potential."""
    reasons = []
    if surrogate != "rectangle":
        reasons.append(f"surrogate: Rectangle, not {surrogate!r}")
    if charge == "delayed":
        reasons.append("a charge other than 'delayed'")
    if reset == "hard" and not detach_reset:
        reasons.append("detach_reset=True under the hard reset")
    if phi not in ("", "spike"):
        reasons.append(f"penalty: none, or phi 'spike', not {phi!r}")
    if backend == "reference":
        reasons.append("a backend with kernels: 'reference' keeps what autograd keeps")
    if reasons:
        raise ValueError(f"memory: 'bits' needs {'; '.join(reasons)}")
