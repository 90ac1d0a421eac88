// `lif` of the charge "decay" into spikes alone, which is what training mostly runs: kernels of few
// instructions, without a division and without a fused multiply-add.
#include "lif.h"

namespace trt {
namespace cuda {
namespace {

// Blocks that an SM must have registers for: these many ask for enough memory at once, and given
// fewer registers some of the kernels spill.
template <class Storage>
constexpr int kLeastBlocks = sizeof(Storage) == 8   ? 4
                             : sizeof(Storage) == 4 ? 8
                                                    : 5;

// Charge, fire and reset of one step: v is updated and h written.
template <class Reset, class Storage, int kWidth, class F>
__device__ __forceinline__ void advance(const Vector<Storage, kWidth>& x, const Neuron<F>& neuron,
                                        F (&v)[kWidth], F (&h)[kWidth]) {
  unpack(x, h);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    h[j] = Decay::charge(v[j], h[j], neuron);
    v[j] = Reset::after(h[j], fires(h[j], neuron), neuron);
  }
}

template <class Storage, int kWidth>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<Storage>)
    plain_forward_kernel(const Rules<State<Storage>> rules, const LIFForward a) {
  using F = State<Storage>;
  const Place own = place<kWidth>(a.shape);
  const int steps = static_cast<int>(a.shape.steps);
  const Index inner = a.shape.inner, neurons = a.shape.outer * inner;
  if (own.state >= neurons) return;
  F v[kWidth];
  read_or_zero(a.v_init, own.state, v);
  visit_kind(Resets(), rules.reset, [&](auto reset) {
    F* checkpoint = static_cast<F*>(a.checkpoints) + own.state;
    for (int begin = 0; begin < steps; begin += a.checkpoint_every) {
      if (begin > 0) {
        write(checkpoint, v);
        checkpoint += neurons;
      }
      const auto step = [&](int, Index index, const Vector<Storage, kWidth>& x) {
        F h[kWidth], s[kWidth];
        advance<decltype(reset)>(x, rules.neuron, v, h);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) s[j] = fires(h[j], rules.neuron) ? F(1) : F(0);
        put<Storage>(a.spikes, index, s);
      };
      const int left = steps - begin;
      for_steps<kWidth, Storage, true>(a.x, own.sequence + begin * inner, inner,
                                       left < a.checkpoint_every ? left : a.checkpoint_every, step);
    }
  });
  if (a.state) write(static_cast<F*>(a.state) + own.state, v);
}

template <class Storage, int kWidth>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<Storage>)
    plain_backward_kernel(const Rules<State<Storage>> rules, const LIFBackward a) {
  using F = State<Storage>;
  TRT_DYNAMIC_SHARED(shared);
  const int steps = static_cast<int>(a.shape.steps);
  const Index inner = a.shape.inner, neurons = a.shape.outer * inner;
  const Place own = place<kWidth>(a.shape);
  if (own.state >= neurons) return;

  Parked<F, kWidth> parked(shared);
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
    visit_kind(Resets(), rules.reset, [&](auto reset) {
      const auto step = [&](int i, Index, const Vector<Storage, kWidth>& x) {
        F h[kWidth];
        advance<decltype(reset)>(x, rules.neuron, v, h);
        parked.put(i, h);
      };
      for_steps<kWidth, Storage, true>(a.x, own.sequence + begin * inner, inner, end - begin, step);
    });

    const auto step = [&](int i, Index index, const Vector<Storage, kWidth>& grad_spikes) {
      const int t = end - 1 - i;
      F h[kWidth], ds[kWidth], slopes[kWidth];
      parked.get(t - begin, h);
      unpack(grad_spikes, ds);
      surrogate_slopes(rules, h, [&](int) { return rules.neuron.threshold; }, slopes);
      // Nothing arrives at an unused last state; times an infinite potential it must stay nothing.
      const bool detach = rules.detach_reset || (t == steps - 1 && !a.grad_state);
      visit_reset(rules, detach, [&](auto reset) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          dv[j] = potential_gradient<decltype(reset), KnownSurrogate>(h[j], ds[j], dv[j], slopes[j],
                                                                      rules.neuron);
        }
      });
      put<Storage>(a.grad_x, index, dv);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) dv[j] = Decay::slope(rules.neuron) * dv[j];
    };
    for_steps<kWidth, Storage, true>(a.grad_spikes, own.sequence + (end - 1) * inner, -inner,
                                     end - begin, step);
  }
  if (a.grad_v_init) write(static_cast<F*>(a.grad_v_init) + own.state, dv);
}

// Calls f(integral_constant of the neurons that a thread owns): as many as 16 bytes of x hold, or
// 2, or 1.
template <class Storage, class Function>
void visit_width(const LIFShape& shape, std::initializer_list<const void*> sequences,
                 std::initializer_list<const void*> states, Function&& f) {
  constexpr int kFull = kVectorBytes / static_cast<int>(sizeof(Storage));
  if (fits<Storage, kFull>(shape, sequences, states)) {
    f(std::integral_constant<int, kFull>());
  } else if (fits<Storage, 2>(shape, sequences, states)) {
    f(std::integral_constant<int, 2>());
  } else {
    f(std::integral_constant<int, 1>());
  }
}

}  // namespace

void plain_lif_forward(const LIFSettings& settings, const LIFForward& a, void* stream) {
  visit_dtype(a.shape.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const auto launch = [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      TRT_LAUNCH("lif forward", (plain_forward_kernel<Storage, kWidth>),
                 ceil_div(a.shape.neurons(), kThreads * kWidth), kThreads, 0, stream,
                 make_rules<State<Storage>>(settings), a);
    };
    visit_width<Storage>(a.shape, {a.x, a.spikes}, {a.v_init, a.state, a.checkpoints}, launch);
  });
}

void plain_lif_backward(const LIFSettings& settings, const LIFBackward& a, void* stream) {
  visit_dtype(a.shape.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const auto launch = [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      const int parked = a.checkpoint_every * kWidth * static_cast<int>(sizeof(State<Storage>));
      const int threads = parked * kThreads <= kSharedBytes ? kThreads : kThreads / 2;
      TRT_LAUNCH("lif backward", (plain_backward_kernel<Storage, kWidth>),
                 ceil_div(a.shape.neurons(), threads * kWidth), threads, parked * threads, stream,
                 make_rules<State<Storage>>(settings), a);
    };
    visit_width<Storage>(a.shape, {a.x, a.grad_spikes, a.grad_x},
                         {a.v_init, a.grad_state, a.grad_v_init, a.checkpoints}, launch);
  });
}

}  // namespace cuda
}  // namespace trt
