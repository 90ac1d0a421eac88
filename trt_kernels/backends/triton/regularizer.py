"""φ of the in-pass regularizer and its derivative (method.md, section 2).

`growth` is expm1(δt), which "trt" alone uses. The gradient of "spike" goes through the surrogate.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def phi_value(h, s, growth, eps, PHI: tl.constexpr):
    """φ(h) of a step that fired where s."""
    if PHI == "square":
        value = h * h
    elif PHI == "trt":
        value = h * h / (1.0 + growth * (tl.abs(h) + eps))
    elif PHI == "range":
        near_zero = tl.abs(h)
        near_one = tl.abs(1.0 - h)
        least = tl.where(near_one < near_zero, near_one, near_zero)
        value = least * least
    else:
        tl.static_assert(PHI == "spike", "unknown phi")
        value = tl.where(s, 1.0, 0.0)
    return value


@triton.jit
def phi_derivative(h, growth, eps, PHI: tl.constexpr):
    """φ'(h)."""
    if PHI == "square":
        slope = 2.0 * h
    elif PHI == "trt":
        d = 1.0 + growth * (tl.abs(h) + eps)
        # Each factor divided by itself: their product may overflow, and so may d * d.
        slope = (h / d) * ((2.0 + growth * (tl.abs(h) + 2.0 * eps)) / d)
    else:
        tl.static_assert(PHI == "range", "unknown phi")
        at_zero = tl.where(h == 0.5, 0.0, 2.0 * h)
        slope = tl.where(tl.abs(1.0 - h) < tl.abs(h), 2.0 * (h - 1.0), at_zero)
    return slope
