// The in-pass regularizer of the neuron and the TRT weight regularizer (method.md, 2 and 3).
#pragma once

#include "kinds.h"

namespace trt {
inline namespace TRT_ISA {

// Largest expm1(delta t): a term divided by more is nothing, and its square stays finite in float.
constexpr double kLargestGrowth = 1152921504606846976.0;  // 2^60

// expm1(delta t), held at the largest.
TRT_HD double growth_at(double delta, std::int64_t t) {
  const double growth = expm1(delta * static_cast<double>(t));
  return growth < kLargestGrowth ? growth : kLargestGrowth;
}

// phi(h) and phi'(h). `growth` is expm1(delta * t), used by "trt" alone. "spike" is not in the
// list: its value is the spike and its gradient goes through the surrogate.
struct SquarePotential {
  static constexpr const char* name = "square";
  template <class F>
  TRT_HD static F value(F h, F, F) {
    return h * h;
  }
  template <class F>
  TRT_HD static F derivative(F h, F, F) {
    return F(2) * h;
  }
};

struct TrtPotential {
  static constexpr const char* name = "trt";
  // h^2 / (1 + growth (|h| + eps))
  template <class F>
  TRT_HD static F value(F h, F growth, F eps) {
    return h * h * fast_reciprocal(F(1) + growth * (absolute(h) + eps));
  }
  template <class F>
  TRT_HD static F derivative(F h, F growth, F eps) {
    const F a = absolute(h);
    const F r = fast_reciprocal(F(1) + growth * (a + eps));
    // Each factor divided by itself: their product may overflow.
    return (h * r) * ((F(2) + growth * (a + F(2) * eps)) * r);
  }
};

struct RangePotential {
  static constexpr const char* name = "range";
  // min(|h|, |1 - h|)^2, derivative 0 at 1/2
  template <class F>
  TRT_HD static F value(F h, F, F) {
    const F near_zero = absolute(h), near_one = absolute(F(1) - h);
    const F least = near_one < near_zero ? near_one : near_zero;
    return least * least;
  }
  template <class F>
  TRT_HD static F derivative(F h, F, F) {
    const F at_zero = h == F(0.5) ? F(0) : F(2) * h;
    return absolute(F(1) - h) < absolute(h) ? F(2) * (h - F(1)) : at_zero;
  }
};

using Potentials = KindList<SquarePotential, TrtPotential, RangePotential>;

// The weight regularizer's term is w^2 / d, with a = |w| and d = 1 + growth (a + eps), written with
// offset = 1 + growth eps.
template <class F>
TRT_HD F weight_denominator(F a, F growth, F offset) {
  return fast_multiply_add(growth, a, offset);
}
// Adds its derivative over w: (2 + growth (a + 2 eps)) / d^2, with `inverse` = 1 / d.
template <class F>
TRT_HD F add_weight_slope(F sum, F denominator, F inverse, F offset) {
  return fast_multiply_add(denominator + offset, inverse * inverse, sum);
}

}  // namespace TRT_ISA
}  // namespace trt
