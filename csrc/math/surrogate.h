// Surrogate derivatives sigma'(u) of the spike, u = h - threshold (method.md, section 1).
// To add one: write its struct and name it in `Surrogates`. Nothing else in csrc/ changes.
#pragma once

#include "kinds.h"

namespace trt {
inline namespace TRT_ISA {

struct Triangle {
  static constexpr const char* name = "triangle";
  // max(0, w - |u|) / w^2
  template <class F>
  TRT_HD static F derivative(F u, F width) {
    const F height = width - absolute(u);
    return (height < F(0) ? F(0) : height) * fast_reciprocal(width * width);
  }
};

struct Sigmoid {
  static constexpr const char* name = "sigmoid";
  // a s(au) (1 - s(au)), written with e^-|au| so that nothing overflows
  template <class F>
  TRT_HD static F derivative(F u, F alpha) {
    const F e = exp2_nonpositive(absolute(u) * (F(-kLog2E) * alpha));
    const F larger = fast_reciprocal(F(1) + e);  // s(|au|)
    return alpha * e * larger * larger;
  }
};

struct ATan {
  static constexpr const char* name = "atan";
  // (a/2) / (1 + (pi a u / 2)^2)
  template <class F>
  TRT_HD static F derivative(F u, F alpha) {
    const F z = F(1.5707963267948966) * alpha * u;
    return F(0.5) * alpha * fast_reciprocal(F(1) + z * z);
  }
};

struct Rectangle {
  static constexpr const char* name = "rectangle";
  // 1/w where |u| < w/2; the last select keeps a NaN
  template <class F>
  TRT_HD static F derivative(F u, F width) {
    const F inside = absolute(u) < F(0.5) * width ? fast_reciprocal(width) : F(0);
    return u == u ? inside : u;
  }
};

struct FastSigmoid {
  static constexpr const char* name = "fast_sigmoid";
  // 1 / (1 + k|u|)^2
  template <class F>
  TRT_HD static F derivative(F u, F slope) {
    const F r = fast_reciprocal(F(1) + slope * absolute(u));
    return r * r;
  }
};

struct SignedStep {
  static constexpr const char* name = "signed_step";
  // height where u < 0, else -height
  template <class F>
  TRT_HD static F derivative(F u, F height) {
    const F step = u < F(0) ? height : -height;
    return u == u ? step : u;
  }
};

using Surrogates = KindList<Triangle, Sigmoid, ATan, Rectangle, FastSigmoid, SignedStep>;

}  // namespace TRT_ISA
}  // namespace trt
