"""One step of the neuron, forward and backward (method.md, section 1): charge, fire, reset.

The order of operations is part of the contract: it decides which spikes fire.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def fires(h, threshold, AT_THRESHOLD: tl.constexpr):
    return h >= threshold if AT_THRESHOLD else h > threshold


@triton.jit
def part_of_charge(v, x, v_reset, FORM: tl.constexpr):
    """What the factor k of the charge multiplies."""
    if FORM == "leaky":
        part = x - (v - v_reset)
    elif FORM == "resting":
        part = v - v_reset
    elif FORM == "boxed":
        part = x - v
    else:
        part = v
    return part


@triton.jit
def charged(
    v,
    x,
    factor,
    threshold,
    v_reset,
    FORM: tl.constexpr,
    DIVIDES: tl.constexpr,
    AT_THRESHOLD: tl.constexpr,
):
    """h; `factor` is the decay, or tau where DIVIDES."""
    part = part_of_charge(v, x, v_reset, FORM)
    if DIVIDES:
        # Triton's / is approximate in float32, and its div_rn knows float32 alone.
        part = part / factor if v.dtype == tl.float64 else tl.div_rn(part, factor)
    else:
        part = factor * part
    if FORM == "leaky" or FORM == "boxed":
        h = v + part
    elif FORM == "resting":
        h = v - part + x
    elif FORM == "delayed":
        h = part + x - tl.where(fires(v, threshold, AT_THRESHOLD), threshold, 0.0)
    else:
        tl.static_assert(FORM == "plain", "unknown charge")
        h = part + x
    return h


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
