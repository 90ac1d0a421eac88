// The multi-step LIF on the GPU, with everything that may stand beside spikes of x: see lif.h. What
// asks for nothing else takes the kernels of plain_lif.cu.
#include "lif.h"

#include "../math/regularizer.h"
#include "reduce.h"
#include "walk.h"

namespace trt {
namespace cuda {
namespace {

// Neurons of a thread, where they can be moved at a time.
template <class Storage>
constexpr int kWide = sizeof(Storage) == 8 ? 2 : 4;

// Blocks that an SM must have registers for: left to itself, the compiler spills a few.
template <class Storage, bool kTiles>
constexpr int kLeastBlocks = kTiles || sizeof(Storage) == 8 ? 2 : 4;

// Neurons whose penalty is summed in one order, however many of them a thread owns.
constexpr int kMostWidth = 8;
constexpr int kGranule = kThreads * kMostWidth;

// What is given by channel, for a thread's neurons: of kCount channels, or all of one.
template <class F, int kCount>
struct Given {
  Neuron<F> neuron[kCount];
  Norm<F> norm[kCount];

  __device__ __forceinline__ Given(const Rules<F>& rules, const LIFShape& shape,
                                   const LIFChannels& by_channel, Index channel) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      neuron[c] = rules.neuron;
      if (by_channel.neuron) {
        neuron[c] = make_neuron(static_cast<const F*>(by_channel.neuron), channel + c,
                                shape.channels, rules.fire_at_threshold);
      }
      norm[c] = {};
      if (by_channel.stats) {
        norm[c] = make_norm<F>(by_channel, channel + c, shape.channels, rules.scale);
      }
    }
  }
};

// The gains of step t, 1 where there are none.
template <class F, int kCount>
__device__ __forceinline__ void gains_of(const LIFShape& shape, const LIFChannels& by_channel,
                                         int t, Index channel, F (&gains)[kCount]) {
  const F* from = static_cast<const F*>(by_channel.gains);
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    gains[c] = F(1);
    if (from)
      gains[c] = by_channel.gains_by_channel ? from[t * shape.channels + channel + c] : from[t];
  }
}

// y from x, in place.
template <class F, int kWidth, int kCount>
__device__ __forceinline__ void normalise(const LIFShape& shape, const LIFChannels& by_channel,
                                          const Given<F, kCount>& given, int t, Index channel,
                                          F (&x)[kWidth]) {
  if (!by_channel.stats) return;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) x[j] = given.norm[j % kCount](x[j]);
  if (!by_channel.gains) return;
  F gains[kCount];
  gains_of(shape, by_channel, t, channel, gains);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) x[j] = x[j] * gains[j % kCount];
}

// v after a step whose potential was h.
template <class F, int kWidth, int kCount>
__device__ __forceinline__ void reset_after(const Rules<F>& rules, const Given<F, kCount>& given,
                                            const F (&h)[kWidth], F (&v)[kWidth]) {
  visit_kind(Resets(), rules.reset, [&](auto reset) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const Neuron<F>& neuron = given.neuron[j % kCount];
      v[j] = decltype(reset)::after(h[j], fires(h[j], neuron), neuron);
    }
  });
}

// Charge, fire and reset: v is updated, and y replaced by h. The choices are branches of a step and
// not loops of their own, or code and compile time would be many times as long.
template <class F, int kWidth, int kCount>
__device__ __forceinline__ void advance(const Rules<F>& rules, const Given<F, kCount>& given,
                                        F (&y)[kWidth], F (&v)[kWidth]) {
  F scaled[kWidth];
  visit_kind(Forms(), rules.form, [&](auto form) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      scaled[j] = decltype(form)::part(v[j], y[j], given.neuron[j % kCount]);
    }
  });
  if (rules.divides) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) scaled[j] = scaled[j] / given.neuron[j % kCount].tau;
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) scaled[j] = given.neuron[j % kCount].decay * scaled[j];
  }
  visit_kind(Forms(), rules.form, [&](auto form) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      y[j] = decltype(form)::join(scaled[j], v[j], y[j], given.neuron[j % kCount]);
    }
  });
  reset_after(rules, given, y, v);
}

// Adds weight * phi of one step.
template <class F, int kWidth>
__device__ __forceinline__ void add_penalty(const Rules<F>& rules, const F (&h)[kWidth],
                                            const F (&s)[kWidth], F weight, F growth,
                                            F (&sum)[kWidth]) {
  if (rules.potential < 0) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum[j] += weight * s[j];
  } else {
    visit_kind(Potentials(), rules.potential, [&](auto phi) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        sum[j] += weight * decltype(phi)::value(h[j], growth, rules.eps);
      }
    });
  }
}

// Adds scale * phi'(h) to dh.
template <class F, int kWidth>
__device__ __forceinline__ void add_penalty_slope(const Rules<F>& rules, const F (&h)[kWidth],
                                                  F scale, F growth, F (&dh)[kWidth]) {
  visit_kind(Potentials(), rules.potential, [&](auto phi) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      dh[j] += scale * decltype(phi)::derivative(h[j], growth, rules.eps);
    }
  });
}

// Writes whether the values are positive as bits, a byte of which is shared by 8 / kWidth
// neighbouring threads.
template <class F, int kWidth>
__device__ __forceinline__ void write_bits(std::uint8_t* bits, Index neuron, bool exists,
                                           const F (&values)[kWidth]) {
  constexpr int kSharing = 8 / kWidth;
  unsigned byte = 0;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) byte |= (exists && values[j] > F(0) ? 1u : 0u) << j;
#pragma unroll
  for (int offset = 1; offset < kSharing; offset *= 2) {
    byte |= __shfl_down_sync(0xffffffffu, byte, offset) << (offset * kWidth);
  }
  if (exists && threadIdx.x % kSharing == 0) bits[neuron / 8] = static_cast<std::uint8_t>(byte);
}

// `one` where a neuron's bit is set, else 0.
template <class F, int kWidth>
__device__ __forceinline__ void read_bits(const std::uint8_t* bits, Index neuron, F one,
                                          F (&values)[kWidth]) {
  const unsigned byte = bits[neuron / 8] >> (neuron % 8);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) values[j] = byte >> j & 1u ? one : F(0);
}

// `growth` [steps] is null where phi does not use it; `partial` has one sum a block, `counts`
// [steps][warps] the spikes of a warp. Every thread of a warp goes through all steps, whether its
// neurons exist or not.
template <class Storage, int kWidth, bool kTiles>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<Storage, kTiles>)
    forward_kernel(const Rules<State<Storage>> rules, const LIFForward a, const int planes,
                   const State<Storage>* growth, double* partial, unsigned* counts) {
  using F = State<Storage>;
  constexpr int kCount = kTiles ? kWidth : 1;
  const Place own = place<kWidth>(a.shape);
  const int steps = static_cast<int>(a.shape.steps);
  const Index inner = a.shape.inner, neurons = a.shape.outer * inner;
  const bool exists = own.state < neurons;
  const Index channel =
      a.shape.channels == 1 || !exists ? 0 : own.state / a.shape.channel_stride % a.shape.channels;
  const Given<F, kCount> given(rules, a.shape, a.by_channel, channel);
  const F* weight = static_cast<const F*>(a.weight);
  const Index bit_bytes = (neurons + 7) / 8;
  F v[kWidth] = {}, current[kWidth] = {}, sum[kWidth] = {};
  if (exists) {
    read_or_zero(a.v_init, own.state, v);
    if (a.shape.constant) {
      unpack(reinterpret_cast<const Vector<Storage, kWidth>*>(static_cast<const Storage*>(a.x) +
                                                              own.state)[0],
             current);
    }
  }
  for (int begin = 0; begin < steps; begin += a.checkpoint_every) {
    if (begin > 0 && a.checkpoints && exists) {
      const Index segment = begin / a.checkpoint_every - 1;
      write(static_cast<F*>(a.checkpoints) + segment * neurons + own.state, v);
    }
    const auto step = [&](int i, Index index, const Vector<Storage, kWidth>& x) {
      const int t = begin + i;
      F h[kWidth], s[kWidth];
      if (a.shape.constant) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) h[j] = current[j];
      } else {
        unpack(x, h);
      }
      normalise(a.shape, a.by_channel, given, t, channel, h);
      advance(rules, given, h, v);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        s[j] = fires(h[j], given.neuron[j % kCount]) ? F(1) : F(0);
      }
      if (exists) {
        put<Storage>(a.spikes, index, s);
        if (a.potential) write(static_cast<F*>(a.potential) + index, h);
        if (a.penalty) add_penalty(rules, h, s, weight[t], growth ? growth[t] : F(0), sum);
      }
      if (counts) {
        unsigned fired = 0;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) fired += exists && s[j] != F(0) ? 1u : 0u;
#pragma unroll
        for (int offset = 1; offset < kWarp; offset *= 2) {
          fired += __shfl_down_sync(0xffffffffu, fired, offset);
        }
        const Index warps = static_cast<Index>(gridDim.x) * (kThreads / kWarp);
        if (threadIdx.x % kWarp == 0) {
          counts[t * warps + static_cast<Index>(blockIdx.x) * (kThreads / kWarp) +
                 threadIdx.x / kWarp] = fired;
        }
      }
      if (planes > 0) {
        std::uint8_t* bits = static_cast<std::uint8_t*>(a.bits) + t * bit_bytes;
        write_bits(bits, own.state, exists, s);
        if (planes > 1) {
          F slopes[kWidth];
          surrogate_slopes(
              rules, h, [&](int j) { return given.neuron[j % kCount].threshold; }, slopes);
          write_bits(bits + steps * bit_bytes, own.state, exists, slopes);
        }
      }
    };
    const int left = steps - begin;
    for_steps<kWidth, Storage>(exists && !a.shape.constant ? a.x : nullptr,
                               own.sequence + begin * inner, inner,
                               left < a.checkpoint_every ? left : a.checkpoint_every, step);
  }
  if (a.state && exists) write(static_cast<F*>(a.state) + own.state, v);
  if (a.penalty) {
    double sums[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sums[j] = sum[j];
    const double total = sum_block<kThreads>(sum_pairs(sums));
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
  }
}

// One block: the mean over all neurons from the sums of `blocks` blocks, `parts` of them a granule.
template <class F>
__global__ void __launch_bounds__(kMostThreads)
    penalty_kernel(const double* partial, Index blocks, int parts, Index neurons, F* penalty) {
  double sum = 0;
#pragma unroll 4
  for (Index first = static_cast<Index>(threadIdx.x) * parts; first < blocks;
       first += static_cast<Index>(kMostThreads) * parts) {
    double of_granule[kMostWidth];
#pragma unroll
    for (int i = 0; i < kMostWidth; ++i) {
      of_granule[i] = i < parts && first + i < blocks ? partial[first + i] : 0.0;
    }
    sum += sum_pairs(of_granule);
  }
  sum = sum_block<kMostThreads>(sum);
  if (threadIdx.x == 0) *penalty = static_cast<F>(sum / static_cast<double>(neurons));
}

// A block a step: the mean of its spikes, from the counts of `warps` warps.
template <class F>
__global__ void __launch_bounds__(kRowThreads)
    rate_kernel(const unsigned* counts, Index warps, Index neurons, F* rate) {
  double sum = 0;  // of whole numbers
#pragma unroll 4
  for (Index warp = threadIdx.x; warp < warps; warp += kRowThreads) {
    sum += counts[blockIdx.x * warps + warp];
  }
  sum = sum_block<kRowThreads>(sum);
  if (threadIdx.x == 0) rate[blockIdx.x] = static_cast<F>(sum / static_cast<double>(neurons));
}

template <class F>
__global__ void __launch_bounds__(kThreads) growth_kernel(double delta, Index steps, F* growth) {
  const Index t = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t >= steps) return;
  growth[t] = static_cast<F>(growth_at(delta, t));
}

// Rows of sums by channel: of the neuron's parameters, then of the normalisation's.
enum SumRow { kFactor, kThreshold, kVReset, kDzX, kDz, kSumRows };

// Where partial sums go; null where none are wanted, and the neurons are then taken in their order.
template <class F>
struct Partials {
  double* sums;  // [kSumRows][chunks][channels]
  F* gains;      // [steps][slots][channels]
};

// Parts of a channel that sum the gradient of a gain by themselves, within a block.
TRT_HD Index slots_of_block(const Walk& walk) {
  return walk.lanes ? walk.rows() : kThreads / kWarp;
}

// Adds to the gradient of the gains of step t, or begins it at the first item.
template <class F, int kCount>
__device__ __forceinline__ void add_gains(const Walk& walk, const LIFShape& shape, int t, int item,
                                          Index channel, F (&d_gains)[kCount], F* partial) {
  const Index chunk = blockIdx.x % walk.chunks, of_block = slots_of_block(walk);
  const Index slots = walk.chunks * of_block;
  const Index within = walk.lanes ? threadIdx.x / walk.lanes : threadIdx.x / kWarp;
  F* to = partial + (t * slots + chunk * of_block + within) * shape.channels + channel;
  if (walk.lanes == 0) {
    F total = d_gains[0];
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      total += __shfl_down_sync(0xffffffffu, total, offset);
    }
    if (threadIdx.x % kWarp == 0) *to = item == 0 ? total : *to + total;
    return;
  }
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    if (channel + c < shape.channels) to[c] = item == 0 ? d_gains[c] : to[c] + d_gains[c];
  }
}

template <class Storage, int kWidth, bool kTiles>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<Storage, kTiles>)
    backward_kernel(const Rules<State<Storage>> rules, const LIFBackward a,
                    const State<Storage>* growth, const Walk walk,
                    const Partials<State<Storage>> partials) {
  using F = State<Storage>;
  using Elements = Vector<Storage, kWidth>;
  constexpr int kCount = kTiles ? kWidth : 1;
  TRT_DYNAMIC_SHARED(shared);
  const int steps = static_cast<int>(a.shape.steps);
  const Index inner = a.shape.inner, neurons = a.shape.outer * inner;
  const Index bit_bytes = (neurons + 7) / 8;
  const bool in_order = !partials.sums && !partials.gains;
  const bool normalised = a.by_channel.stats;
  const auto* bits = static_cast<const std::uint8_t*>(a.bits);
  const Storage* x = static_cast<const Storage*>(a.x);
  const F* weight = static_cast<const F*>(a.weight);
  const F bit_height = F(1) / rules.surrogate_parameter;
  F penalty_scale = F(0);
  if (a.grad_penalty) {
    penalty_scale = *static_cast<const F*>(a.grad_penalty) / static_cast<F>(neurons);
  }
  const auto locate = [&](int item) -> Spot {
    if (!in_order) return spot<kWidth>(walk, item);
    const Index own = place<kWidth>(a.shape).state;
    const bool exists = own < neurons;
    return {exists, own,
            a.shape.channels == 1 || !exists ? 0 : own / a.shape.channel_stride % a.shape.channels};
  };

  const Index own_channel = locate(0).channel;
  // A tile may reach beyond the last channel: a thread there reads what is given for the first.
  const Index channel = own_channel < a.shape.channels ? own_channel : 0;
  const Given<F, kCount> given(rules, a.shape, a.by_channel, channel);
  F mean_dzx[kCount] = {}, mean_dz[kCount] = {};
  if (a.means) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      mean_dzx[c] = static_cast<const F*>(a.means)[channel + c];
      mean_dz[c] = static_cast<const F*>(a.means)[a.shape.channels + channel + c];
    }
  }
  F sums[kSumRows][kCount] = {};
  Parked<F, kWidth> parked(shared);

  for (int item = 0; item < (in_order ? 1 : walk.items); ++item) {
    const Spot own = locate(item);
    const bool exists = own.exists;
    const Index outer = a.shape.outer == 1 || !exists ? 0 : own.index / inner;
    const Index sequence = own.index + outer * (steps - 1) * inner;
    F dv[kWidth] = {}, first_v[kWidth] = {}, current[kWidth] = {}, dx_sum[kWidth] = {};
    if (exists) {
      read_or_zero(a.grad_state, own.index, dv);
      if (a.shape.constant && !bits) {
        unpack(*reinterpret_cast<const Elements*>(x + own.index), current);
      }
    }
    for (int segment = (steps - 1) / a.checkpoint_every; segment >= 0; --segment) {
      const int begin = segment * a.checkpoint_every;
      const int end = begin + a.checkpoint_every < steps ? begin + a.checkpoint_every : steps;
      if (!bits) {
        F v[kWidth] = {};
        if (exists && segment > 0) {
          read(static_cast<const F*>(a.checkpoints) + (segment - 1) * neurons + own.index, v);
        } else if (exists) {
          read_or_zero(a.v_init, own.index, v);
        }
#pragma unroll
        for (int j = 0; j < kWidth; ++j) first_v[j] = v[j];
        const auto step = [&](int i, Index, const Elements& elements) {
          F h[kWidth];
          if (a.shape.constant) {
#pragma unroll
            for (int j = 0; j < kWidth; ++j) h[j] = current[j];
          } else {
            unpack(elements, h);
          }
          normalise(a.shape, a.by_channel, given, begin + i, channel, h);
          advance(rules, given, h, v);
          parked.put(i, h);
        };
        for_steps<kWidth, Storage>(exists && !a.shape.constant ? a.x : nullptr,
                                   sequence + begin * inner, inner, end - begin, step);
      }

      const auto step = [&](int i, Index index, const Elements& grad_spikes) {
        const int t = end - 1 - i;
        F here[kWidth] = {};  // x again, which is still in a cache
        if (normalised || (partials.sums && !bits && rules.scales_input)) {
          if (a.shape.constant) {
#pragma unroll
            for (int j = 0; j < kWidth; ++j) here[j] = current[j];
          } else if (exists) {
            unpack(*reinterpret_cast<const Elements*>(x + index), here);
          }
        }
        F h[kWidth] = {}, s[kWidth] = {}, ds[kWidth], slopes[kWidth] = {}, scale = F(0);
        unpack(grad_spikes, ds);
        if (!bits) {
          parked.get(t - begin, h);
          surrogate_slopes(
              rules, h, [&](int j) { return given.neuron[j % kCount].threshold; }, slopes);
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            s[j] = fires(h[j], given.neuron[j % kCount]) ? F(1) : F(0);
          }
        } else if (exists) {
          read_bits(bits + t * bit_bytes, own.index, F(1), s);
          read_bits(bits + (steps + t) * bit_bytes, own.index, bit_height, slopes);
        }
        if (a.grad_penalty) {
          scale = penalty_scale * weight[t];
          if (rules.potential < 0) {
#pragma unroll
            for (int j = 0; j < kWidth; ++j) ds[j] += scale;
          }
        }
        // Nothing arrives at an unused last state; times an infinite potential it must stay so.
        const bool detach = rules.detach_reset || (t == steps - 1 && !a.grad_state);
        visit_reset(rules, detach, [&](auto reset) {
          using Reset = decltype(reset);
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            const Neuron<F>& neuron = given.neuron[j % kCount];
            const F at_spike = Reset::spike_gradient(ds[j], h[j], dv[j], neuron) * slopes[j];
            const bool fired = s[j] != F(0);
            const F at_fired = fired ? dv[j] : F(0);
            if (partials.sums && exists) {
              sums[kThreshold][j % kCount] -= at_spike;
              if (Reset::uses_threshold) sums[kThreshold][j % kCount] -= at_fired;
              if (Reset::uses_v_reset) sums[kVReset][j % kCount] += at_fired;
            }
            dv[j] = at_spike + Reset::through_potential(fired, dv[j]);
          }
        });
        if (a.grad_potential && exists) {
          F extra[kWidth];
          read(static_cast<const F*>(a.grad_potential) + index, extra);
#pragma unroll
          for (int j = 0; j < kWidth; ++j) dv[j] += extra[j];
        }
        if (a.grad_penalty && rules.potential >= 0) {
          add_penalty_slope(rules, h, scale, growth ? growth[t] : F(0), dv);
        }
        F before[kWidth] = {}, input[kWidth];  // v before this step, and its y
#pragma unroll
        for (int j = 0; j < kWidth; ++j) input[j] = here[j];
        if (partials.sums && !bits) {
          if (rules.scales_input) normalise(a.shape, a.by_channel, given, t, channel, input);
          if (t > begin) {
            F earlier[kWidth];
            parked.get(t - 1 - begin, earlier);
            reset_after(rules, given, earlier, before);
          } else {
#pragma unroll
            for (int j = 0; j < kWidth; ++j) before[j] = first_v[j];
          }
        }
        F dy[kWidth];
        visit_kind(Forms(), rules.form, [&](auto form) {
          using Form = decltype(form);
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            const Neuron<F>& neuron = given.neuron[j % kCount];
            const F k = factor_of(rules.divides, neuron);
            if (partials.sums && exists) {
              if (!bits) {
                sums[kFactor][j % kCount] +=
                    dv[j] * factor_slope_of<Form>(rules.divides, k, before[j], input[j], neuron);
                if (Form::delays_reset && fires(before[j], neuron)) {
                  sums[kThreshold][j % kCount] -= dv[j];
                }
              }
              sums[kVReset][j % kCount] += dv[j] * reset_slope_of<Form>(k);
            }
            dy[j] = input_slope_of<Form>(k) * dv[j];
            dv[j] = slope_of<Form>(k) * dv[j];
          }
        });
        if (normalised) {
          F gains[kCount], d_gains[kCount] = {};
          gains_of(a.shape, a.by_channel, t, channel, gains);
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            const Norm<F>& norm = given.norm[j % kCount];
            if (exists) d_gains[j % kCount] += dy[j] * norm(here[j]);
            const F dz = gains[j % kCount] * dy[j], xhat = norm.xhat(here[j]);
            if (partials.sums && exists) {
              sums[kDzX][j % kCount] += dz * xhat;
              sums[kDz][j % kCount] += dz;
            }
            dy[j] = norm.gradient(xhat, dz, mean_dzx[j % kCount], mean_dz[j % kCount]);
          }
          if (partials.gains) {
            add_gains(walk, a.shape, t, item, own_channel, d_gains, partials.gains);
          }
        }
        if (a.shape.constant) {
#pragma unroll
          for (int j = 0; j < kWidth; ++j) dx_sum[j] += dy[j];
        } else if (a.grad_x && exists) {
          put<Storage>(a.grad_x, index, dy);
        }
      };
      for_steps<kWidth, Storage>(exists ? a.grad_spikes : nullptr, sequence + (end - 1) * inner,
                                 -inner, end - begin, step);
    }
    if (exists) {
      if (a.shape.constant && a.grad_x) put<Storage>(a.grad_x, own.index, dx_sum);
      if (a.grad_v_init) write(static_cast<F*>(a.grad_v_init) + own.index, dv);
    }
  }
  if (!partials.sums) return;
#pragma unroll
  for (int row = 0; row < kSumRows; ++row) {
    double values[kCount];
#pragma unroll
    for (int c = 0; c < kCount; ++c) values[c] = sums[row][c];
    sum_by_channel(walk, row, values, partials.sums);
  }
}

// Calls f(width, whether a thread's neighbours are channels) for the widest that every tensor's
// rows and the channels' runs allow.
template <class Storage, class Function>
void visit_kernel(const LIFShape& shape, std::initializer_list<const void*> sequences,
                  std::initializer_list<const void*> states, Function&& f) {
  constexpr int kWidth = kWide<Storage>;
  const std::integral_constant<int, kWidth> wide;
  const bool one_channel = shape.channels == 1 || shape.channel_stride % kWidth == 0;
  const bool tiles = shape.channel_stride == 1 && shape.channels % kWidth == 0 &&
                     shape.inner % shape.channels == 0;
  if ((one_channel || tiles) && fits<Storage, kWidth>(shape, sequences, states)) {
    if (one_channel) {
      f(wide, std::false_type());
    } else {
      f(wide, std::true_type());
    }
  } else {
    f(std::integral_constant<int, 1>(), std::false_type());
  }
}

bool uses_growth(const LIFSettings& settings) {
  return settings.potential >= 0 &&
         settings.potential == find_kind(Potentials(), TrtPotential::name);
}

bool is_decay(const LIFSettings& settings) {
  static const int decay = find_kind(Charges(), Decay::name);
  return settings.charge == decay;
}

// Memory of a workspace, handed out in order. Without a base it only counts.
class Space {
 public:
  explicit Space(void* base) : base_(static_cast<unsigned char*>(base)) {}
  template <class T>
  T* take(Index count) {
    T* taken = base_ ? reinterpret_cast<T*>(base_ + bytes_) : nullptr;
    bytes_ += ceil_div(count * static_cast<Index>(sizeof(T)), kAlignment) * kAlignment;
    return taken;
  }
  Index bytes() const { return bytes_; }

 private:
  static constexpr Index kAlignment = 16;
  unsigned char* base_;
  Index bytes_ = 0;
};

// Writes expm1(delta t) for every step; null where phi does not use it.
template <class F>
const F* fill_growth(const LIFSettings& settings, const LIFShape& shape, F* growth, void* stream) {
  if (!uses_growth(settings) || shape.steps == 0) return nullptr;
  TRT_LAUNCH("lif growth", growth_kernel<F>, ceil_div(shape.steps, kThreads), kThreads, 0, stream,
             settings.delta, shape.steps, growth);
  return growth;
}

// The parts of a forward's workspace.
template <class F>
struct ForwardSpace {
  ForwardSpace(const LIFSettings& settings, const LIFForward& a, void* base) {
    Space space(base);
    const Index most_blocks = ceil_div(a.shape.neurons(), kThreads);
    partial = space.take<double>(a.penalty ? most_blocks : 0);
    growth = space.take<F>(a.penalty && uses_growth(settings) ? a.shape.steps : 0);
    counts = space.take<unsigned>(a.rate ? most_blocks * (kThreads / kWarp) * a.shape.steps : 0);
    bytes = space.bytes();
  }
  double* partial;
  F* growth;
  unsigned* counts;
  Index bytes;
};

void clear(void* to, Index bytes, void* stream, const char* what) {
  if (!to || bytes == 0) return;
  check(cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(stream)), what);
}

template <class Storage>
void forward(const LIFSettings& settings, LIFForward a, const Queue& queue) {
  using F = State<Storage>;
  a.shape = flatten(a.shape);
  a.checkpoint_every = segment_steps(a.shape, a.checkpoints, a.checkpoint_every);
  const Index neurons = a.shape.neurons(), steps = a.shape.steps;
  if (neurons == 0 || steps == 0) clear(a.penalty, sizeof(F), queue.stream, "clearing the penalty");
  if (neurons == 0) {
    clear(a.rate, steps * static_cast<Index>(sizeof(F)), queue.stream, "clearing the rate");
    return;
  }
  const bool asks_more = a.penalty || a.potential || a.rate || a.bits;
  const bool by_channel = a.by_channel.neuron || a.by_channel.stats;
  if (is_decay(settings) && !asks_more && !by_channel && !a.shape.constant) {
    plain_lif_forward(settings, a, queue.stream);
    return;
  }
  ForwardSpace<F> space(settings, a, queue.workspace);
  const F* growth = nullptr;
  if (a.penalty) growth = fill_growth(settings, a.shape, space.growth, queue.stream);
  const auto launch = [&](auto width, auto tiles) {
    constexpr int kWidth = decltype(width)::value;
    constexpr bool kTiles = decltype(tiles)::value;
    const Index blocks = ceil_div(neurons, kThreads * kWidth);
    TRT_LAUNCH("lif forward", (forward_kernel<Storage, kWidth, kTiles>), blocks, kThreads, 0,
               queue.stream, make_rules<F>(settings), a, a.bits ? settings.bits : 0, growth,
               space.partial, a.rate ? space.counts : nullptr);
    if (a.penalty && steps > 0) {
      TRT_LAUNCH("lif penalty", penalty_kernel<F>, 1, kMostThreads, 0, queue.stream,
                 static_cast<const double*>(space.partial), blocks, kGranule / (kThreads * kWidth),
                 neurons, static_cast<F*>(a.penalty));
    }
    if (a.rate && steps > 0) {
      TRT_LAUNCH("lif rate", rate_kernel<F>, steps, kRowThreads, 0, queue.stream,
                 static_cast<const unsigned*>(space.counts), blocks * (kThreads / kWarp), neurons,
                 static_cast<F*>(a.rate));
    }
  };
  visit_kernel<Storage>(a.shape, {a.x, a.spikes}, {a.v_init, a.potential, a.state, a.checkpoints},
                        launch);
}

// What of a backward needs sums by channel, and where it keeps them.
template <class Storage>
struct BackwardSpace {
  using F = State<Storage>;

  BackwardSpace(const LIFSettings& settings, const LIFBackward& a, void* base) {
    finds_means = a.by_channel.stats && settings.batch && a.grad_x && !a.means;
    sums = finds_means || a.grad_neuron || a.grad_affine;
    const LIFShape shape = flatten(a.shape);
    visit(a, [&](auto width, auto) {
      walk =
          make_walk<decltype(width)::value>(shape.neurons(), shape.channels, shape.channel_stride);
    });
    slots = walk.chunks * slots_of_block(walk);
    Space space(base);
    growth = space.template take<F>(a.grad_penalty && uses_growth(settings) ? shape.steps : 0);
    means = space.template take<F>(finds_means ? 2 * shape.channels : 0);
    partials.sums = space.template take<double>(sums ? kSumRows * walk.chunks * shape.channels : 0);
    partials.gains =
        space.template take<F>(a.grad_gains ? shape.steps * slots * shape.channels : 0);
    if (!sums) partials.sums = nullptr;
    if (!a.grad_gains) partials.gains = nullptr;
    bytes = space.bytes();
  }

  template <class Function>
  static void visit(const LIFBackward& a, Function&& f) {
    visit_kernel<Storage>(flatten(a.shape), {a.x, a.grad_spikes, a.grad_x},
                          {a.v_init, a.grad_potential, a.grad_state, a.grad_v_init, a.checkpoints},
                          f);
  }

  bool finds_means, sums;
  Walk walk;
  Index slots;
  F *growth, *means;
  Partials<F> partials;
  Index bytes;
};

template <class Storage>
void backward(const LIFSettings& settings, LIFBackward a, const Queue& queue) {
  using F = State<Storage>;
  a.shape = flatten(a.shape);
  const int every = a.checkpoint_every;
  a.checkpoint_every = a.bits ? static_cast<int>(std::max<Index>(1, a.shape.steps))
                              : segment_steps(a.shape, a.checkpoints, every);
  if (!a.bits && a.checkpoint_every > every && a.shape.neurons() > 0) {
    throw std::invalid_argument("lif backward: a sequence of " + std::to_string(a.shape.steps) +
                                " steps needs the forward's checkpoints");
  }
  const Index channels = a.shape.channels, steps = a.shape.steps;
  if (a.shape.neurons() == 0 || steps == 0) {
    const Index size = channels * static_cast<Index>(sizeof(F));
    clear(a.grad_neuron, 3 * size, queue.stream, "clearing the neuron's gradient");
    clear(a.grad_affine, 2 * size, queue.stream, "clearing the normalisation's gradient");
    clear(a.grad_gains, steps * size, queue.stream, "clearing the gains' gradient");
    if (a.shape.neurons() == 0) return;
  }
  const bool by_channel = a.by_channel.neuron || a.by_channel.stats;
  const bool asks_more = a.grad_penalty || a.grad_potential || a.bits || !a.grad_x;
  if (is_decay(settings) && !asks_more && !by_channel && !a.shape.constant) {
    plain_lif_backward(settings, a, queue.stream);
    return;
  }
  BackwardSpace<Storage> space(settings, a, queue.workspace);
  const F* growth = nullptr;
  if (a.grad_penalty) growth = fill_growth(settings, a.shape, space.growth, queue.stream);
  const auto run = [&](const LIFBackward& b, const Partials<F>& partials) {
    BackwardSpace<Storage>::visit(a, [&](auto width, auto tiles) {
      constexpr int kWidth = decltype(width)::value;
      constexpr bool kTiles = decltype(tiles)::value;
      const bool in_order = !partials.sums && !partials.gains;
      const Index blocks =
          in_order ? ceil_div(b.shape.neurons(), kThreads * kWidth) : space.walk.blocks();
      const int parked = b.bits ? 0 : b.checkpoint_every * kWidth * static_cast<int>(sizeof(F));
      TRT_LAUNCH("lif backward", (backward_kernel<Storage, kWidth, kTiles>), blocks, kThreads,
                 parked * kThreads, queue.stream, make_rules<F>(settings), b, growth, space.walk,
                 partials);
    });
  };
  // Sums of rows first .. first + rows - 1, and their means if `also` is given.
  const auto sum_rows = [&](int first, int rows, void* out, F* also) {
    if (!out && !also) return;
    const double count = static_cast<double>(a.shape.neurons()) * static_cast<double>(steps) /
                         static_cast<double>(channels);
    TRT_LAUNCH(
        "channel sums", (channel_sums_kernel<double, F>), rows * ceil_div(channels, kWarp),
        kRowThreads, 0, queue.stream,
        static_cast<const double*>(space.partials.sums) + first * space.walk.chunks * channels,
        space.walk.chunks, channels, static_cast<F*>(out), also, 1.0 / count);
  };
  if (steps > 0) {
    LIFBackward first = a;
    if (space.finds_means) first.grad_x = first.grad_v_init = nullptr;
    run(first, space.partials);
    if (space.sums) {
      sum_rows(kFactor, 3, a.grad_neuron, nullptr);
      sum_rows(kDzX, 2, a.grad_affine, space.finds_means ? space.means : nullptr);
    }
    if (a.grad_gains) {
      TRT_LAUNCH("channel sums", (channel_sums_kernel<F, F>), steps * ceil_div(channels, kWarp),
                 kRowThreads, 0, queue.stream, static_cast<const F*>(space.partials.gains),
                 space.slots, channels, static_cast<F*>(a.grad_gains), static_cast<F*>(nullptr),
                 1.0);
    }
    if (space.finds_means) {
      a.means = space.means;
      run(a, {nullptr, nullptr});
    }
  } else {
    run(a, {nullptr, nullptr});
  }
}

}  // namespace

std::int64_t lif_forward_workspace(const LIFSettings& settings, const LIFForward& a) {
  Index bytes = 0;
  visit_dtype(a.shape.dtype, [&](auto storage) {
    bytes = ForwardSpace<State<decltype(storage)>>(settings, a, nullptr).bytes;
  });
  return bytes;
}

std::int64_t lif_backward_workspace(const LIFSettings& settings, const LIFBackward& a) {
  if (a.shape.neurons() == 0) return 0;
  Index bytes = 0;
  visit_dtype(a.shape.dtype, [&](auto storage) {
    bytes = BackwardSpace<decltype(storage)>(settings, a, nullptr).bytes;
  });
  return bytes;
}

void lif_forward(const LIFSettings& settings, const LIFForward& a, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  visit_dtype(a.shape.dtype, [&](auto storage) { forward<decltype(storage)>(settings, a, queue); });
}

void lif_backward(const LIFSettings& settings, const LIFBackward& a, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  visit_dtype(a.shape.dtype,
              [&](auto storage) { backward<decltype(storage)>(settings, a, queue); });
}

}  // namespace cuda
}  // namespace trt
