"""Surrogate derivatives σ'(u) of the spike, u = h - threshold (method.md, section 1)."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def surrogate_derivative(u, parameter, NAME: tl.constexpr):
    """σ'(u). A new surrogate is one more branch here; NaN stays NaN in each."""
    size = tl.abs(u)
    if NAME == "triangle":
        height = parameter - size
        slope = tl.where(height < 0, 0.0, height) * (1.0 / (parameter * parameter))
    elif NAME == "sigmoid":
        # By e^-|au|, which does not overflow.
        e = tl.exp2(size * (parameter * -1.4426950408889634))
        slope = parameter * e / ((1.0 + e) * (1.0 + e))
    elif NAME == "atan":
        z = u * (parameter * 1.5707963267948966)
        slope = (0.5 * parameter) / (1.0 + z * z)
    elif NAME == "rectangle":
        inside = tl.where(size < 0.5 * parameter, 1.0 / parameter, 0.0)
        slope = tl.where(u == u, inside, u)
    elif NAME == "signed_step":
        step = tl.where(u < 0, parameter, -parameter)
        slope = tl.where(u == u, step, u)
    else:
        tl.static_assert(NAME == "fast_sigmoid", "unknown surrogate")
        d = 1.0 + parameter * size
        slope = 1.0 / (d * d)
    return slope
