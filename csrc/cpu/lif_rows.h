// The rows of lif's forward pass, which its backward pass runs again, and how wide they are.
//
// Neurons are taken in blocks of columns that stay in cache over all timesteps. Rows of a block
// (one timestep of it) are handled by loops over state-type arrays, one loop a choice (charge and
// reset, surrogate, phi), so that a new choice adds a loop and not a product of loops. Half
// precision and short runs are converted and gathered into such arrays first.
#pragma once

#include <algorithm>
#include <vector>

#include "../math/regularizer.h"
#include "../math/surrogate.h"
#include "channels.h"
#include "kernels.h"

namespace trt {
inline namespace TRT_ISA {

// Charge, fire and reset of a row: v is updated; h and s are written where they are not null.
template <bool kKeep, bool kWrite, class Charge, class Reset, class Neurons, class F>
void forward_loop(Index n, const F* __restrict__ x, F* __restrict__ v, F* __restrict__ h,
                  F* __restrict__ s, const Neurons neurons) {
  for (Index i = 0; i < n; ++i) {
    const F potential = Charge::charge(v[i], x[i], neurons[i]);
    const bool spike = fires(potential, neurons[i]);
    v[i] = Reset::after(potential, spike, neurons[i]);
    if (kKeep) h[i] = potential;
    if (kWrite) s[i] = spike ? F(1) : F(0);
  }
}

template <class Neurons, class F>
using ForwardRow = void (*)(Index n, const F* x, F* v, F* h, F* s, const Neurons&);

template <class Charge, class Reset, class Neurons, class F>
void forward_row(Index n, const F* x, F* v, F* h, F* s, const Neurons& neurons) {
  if (h && s) {
    forward_loop<true, true, Charge, Reset>(n, x, v, h, s, neurons);
  } else if (h) {
    forward_loop<true, false, Charge, Reset>(n, x, v, h, s, neurons);
  } else {
    forward_loop<false, true, Charge, Reset>(n, x, v, h, s, neurons);
  }
}

template <class Neurons, class F>
ForwardRow<Neurons, F> choose_forward(const LIFSettings& settings) {
  ForwardRow<Neurons, F> row = nullptr;
  visit_kind(Charges(), settings.charge, [&](auto charge) {
    visit_kind(Resets(), settings.reset, [&](auto reset) {
      row = &forward_row<decltype(charge), decltype(reset), Neurons, F>;
    });
  });
  return row;
}

// The rows of both kinds of neurons.
template <class F>
struct ForwardRows {
  explicit ForwardRows(const LIFSettings& settings)
      : one_(choose_forward<OneNeuron<F>, F>(settings)),
        each_(choose_forward<NeuronRow<F>, F>(settings)) {}
  void operator()(const Local<F>& local, Index n, const F* x, F* v, F* h, F* s) const {
    local.visit_neurons([&](const auto& neurons) { run(n, x, v, h, s, neurons); });
  }

 private:
  void run(Index n, const F* x, F* v, F* h, F* s, const OneNeuron<F>& neurons) const {
    one_(n, x, v, h, s, neurons);
  }
  void run(Index n, const F* x, F* v, F* h, F* s, const NeuronRow<F>& neurons) const {
    each_(n, x, v, h, s, neurons);
  }
  ForwardRow<OneNeuron<F>, F> one_;
  ForwardRow<NeuronRow<F>, F> each_;
};

// Spikes and surrogate derivatives from potentials.
template <class F, class Neurons>
void surrogate_row(const LIFSettings& settings, Index n, const F* __restrict__ h,
                   const Neurons& neurons, F* __restrict__ s, F* __restrict__ slope) {
  const F parameter = static_cast<F>(settings.surrogate_parameter);
  visit_kind(Surrogates(), settings.surrogate, [&](auto surrogate) {
    for (Index i = 0; i < n; ++i) {
      s[i] = fires(h[i], neurons[i]) ? F(1) : F(0);
      slope[i] = decltype(surrogate)::derivative(h[i] - neurons[i].threshold, parameter);
    }
  });
}

// expm1(delta t) for every step, where phi needs it.
template <class F>
std::vector<F> growths(const LIFSettings& settings, Index steps) {
  std::vector<F> growth(steps, F(0));
  if (settings.potential < 0) return growth;
  for (Index t = 0; t < steps; ++t) {
    growth[t] = static_cast<F>(growth_at(settings.delta, t));
  }
  return growth;
}

// Columns of a block, as measured: few at small T, where all rows of a block stay in the
// first-level cache; many at large T, where short rows a timestep apart waste memory bandwidth.
// Every column keeps `column_elements` in the second-level cache.
template <class F>
Index block_width(const LIFShape& shape, Index column_elements, int threads) {
  constexpr Index kBytes = 4 * 1024 * 1024;
  const Index wanted = shape.steps > 256 || shape.steps == 1 ? 2048 : shape.steps > 16 ? 1024 : 256;
  const Index fits = kBytes / static_cast<Index>(sizeof(F)) / column_elements;
  const Index shared = ceil_div(shape.neurons(), threads);
  // A tile's columns are sums of their own, whose order is that of its blocks: of the shape alone.
  const Index width =
      Planes::are_tiles(shape) ? std::min(wanted, fits) : std::min({wanted, fits, shared});
  return std::max<Index>(1, (width + kGranule / 2) / kGranule) * kGranule;
}

constexpr Index kSerial = serial_below(16 * 1024);  // neuron-steps

inline int useful_threads(const LIFShape& shape, int threads) {
  return shape.neurons() * shape.steps < kSerial ? 1 : threads;
}

}  // namespace TRT_ISA
}  // namespace trt
