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

// A neuron's constants; `factor` is the decay or tau, whichever the charge uses.
template <class F>
TRT_HD Neuron<F> make_neuron(F factor, F threshold, F v_reset, bool fire_at_threshold) {
  const F before = std::nextafter(threshold, -std::numeric_limits<F>::infinity());
  return {factor, factor, threshold, v_reset, fire_at_threshold ? before : threshold};
}

template <class F>
Neuron<F> make_neuron(const LIFSettings& settings) {
  Neuron<F> neuron = make_neuron(static_cast<F>(settings.decay), static_cast<F>(settings.threshold),
                                 static_cast<F>(settings.v_reset), settings.fire_at_threshold);
  neuron.tau = static_cast<F>(settings.tau);
  return neuron;
}

// That of a channel.
template <class F>
TRT_HD Neuron<F> make_neuron(const F* by_channel, std::int64_t channel, std::int64_t channels,
                             bool fire_at_threshold) {
  return make_neuron(by_channel[channel], by_channel[channels + channel],
                     by_channel[2 * channels + channel], fire_at_threshold);
}

// Batch normalisation of one channel: z = (x - mean) a + b, in this order.
template <class F>
struct Norm {
  F mean, rest, inverse, a, b;

  TRT_HD F operator()(F x) const { return (x - mean) * a + b; }
  // The normalised x without weight and bias, where no spike depends on rounding.
  TRT_HD F xhat(F x) const { return ((x - mean) - rest) * inverse; }
  // dx, from what arrives at z and the batch's means of dz xhat and of dz.
  TRT_HD F gradient(F xhat, F dz, F mean_dzx, F mean_dz) const {
    return a * (dz - mean_dz - xhat * mean_dzx);
  }
};

template <class F>
TRT_HD Norm<F> make_norm(const LIFChannels& given, std::int64_t channel, std::int64_t channels,
                         F scale) {
  const F* stats = static_cast<const F*>(given.stats) + channel;
  Norm<F> norm{stats[0], stats[channels], stats[2 * channels], F(0), F(0)};
  norm.a = norm.inverse * scale;
  if (given.norm_weight) norm.a = norm.a * static_cast<const F*>(given.norm_weight)[channel];
  const F shift = norm.rest * norm.a;
  norm.b = given.norm_bias ? static_cast<const F*>(given.norm_bias)[channel] - shift : -shift;
  return norm;
}

// Mean, what rounding left of it, 1 / deviation and unbiased variance of n numbers, from their sum
// and sum of squares, each less `shift`.
template <class F>
TRT_HD void write_statistics(const Statistics& a, std::int64_t channel, double shift, double sum,
                             double squares) {
  const double n = static_cast<double>(a.before) * static_cast<double>(a.within);
  const double offset = sum / n, mean = shift + offset;
  double variance = squares / n - offset * offset;
  variance = variance < 0 ? 0 : variance;  // a NaN stays
  const double repeated = n * static_cast<double>(a.repeat);
  F* stats = static_cast<F*>(a.stats) + channel;
  stats[0] = static_cast<F>(mean);
  stats[a.channels] = static_cast<F>((shift - static_cast<double>(stats[0])) + offset);
  stats[2 * a.channels] = static_cast<F>(1 / sqrt(variance + a.eps));
  stats[3 * a.channels] = static_cast<F>(variance * repeated / (repeated > 2 ? repeated - 1 : 1));
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace TRT_ISA
}  // namespace trt
