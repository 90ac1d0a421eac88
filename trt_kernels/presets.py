"""Options of `lif` that make it the neuron of another library, bit for bit as on the CPU.

Each function takes what its library's constructor takes and gives keyword arguments for `lif`,
`nn.LIF`, `batch_norm_lif` and `nn.BatchNormLIF`:

    spikes = lif(x, **presets.spikingjelly_lif(tau=2.0))
    layer = nn.BatchNormLIF(64, **presets.official_trt(tau=2.0))

The libraries' own surrogates under their names here: SpikingJelly's PiecewiseQuadratic(alpha) is
Triangle(1 / alpha), its Rect(alpha) is Rectangle(1 / alpha); snnTorch's triangular(threshold) is
SignedStep(threshold); Norse's "super" is FastSigmoid(1). In float64 a tau may be an ulp off, as
charges divide by 1 / (1 / tau); in float32, whose bits are promised, it is not.

Raises:
    TypeError, ValueError: an option that the library does not have or refuses, named.
"""

from typing import Any

import torch
from torch import Tensor

from . import checks
from .surrogates import ATan, FastSigmoid, Rectangle, Sigmoid, SignedStep, Surrogate, Triangle

Options = dict[str, Any]


def _surrogate(library: str, surrogate: Any, allowed: tuple[type[Surrogate], ...]) -> Surrogate:
    for kind in allowed:
        if type(surrogate) is kind:
            return surrogate
    names = ", ".join(kind.__name__ for kind in allowed)
    raise ValueError(f"surrogate: got {surrogate!r}, {library} has {names}")


def _reset(v_reset: float | None) -> Options:
    """SpikingJelly's and the official code's: a potential, or None for the soft reset."""
    if v_reset is None:
        return {"reset": "soft"}
    return {"reset": "hard", "v_reset": checks.finite("v_reset", v_reset)}


def official_trt(
    *,
    v_threshold: float = 0.5,
    v_reset: float | None = 0.0,
    tau: float = 5.0,
    surrogate_type: str = "sigmoid",
    surrogate_param: float = 2.0,
) -> Options:
    """`LIFNode` of the official TRT code (arXiv 2506.19256), on x [B, T, *].

        h = v / tau + x,  fires at h > v_threshold,  hard or (v_reset None) soft reset, not detached

    Args:
        v_threshold, v_reset: as in `lif`; None for the soft reset.
        tau: a number > 0; 1 is legal, and used.
        surrogate_type: "sigmoid" (surrogate_param is α), "triangle" (its width), or "pseudo" with
            a surrogate_param of 0.5 (the rectangle of width 1; others are not normalised). The
            random "zo" and the learned "asgl" are refused.
    """
    number = checks.positive("surrogate_param", surrogate_param)
    if surrogate_type == "sigmoid":
        surrogate: Surrogate = Sigmoid(number)
    elif surrogate_type == "triangle":
        surrogate = Triangle(number)
    elif surrogate_type == "pseudo" and number == 0.5:
        surrogate = Rectangle(1.0)
    else:
        raise ValueError(
            f"surrogate_type: got {surrogate_type!r} with surrogate_param {surrogate_param!r}, "
            "needs 'sigmoid', 'triangle', or 'pseudo' with surrogate_param 0.5"
        )
    return {
        "charge": "divide",
        "decay": 1 / checks.positive("tau", tau),
        "threshold": checks.finite("v_threshold", v_threshold),
        "surrogate": surrogate,
        "time_dim": 1,
        **_reset(v_reset),
    }


_SPIKINGJELLY = (Sigmoid, ATan, Triangle, Rectangle)


def _spikingjelly(
    v_threshold: float, v_reset: float | None, surrogate: Any, detach_reset: bool
) -> Options:
    return {
        "threshold": checks.finite("v_threshold", v_threshold),
        "fire_at_threshold": True,
        "surrogate": _surrogate("SpikingJelly", surrogate, _SPIKINGJELLY),
        "detach_reset": checks.boolean("detach_reset", detach_reset),
        "v_init": 0.0 if v_reset is None else checks.finite("v_reset", v_reset),
        **_reset(v_reset),
    }


def spikingjelly_if(
    *,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    surrogate: Surrogate = Sigmoid(4.0),  # noqa: B008
    detach_reset: bool = False,
) -> Options:
    """`IFNode` of SpikingJelly 2.0.0: h = v + x, fires at h >= v_threshold, starts at v_reset.

    Args:
        v_reset: of the hard reset; None for the soft one.
        surrogate: Sigmoid, ATan, Triangle or Rectangle.
    """
    return {
        "charge": "decay",
        "decay": 1.0,
        **_spikingjelly(v_threshold, v_reset, surrogate, detach_reset),
    }


def spikingjelly_lif(
    *,
    tau: float = 2.0,
    decay_input: bool = True,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    surrogate: Surrogate = Sigmoid(4.0),  # noqa: B008
    detach_reset: bool = False,
) -> Options:
    """`LIFNode` of SpikingJelly 2.0.0.

        h = v + (x - (v - v_reset)) / tau       with decay_input
        h = v - (v - v_reset) / tau + x         without

    Args:
        tau: a number > 1.
        v_threshold, v_reset, surrogate, detach_reset: as in `spikingjelly_if`.
    """
    if checks.finite("tau", tau) <= 1:
        raise ValueError(f"tau: got {tau!r}, SpikingJelly's LIFNode needs a number > 1")
    return {
        "charge": "leak_divide" if checks.boolean("decay_input", decay_input) else "rest_divide",
        "decay": 1 / tau,
        **_spikingjelly(v_threshold, v_reset, surrogate, detach_reset),
    }


def spikingjelly_plif(
    *,
    decay_input: bool = True,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    surrogate: Surrogate = Sigmoid(4.0),  # noqa: B008
    detach_reset: bool = False,
) -> Options:
    """`ParametricLIFNode` of SpikingJelly 2.0.0, for `lif(x, decay=w.sigmoid(), **options)`.

        h = v + (x - (v - v_reset))·sigmoid(w)      with decay_input
        h = v - (v - v_reset)·sigmoid(w) + x        without

    Args: as in `spikingjelly_if`.
    """
    return {
        "charge": "leak" if checks.boolean("decay_input", decay_input) else "rest",
        **_spikingjelly(v_threshold, v_reset, surrogate, detach_reset),
    }


def snntorch_leaky(
    beta: float | Tensor,
    *,
    threshold: float | Tensor = 1.0,
    reset_mechanism: str = "subtract",
    surrogate: Surrogate = ATan(2.0),  # noqa: B008
) -> Options:
    """`Leaky` of snnTorch 1.0, whose reset is delayed by a step and detached.

        h_t = beta·h_{t-1} + x_t - threshold·[h_{t-1} > threshold]      "subtract"
        h_t = beta·(0 where h_{t-1} > threshold, else h_{t-1}) + x_t    "zero"
        h_t = beta·h_{t-1} + x_t                                        "none"

    snnTorch's `mem` is h: `return_potential`. Its last value carried on as v_init goes on with
    "subtract" and "none"; with "zero" the state of `return_state` does, which is reset already.

    Args:
        beta: decay, clamped to [0, 1] as there; a tensor is a scalar, or [C] with channel_dim.
        threshold: a float, or a tensor as beta.
        surrogate: ATan, FastSigmoid, Sigmoid or SignedStep ("triangular").
    """
    reset = checks.choice("reset_mechanism", reset_mechanism, ("subtract", "zero", "none"))
    clamped = (
        beta.clamp(0, 1)
        if isinstance(beta, Tensor)
        else min(max(checks.finite("beta", beta), 0.0), 1.0)
    )
    if not isinstance(threshold, Tensor):
        threshold = checks.finite("threshold", threshold)
    return {
        "charge": "delayed" if reset == "subtract" else "decay",
        "decay": clamped,
        "threshold": threshold,
        "reset": "hard" if reset == "zero" else "none",
        "detach_reset": True,
        "surrogate": _surrogate("snnTorch", surrogate, (ATan, FastSigmoid, Sigmoid, SignedStep)),
    }


def norse_lif_box(
    *,
    tau_mem_inv: float = 100.0,
    v_leak: float = 0.0,
    v_th: float = 1.0,
    v_reset: float = 0.0,
    dt: float = 0.001,
    reset_method: str = "value",
    surrogate: Surrogate = FastSigmoid(1.0),  # noqa: B008
) -> Options:
    """`LIFBoxCell` of Norse 1.1 over all timesteps.

        h = v + (dt·tau_mem_inv)·(x + v_leak - v),  fires at h > v_th

    Args:
        tau_mem_inv: 1/s; dt: s. Their product is rounded to float32 as there.
        v_leak: 0. For another, add it to x yourself and start at v_init=v_leak: the same bits.
        reset_method: "value" (to v_reset) or "subtract", not detached.
        surrogate: FastSigmoid(1.0), the method "super", or Triangle(1.0), "triangle" of alpha 1.
    """
    if checks.finite("v_leak", v_leak) != 0:
        raise ValueError(
            f"v_leak: got {v_leak!r}, needs 0: give x + v_leak as x, and v_init=v_leak beside "
            "these options; the bits are Norse's"
        )
    if surrogate not in (FastSigmoid(1.0), Triangle(1.0)):
        raise ValueError(f"surrogate: got {surrogate!r}, Norse has FastSigmoid(1.0), Triangle(1.0)")
    soft = checks.choice("reset_method", reset_method, ("value", "subtract")) == "subtract"
    return {
        "charge": "box",
        "decay": float(
            torch.tensor(checks.finite("tau_mem_inv", tau_mem_inv)) * checks.finite("dt", dt)
        ),
        "threshold": checks.finite("v_th", v_th),
        "reset": "soft" if soft else "hard",
        "v_reset": checks.finite("v_reset", v_reset),
        "surrogate": surrogate,
    }
