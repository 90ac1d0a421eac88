// What the kernels of lif.cu and plain_lif.cu share: a thread owns a few neighbouring neurons over
// all timesteps.
//
// The forward is a rolling loop over time. The backward computes the potentials again from x, parks
// those of a segment of time in shared memory and walks the segment in reverse; a longer sequence
// is a row of segments, each of which starts from a potential that the forward left.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "../arguments.h"
#include "../math/surrogate.h"
#include "launch.h"
#include "vector.h"

namespace trt {
namespace cuda {

using Index = std::int64_t;

// Steps whose loads are issued before the first is used, to hide the latency of memory: more, where
// a load is small.
template <class Storage, int kWidth>
constexpr int kAhead = kWidth * sizeof(Storage) <= 4 ? 8 : 4;

// Shared memory that every device gives to a block without being asked specially.
constexpr int kSharedBytes = 48 * 1024;

// Settings in the state's type, with what is made of them once a launch.
template <class F>
struct Rules {
  Neuron<F> neuron;
  int form;  // of the charge, in `Forms`
  int reset, surrogate;
  int potential;  // phi in `Potentials`, -1 for the spike
  bool detach_reset;
  bool fire_at_threshold;
  bool divides;       // by tau
  bool scales_input;  // so that the gradient of its factor needs x
  F surrogate_parameter, eps, scale;
};

template <class F>
Rules<F> make_rules(const LIFSettings& s) {
  int form = 0;
  bool divides = false, scales_input = false;
  visit_kind(Charges(), s.charge, [&](auto charge) {
    using Form = typename decltype(charge)::Form;
    form = position_of(Forms(), Form());
    divides = charge.divides;
    scales_input = Form::part_x != 0;
  });
  return {make_neuron<F>(s),
          form,
          s.reset,
          s.surrogate,
          s.potential,
          s.detach_reset,
          s.fire_at_threshold,
          divides,
          scales_input,
          static_cast<F>(s.surrogate_parameter),
          static_cast<F>(s.eps),
          static_cast<F>(s.scale)};
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

// Elements of the next `ready` steps, of kAhead at most, by loads that are issued together.
template <int kWidth, class Storage, int kCount>
__device__ __forceinline__ void load_steps(const Storage* data, Index stride, int ready,
                                           Vector<Storage, kWidth> (&to)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if (k < ready) to[k] = reinterpret_cast<const Vector<Storage, kWidth>*>(data + k * stride)[0];
  }
}

// f(i, index, elements of `data` at index) for i = 0..count-1 and an index that moves by `stride`
// from `index` on, with the loads of kAhead steps issued together; zeros where there is no `data`.
// With kUnrolled, whole groups of kAhead steps are unrolled, which costs the fewest instructions.
// Other steps are a rolled loop whose elements move up by one place a step: where f is long, code
// and compile time would be four times as long.
template <int kWidth, class Storage, bool kUnrolled = false, class Function>
__device__ __forceinline__ void for_steps(const void* data, Index index, Index stride, int count,
                                          Function&& f) {
  using Elements = Vector<Storage, kWidth>;
  constexpr int kAhead = cuda::kAhead<Storage, kWidth>;
  const Storage* from = static_cast<const Storage*>(data);
  int first = 0;
  if constexpr (kUnrolled) {
    const auto run_group = [&](auto size) {
      Elements group[decltype(size)::value] = {};
      if (data) load_steps<kWidth>(from + index, stride, decltype(size)::value, group);
#pragma unroll
      for (const Elements& elements : group) {
        f(first++, index, elements);
        index += stride;
      }
    };
#pragma unroll 1
    while (count - first >= kAhead) run_group(std::integral_constant<int, kAhead>());
    if (count - first >= kAhead / 2) run_group(std::integral_constant<int, kAhead / 2>());
  }
  Elements ahead[kAhead] = {};
  for (; first < count; first += kAhead) {
    const int ready = count - first < kAhead ? count - first : kAhead;
    if (data) load_steps<kWidth>(from + index, stride, ready, ahead);
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
  store_vector(reinterpret_cast<Vector<Storage, kWidth>*>(static_cast<Storage*>(data) + index),
               elements);
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

// Surrogate derivatives of the neurons of a thread; `threshold(j)` is the neuron's.
template <class F, int kWidth, class Threshold>
__device__ __forceinline__ void surrogate_slopes(const Rules<F>& rules, const F (&h)[kWidth],
                                                 Threshold&& threshold, F (&slopes)[kWidth]) {
  visit_kind(Surrogates(), rules.surrogate, [&](auto surrogate) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      slopes[j] = decltype(surrogate)::derivative(h[j] - threshold(j), rules.surrogate_parameter);
    }
  });
}

// f(reset) for that of `rules`, with a gradient through its spike or without one.
template <class F, class Function>
__device__ __forceinline__ void visit_reset(const Rules<F>& rules, bool detach, Function&& f) {
  visit_kind(Resets(), rules.reset, [&](auto reset) {
    if (detach) {
      f(Detached<decltype(reset)>());
    } else {
      f(reset);
    }
  });
}

// One step or none has no time stride: all neurons are one run.
inline LIFShape flatten(LIFShape shape) {
  if (shape.steps <= 1) {
    shape.inner *= shape.outer;
    shape.outer = 1;
  }
  return shape;
}

// Whether kWidth neurons of every row of every tensor can be moved at a time: rows start on a whole
// vector and have no tail.
template <class Storage, int kWidth>
bool fits(const LIFShape& shape, std::initializer_list<const void*> sequences,
          std::initializer_list<const void*> states) {
  const auto all = [](std::initializer_list<const void*> tensors, auto is_aligned) {
    return std::all_of(tensors.begin(), tensors.end(), is_aligned);
  };
  return shape.inner % kWidth == 0 && all(sequences, &aligned<Storage, kWidth>) &&
         all(states, &aligned<State<Storage>, kWidth>);
}

// One segment, where there are no checkpoints.
inline int segment_steps(const LIFShape& shape, const void* checkpoints, int every) {
  return checkpoints ? every : static_cast<int>(std::max<Index>(1, shape.steps));
}

// Spikes of x and gradients of x alone, for the charge "decay": plain_lif.cu.
void plain_lif_forward(const LIFSettings&, const LIFForward&, void* stream);
void plain_lif_backward(const LIFSettings&, const LIFBackward&, void* stream);

}  // namespace cuda
}  // namespace trt
