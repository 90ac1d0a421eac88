// The multi-step LIF on the CPU: one pass over memory, whatever is asked of it.
#include "bits.h"
#include "lif_rows.h"

namespace trt {
inline namespace TRT_ISA {
namespace {

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

// Adds weight * phi(h) to `sum`.
template <class F>
void add_potential_value(const LIFSettings& settings, Index n, const F* __restrict__ h, F weight,
                         F growth, F* __restrict__ sum) {
  visit_kind(Potentials(), settings.potential, [&](auto phi) {
    const F eps = static_cast<F>(settings.eps);
    for (Index i = 0; i < n; ++i) sum[i] += weight * decltype(phi)::value(h[i], growth, eps);
  });
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
  const Scratch<F> scratch(6 * width + Given<F>::kRows * given.width, threads);
  const Scratch<Index> starts(2 * width, threads);
  std::vector<Index> filled(threads, -1);

  const Index planes = blocks.planes.count;
  parallel_for(planes * blocks.parts_of_plane, threads, [&](Index index, int thread) {
    F* v = scratch.of(thread);
    F *x_row = v + width, *h_row = x_row + width, *s_row = h_row + width, *sum = s_row + width;
    F* y_row = sum + width;
    Local<F> local(given, y_row + width, filled[thread]);
    const Runs runs{starts.of(thread), starts.of(thread) + width};
    blocks.for_blocks(0, planes, index, [&](const Block& block, Index) {
      const Index n = block.columns();
      local.enter(block);
      runs.find(blocks, block);
      fill_row(v_init, runs, block, v);
      if (a.penalty) std::fill_n(sum, n, F(0));
      for (Index t = 0; t < steps; ++t) {
        F* s = open_row(spikes, runs, block, t, s_row);
        F* h = potential.data ? open_row(potential, runs, block, t, h_row)
               : keeps        ? h_row
                              : nullptr;
        const F* y = y_row;
        if (a.by_channel.stats) {
          normalise_row(local, a.by_channel.gains, x, runs, block, t, y_row);
        } else {
          y = load_row(x, runs, block, t, x_row);
        }
        advance(local, n, y, v, h, s);
        if (a.rate) counts[thread * steps + t] += sum_row(n, s);
        if (bits) set_bits(bits + t * a.shape.bit_bytes(), runs, block, s);
        store_spikes(spikes, runs, block, t, s);
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
        blocks.for_granules(block, [&](Index granule, Index count, Index first) {
          partial[granule] += sum_row(count, sum + first);
        });
      }
    });
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

}  // namespace

void lif_forward(const LIFSettings& settings, const LIFForward& a, int threads) {
  visit_dtype(a.shape.dtype,
              [&](auto storage) { forward<decltype(storage)>(settings, a, threads); });
}

}  // namespace TRT_ISA
}  // namespace trt
