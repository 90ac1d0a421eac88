"""One step of the neuron, forward and backward (method.md, section 1): charge, fire, reset.

The order of operations is part of the contract: it decides which spikes fire.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def charged(v, x, factor, v_reset, CHARGE: tl.constexpr):
    """h; `factor` is the decay, or tau for "divide"."""
    if CHARGE == "decay":
        h = factor * v + x
    elif CHARGE == "leak":
        h = v + (x - (v - v_reset)) * factor
    else:
        tl.static_assert(CHARGE == "divide", "unknown charge")
        # Triton's / is approximate in float32, and its div_rn knows float32 alone.
        h = (v / factor if v.dtype == tl.float64 else tl.div_rn(v, factor)) + x
    return h


@triton.jit
def fires(h, threshold, AT_THRESHOLD: tl.constexpr):
    return h >= threshold if AT_THRESHOLD else h > threshold


@triton.jit
def after_reset(h, s, threshold, v_reset, RESET: tl.constexpr):
    """v from h and the spike s; the hard reset selects, so that an infinite h leaves no NaN."""
    if RESET == "hard":
        v = tl.where(s, v_reset, h)
    elif RESET == "soft":
        v = h - threshold * tl.where(s, 1.0, 0.0)
    else:
        tl.static_assert(RESET == "none", "unknown reset")
        v = h
    return v


@triton.jit
def spike_gradient(h, ds, dv, threshold, v_reset, RESET: tl.constexpr, DETACH: tl.constexpr):
    """dL/ds from what arrives at the spike itself, ds, and at the potential after its reset, dv."""
    if not DETACH:
        if RESET == "hard":
            ds += (v_reset - h) * dv
        elif RESET == "soft":
            ds -= threshold * dv
    return ds


@triton.jit
def potential_gradient(through, s, dv, RESET: tl.constexpr):
    """dL/dh from what arrives through the spike, and at the potential after the reset, dv."""
    return through + (tl.where(s, 0.0, dv) if RESET == "hard" else dv)
