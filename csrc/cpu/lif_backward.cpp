// The backward pass of the multi-step LIF on the CPU: the forward pass of a block again, then its
// rows from the last to the first. Two passes where the input is normalised by its own statistics.
#include <type_traits>

#include "bits.h"
#include "lif_rows.h"

namespace trt {
inline namespace TRT_ISA {
namespace {

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
// and y its input, read where the gradient of the decay is wanted, or of what a delayed reset uses.
template <class F, class Neurons>
void leave_row(const LIFSettings& settings, Index n, const F* __restrict__ v,
               const F* __restrict__ y, F* __restrict__ dv, F* __restrict__ dx,
               F* __restrict__ d_factor, F* __restrict__ d_threshold, F* __restrict__ d_v_reset,
               const Neurons& neurons) {
  visit_kind(Charges(), settings.charge, [&](auto charge) {
    using Charge = decltype(charge);
    if (d_factor) {
      for (Index i = 0; i < n; ++i) {
        d_factor[i] += dv[i] * Charge::factor_slope(v[i], y[i], neurons[i]);
      }
      if (Charge::Form::delays_reset) {
        for (Index i = 0; i < n; ++i) d_threshold[i] -= fires(v[i], neurons[i]) ? dv[i] : F(0);
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

// Adds scale * phi'(h) to `dh`.
template <class F>
void add_potential_slope(const LIFSettings& settings, Index n, const F* __restrict__ h, F scale,
                         F growth, F* __restrict__ dh) {
  visit_kind(Potentials(), settings.potential, [&](auto phi) {
    const F eps = static_cast<F>(settings.eps);
    for (Index i = 0; i < n; ++i) dh[i] += scale * decltype(phi)::derivative(h[i], growth, eps);
  });
}

template <class F>
void get_bits(const std::uint8_t* bits, const Runs& runs, const Block& block, F one, F* row) {
  for (Index o = 0; o < block.runs; ++o) {
    spread_bits(bits, runs.state[o], block.length,
                [&](Index i, bool bit) { row[o * block.length + i] = bit ? one : F(0); });
  }
}

// Adds dz xhat and dz.
template <class F, class Storage, class Norms>
void reduce_loop(Index n, const Storage* __restrict__ x, const F* __restrict__ dz,
                 const Norms norms, F* __restrict__ sum_dzx, F* __restrict__ sum_dz) {
#pragma GCC ivdep
  for (Index i = 0; i < n; ++i) {
    sum_dzx[i] += dz[i] * norms[i].xhat(load(x[i]));
    sum_dz[i] += dz[i];
  }
}

// dx, where dz is summed over so many `times`. It may take the place of dz.
template <class F, class Storage, class Norms>
void write_loop(Index n, const Storage* __restrict__ x, const F* dz, F times, const Norms norms,
                Storage* dx) {
#pragma GCC ivdep
  for (Index i = 0; i < n; ++i) {
    store(&dx[i], norms.gradient(i, norms[i].xhat(load(x[i])), dz[i], times));
  }
}

// dy z: what the gain's gradient sums.
template <class F, class Storage, class Norms>
void gain_slope_loop(Index n, const Storage* __restrict__ x, const F* __restrict__ dy,
                     const Norms norms, F* __restrict__ d_gain) {
#pragma GCC ivdep
  for (Index i = 0; i < n; ++i) d_gain[i] = dy[i] * norms[i](load(x[i]));
}

template <class F>
void add_row(Index n, const F* __restrict__ from, F* __restrict__ to) {
  for (Index i = 0; i < n; ++i) to[i] += from[i];
}

// Rows of sums by channel: of the neuron's parameters, then of the normalisation's.
enum SumRow : Index { kFactor, kThreshold, kVReset, kDzX, kDz, kSumRows };

// What a pass over blocks is for. A batch's own mean and deviation take two: `kReduce` finds the
// sums and leaves dz, which `kFinish` makes dx of; or where nothing can keep dz, `kReduce` without
// it, and `kWrite`.
enum Purpose { kReduce, kFinish, kWrite };

template <class F>
struct Pass {
  Purpose purpose;
  Given<F> given;
  bool keeps;  // dz
  ChannelSums *sums, *gain_sums;
};

// The backward pass of blocks.
template <class Storage>
class Backward {
 public:
  using F = State<Storage>;

  Backward(const LIFSettings& settings, const LIFBackward& a, const Blocks& blocks, int threads)
      : settings_(settings),
        a_(a),
        blocks_(blocks),
        width_(blocks.width()),
        scratch_(scratch_rows(a.shape.steps) * width_ + Given<F>::kRows * blocks.given_width(),
                 threads),
        starts_(2 * width_, threads),
        filled_(threads, -1),
        advance_(settings),
        row_(choose_backward<F>(settings, settings.detach_reset)),
        // Nothing arrives at an unused last state, and nothing times an infinite potential must
        // stay 0.
        last_row_(a.grad_state ? row_ : choose_backward<F>(settings, true)),
        growth_(growths<F>(settings, a.grad_penalty ? a.shape.steps : 0)) {}

  // Rows of `width` that a thread needs.
  static Index scratch_rows(Index steps) { return steps + 17; }

  // Adds to the sums of `pass`, if any. A pass that keeps dz does so in the gradient of x itself,
  // where `kept` is null.
  void run(const Pass<F>& pass, const Block& block, int thread, F* kept) {
    const Runs runs{starts_.of(thread), starts_.of(thread) + width_};
    runs.find(blocks_, block);
    F* const scratch = scratch_.of(thread);
    Memory memory{scratch + Given<F>::kRows * pass.given.width, width_};
    Local<F> local(pass.given, scratch, filled_[thread]);
    local.enter(block);
    if (pass.purpose == kFinish) {
      finish(block, runs, local, memory, kept);
    } else {
      run_steps(pass, block, runs, local, memory, kept);
    }
  }

 private:
  struct Memory {
    F* next;
    Index width;
    F* take(Index rows = 1) {
      F* const taken = next;
      next += rows * width;
      return taken;
    }
    F* zeros(Index n) {
      F* const taken = take();
      std::fill_n(taken, n, F(0));
      return taken;
    }
  };

  // Rows of x, or of what is like it.
  template <class Data>
  Rows<Data> like_x(Data* data) const {
    return a_.shape.constant ? state_rows(data) : sequence_rows(data, a_.shape);
  }

  // dx of a batch normalised input, from the dz of a step or of all.
  void write(const Block& block, const Runs& runs, const Local<F>& local, Index t, const F* dz,
             F times) const {
    const auto x = like_x(static_cast<const Storage*>(a_.x));
    const auto grad_x = like_x(static_cast<Storage*>(a_.grad_x));
    local.visit_norm([&](const auto& norms) {
      for_runs(x, runs, block, t, [&](Index i, const Storage* from) {
        Storage* to = grad_x.data + (from - x.data);
        write_loop(block.length, from, dz + i, times, norms.from(i), to);
      });
    });
  }

  void finish(const Block& block, const Runs& runs, const Local<F>& local, Memory memory,
              const F* kept) const {
    const auto dz = like_x(static_cast<const Storage*>(a_.grad_x));
    F* const dz_row = memory.take();
    const F times = a_.shape.constant ? static_cast<F>(a_.shape.steps) : F(1);
    for (Index t = 0; t < (a_.shape.constant ? 1 : a_.shape.steps); ++t) {
      write(block, runs, local, t, kept ? kept + t * width_ : load_row(dz, runs, block, t, dz_row),
            times);
    }
  }

  void run_steps(const Pass<F>& pass, const Block& block, const Runs& runs, const Local<F>& local,
                 Memory memory, F* kept) const {
    const LIFShape& shape = a_.shape;
    const Index n = block.columns(), steps = shape.steps;
    const bool normalised = a_.by_channel.stats, gains = a_.by_channel.gains;
    const bool constant = shape.constant;
    const bool writes = pass.purpose == kWrite;
    const auto x = like_x(static_cast<const Storage*>(a_.x));
    const auto v_init = state_rows(static_cast<const F*>(a_.v_init));
    const auto grad_spikes = sequence_rows(static_cast<const Storage*>(a_.grad_spikes), shape);
    const auto grad_potential = sequence_rows(static_cast<const F*>(a_.grad_potential), shape);
    const auto grad_state = state_rows(static_cast<const F*>(a_.grad_state));
    const auto grad_x = like_x(static_cast<Storage*>(writes ? a_.grad_x : nullptr));
    const auto grad_v_init =
        state_rows(static_cast<F*>(writes || pass.keeps ? a_.grad_v_init : nullptr));
    const auto kept_rows = like_x(static_cast<Storage*>(pass.keeps && !kept ? a_.grad_x : nullptr));
    const auto* bits = static_cast<const std::uint8_t*>(a_.bits);
    const Index bit_bytes = shape.bit_bytes();
    const F* weight = static_cast<const F*>(a_.weight);
    const F penalty_scale =
        a_.grad_penalty ? *static_cast<const F*>(a_.grad_penalty) / static_cast<F>(shape.neurons())
                        : F(0);
    const bool through_potential = a_.grad_penalty && settings_.potential >= 0;
    const bool learns = pass.sums && a_.grad_neuron;
    const bool reduces = pass.sums && normalised;
    const bool whole_row = !bits && !learns && !pass.given.neurons_differ();

    F *const dv = memory.take(), *const in_row = memory.take(), *const out_row = memory.take();
    F *const y_row = memory.take(), *const extra = memory.take(), *const v_row = memory.take();
    F *const s_row = memory.take(), *const slope_row = memory.take();
    F* const gain_row = memory.take();
    F* const h = memory.take(bits ? 0 : steps);
    F* const nothing = bits || !grad_spikes.data ? memory.zeros(n) : nullptr;
    F* const dx_sum = constant ? memory.zeros(n) : nullptr;
    F* sum_rows[kSumRows] = {};
    for (Index row = 0; row < kSumRows; ++row) {
      if (row < kDzX ? learns : reduces) sum_rows[row] = memory.zeros(n);
    }

    const auto input = [&](Index t) {
      if (!normalised) return load_row(x, runs, block, t, y_row);
      normalise_row(local, gains, x, runs, block, t, y_row);
      return static_cast<const F*>(y_row);
    };
    if (!bits) {
      // Forward again, from x alone; dv serves as the potential after the reset.
      fill_row(v_init, runs, block, dv);
      for (Index t = 0; t < steps; ++t) advance_(local, n, input(t), dv, h + t * width_, nullptr);
    }
    Neuron<F> neuron{};
    Slopes<F> of_charge{};
    if (whole_row) {
      local.visit_neurons([&](const auto& neurons) { neuron = neurons[0]; });
      visit_kind(Charges(), settings_.charge,
                 [&](auto charge) { of_charge = slopes<decltype(charge)>(neuron); });
    }
    fill_row(grad_state, runs, block, dv);
    for (Index t = steps - 1; t >= 0; --t) {
      const F* h_row = bits ? nothing : h + t * width_;
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
      const F* ds = grad_spikes.data ? load_row(grad_spikes, runs, block, t, in_row) : nothing;
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
        (last ? last_row_ : row_)(n, h_row, ds, ds_extra, dh_extra, dv, dx, of_charge,
                                  static_cast<F>(settings_.surrogate_parameter), neuron);
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
                      sum_rows[kThreshold], sum_rows[kVReset], neurons);
          if (dh_extra) add_row(n, dh_extra, dv);
          const F* y = nullptr;
          if (learns && !bits) {
            if (t > 0) {
              after_row(settings_, n, h_row - width_, neurons, v_row);
            } else {
              fill_row(v_init, runs, block, v_row);
            }
            y = input(t);
          }
          leave_row(settings_, n, v_row, y, dv, dx, y ? sum_rows[kFactor] : nullptr,
                    sum_rows[kThreshold], sum_rows[kVReset], neurons);
        });
      }
      if (normalised) {
        if (pass.gain_sums) {
          local.visit_norm([&](const auto& norms) {
            for_runs(x, runs, block, t, [&](Index i, const Storage* from) {
              gain_slope_loop(block.length, from, dx + i, norms.from(i), gain_row + i);
            });
          });
          pass.gain_sums->add(block, t, gain_row);
        }
        if (gains) local.visit_gain(t, [&](const auto& gain) { gain_loop(n, dx, gain); });
        if (reduces) {
          local.visit_norm([&](const auto& norms) {
            for_runs(x, runs, block, t, [&](Index i, const Storage* from) {
              reduce_loop(block.length, from, dx + i, norms.from(i), sum_rows[kDzX] + i,
                          sum_rows[kDz] + i);
            });
          });
        }
      }
      if (constant) {
        add_row(n, dx, dx_sum);
      } else if (kept_rows.data) {
        store_row(kept_rows, runs, block, t, dx);
      } else if (grad_x.data && normalised) {
        write(block, runs, local, t, dx, F(1));
      } else if (grad_x.data) {
        store_row(grad_x, runs, block, t, dx);
      }
    }
    if (constant && kept) std::copy_n(dx_sum, n, kept);
    if (constant && kept_rows.data) copy_row(kept_rows, runs, block, 0, dx_sum);
    if (constant && grad_x.data && normalised) {
      write(block, runs, local, 0, dx_sum, static_cast<F>(steps));
    } else if (constant && grad_x.data) {
      copy_row(grad_x, runs, block, 0, dx_sum);
    }
    if (grad_v_init.data) copy_row(grad_v_init, runs, block, 0, dv);
    for (Index row = 0; row < kSumRows; ++row) {
      if (sum_rows[row]) pass.sums->add(block, row, sum_rows[row]);
    }
  }

  const LIFSettings& settings_;
  const LIFBackward& a_;
  const Blocks& blocks_;
  const Index width_;
  const Scratch<F> scratch_;
  const Scratch<Index> starts_;
  std::vector<Index> filled_;
  const ForwardRows<F> advance_;
  const BackwardRow<F> row_, last_row_;
  const std::vector<F> growth_;
};

// What a group of planes has of x, at most where it may: the second pass over a group then finds it
// in cache.
constexpr Index kGroupBytes = 4 * 1024 * 1024;

// The dz of a group, apart from the scratch memory of `Backward`, and how much of it there may be:
// beyond what a cache holds it is quicker to find it again.
template <class F>
struct Kept {
  F value;
};
constexpr Index kMostKept = 16 * 1024 * 1024;

// dx of an input that is normalised by its own statistics: it needs the sums of its channel.
//
// Two passes over a group of planes. That a thread takes fewer channels, and keeps dz and xhat of
// them in its second-level cache, was tried: short runs cost as much as is gained.
template <class Storage>
void backward_of_batch(Backward<Storage>& work, const Given<State<Storage>>& given,
                       const LIFSettings& settings, const LIFBackward& a, const Blocks& blocks,
                       int threads, ChannelSums* sums, ChannelSums* gain_sums) {
  using F = State<Storage>;
  const Index channels = a.shape.channels, planes = blocks.planes.count;
  const Index rows = a.shape.constant ? 1 : a.shape.steps;
  const Index of_block = rows * blocks.width(), of_plane = blocks.of_plane * of_block;
  const Index together =
      std::clamp<Index>(kGroupBytes / (of_plane * static_cast<Index>(sizeof(Storage))), 1, planes);

  // In the state's type dz stays where dx will be; half precision needs other memory.
  const bool in_place = std::is_same<F, Storage>::value;
  const bool apart = !in_place && together * of_plane * static_cast<Index>(sizeof(F)) <= kMostKept;
  const Scratch<Kept<F>> memory(apart ? together * of_plane : 0, 1);
  const bool keeps = in_place || apart;

  const double count = static_cast<double>(a.shape.neurons()) * static_cast<double>(a.shape.steps) /
                       static_cast<double>(channels);
  std::vector<F> means(2 * channels);
  const Pass<F> reduce{kReduce, given, keeps, sums, gain_sums};
  const Pass<F> finish{keeps ? kFinish : kWrite,
                       Given<F>(settings, a.shape, a.by_channel, means.data(), blocks), false,
                       nullptr, nullptr};
  for (Index first = 0; first < planes; first += together) {
    const Index group = std::min(together, planes - first);
    const auto run = [&](const Pass<F>& pass) {
      parallel_for(group * blocks.parts_of_plane, threads, [&](Index index, int thread) {
        blocks.for_blocks(first, group, index, [&](const Block& block, Index number) {
          work.run(pass, block, thread, apart ? &memory.of(0)->value + number * of_block : nullptr);
        });
      });
    };
    run(reduce);
    const Index end = std::min(channels, blocks.planes.first_channel(first + group));
    for (Index c = blocks.planes.first_channel(first); c < end; ++c) {
      means[c] = static_cast<F>(sums->total(kDzX, c) / count);
      means[channels + c] = static_cast<F>(sums->total(kDz, c) / count);
    }
    run(finish);
  }
}

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
  Backward<Storage> work(settings, a, blocks, threads);

  const bool finds_means = a.by_channel.stats && settings.batch && a.grad_x && !a.means;
  const bool sums_wanted = grad_neuron || grad_affine || finds_means;
  ChannelSums sums(blocks, sums_wanted ? Index(kSumRows) : 0);
  ChannelSums gain_sums(blocks, grad_gains ? steps : 0);
  ChannelSums* const of_channels = sums_wanted ? &sums : nullptr;
  ChannelSums* const of_gains = grad_gains ? &gain_sums : nullptr;
  const Given<F> given(settings, a.shape, a.by_channel, static_cast<const F*>(a.means), blocks);
  if (finds_means) {
    backward_of_batch(work, given, settings, a, blocks, threads, of_channels, of_gains);
  } else {
    const Pass<F> pass{kWrite, given, false, of_channels, of_gains};
    const Index planes = blocks.planes.count;
    parallel_for(planes * blocks.parts_of_plane, threads, [&](Index index, int thread) {
      blocks.for_blocks(0, planes, index,
                        [&](const Block& block, Index) { work.run(pass, block, thread, nullptr); });
    });
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

void lif_backward(const LIFSettings& settings, const LIFBackward& a, int threads) {
  visit_dtype(a.shape.dtype,
              [&](auto storage) { backward<decltype(storage)>(settings, a, threads); });
}

}  // namespace TRT_ISA
}  // namespace trt
