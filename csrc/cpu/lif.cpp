// The multi-step LIF on the CPU: one pass over memory each way.
//
// Neurons are taken in blocks of columns that stay in cache over all timesteps. Rows of a block
// (one timestep of it) are handled by loops over state-type arrays, one loop a choice (charge and
// reset, surrogate, phi), so that a new choice adds a loop and not a product of loops. Half
// precision and short runs are converted and gathered into such arrays first.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "../math/regularizer.h"
#include "../math/surrogate.h"
#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace trt {
inline namespace TRT_ISA {
namespace {

using Index = std::int64_t;

// The columns of a block: `outers` runs of `inners` neurons, consecutive in storage.
struct Block {
  Index outer, inner, outers, inners;
  Index columns() const { return outers * inners; }
};

// Cuts the neurons into blocks of about `width` columns. Sums are taken over granules: parts of a
// block whose borders depend on the shape alone, so that a block may be as wide as the number of
// threads asks and a sum still has one order.
constexpr Index kGranule = 128;

class Blocks {
 public:
  Blocks(const LIFShape& shape, Index width)
      : shape_(shape),
        granule_inners_(std::min(shape.inner, kGranule)),
        granule_outers_(std::max<Index>(1, kGranule / shape.inner)),
        granules_across_(ceil_div(shape.inner, granule_inners_)),
        inners_(std::min(shape.inner, width)),
        outers_(std::max<Index>(1, width / shape.inner / granule_outers_) * granule_outers_),
        across_(ceil_div(shape.inner, inners_)),
        count_(across_ * ceil_div(shape.outer, outers_)) {}

  Index count() const { return count_; }
  // Most columns of a block.
  Index width() const { return std::min(outers_, shape_.outer) * inners_; }
  Index granules() const { return granules_across_ * ceil_div(shape_.outer, granule_outers_); }

  Block operator[](Index block) const {
    const Index outer = block / across_ * outers_, inner = block % across_ * inners_;
    return {outer, inner, std::min(outers_, shape_.outer - outer),
            std::min(inners_, shape_.inner - inner)};
  }

  // partial[granule] = sum of its columns, for every granule of the block.
  template <class F>
  void sum_granules(const Block& block, const F* columns, double* partial) const {
    for (Index o = 0; o < block.outers; o += granule_outers_) {
      const Index outers = std::min(granule_outers_, block.outers - o);
      for (Index i = 0; i < block.inners; i += granule_inners_) {
        const Index inners = std::min(granule_inners_, block.inners - i);
        partial[(block.outer + o) / granule_outers_ * granules_across_ +
                (block.inner + i) / granule_inners_] =
            sum_row(outers * inners, columns + o * block.inners + i);
      }
    }
  }

 private:
  LIFShape shape_;
  Index granule_inners_, granule_outers_, granules_across_;
  Index inners_, outers_, across_, count_;
};

// A dense [outer][steps][inner] tensor (steps = 1 for a state), read and written by rows of a
// block.
template <class Storage>
struct Sequence {
  Storage* data;
  Index steps, inner;

  Storage* run(const Block& block, Index outer, Index t) const {
    return data + ((block.outer + outer) * steps + t) * inner + block.inner;
  }
};

// The row as an array of F: in place, or converted into `buffer`.
template <class F, class Storage>
const F* load_row(const Sequence<const Storage>& from, const Block& block, Index t, F* buffer) {
  if constexpr (std::is_same<F, Storage>::value) {
    if (block.outers == 1) return from.run(block, 0, t);
  }
  for (Index o = 0; o < block.outers; ++o) {
    const Storage* source = from.run(block, o, t);
    F* to = buffer + o * block.inners;
    for (Index i = 0; i < block.inners; ++i) to[i] = load(source[i]);
  }
  return buffer;
}

// Where to compute a row to be stored: in place, or in `buffer` for `store_row`.
template <class F, class Storage>
F* open_row(const Sequence<Storage>& to, const Block& block, Index t, F* buffer) {
  if constexpr (std::is_same<F, Storage>::value) {
    if (block.outers == 1) return to.run(block, 0, t);
  }
  return buffer;
}

template <class F, class Storage>
void copy_row(const Sequence<Storage>& to, const Block& block, Index t, const F* row) {
  for (Index o = 0; o < block.outers; ++o) {
    Storage* target = to.run(block, o, t);
    const F* from = row + o * block.inners;
    for (Index i = 0; i < block.inners; ++i) store(&target[i], from[i]);
  }
}

// Ends what `open_row` began.
template <class F, class Storage>
void store_row(const Sequence<Storage>& to, const Block& block, Index t, const F* row) {
  if (std::is_same<F, Storage>::value && block.outers == 1) return;
  copy_row(to, block, t, row);
}

// Fills `row` from `from`, or with zeros where there is no such tensor.
template <class F>
void fill_row(const Sequence<const F>& from, const Block& block, F* row) {
  const Index n = block.columns();
  if (!from.data) {
    std::fill_n(row, n, F(0));
  } else if (const F* loaded = load_row(from, block, 0, row); loaded != row) {
    std::copy_n(loaded, n, row);
  }
}

// Charge, fire and reset of a row: v is updated; h and s are written where they are not null.
template <class F>
using ForwardRow = void (*)(Index n, const F* x, F* v, F* h, F* s, const Neuron<F>&);

template <bool kKeep, bool kWrite, class Charge, class Reset, class F>
void forward_loop(Index n, const F* __restrict__ x, F* __restrict__ v, F* __restrict__ h,
                  F* __restrict__ s, const Neuron<F> neuron) {
  for (Index i = 0; i < n; ++i) {
    const F potential = Charge::charge(v[i], x[i], neuron);
    const bool spike = fires(potential, neuron);
    v[i] = Reset::after(potential, spike, neuron);
    if (kKeep) h[i] = potential;
    if (kWrite) s[i] = spike ? F(1) : F(0);
  }
}

template <class Charge, class Reset, class F>
void forward_row(Index n, const F* x, F* v, F* h, F* s, const Neuron<F>& neuron) {
  if (h && s) {
    forward_loop<true, true, Charge, Reset>(n, x, v, h, s, neuron);
  } else if (h) {
    forward_loop<true, false, Charge, Reset>(n, x, v, h, s, neuron);
  } else {
    forward_loop<false, true, Charge, Reset>(n, x, v, h, s, neuron);
  }
}

template <class F>
ForwardRow<F> choose_forward(const LIFSettings& settings) {
  ForwardRow<F> row = nullptr;
  visit_kind(Charges(), settings.charge, [&](auto charge) {
    visit_kind(Resets(), settings.reset,
               [&](auto reset) { row = &forward_row<decltype(charge), decltype(reset), F>; });
  });
  return row;
}

// Gradient of a row: dv holds what arrives at the potential after the reset and is replaced by what
// leaves to the step before. `ds_extra` is added to every spike's gradient, `dh_extra` (may be
// null) to every potential's.
template <class F>
using BackwardRow = void (*)(Index n, const F* h, const F* ds, F ds_extra, const F* dh_extra, F* dv,
                             F* dx, F slope, F surrogate_parameter, const Neuron<F>&);

template <bool kExtra, class Reset, class Surrogate, class F>
void backward_loop(Index n, const F* __restrict__ h, const F* __restrict__ ds, F ds_extra,
                   const F* __restrict__ dh_extra, F* __restrict__ dv, F* __restrict__ dx, F slope,
                   F surrogate_parameter, const Neuron<F> neuron) {
  for (Index i = 0; i < n; ++i) {
    F dh = potential_gradient<Reset, Surrogate>(h[i], ds[i] + ds_extra, dv[i], surrogate_parameter,
                                                neuron);
    if (kExtra) dh += dh_extra[i];
    dx[i] = dh;
    dv[i] = slope * dh;
  }
}

template <class Reset, class Surrogate, class F>
void backward_row(Index n, const F* h, const F* ds, F ds_extra, const F* dh_extra, F* dv, F* dx,
                  F slope, F surrogate_parameter, const Neuron<F>& neuron) {
  (dh_extra ? backward_loop<true, Reset, Surrogate, F>
            : backward_loop<false, Reset, Surrogate, F>)(n, h, ds, ds_extra, dh_extra, dv, dx,
                                                         slope, surrogate_parameter, neuron);
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
  const Index width = std::min({wanted, fits, shared});
  return std::max<Index>(1, (width + kGranule / 2) / kGranule) * kGranule;
}

// Below this many neuron-steps a second thread costs more than it gives.
constexpr Index kSerial = 16 * 1024;

int useful_threads(const LIFShape& shape, int threads) {
  return shape.neurons() * shape.steps < kSerial ? 1 : threads;
}

template <class Storage>
void forward(const LIFSettings& settings, const LIFForward& a, int threads) {
  using F = State<Storage>;
  if (a.penalty) *static_cast<F*>(a.penalty) = F(0);
  if (a.shape.neurons() == 0) return;
  const Index steps = a.shape.steps, inner = a.shape.inner;
  threads = useful_threads(a.shape, threads);
  const Blocks blocks(a.shape, block_width<F>(a.shape, 5, threads));
  const Index width = blocks.width();

  const Neuron<F> neuron = make_neuron<F>(settings);
  const ForwardRow<F> row = choose_forward<F>(settings);
  const std::vector<F> growth = growths<F>(settings, a.penalty ? steps : 0);
  const Sequence<const Storage> x{static_cast<const Storage*>(a.x), steps, inner};
  const Sequence<const F> v_init{static_cast<const F*>(a.v_init), 1, inner};
  const Sequence<Storage> spikes{static_cast<Storage*>(a.spikes), steps, inner};
  const Sequence<F> potential{static_cast<F*>(a.potential), steps, inner};
  const Sequence<F> state{static_cast<F*>(a.state), 1, inner};
  const F* weight = static_cast<const F*>(a.weight);
  const bool sums_potential = a.penalty && settings.potential >= 0;
  std::vector<double> partial(a.penalty ? blocks.granules() : 0);
  const Scratch<F> scratch(5 * width, threads);

  parallel_for(blocks.count(), threads, [&](Index index, int thread) {
    const Block block = blocks[index];
    const Index n = block.columns();
    F* v = scratch.of(thread);
    F *x_row = v + width, *h_row = x_row + width, *s_row = h_row + width, *sum = s_row + width;
    fill_row(v_init, block, v);
    if (a.penalty) std::fill_n(sum, n, F(0));
    for (Index t = 0; t < steps; ++t) {
      F* s = open_row(spikes, block, t, s_row);
      F* h = potential.data   ? open_row(potential, block, t, h_row)
             : sums_potential ? h_row
                              : nullptr;
      row(n, load_row(x, block, t, x_row), v, h, s, neuron);
      store_row(spikes, block, t, s);
      if (potential.data) store_row(potential, block, t, h);
      if (sums_potential) {
        add_potential_value(settings, n, h, weight[t], growth[t], sum);
      } else if (a.penalty) {
        for (Index i = 0; i < n; ++i) sum[i] += weight[t] * s[i];
      }
    }
    if (state.data) copy_row(state, block, 0, v);
    if (a.penalty) blocks.sum_granules(block, sum, partial.data());
  });

  if (a.penalty) {
    double total = 0;
    for (double sum : partial) total += sum;
    *static_cast<F*>(a.penalty) = static_cast<F>(total / static_cast<double>(a.shape.neurons()));
  }
}

template <class Storage>
void backward(const LIFSettings& settings, const LIFBackward& a, int threads) {
  using F = State<Storage>;
  if (a.shape.neurons() == 0) return;
  const Index steps = a.shape.steps, inner = a.shape.inner;
  threads = useful_threads(a.shape, threads);
  const Blocks blocks(a.shape, block_width<F>(a.shape, steps + 4, threads));
  const Index width = blocks.width();

  const Neuron<F> neuron = make_neuron<F>(settings);
  const ForwardRow<F> forward_row = choose_forward<F>(settings);
  const BackwardRow<F> backward_row = choose_backward<F>(settings, settings.detach_reset);
  // Nothing arrives at an unused last state, and nothing times an infinite potential must stay 0.
  const BackwardRow<F> last_row = a.grad_state ? backward_row : choose_backward<F>(settings, true);
  const std::vector<F> growth = growths<F>(settings, a.grad_penalty ? steps : 0);
  const F slope = charge_slope<F>(settings);
  const F surrogate_parameter = static_cast<F>(settings.surrogate_parameter);
  const Sequence<const Storage> x{static_cast<const Storage*>(a.x), steps, inner};
  const Sequence<const F> v_init{static_cast<const F*>(a.v_init), 1, inner};
  const Sequence<const Storage> grad_spikes{static_cast<const Storage*>(a.grad_spikes), steps,
                                            inner};
  const Sequence<const F> grad_potential{static_cast<const F*>(a.grad_potential), steps, inner};
  const Sequence<const F> grad_state{static_cast<const F*>(a.grad_state), 1, inner};
  const Sequence<Storage> grad_x{static_cast<Storage*>(a.grad_x), steps, inner};
  const Sequence<F> grad_v_init{static_cast<F*>(a.grad_v_init), 1, inner};
  const F* weight = static_cast<const F*>(a.weight);
  const F penalty_scale =
      a.grad_penalty ? *static_cast<const F*>(a.grad_penalty) / static_cast<F>(a.shape.neurons())
                     : F(0);
  const bool through_potential = a.grad_penalty && settings.potential >= 0;
  const Scratch<F> scratch((steps + 4) * width, threads);

  parallel_for(blocks.count(), threads, [&](Index index, int thread) {
    const Block block = blocks[index];
    const Index n = block.columns();
    F* dv = scratch.of(thread);
    F *in_row = dv + width, *out_row = in_row + width, *extra = out_row + width, *h = extra + width;
    // Forward again, from x alone; dv serves as the potential after the reset.
    fill_row(v_init, block, dv);
    for (Index t = 0; t < steps; ++t) {
      forward_row(n, load_row(x, block, t, in_row), dv, h + t * width, nullptr, neuron);
    }
    fill_row(grad_state, block, dv);
    if (!grad_spikes.data) std::fill_n(in_row, n, F(0));
    for (Index t = steps - 1; t >= 0; --t) {
      const F* h_row = h + t * width;
      const F* dh_extra = nullptr;
      F ds_extra = F(0);
      if (grad_potential.data) dh_extra = load_row(grad_potential, block, t, extra);
      if (through_potential) {
        if (!dh_extra) {
          std::fill_n(extra, n, F(0));
        } else if (dh_extra != extra) {
          std::copy_n(dh_extra, n, extra);
        }
        dh_extra = extra;
        add_potential_slope(settings, n, h_row, penalty_scale * weight[t], growth[t], extra);
      } else if (a.grad_penalty) {
        ds_extra = penalty_scale * weight[t];
      }
      const F* ds = grad_spikes.data ? load_row(grad_spikes, block, t, in_row) : in_row;
      F* dx = open_row(grad_x, block, t, out_row);
      const BackwardRow<F> row = t == steps - 1 ? last_row : backward_row;
      row(n, h_row, ds, ds_extra, dh_extra, dv, dx, slope, surrogate_parameter, neuron);
      store_row(grad_x, block, t, dx);
    }
    if (grad_v_init.data) copy_row(grad_v_init, block, 0, dv);
  });
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
