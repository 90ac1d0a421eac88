// The multi-step LIF on the GPU: a thread owns a few neighbouring neurons over all timesteps.
//
// The forward is a rolling loop over time. The backward computes the potentials again from x, parks
// those of a segment of time in shared memory and walks the segment in reverse; a longer sequence
// is a row of segments, each of which starts from a potential that the forward left.
//
// Every kernel exists twice: lean, for a charge without division and nothing but spikes and states,
// which is what training runs, and whole.
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <type_traits>

#include "../arguments.h"
#include "../math/regularizer.h"
#include "../math/surrogate.h"
#include "launch.h"
#include "reduce.h"
#include "vector.h"

namespace trt {
namespace cuda {
namespace {

using Index = std::int64_t;

// Steps whose loads are issued before the first is used, to hide the latency of memory: more, where
// a load is small.
template <class Storage, int kWidth>
constexpr int kAhead = kWidth * sizeof(Storage) <= 4 ? 8 : 4;

// Blocks that an SM must have registers for: these many ask for enough memory at once, and given
// fewer registers some of the kernels spill.
template <class Storage, bool kLean>
constexpr int kLeastBlocks = sizeof(Storage) == 8            ? 4
                             : kLean && sizeof(Storage) == 4 ? 8
                                                             : 5;

// Shared memory that every device gives to a block without being asked specially.
constexpr int kSharedBytes = 48 * 1024;

// Neurons whose penalty is summed in one order, however many of them a thread owns: the most that a
// block covers, which is with half precision.
constexpr int kMostWidth = 8;
constexpr int kGranule = kThreads * kMostWidth;

// Settings in the state's type, with what is made of them once a launch.
template <class F>
struct Rules {
  Neuron<F> neuron;
  int charge, reset, surrogate;
  int potential;  // phi in `Potentials`, -1 for the spike
  bool detach_reset;
  F surrogate_parameter, slope, eps;
};

template <class F>
Rules<F> make_rules(const LIFSettings& s) {
  return {make_neuron<F>(s),
          s.charge,
          s.reset,
          s.surrogate,
          s.potential,
          s.detach_reset,
          static_cast<F>(s.surrogate_parameter),
          charge_slope<F>(s),
          static_cast<F>(s.eps)};
}

// Where a thread's neurons start in a state [outer][inner] and in a sequence [outer][steps][inner].
struct Place {
  Index state, sequence;
};

template <int kWidth>
__device__ __forceinline__ Place place(const LIFShape& shape) {
  const Index neuron = (static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x) * kWidth;
  const Index outer = shape.outer == 1 ? 0 : neuron / shape.inner;
  return {neuron, neuron + outer * (shape.steps - 1) * shape.inner};
}

// A part of the tensor at `data`, or zeros where there is no such tensor.
template <class F, int kWidth>
__device__ __forceinline__ void read_or_zero(const void* data, Index index, F (&to)[kWidth]) {
  if (data) {
    read(static_cast<const F*>(data) + index, to);
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) to[j] = F(0);
  }
}

// f(i, index, elements of `data` at index) for i = 0..count-1 and an index that moves by `stride`
// from `index` on, with the loads of kAhead steps issued together; zeros where there is no `data`.
// The loop is rolled and its elements move up by one place a step, which costs few instructions:
// unrolled, code and compile time would be four times as long.
template <int kWidth, class Storage, class Function>
__device__ __forceinline__ void for_steps(const void* data, Index index, Index stride, int count,
                                          Function&& f) {
  using Elements = Vector<Storage, kWidth>;
  constexpr int kAhead = cuda::kAhead<Storage, kWidth>;
  Elements ahead[kAhead] = {};
  Index next = index;
  for (int first = 0; first < count; first += kAhead) {
    const int ready = count - first < kAhead ? count - first : kAhead;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (data && k < ready) {
        ahead[k] = *reinterpret_cast<const Elements*>(static_cast<const Storage*>(data) + next);
        next += stride;
      }
    }
#pragma unroll 1
    for (int k = 0; k < ready; ++k) {
      f(first + k, index, ahead[0]);
      index += stride;
#pragma unroll
      for (int i = 1; i < kAhead; ++i) ahead[i - 1] = ahead[i];
    }
  }
}

template <class Storage, int kWidth>
__device__ __forceinline__ void put(void* data, Index index, const State<Storage> (&from)[kWidth]) {
  Vector<Storage, kWidth> elements;
  pack(from, elements);
  *reinterpret_cast<Vector<Storage, kWidth>*>(static_cast<Storage*>(data) + index) = elements;
}

// Charge, fire and reset of one step: v is updated and h written.
template <class Charge, class Reset, class Storage, int kWidth, class F>
__device__ __forceinline__ void advance(const Vector<Storage, kWidth>& x, const Neuron<F>& neuron,
                                        F (&v)[kWidth], F (&h)[kWidth]) {
  unpack(x, h);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    h[j] = Charge::charge(v[j], h[j], neuron);
    v[j] = Reset::after(h[j], fires(h[j], neuron), neuron);
  }
}

// f(charge, reset) for those of `rules`.
template <bool kLean, class F, class Function>
__device__ __forceinline__ void visit_rules(const Rules<F>& rules, Function&& f) {
  const auto visit_reset = [&](auto charge) {
    visit_kind(Resets(), rules.reset, [&](auto reset) { f(charge, reset); });
  };
  if constexpr (kLean) {
    visit_reset(Decay());
  } else {
    visit_kind(Charges(), rules.charge, visit_reset);
  }
}

// Adds weight * phi(h) of one step.
template <class F, int kWidth>
__device__ __forceinline__ void add_penalty(const Rules<F>& rules, const F (&h)[kWidth], F weight,
                                            F growth, F (&sum)[kWidth]) {
  if (rules.potential < 0) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum[j] += weight * (fires(h[j], rules.neuron) ? F(1) : F(0));
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

// `growth` [steps] is null where phi does not use it; `partial` has one sum a block.
template <class Storage, int kWidth, bool kLean>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<Storage, kLean>)
    forward_kernel(const Rules<State<Storage>> rules, const LIFForward a,
                   const State<Storage>* growth, double* partial) {
  using F = State<Storage>;
  const Place own = place<kWidth>(a.shape);
  const int steps = static_cast<int>(a.shape.steps);
  const Index inner = a.shape.inner, neurons = a.shape.outer * inner;
  const F* weight = static_cast<const F*>(a.weight);
  F sum[kWidth] = {};
  if (own.state < neurons) {
    F v[kWidth];
    read_or_zero(a.v_init, own.state, v);
    visit_rules<kLean>(rules, [&](auto charge, auto reset) {
      F* checkpoint = static_cast<F*>(a.checkpoints) + own.state;
      for (int begin = 0; begin < steps; begin += a.checkpoint_every) {
        if (begin > 0) {
          write(checkpoint, v);
          checkpoint += neurons;
        }
        const auto step = [&](int i, Index index, const Vector<Storage, kWidth>& x) {
          F h[kWidth], s[kWidth];
          advance<decltype(charge), decltype(reset)>(x, rules.neuron, v, h);
#pragma unroll
          for (int j = 0; j < kWidth; ++j) s[j] = fires(h[j], rules.neuron) ? F(1) : F(0);
          put<Storage>(a.spikes, index, s);
          if constexpr (!kLean) {
            const int t = begin + i;
            if (a.potential) write(static_cast<F*>(a.potential) + index, h);
            if (a.penalty) add_penalty(rules, h, weight[t], growth ? growth[t] : F(0), sum);
          }
        };
        const int left = steps - begin;
        for_steps<kWidth, Storage>(a.x, own.sequence + begin * inner, inner,
                                   left < a.checkpoint_every ? left : a.checkpoint_every, step);
      }
    });
    if (a.state) write(static_cast<F*>(a.state) + own.state, v);
  }
  if constexpr (!kLean) {
    if (a.penalty) {
      double sums[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sums[j] = sum[j];
      const double total = sum_block<kThreads>(sum_pairs(sums));
      if (threadIdx.x == 0) partial[blockIdx.x] = total;
    }
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

template <class F>
__global__ void __launch_bounds__(kThreads) growth_kernel(double delta, Index steps, F* growth) {
  const Index t = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t >= steps) return;
  growth[t] = static_cast<F>(growth_at(delta, t));
}

// Potentials of a segment in shared memory. Every thread has a column of its own, so no barrier is
// needed, and neighbouring threads have neighbouring accesses, so no two meet in a bank.
template <class F, int kWidth>
class Parked {
 public:
  __device__ __forceinline__ explicit Parked(unsigned char* shared)
      : column_(reinterpret_cast<Element*>(shared) + threadIdx.x) {}

  __device__ __forceinline__ void put(int t, const F (&h)[kWidth]) {
#pragma unroll
    for (int i = 0; i < A::kCount; ++i) {
      Element element;
#pragma unroll
      for (int j = 0; j < A::kElements; ++j) element.data[j] = h[i * A::kElements + j];
      column_[(t * A::kCount + i) * blockDim.x] = element;
    }
  }

  __device__ __forceinline__ void get(int t, F (&h)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < A::kCount; ++i) {
      const Element element = column_[(t * A::kCount + i) * blockDim.x];
#pragma unroll
      for (int j = 0; j < A::kElements; ++j) h[i * A::kElements + j] = element.data[j];
    }
  }

 private:
  using A = Access<F, kWidth>;
  using Element = typename A::type;
  Element* column_;
};

// Takes the place of a surrogate whose derivative is known already, so that surrogates and resets
// are two branches one after the other and not every pair of them.
struct KnownSurrogate {
  template <class F>
  TRT_HD static F derivative(F, F known) {
    return known;
  }
};

// Backward of one step: dv arrives at the potential after the reset and is replaced by dh; ds
// arrives at the spikes. `detach` takes it no further through the reset.
template <class F, int kWidth>
__device__ __forceinline__ void retreat(const Rules<F>& rules, const F (&h)[kWidth],
                                        const F (&ds)[kWidth], bool detach, F (&dv)[kWidth]) {
  F known[kWidth];
  visit_kind(Surrogates(), rules.surrogate, [&](auto surrogate) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      known[j] =
          decltype(surrogate)::derivative(h[j] - rules.neuron.threshold, rules.surrogate_parameter);
    }
  });
  const auto through = [&](auto reset) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      dv[j] = potential_gradient<decltype(reset), KnownSurrogate>(h[j], ds[j], dv[j], known[j],
                                                                  rules.neuron);
    }
  };
  visit_kind(Resets(), rules.reset, [&](auto reset) {
    if (detach) {
      through(Detached<decltype(reset)>());
    } else {
      through(reset);
    }
  });
}

template <class Storage, int kWidth, bool kLean>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<Storage, kLean>)
    backward_kernel(const Rules<State<Storage>> rules, const LIFBackward a,
                    const State<Storage>* growth) {
  using F = State<Storage>;
  TRT_DYNAMIC_SHARED(shared);
  const int steps = static_cast<int>(a.shape.steps);
  const Index inner = a.shape.inner, neurons = a.shape.outer * inner;
  const Place own = place<kWidth>(a.shape);
  if (own.state >= neurons) return;

  Parked<F, kWidth> parked(shared);
  const F* weight = static_cast<const F*>(a.weight);
  F penalty_scale = F(0);
  if (!kLean && a.grad_penalty) {
    penalty_scale = *static_cast<const F*>(a.grad_penalty) / static_cast<F>(neurons);
  }
  F dv[kWidth];
  read_or_zero(a.grad_state, own.state, dv);

  for (int segment = (steps - 1) / a.checkpoint_every; segment >= 0; --segment) {
    const int begin = segment * a.checkpoint_every;
    const int end = begin + a.checkpoint_every < steps ? begin + a.checkpoint_every : steps;
    F v[kWidth];
    if (segment > 0) {
      read(static_cast<const F*>(a.checkpoints) + (segment - 1) * neurons + own.state, v);
    } else {
      read_or_zero(a.v_init, own.state, v);
    }
    visit_rules<kLean>(rules, [&](auto charge, auto reset) {
      const auto step = [&](int i, Index, const Vector<Storage, kWidth>& x) {
        F h[kWidth];
        advance<decltype(charge), decltype(reset)>(x, rules.neuron, v, h);
        parked.put(i, h);
      };
      for_steps<kWidth, Storage>(a.x, own.sequence + begin * inner, inner, end - begin, step);
    });

    const auto step = [&](int i, Index index, const Vector<Storage, kWidth>& grad_spikes) {
      const int t = end - 1 - i;
      F h[kWidth], ds[kWidth], scale = F(0);
      parked.get(t - begin, h);
      unpack(grad_spikes, ds);
      if (!kLean && a.grad_penalty) {
        scale = penalty_scale * weight[t];
        if (rules.potential < 0) {
#pragma unroll
          for (int j = 0; j < kWidth; ++j) ds[j] += scale;
        }
      }
      // Nothing arrives at an unused last state; times an infinite potential it must stay nothing.
      const bool detach = rules.detach_reset || (t == steps - 1 && !a.grad_state);
      retreat(rules, h, ds, detach, dv);
      if constexpr (!kLean) {
        if (a.grad_potential) {
          F extra[kWidth];
          read(static_cast<const F*>(a.grad_potential) + index, extra);
#pragma unroll
          for (int j = 0; j < kWidth; ++j) dv[j] += extra[j];
        }
        if (a.grad_penalty && rules.potential >= 0) {
          add_penalty_slope(rules, h, scale, growth ? growth[t] : F(0), dv);
        }
      }
      put<Storage>(a.grad_x, index, dv);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) dv[j] = rules.slope * dv[j];
    };
    for_steps<kWidth, Storage>(a.grad_spikes, own.sequence + (end - 1) * inner, -inner, end - begin,
                               step);
  }
  if (a.grad_v_init) write(static_cast<F*>(a.grad_v_init) + own.state, dv);
}

// One step or none has no time stride: all neurons are one run.
LIFShape flatten(LIFShape shape) {
  if (shape.steps <= 1) {
    shape.inner *= shape.outer;
    shape.outer = 1;
  }
  return shape;
}

// Calls f(integral_constant of the neurons that a thread owns): as many as 16 bytes of x hold, or
// 2, or 1, where every row of every tensor starts on a whole vector and has no tail.
template <class Storage, class Function>
void visit_width(const LIFShape& shape, std::initializer_list<const void*> sequences,
                 std::initializer_list<const void*> states, Function&& f) {
  const auto fits = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    const auto all = [](std::initializer_list<const void*> tensors, auto is_aligned) {
      return std::all_of(tensors.begin(), tensors.end(), is_aligned);
    };
    return shape.inner % kWidth == 0 && all(sequences, &aligned<Storage, kWidth>) &&
           all(states, &aligned<State<Storage>, kWidth>);
  };
  const std::integral_constant<int, kVectorBytes / static_cast<int>(sizeof(Storage))> full;
  const std::integral_constant<int, 2> pair;
  const std::integral_constant<int, 1> single;
  if (fits(full)) {
    f(full);
  } else if (fits(pair)) {
    f(pair);
  } else {
    f(single);
  }
}

bool uses_growth(const LIFSettings& settings) {
  return settings.potential >= 0 &&
         settings.potential == find_kind(Potentials(), TrtPotential::name);
}

// Writes expm1(delta t) for every step; null where phi does not use it.
template <class F>
const F* fill_growth(const LIFSettings& settings, const LIFShape& shape, F* growth, void* stream) {
  if (!uses_growth(settings) || shape.steps == 0) return nullptr;
  TRT_LAUNCH("lif growth", growth_kernel<F>, ceil_div(shape.steps, kThreads), kThreads, 0, stream,
             settings.delta, shape.steps, growth);
  return growth;
}

Index most_partials(const LIFShape& shape) { return ceil_div(shape.neurons(), kThreads); }

Index growth_bytes(const LIFSettings& settings, const LIFShape& shape) {
  if (!uses_growth(settings)) return 0;
  return shape.steps * (shape.dtype == DType::float64 ? 8 : 4);
}

// One segment, where there are no checkpoints.
int segment_steps(const LIFShape& shape, const void* checkpoints, int every) {
  return checkpoints ? every : static_cast<int>(std::max<Index>(1, shape.steps));
}

// Calls f(true_type or false_type) by whether the lean kernel will do.
template <class Function>
void visit_lean(const LIFSettings& settings, bool asks_more, Function&& f) {
  static const int decay = find_kind(Charges(), Decay::name);
  if (asks_more || settings.charge != decay) {
    f(std::false_type());
  } else {
    f(std::true_type());
  }
}

template <class Storage>
void forward(const LIFSettings& settings, LIFForward a, const Queue& queue) {
  using F = State<Storage>;
  a.shape = flatten(a.shape);
  a.checkpoint_every = segment_steps(a.shape, a.checkpoints, a.checkpoint_every);
  const Index neurons = a.shape.neurons();
  if (neurons == 0) {
    if (!a.penalty) return;
    check(cudaMemsetAsync(a.penalty, 0, sizeof(F), static_cast<cudaStream_t>(queue.stream)),
          "clearing the penalty");
    return;
  }
  double* partial = static_cast<double*>(queue.workspace);
  const F* growth = nullptr;
  if (a.penalty) {
    F* space = reinterpret_cast<F*>(partial + most_partials(a.shape));
    growth = fill_growth(settings, a.shape, space, queue.stream);
  }
  const auto launch = [&](auto width, auto lean) {
    constexpr int kWidth = decltype(width)::value;
    constexpr bool kLean = decltype(lean)::value;
    const Index blocks = ceil_div(neurons, kThreads * kWidth);
    TRT_LAUNCH("lif forward", (forward_kernel<Storage, kWidth, kLean>), blocks, kThreads, 0,
               queue.stream, make_rules<F>(settings), a, growth, partial);
    if (!a.penalty) return;
    TRT_LAUNCH("lif penalty", penalty_kernel<F>, 1, kMostThreads, 0, queue.stream, partial, blocks,
               kGranule / (kThreads * kWidth), neurons, static_cast<F*>(a.penalty));
  };
  visit_width<Storage>(
      a.shape, {a.x, a.spikes}, {a.v_init, a.potential, a.state, a.checkpoints}, [&](auto width) {
        visit_lean(settings, a.penalty || a.potential, [&](auto lean) { launch(width, lean); });
      });
}

template <class Storage>
void backward(const LIFSettings& settings, LIFBackward a, const Queue& queue) {
  using F = State<Storage>;
  a.shape = flatten(a.shape);
  const int every = a.checkpoint_every;
  a.checkpoint_every = segment_steps(a.shape, a.checkpoints, every);
  if (a.checkpoint_every > every) {
    throw std::invalid_argument("lif backward: a sequence of " + std::to_string(a.shape.steps) +
                                " steps needs the forward's checkpoints");
  }
  const Index neurons = a.shape.neurons();
  if (neurons == 0) return;
  const F* growth = nullptr;
  if (a.grad_penalty) {
    growth = fill_growth(settings, a.shape, static_cast<F*>(queue.workspace), queue.stream);
  }
  const auto launch = [&](auto width, auto lean) {
    constexpr int kWidth = decltype(width)::value;
    constexpr bool kLean = decltype(lean)::value;
    const int parked = a.checkpoint_every * kWidth * static_cast<int>(sizeof(F));
    const int threads = parked * kThreads <= kSharedBytes ? kThreads : kThreads / 2;
    TRT_LAUNCH("lif backward", (backward_kernel<Storage, kWidth, kLean>),
               ceil_div(neurons, threads * kWidth), threads, parked * threads, queue.stream,
               make_rules<F>(settings), a, growth);
  };
  visit_width<Storage>(a.shape, {a.x, a.grad_spikes, a.grad_x},
                       {a.v_init, a.grad_potential, a.grad_state, a.grad_v_init, a.checkpoints},
                       [&](auto width) {
                         visit_lean(settings, a.grad_penalty || a.grad_potential,
                                    [&](auto lean) { launch(width, lean); });
                       });
}

}  // namespace

std::int64_t lif_forward_workspace(const LIFSettings& settings, const LIFShape& shape) {
  if (!settings.penalizes()) return 0;
  return most_partials(shape) * static_cast<Index>(sizeof(double)) + growth_bytes(settings, shape);
}

std::int64_t lif_backward_workspace(const LIFSettings& settings, const LIFShape& shape) {
  return growth_bytes(settings, shape);
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
