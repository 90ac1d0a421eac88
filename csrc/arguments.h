// What kernels on every device make of their plain arguments.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "math/neuron.h"
#include "ops.h"

namespace trt {
inline namespace TRT_ISA {

// Calls f(Storage()) for the storage type of a dtype.
template <class Function>
void visit_dtype(DType dtype, Function&& f) {
  switch (dtype) {
    case DType::float32:
      return f(float());
    case DType::float64:
      return f(double());
    case DType::float16:
      return f(Half());
    case DType::bfloat16:
      return f(BFloat16());
  }
}

template <class F>
Neuron<F> make_neuron(const LIFSettings& settings) {
  const F threshold = static_cast<F>(settings.threshold);
  const F before = std::nextafter(threshold, -std::numeric_limits<F>::infinity());
  return {static_cast<F>(settings.decay), static_cast<F>(settings.tau), threshold,
          static_cast<F>(settings.v_reset), settings.fire_at_threshold ? before : threshold};
}

// dv/dh of the step before: what the charge passes back.
template <class F>
F charge_slope(const LIFSettings& settings) {
  F slope = F(0);
  visit_kind(Charges(), settings.charge,
             [&](auto charge) { slope = decltype(charge)::slope(make_neuron<F>(settings)); });
  return slope;
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace TRT_ISA
}  // namespace trt
