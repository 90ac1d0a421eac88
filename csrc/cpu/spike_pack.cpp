// Spikes as bits, and back. Packing finds out whether the elements are spikes at all, and gives up
// at the first that is not: most tensors that are tried are none.
#include <algorithm>
#include <atomic>

#include "../math/spike_word.h"
#include "bits.h"
#include "kernels.h"
#include "parallel.h"

namespace trt {
inline namespace TRT_ISA {
namespace {

using Index = std::int64_t;

constexpr Index kTile = 512;  // elements looked at before the next look at the others' finds
constexpr Index kChunk = 64 * kTile;
constexpr Index kSerial = serial_below(2 * kChunk);

// Writes the bits of at most kTile elements; false if one of them is neither 0 nor 1.
template <class Word>
bool pack_tile(Index n, const Word* x, Word one, std::uint8_t* bits) {
  std::uint8_t spikes[kTile];
  Word other = 0;
  for (Index i = 0; i < n; ++i) {
    const bool spike = x[i] == one;
    spikes[i] = spike;
    other |= spike ? Word(0) : x[i];
  }
  if (other) return false;
  for (Index i = n; i % 8 != 0; ++i) spikes[i] = 0;
  for (Index i = 0; i < n; i += 8) bits[i / 8] = gather_bits(&spikes[i]);
  return true;
}

template <class Word>
bool pack(Index count, const Word* x, Word one, std::uint8_t* bits, int threads) {
  // What is no spike shows in the first tile as a rule: no thread is woken for it.
  if (!pack_tile(std::min(kTile, count), x, one, bits)) return false;
  std::atomic<bool> binary{true};
  parallel_for(ceil_div(count, kChunk), count < kSerial ? 1 : threads, [&](Index chunk, int) {
    const Index end = std::min((chunk + 1) * kChunk, count);
    for (Index i = chunk * kChunk; i < end; i += kTile) {
      if (!binary.load(std::memory_order_relaxed)) return;
      if (!pack_tile(std::min(kTile, end - i), x + i, one, bits + i / 8)) {
        binary.store(false, std::memory_order_relaxed);
      }
    }
  });
  return binary.load();
}

// Chunks of the result, whatever the rows are: one row may be all of it, or a single element.
template <class Word>
void unpack(const SpikeBits& a, Word one, Word* to, int threads) {
  const Index count = a.outer * a.steps * a.inner;
  const Index bytes_of_step = ceil_div(a.outer * a.inner, 8);
  parallel_for(ceil_div(count, kChunk), count < kSerial ? 1 : threads, [&](Index chunk, int) {
    const Index end = std::min((chunk + 1) * kChunk, count);
    Index i = chunk * kChunk;
    Index row = i / a.inner, within = i % a.inner;
    Index outer = row / a.steps, step = row % a.steps;
    while (i < end) {
      const Index n = std::min(a.inner - within, end - i);
      spread_bits(a.bits + step * bytes_of_step, outer * a.inner + within, n,
                  [&](Index k, bool bit) { to[i + k] = bit ? one : Word(0); });
      i += n;
      within = 0;
      if (++step == a.steps) {
        step = 0;
        ++outer;
      }
    }
  });
}

}  // namespace

bool spike_pack(DType dtype, std::int64_t count, const void* x, std::uint8_t* bits, int threads) {
  bool binary = false;
  visit_dtype(dtype, [&](auto storage) {
    using Spike = SpikeWord<decltype(storage)>;
    using Word = typename Spike::type;
    binary = pack<Word>(count, static_cast<const Word*>(x), Spike::kOne, bits, threads);
  });
  return binary;
}

void spike_unpack(DType dtype, const SpikeBits& bits, void* to, int threads) {
  visit_dtype(dtype, [&](auto storage) {
    using Spike = SpikeWord<decltype(storage)>;
    using Word = typename Spike::type;
    unpack<Word>(bits, Spike::kOne, static_cast<Word*>(to), threads);
  });
}

}  // namespace TRT_ISA
}  // namespace trt
