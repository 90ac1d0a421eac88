// The multi-step LIF on the CPU: one pass over memory each way, two of a batch normalised input.
//
// Neurons are taken in blocks of columns that stay in cache over all timesteps. Rows of a block
// (one timestep of it) are handled by loops over state-type arrays, one loop a choice (charge and
// reset, surrogate, phi), so that a new choice adds a loop and not a product of loops. Half
// precision and short runs are converted and gathered into such arrays first.
//
// What is given by channel is a constant of a block, whose neurons are then of one channel; where
// channels are neighbours in memory, it is an array beside the rows.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "../math/regularizer.h"
#include "../math/surrogate.h"
#include "bits.h"
#include "blocks.h"
#include "kernels.h"

namespace trt {
inline namespace TRT_ISA {
namespace {

// A value of every column: the same, or an array's.
template <class F>
struct Same {
  F value;
  F operator[](Index) const { return value; }
};

// The neurons of a block's columns.
template <class F>
struct OneNeuron {
  Neuron<F> value;
  const Neuron<F>& operator[](Index) const { return value; }
};
template <class F>
struct NeuronRow {
  const F* __restrict__ factor, * __restrict__ threshold, * __restrict__ v_reset, * __restrict__ fires_above;
  Neuron<F> operator[](Index i) const {
    return {factor[i], factor[i], threshold[i], v_reset[i], fires_above[i]};
  }
};

// The normalisation of a block's columns, and what its backward pass subtracts.
template <class Values>
struct NormRow {
  Values mean, rest, inverse, a, b, mean_dzx, mean_dz;
};

// What is given by channel, as a thread has it ready for the columns of a block.
template <class F>
class Given {
 public:
  static constexpr Index kRows = 11;

  Given(const LIFSettings& settings, const LIFShape& shape, const LIFChannels& by_channel,
        const void* means, const Blocks& blocks)
      : settings_(settings),
        shape_(shape),
        by_channel_(by_channel),
        means_(static_cast<const F*>(means)),
        blocks_(blocks),
        one_(make_neuron<F>(settings)) {}

  // Whether neurons, or the normalisation, differ from column to column.
  bool neurons_differ() const { return blocks_.planes.tiles && by_channel_.neuron; }
  bool normalises() const { return by_channel_.stats; }
  bool norms_differ() const { return blocks_.planes.tiles && by_channel_.stats; }

  Neuron<F> neuron(Index plane) const {
    if (!by_channel_.neuron) return one_;
    return make_neuron(static_cast<const F*>(by_channel_.neuron), plane, shape_.channels,
                       settings_.fire_at_threshold);
  }
  NormRow<Same<F>> norm(Index plane) const {
    const Norm<F> n = make_norm<F>(by_channel_, plane, shape_.channels, scale());
    return {{n.mean},
            {n.rest},
            {n.inverse},
            {n.a},
            {n.b},
            {means_ ? means_[plane] : F(0)},
            {means_ ? means_[shape_.channels + plane] : F(0)}};
  }
  // The gain of a step, for a block of one channel.
  Same<F> gain(Index t, Index plane) const {
    const F* gains = static_cast<const F*>(by_channel_.gains);
    if (!gains) return {F(1)};
    return {by_channel_.gains_by_channel ? gains[t * shape_.channels + plane] : gains[t]};
  }

  // Fills kRows rows of a tile's columns, each `width` long: of the neurons, then of the norm.
  void fill(Index plane, Index width, F* rows) const {
    const Index tile = blocks_.planes.run_width(plane), first = blocks_.planes.first_channel(plane);
    for (Index j = 0; j < tile; ++j) {
      F values[kRows] = {};
      if (by_channel_.neuron) {
        const Neuron<F> n = make_neuron(static_cast<const F*>(by_channel_.neuron), first + j,
                                        shape_.channels, settings_.fire_at_threshold);
        const F of_neuron[] = {n.decay, n.threshold, n.v_reset, n.fires_above};
        std::copy_n(of_neuron, 4, values);
      }
      if (by_channel_.stats) {
        const Norm<F> n = make_norm<F>(by_channel_, first + j, shape_.channels, scale());
        const F of_norm[] = {n.mean,
                             n.rest,
                             n.inverse,
                             n.a,
                             n.b,
                             means_ ? means_[first + j] : F(0),
                             means_ ? means_[shape_.channels + first + j] : F(0)};
        std::copy_n(of_norm, 7, values + 4);
      }
      for (Index row = 0; row < kRows; ++row) rows[row * width + j] = values[row];
    }
    for (Index row = 0; row < kRows; ++row) repeat(rows + row * width, tile, width);
  }
  static NeuronRow<F> neurons_of(const F* rows, Index width) {
    return {rows, rows + width, rows + 2 * width, rows + 3 * width};
  }
  static NormRow<const F*> norms_of(const F* rows, Index width) {
    const auto row = [&](Index i) { return rows + (4 + i) * width; };
    return {row(0), row(1), row(2), row(3), row(4), row(5), row(6)};
  }
  // The gains of a step, for a tile's columns.
  void fill_gains(Index t, Index plane, Index columns, F* row) const {
    const Index tile = blocks_.planes.run_width(plane), first = blocks_.planes.first_channel(plane);
    for (Index j = 0; j < tile; ++j) row[j] = gain(t, first + j).value;
    repeat(row, tile, columns);
  }

 private:
  F scale() const { return static_cast<F>(settings_.scale); }
  static void repeat(F* row, Index period, Index columns) {
    for (Index i = period; i < columns; ++i) row[i] = row[i - period];
  }

  const LIFSettings& settings_;
  const LIFShape& shape_;
  const LIFChannels& by_channel_;
  const F* means_;
  const Blocks& blocks_;
  Neuron<F> one_;
};

// A thread's block with what is given for it by channel: rows where channels are columns, which
// stay filled from block to block of a tile.
template <class F>
class Local {
 public:
  // `rows` has Given::kRows + 1 rows of `width`, which are filled for the plane `filled`.
  Local(const Given<F>& given, Index width, F* rows, Index& filled)
      : given_(given), width_(width), rows_(rows), filled_(filled) {}

  void enter(const Block& block) {
    block_ = block;
    if (!given_.neurons_differ()) neuron_ = given_.neuron(block.plane);
    if (given_.normalises() && !given_.norms_differ()) norm_ = given_.norm(block.plane);
    if ((given_.neurons_differ() || given_.norms_differ()) && filled_ != block.plane) {
      given_.fill(block.plane, width_, rows_);
      filled_ = block.plane;
    }
  }
  // f(neurons) with those of the block's columns.
  template <class Function>
  void visit_neurons(Function&& f) const {
    if (given_.neurons_differ()) {
      f(given_.neurons_of(rows_, width_));
    } else {
      f(OneNeuron<F>{neuron_});
    }
  }
  template <class Function>
  void visit_norm(Function&& f) const {
    if (given_.norms_differ()) {
      f(given_.norms_of(rows_, width_));
    } else {
      f(norm_);
    }
  }
  // The gains of step t.
  template <class Function>
  void visit_gain(Index t, Function&& f) const {
    if (given_.norms_differ()) {
      F* gains = rows_ + Given<F>::kRows * width_;
      given_.fill_gains(t, block_.plane, block_.columns(), gains);
      f(static_cast<const F*>(gains));
    } else {
      f(given_.gain(t, block_.plane));
    }
  }

 private:
  const Given<F>& given_;
  const Index width_;
  F* const rows_;
  Index& filled_;
  Block block_{};
  Neuron<F> neuron_{};
  NormRow<Same<F>> norm_{};
};

// The normalised input, or dz from what arrives at it.
template <class F, class Norms>
void normalise_loop(Index n, const F* __restrict__ x, F* __restrict__ y, const Norms norm) {
  for (Index i = 0; i < n; ++i) y[i] = (x[i] - norm.mean[i]) * norm.a[i] + norm.b[i];
}
template <class F, class Gain>
void gain_loop(Index n, F* __restrict__ y, const Gain gain) {
  for (Index i = 0; i < n; ++i) y[i] = y[i] * gain[i];
}

// Adds dz xhat and dz.
template <class F, class Norms>
void reduce_loop(Index n, const F* __restrict__ x, const F* __restrict__ dz, const Norms norm,
                 F* __restrict__ sum_dzx, F* __restrict__ sum_dz) {
  for (Index i = 0; i < n; ++i) {
    const F xhat = ((x[i] - norm.mean[i]) - norm.rest[i]) * norm.inverse[i];
    sum_dzx[i] += dz[i] * xhat;
    sum_dz[i] += dz[i];
  }
}

// dx, where dz is summed over so many `times`. It may take the place of dz.
template <class F, class Norms>
void write_loop(Index n, const F* __restrict__ x, const F* dz, F times, const Norms norm, F* dx) {
#pragma GCC ivdep
  for (Index i = 0; i < n; ++i) {
    const F xhat = ((x[i] - norm.mean[i]) - norm.rest[i]) * norm.inverse[i];
    dx[i] = norm.a[i] * (dz[i] - times * (norm.mean_dz[i] + xhat * norm.mean_dzx[i]));
  }
}

// dy z: what the gain's gradient sums.
template <class F, class Norms>
void gain_slope_loop(Index n, const F* __restrict__ x, const F* __restrict__ dy, const Norms norm,
                     F* __restrict__ d_gain) {
  for (Index i = 0; i < n; ++i) {
    d_gain[i] = dy[i] * ((x[i] - norm.mean[i]) * norm.a[i] + norm.b[i]);
  }
}

template <class F>
void add_row(Index n, const F* __restrict__ from, F* __restrict__ to) {
  for (Index i = 0; i < n; ++i) to[i] += from[i];
}

// Step t of the normalised input.
template <class F>
void normalise_row(const Local<F>& local, bool gains, Index t, Index n, const F* x, F* y) {
  local.visit_norm([&](const auto& norm) { normalise_loop(n, x, y, norm); });
  if (gains) local.visit_gain(t, [&](const auto& gain) { gain_loop(n, y, gain); });
}

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

// Slopes of the charge, of one neuron.
template <class F>
struct Slopes {
  F potential, input, reset;
};
template <class Charge, class F>
Slopes<F> slopes(const Neuron<F>& neuron) {
  return {Charge::slope(neuron), Charge::input_slope(neuron), Charge::reset_slope(neuron)};
}

// Gradient of a row: dv holds what arrives at the potential after the reset and is replaced by what
// leaves to the step before. `ds_extra` is added to every spike's gradient, `dh_extra` (may be
// null) to every potential's. dx may be dv's neighbour but not dv.
template <class F>
using BackwardRow = void (*)(Index n, const F* h, const F* ds, F ds_extra, const F* dh_extra, F* dv,
                             F* dx, Slopes<F> slopes, F surrogate_parameter, const Neuron<F>&);

template <bool kExtra, class Reset, class Surrogate, class F>
void backward_loop(Index n, const F* __restrict__ h, const F* __restrict__ ds, F ds_extra,
                   const F* __restrict__ dh_extra, F* __restrict__ dv, F* __restrict__ dx,
                   const Slopes<F> slopes, F surrogate_parameter, const Neuron<F> neuron) {
  for (Index i = 0; i < n; ++i) {
    F dh = potential_gradient<Reset, Surrogate>(h[i], ds[i] + ds_extra, dv[i], surrogate_parameter,
                                                neuron);
    if (kExtra) dh += dh_extra[i];
    dx[i] = slopes.input * dh;
    dv[i] = slopes.potential * dh;
  }
}

template <class Reset, class Surrogate, class F>
void backward_row(Index n, const F* h, const F* ds, F ds_extra, const F* dh_extra, F* dv, F* dx,
                  Slopes<F> slopes, F surrogate_parameter, const Neuron<F>& neuron) {
  (dh_extra ? backward_loop<true, Reset, Surrogate, F>
            : backward_loop<false, Reset, Surrogate, F>)(n, h, ds, ds_extra, dh_extra, dv, dx,
                                                         slopes, surrogate_parameter, neuron);
}

template <class F>
BackwardRow<F> choose_backward(const LIFSettings& settings, bool detach_reset) {
  BackwardRow<F> row = nullptr;
  visit_kind(Resets(), settings.reset, [&](auto reset) {
    visit_kind(Surrogates(), settings.surrogate, [&](auto surrogate) {
      using Reset = decltype(reset);
      using Surrogate = decltype(surrogate);
      row = detach_reset ? &backward_row<Detached<Reset>, Surrogate, F>
                         : &backward_row<Reset, Surrogate, F>;
    });
  });
  return row;
}

// The same in three rows, for whatever the row above does not serve: neurons that differ, spikes
// from bits, sums for the gradients of what is learned.

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

// dv is replaced by dh, without what arrives at the potential itself; where they are not null,
// `d_threshold` and `d_v_reset` have the neuron's part added.
template <bool kSums, class Reset, class F, class Neurons>
void retreat_loop(Index n, const F* __restrict__ h, const F* __restrict__ s,
                  const F* __restrict__ slope, const F* __restrict__ ds, F ds_extra,
                  F* __restrict__ dv, F* __restrict__ d_threshold, F* __restrict__ d_v_reset,
                  const Neurons neurons) {
  for (Index i = 0; i < n; ++i) {
    const F at_spike = Reset::spike_gradient(ds[i] + ds_extra, h[i], dv[i], neurons[i]) * slope[i];
    const F dh = at_spike + Reset::through_potential(s[i] != F(0), dv[i]);
    if (kSums) {
      d_threshold[i] -= at_spike + (Reset::uses_threshold ? s[i] * dv[i] : F(0));
      if (Reset::uses_v_reset) d_v_reset[i] += s[i] != F(0) ? dv[i] : F(0);
    }
    dv[i] = dh;
  }
}

template <class F, class Neurons>
void retreat_row(const LIFSettings& settings, bool detach, Index n, const F* h, const F* s,
                 const F* slope, const F* ds, F ds_extra, F* dv, F* d_threshold, F* d_v_reset,
                 const Neurons& neurons) {
  const auto run = [&](auto reset) {
    using Reset = decltype(reset);
    (d_threshold ? retreat_loop<true, Reset, F, Neurons>
                 : retreat_loop<false, Reset, F, Neurons>)(n, h, s, slope, ds, ds_extra, dv,
                                                           d_threshold, d_v_reset, neurons);
  };
  visit_kind(Resets(), settings.reset, [&](auto reset) {
    if (detach) {
      run(Detached<decltype(reset)>());
    } else {
      run(reset);
    }
  });
}

// From dh, in dv, to dx and to what leaves to the step before; `v` is the potential before the step
// and y its input, read where the gradient of the decay is wanted.
template <class F, class Neurons>
void leave_row(const LIFSettings& settings, Index n, const F* __restrict__ v,
               const F* __restrict__ y, F* __restrict__ dv, F* __restrict__ dx,
               F* __restrict__ d_factor, F* __restrict__ d_v_reset, const Neurons& neurons) {
  visit_kind(Charges(), settings.charge, [&](auto charge) {
    using Charge = decltype(charge);
    if (d_factor) {
      for (Index i = 0; i < n; ++i) {
        d_factor[i] += dv[i] * Charge::factor_slope(v[i], y[i], neurons[i]);
      }
    }
    if (d_v_reset) {
      for (Index i = 0; i < n; ++i) d_v_reset[i] += dv[i] * Charge::reset_slope(neurons[i]);
    }
    for (Index i = 0; i < n; ++i) {
      dx[i] = Charge::input_slope(neurons[i]) * dv[i];
      dv[i] = Charge::slope(neurons[i]) * dv[i];
    }
  });
}

// v after a step, from its potential.
template <class F, class Neurons>
void after_row(const LIFSettings& settings, Index n, const F* __restrict__ h,
               const Neurons& neurons, F* __restrict__ v) {
  visit_kind(Resets(), settings.reset, [&](auto reset) {
    for (Index i = 0; i < n; ++i) {
      v[i] = decltype(reset)::after(h[i], fires(h[i], neurons[i]), neurons[i]);
    }
  });
}

// The regularizer's rows: adds weight * phi(h) to `sum`, or scale * phi'(h) to `dh`.
template <class F>
void add_potential_value(const LIFSettings& settings, Index n, const F* __restrict__ h, F weight,
                         F growth, F* __restrict__ sum) {
  visit_kind(Potentials(), settings.potential, [&](auto phi) {
    const F eps = static_cast<F>(settings.eps);
    for (Index i = 0; i < n; ++i) sum[i] += weight * decltype(phi)::value(h[i], growth, eps);
  });
}

template <class F>
void add_potential_slope(const LIFSettings& settings, Index n, const F* __restrict__ h, F scale,
                         F growth, F* __restrict__ dh) {
  visit_kind(Potentials(), settings.potential, [&](auto phi) {
    const F eps = static_cast<F>(settings.eps);
    for (Index i = 0; i < n; ++i) dh[i] += scale * decltype(phi)::derivative(h[i], growth, eps);
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
  const Index wanted = shape.steps <= 16 ? 256 : shape.steps <= 256 ? 1024 : 2048;
  const Index fits = kBytes / static_cast<Index>(sizeof(F)) / column_elements;
  const Index shared = ceil_div(shape.neurons(), threads);
  // A tile's columns are sums of their own, so its blocks depend on the shape alone.
  const bool tiles = Planes(shape).tiles;
  const Index width = tiles ? 2 * kGranule : std::min({wanted, fits, shared});
  return std::max<Index>(1, (width + kGranule / 2) / kGranule) * kGranule;
}

// Below this many neuron-steps a second thread costs more than it gives.
constexpr Index kSerial = 16 * 1024;

int useful_threads(const LIFShape& shape, int threads) {
  return shape.neurons() * shape.steps < kSerial ? 1 : threads;
}

// Bits of the neurons of a block's rows: whether their values are positive. Runs may share a byte
// with those of another thread: `bits` starts as zeros.
template <class F>
void set_bits(std::uint8_t* bits, const Runs& runs, const Block& block, const F* row) {
  const auto set_some = [&](Index neuron, Index count, const F* from) {
    unsigned value = 0;
    for (Index i = 0; i < count; ++i) value |= (from[i] > F(0) ? 1u : 0u) << ((neuron + i) % 8);
    if (value) {
      __atomic_fetch_or(bits + neuron / 8, static_cast<std::uint8_t>(value), __ATOMIC_RELAXED);
    }
  };
  for (Index o = 0; o < block.runs; ++o) {
    const F* from = row + o * block.length;
    const Index first = runs.state[o];
    Index i = std::min(block.length, (8 - first % 8) % 8);
    if (i > 0) set_some(first, i, from);
    constexpr Index kTogether = 128;
    std::uint8_t positive[kTogether];
    while (i + 8 <= block.length) {
      const Index n = std::min(kTogether, (block.length - i) / 8 * 8);
      for (Index k = 0; k < n; ++k) positive[k] = from[i + k] > F(0);
      std::uint8_t* to = bits + (first + i) / 8;
      for (Index k = 0; k < n; k += 8) to[k / 8] = gather_bits(positive + k);
      i += n;
    }
    if (i < block.length) set_some(first + i, block.length - i, from + i);
  }
}

template <class F>
void get_bits(const std::uint8_t* bits, const Runs& runs, const Block& block, F one, F* row) {
  for (Index o = 0; o < block.runs; ++o) {
    spread_bits(bits, runs.state[o], block.length,
                [&](Index i, bool bit) { row[o * block.length + i] = bit ? one : F(0); });
  }
}

template <class Storage>
void forward(const LIFSettings& settings, const LIFForward& a, int threads) {
  using F = State<Storage>;
  const Index steps = a.shape.steps;
  if (a.penalty) *static_cast<F*>(a.penalty) = F(0);
  if (a.rate) std::fill_n(static_cast<F*>(a.rate), steps, F(0));
  if (a.shape.neurons() == 0) return;
  threads = useful_threads(a.shape, threads);
  const Blocks blocks(a.shape, block_width<F>(a.shape, 5, threads));
  const Index width = blocks.width();

  const Given<F> given(settings, a.shape, a.by_channel, nullptr, blocks);
  const ForwardRows<F> advance(settings);
  const std::vector<F> growth = growths<F>(settings, a.penalty ? steps : 0);
  const Storage* input = static_cast<const Storage*>(a.x);
  const auto x = a.shape.constant ? state_rows(input) : sequence_rows(input, a.shape);
  const auto v_init = state_rows(static_cast<const F*>(a.v_init));
  const auto spikes = sequence_rows(static_cast<Storage*>(a.spikes), a.shape);
  const auto potential = sequence_rows(static_cast<F*>(a.potential), a.shape);
  const auto state = state_rows(static_cast<F*>(a.state));
  const F* weight = static_cast<const F*>(a.weight);
  auto* bits = static_cast<std::uint8_t*>(a.bits);
  const Index plane_bytes = steps * a.shape.bit_bytes();
  if (bits) std::fill_n(bits, plane_bytes * settings.bits, std::uint8_t(0));
  const bool windows = bits && settings.bits == 2;
  const bool sums_potential = a.penalty && settings.potential >= 0;
  const bool keeps = sums_potential || windows;
  std::vector<double> partial(a.penalty ? blocks.granules() : 0);
  std::vector<double> counts(a.rate ? threads * steps : 0);
  const Scratch<F> scratch((6 + Given<F>::kRows + 1) * width, threads);
  const Scratch<Index> starts(2 * width, threads);
  std::vector<Index> filled(threads, -1);

  parallel_for(blocks.count(), threads, [&](Index index, int thread) {
    const Block block = blocks.in_order(index, 0, blocks.planes.count);
    const Index n = block.columns();
    F* v = scratch.of(thread);
    F *x_row = v + width, *h_row = x_row + width, *s_row = h_row + width, *sum = s_row + width;
    F* y_row = sum + width;
    Local<F> local(given, width, y_row + width, filled[thread]);
    local.enter(block);
    const Runs runs{starts.of(thread), starts.of(thread) + width};
    runs.find(blocks, block);
    fill_row(v_init, runs, block, v);
    if (a.penalty) std::fill_n(sum, n, F(0));
    for (Index t = 0; t < steps; ++t) {
      F* s = open_row(spikes, runs, block, t, s_row);
      F* h = potential.data ? open_row(potential, runs, block, t, h_row) : keeps ? h_row : nullptr;
      const F* y = load_row(x, runs, block, t, x_row);
      if (a.by_channel.stats) {
        normalise_row(local, a.by_channel.gains != nullptr, t, n, y, y_row);
        y = y_row;
      }
      advance(local, n, y, v, h, s);
      if (a.rate) counts[thread * steps + t] += sum_row(n, s);
      if (bits) set_bits(bits + t * a.shape.bit_bytes(), runs, block, s);
      store_row(spikes, runs, block, t, s);
      if (potential.data) store_row(potential, runs, block, t, h);
      if (sums_potential) {
        add_potential_value(settings, n, h, weight[t], growth[t], sum);
      } else if (a.penalty) {
        for (Index i = 0; i < n; ++i) sum[i] += weight[t] * s[i];
      }
      if (windows) {
        local.visit_neurons(
            [&](const auto& neurons) { surrogate_row(settings, n, h, neurons, x_row, y_row); });
        set_bits(bits + plane_bytes + t * a.shape.bit_bytes(), runs, block, y_row);
      }
    }
    if (state.data) copy_row(state, runs, block, 0, v);
    if (a.penalty) {
      blocks.for_granules(block, [&](Index granule, Index outers, Index inners, Index first) {
        partial[granule] = sum_row(outers * inners, sum + first);
      });
    }
  });

  const double neurons = static_cast<double>(a.shape.neurons());
  if (a.penalty) {
    double total = 0;
    for (double sum : partial) total += sum;
    *static_cast<F*>(a.penalty) = static_cast<F>(total / neurons);
  }
  for (Index t = 0; a.rate && t < steps; ++t) {
    double count = 0;  // whole numbers, so their order does not matter
    for (int thread = 0; thread < threads; ++thread) count += counts[thread * steps + t];
    static_cast<F*>(a.rate)[t] = static_cast<F>(count / neurons);
  }
}

// Rows of sums by channel: of the neuron's parameters, then of the normalisation's.
enum SumRow : Index { kFactor, kThreshold, kVReset, kDzX, kDz, kSumRows };

// One direction of a backward pass over some of the planes.
template <class Storage>
class Backward {
 public:
  using F = State<Storage>;

  Backward(const LIFSettings& settings, const LIFBackward& a, const Blocks& blocks, int threads)
      : settings_(settings),
        a_(a),
        blocks_(blocks),
        threads_(threads),
        width_(blocks.width()),
        advance_(settings),
        row_(choose_backward<F>(settings, settings.detach_reset)),
        // Nothing arrives at an unused last state, and nothing times an infinite potential must
        // stay 0.
        last_row_(a.grad_state ? row_ : choose_backward<F>(settings, true)),
        growth_(growths<F>(settings, a.grad_penalty ? a.shape.steps : 0)) {}

  // Rows of `width` that a thread needs.
  static Index scratch_rows(Index steps) { return steps + 17 + Given<F>::kRows + 1; }

  // What a pass over blocks is for. A batch's own mean and deviation take two: `kReduce` finds the
  // sums and leaves dz, which `kFinish` makes dx of; or where nothing can keep dz, `kReduce` again
  // without it, and `kWrite`.
  enum Purpose { kReduce, kFinish, kWrite };

  // Planes first .. first + count - 1. Adds to `sums` and `gain_sums` where there are any. `kept`
  // has room for the dz of their blocks; null for that in the gradient of x itself, or for none.
  void run(Purpose purpose, Index first, Index count, const void* means, bool keeps, F* kept,
           ChannelSums* sums, ChannelSums* gain_sums) {
    const Given<F> given(settings_, a_.shape, a_.by_channel, means, blocks_);
    const Scratch<F> scratch(scratch_rows(a_.shape.steps) * width_, threads_);
    const Scratch<Index> starts(2 * width_, threads_);
    std::vector<Index> filled(threads_, -1);
    const Index rows = a_.shape.constant ? 1 : a_.shape.steps;
    parallel_for(count * blocks_.of_plane, threads_, [&](Index index, int thread) {
      const Block block = blocks_.in_order(index, first, count);
      const Runs runs{starts.of(thread), starts.of(thread) + width_};
      runs.find(blocks_, block);
      F* of_block = kept ? kept + index * rows * width_ : nullptr;
      if (purpose == kFinish) {
        finish_block(block, runs, given, scratch.of(thread), filled[thread], of_block);
      } else {
        run_block(purpose, block, runs, given, scratch.of(thread), filled[thread], keeps, of_block,
                  sums, gain_sums);
      }
    });
  }

 private:
  // dx of a batch normalised input, from the dz that was kept.
  void finish_block(const Block& block, const Runs& runs, const Given<F>& given, F* memory,
                    Index& filled, const F* kept) const {
    const Index n = block.columns(), rows = a_.shape.constant ? 1 : a_.shape.steps;
    const auto like_x = [&](auto* data) {
      return a_.shape.constant ? state_rows(data) : sequence_rows(data, a_.shape);
    };
    const auto x = like_x(static_cast<const Storage*>(a_.x));
    const auto grad_x = like_x(static_cast<Storage*>(a_.grad_x));
    const auto dz = like_x(static_cast<const Storage*>(a_.grad_x));
    F *x_row = memory, *dz_row = x_row + width_, *out_row = dz_row + width_;
    Local<F> local(given, width_, out_row + width_, filled);
    local.enter(block);
    const F times = a_.shape.constant ? static_cast<F>(a_.shape.steps) : F(1);
    for (Index t = 0; t < rows; ++t) {
      const F* x_here = load_row(x, runs, block, t, x_row);
      const F* from = kept ? kept + t * width_ : load_row(dz, runs, block, t, dz_row);
      F* to = open_row(grad_x, runs, block, t, out_row);
      local.visit_norm([&](const auto& norm) { write_loop(n, x_here, from, times, norm, to); });
      store_row(grad_x, runs, block, t, to);
    }
  }

  void run_block(Purpose purpose, const Block& block, const Runs& runs, const Given<F>& given,
                 F* memory, Index& filled, bool keeps, F* kept, ChannelSums* sums,
                 ChannelSums* gain_sums) const {
    const Index n = block.columns(), steps = a_.shape.steps;
    const bool normalised = a_.by_channel.stats, gains = a_.by_channel.gains;
    const bool constant = a_.shape.constant;
    const auto take = [&](Index rows = 1) {
      F* taken = memory;
      memory += rows * width_;
      return taken;
    };
    F *dv = take(), *in_row = take(), *out_row = take(), *extra = take(), *x_row = take();
    F *s_row = take(), *slope_row = take(), *v_row = take(), *zeros = take();
    F* sum_rows[kSumRows];
    for (F*& row : sum_rows) row = take();
    F *gain_row = take(), *dx_sum = take(), *y_row = take();
    F* h = take(steps);
    Local<F> local(given, width_, take(Given<F>::kRows + 1), filled);
    local.enter(block);

    const LIFShape& shape = a_.shape;
    const auto like_x = [&](auto* data) {
      return constant ? state_rows(data) : sequence_rows(data, shape);
    };
    const auto x = like_x(static_cast<const Storage*>(a_.x));
    const auto v_init = state_rows(static_cast<const F*>(a_.v_init));
    const auto grad_spikes = sequence_rows(static_cast<const Storage*>(a_.grad_spikes), shape);
    const auto grad_potential = sequence_rows(static_cast<const F*>(a_.grad_potential), shape);
    const auto grad_state = state_rows(static_cast<const F*>(a_.grad_state));
    const bool writes = purpose == kWrite;
    const auto grad_x = like_x(static_cast<Storage*>(writes ? a_.grad_x : nullptr));
    const auto grad_v_init =
        state_rows(static_cast<F*>(writes || keeps ? a_.grad_v_init : nullptr));
    const auto kept_rows = like_x(static_cast<Storage*>(keeps && !kept ? a_.grad_x : nullptr));
    const auto* bits = static_cast<const std::uint8_t*>(a_.bits);
    const Index bit_bytes = a_.shape.bit_bytes();
    const F* weight = static_cast<const F*>(a_.weight);
    const F penalty_scale = a_.grad_penalty ? *static_cast<const F*>(a_.grad_penalty) /
                                                  static_cast<F>(a_.shape.neurons())
                                            : F(0);
    const bool through_potential = a_.grad_penalty && settings_.potential >= 0;
    const bool learns = sums && a_.grad_neuron;
    const bool whole_row = !bits && !learns && !given.neurons_differ();
    for (F* row : sum_rows) std::fill_n(row, n, F(0));
    if (constant) std::fill_n(dx_sum, n, F(0));
    std::fill_n(zeros, n, F(0));

    if (!bits) {
      // Forward again, from x alone; dv serves as the potential after the reset.
      fill_row(v_init, runs, block, dv);
      for (Index t = 0; t < steps; ++t) {
        const F* y = load_row(x, runs, block, t, in_row);
        if (normalised) {
          normalise_row(local, gains, t, n, y, y_row);
          y = y_row;
        }
        advance_(local, n, y, dv, h + t * width_, nullptr);
      }
    }
    fill_row(grad_state, runs, block, dv);
    for (Index t = steps - 1; t >= 0; --t) {
      const F* h_row = bits ? zeros : h + t * width_;
      const F* dh_extra = nullptr;
      F ds_extra = F(0);
      if (grad_potential.data) dh_extra = load_row(grad_potential, runs, block, t, extra);
      if (through_potential) {
        if (!dh_extra) {
          std::fill_n(extra, n, F(0));
        } else if (dh_extra != extra) {
          std::copy_n(dh_extra, n, extra);
        }
        dh_extra = extra;
        add_potential_slope(settings_, n, h_row, penalty_scale * weight[t], growth_[t], extra);
      } else if (a_.grad_penalty) {
        ds_extra = penalty_scale * weight[t];
      }
      const F* ds = grad_spikes.data ? load_row(grad_spikes, runs, block, t, in_row) : zeros;
      F* dx = out_row;
      if (!constant && kept) {
        dx = kept + t * width_;
      } else if (!constant && kept_rows.data) {
        dx = open_row(kept_rows, runs, block, t, out_row);
      } else if (!constant && !normalised && grad_x.data) {
        dx = open_row(grad_x, runs, block, t, out_row);
      }
      const bool last = t == steps - 1;
      if (whole_row) {
        local.visit_neurons([&](const auto& neurons) {
          const Neuron<F> neuron = neurons[0];
          Slopes<F> of_charge{};
          visit_kind(Charges(), settings_.charge,
                     [&](auto charge) { of_charge = slopes<decltype(charge)>(neuron); });
          (last ? last_row_ : row_)(n, h_row, ds, ds_extra, dh_extra, dv, dx, of_charge,
                                    static_cast<F>(settings_.surrogate_parameter), neuron);
        });
      } else {
        local.visit_neurons([&](const auto& neurons) {
          if (bits) {
            const F height = F(1) / static_cast<F>(settings_.surrogate_parameter);
            get_bits(bits + t * bit_bytes, runs, block, F(1), s_row);
            get_bits(bits + (steps + t) * bit_bytes, runs, block, height, slope_row);
          } else {
            surrogate_row(settings_, n, h_row, neurons, s_row, slope_row);
          }
          const bool detach = settings_.detach_reset || (last && !a_.grad_state);
          retreat_row(settings_, detach, n, h_row, s_row, slope_row, ds, ds_extra, dv,
                      learns ? sum_rows[kThreshold] : nullptr, sum_rows[kVReset], neurons);
          if (dh_extra) add_row(n, dh_extra, dv);
          const bool from_potential = learns && !bits;
          const F* input = nullptr;
          if (from_potential) {
            if (t > 0) {
              after_row(settings_, n, h_row - width_, neurons, v_row);
            } else {
              fill_row(v_init, runs, block, v_row);
            }
            const F* x_here = load_row(x, runs, block, t, y_row);
            if (normalised) {
              normalise_row(local, gains, t, n, x_here, x_row);
              x_here = x_row;
            }
            input = x_here;
          }
          leave_row(settings_, n, v_row, input, dv, dx,
                    from_potential ? sum_rows[kFactor] : nullptr,
                    learns ? sum_rows[kVReset] : nullptr, neurons);
        });
      }
      if (normalised) {
        const F* x_here = load_row(x, runs, block, t, x_row);
        if (gain_sums) {
          local.visit_norm(
              [&](const auto& norm) { gain_slope_loop(n, x_here, dx, norm, gain_row); });
          gain_sums->add(block, t, gain_row);
        }
        if (gains) local.visit_gain(t, [&](const auto& gain) { gain_loop(n, dx, gain); });
        local.visit_norm([&](const auto& norm) {
          if (sums) reduce_loop(n, x_here, dx, norm, sum_rows[kDzX], sum_rows[kDz]);
          if (!grad_x.data || constant) return;
          F* to = open_row(grad_x, runs, block, t, y_row);
          write_loop(n, x_here, dx, F(1), norm, to);
          store_row(grad_x, runs, block, t, to);
        });
      }
      if (constant) {
        add_row(n, dx, dx_sum);
      } else if (kept_rows.data) {
        store_row(kept_rows, runs, block, t, dx);
      } else if (grad_x.data && !normalised) {
        store_row(grad_x, runs, block, t, dx);
      }
    }
    if (constant && kept) std::copy_n(dx_sum, n, kept);
    if (constant && kept_rows.data) copy_row(kept_rows, runs, block, 0, dx_sum);
    if (constant && grad_x.data) {
      F* to = dx_sum;
      if (normalised) {
        const F* x_here = load_row(x, runs, block, 0, x_row);
        to = y_row;
        local.visit_norm([&](const auto& norm) {
          write_loop(n, x_here, dx_sum, static_cast<F>(steps), norm, to);
        });
      }
      copy_row(grad_x, runs, block, 0, to);
    }
    if (grad_v_init.data) copy_row(grad_v_init, runs, block, 0, dv);
    if (sums) {
      for (Index row = 0; row < kSumRows; ++row) {
        if (row < kDzX ? learns : normalised) sums->add(block, row, sum_rows[row]);
      }
    }
  }

  const LIFSettings& settings_;
  const LIFBackward& a_;
  const Blocks& blocks_;
  const int threads_;
  const Index width_;
  const ForwardRows<F> advance_;
  const BackwardRow<F> row_, last_row_;
  const std::vector<F> growth_;
};

// What of x and of the spikes' gradient a group of planes has, at most where it may: the second
// pass over a group then finds it in cache.
constexpr Index kGroupBytes = 4 * 1024 * 1024;

// The dz of a group, apart from the scratch memory of `Backward`.
template <class F>
struct Kept {
  F value;
};

template <class Storage>
void backward(const LIFSettings& settings, const LIFBackward& a, int threads) {
  using F = State<Storage>;
  const Index channels = a.shape.channels, steps = a.shape.steps;
  F* grad_neuron = static_cast<F*>(a.grad_neuron);
  F* grad_affine = static_cast<F*>(a.grad_affine);
  F* grad_gains = static_cast<F*>(a.grad_gains);
  if (a.shape.neurons() == 0 || steps == 0) {
    if (grad_neuron) std::fill_n(grad_neuron, 3 * channels, F(0));
    if (grad_affine) std::fill_n(grad_affine, 2 * channels, F(0));
    if (grad_gains) std::fill_n(grad_gains, steps * channels, F(0));
    if (a.shape.neurons() == 0) return;
  }
  threads = useful_threads(a.shape, threads);
  const Index rows = Backward<Storage>::scratch_rows(steps);
  const Blocks blocks(a.shape, block_width<F>(a.shape, rows, threads));
  Backward<Storage> pass(settings, a, blocks, threads);

  const bool finds_means = a.by_channel.stats && settings.batch && a.grad_x && !a.means;
  const bool sums_wanted = grad_neuron || grad_affine || finds_means;
  ChannelSums sums(blocks, sums_wanted ? Index(kSumRows) : 0);
  ChannelSums gain_sums(blocks, grad_gains ? steps : 0);
  ChannelSums* const of_channels = sums_wanted ? &sums : nullptr;
  ChannelSums* const of_gains = grad_gains ? &gain_sums : nullptr;
  using Pass = Backward<Storage>;
  if (!finds_means) {
    pass.run(Pass::kWrite, 0, blocks.planes.count, a.means, false, nullptr, of_channels, of_gains);
  } else {
    std::vector<F> means(2 * channels);
    const double count = static_cast<double>(a.shape.neurons()) * static_cast<double>(steps) /
                         static_cast<double>(channels);
    const Index of_plane = a.shape.neurons() / blocks.planes.count * steps;
    const Index together = std::max<Index>(
        1, kGroupBytes / std::max<Index>(1, of_plane * static_cast<Index>(2 * sizeof(Storage))));
    // In the state's type dz stays where dx will be; half precision needs other memory, which a
    // group that does not fit a cache is not worth.
    const bool in_place = std::is_same<F, Storage>::value;
    const bool apart = !in_place && of_plane * together * 2 <= 2 * kGroupBytes;
    const Index rows_kept = a.shape.constant ? 1 : steps;
    const Scratch<Kept<F>> memory(
        apart ? together * blocks.of_plane * rows_kept * blocks.width() : 0, 1);
    F* const kept = apart ? &memory.of(0)->value : nullptr;
    const bool keeps = in_place || apart;
    for (Index plane = 0; plane < blocks.planes.count; plane += together) {
      const Index end = std::min(blocks.planes.count, plane + together);
      pass.run(Pass::kReduce, plane, end - plane, nullptr, keeps, kept, of_channels, of_gains);
      const Index last = end == blocks.planes.count ? channels : blocks.planes.first_channel(end);
      for (Index c = blocks.planes.first_channel(plane); c < last; ++c) {
        means[c] = static_cast<F>(sums.total(kDzX, c) / count);
        means[channels + c] = static_cast<F>(sums.total(kDz, c) / count);
      }
      pass.run(keeps ? Pass::kFinish : Pass::kWrite, plane, end - plane, means.data(), false, kept,
               nullptr, nullptr);
    }
  }
  for (Index c = 0; c < channels; ++c) {
    for (Index row = 0; grad_neuron && row < 3; ++row) {
      grad_neuron[row * channels + c] = static_cast<F>(sums.total(row, c));
    }
    for (Index row = 0; grad_affine && row < 2; ++row) {
      grad_affine[row * channels + c] = static_cast<F>(sums.total(kDzX + row, c));
    }
    for (Index t = 0; grad_gains && t < steps; ++t) {
      grad_gains[t * channels + c] = static_cast<F>(gain_sums.total(t, c));
    }
  }
}

}  // namespace

void lif_forward(const LIFSettings& settings, const LIFForward& a, int threads) {
  visit_dtype(a.shape.dtype,
              [&](auto storage) { forward<decltype(storage)>(settings, a, threads); });
}

void lif_backward(const LIFSettings& settings, const LIFBackward& a, int threads) {
  visit_dtype(a.shape.dtype,
              [&](auto storage) { backward<decltype(storage)>(settings, a, threads); });
}

}  // namespace TRT_ISA
}  // namespace trt
