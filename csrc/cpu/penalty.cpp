// The TRT weight regularizer on the CPU: all tensors and all T terms in one pass each way.
//
// A term costs a division, and divisions would decide the time. Terms are taken in groups whose
// denominators are multiplied, so that one division inverts the whole group.
#include <algorithm>
#include <type_traits>

#include "../math/regularizer.h"
#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace trt {
inline namespace TRT_ISA {
namespace {

using Index = std::int64_t;

constexpr Index kBlock = 1024;         // elements that stay in the first-level cache
constexpr Index kChunk = 16 * kBlock;  // elements of one partial sum
constexpr Index kSerial = serial_below(16 * 1024);
constexpr int kGroup = 4;

struct Chunk {
  const PenaltyTensor* tensor;
  Index begin, end;
};

std::vector<Chunk> make_chunks(const std::vector<PenaltyTensor>& tensors) {
  std::vector<Chunk> chunks;
  for (const PenaltyTensor& tensor : tensors) {
    for (Index begin = 0; begin < tensor.size; begin += kChunk) {
      chunks.push_back({&tensor, begin, std::min(begin + kChunk, tensor.size)});
    }
  }
  return chunks;
}

// 1 / d for kCount denominators with a single division.
template <int kCount, class F>
TRT_HD void invert(const F (&d)[kCount], F (&inverse)[kCount]) {
  F product[kCount];
  product[0] = d[0];
  for (int k = 1; k < kCount; ++k) product[k] = product[k - 1] * d[k];
  F rest = F(1) / product[kCount - 1];
  for (int k = kCount - 1; k > 0; --k) {
    inverse[k] = rest * product[k - 1];
    rest *= d[k];
  }
  inverse[0] = rest;
}

// The terms of the sum over t, in the state's type.
template <class F>
struct Terms {
  std::vector<F> growth, offset;
  F eps;

  explicit Terms(const PenaltySettings& settings) : eps(static_cast<F>(settings.eps)) {
    for (double g : settings.growth) {
      growth.push_back(static_cast<F>(g));
      offset.push_back(static_cast<F>(1 + g * settings.eps));
    }
  }
};

// The terms in both state types, made before the threads start.
struct AllTerms {
  Terms<float> single;
  Terms<double> twice;

  explicit AllTerms(const PenaltySettings& settings) : single(settings), twice(settings) {}
  const Terms<float>& of(float) const { return single; }
  const Terms<double>& of(double) const { return twice; }
};

// Adds the kCount terms from t on to `sum`: those of the value over w^2, or of the gradient over w.
template <bool kGradient, int kCount, class F>
void add_group(Index n, const F* __restrict__ a, const Terms<F>& terms, std::size_t t,
               F* __restrict__ sum) {
  F growth[kCount], offset[kCount];
  for (int k = 0; k < kCount; ++k) {
    growth[k] = terms.growth[t + k];
    offset[k] = terms.offset[t + k];
  }
  for (Index i = 0; i < n; ++i) {
    F d[kCount];
    for (int k = 0; k < kCount; ++k) d[k] = weight_denominator(a[i], growth[k], offset[k]);
    if (kGradient) {
      F inverse[kCount], added = F(0);
      invert(d, inverse);
      for (int k = 0; k < kCount; ++k) {
        added = add_weight_slope(added, d[k], inverse[k], offset[k]);
      }
      sum[i] += added;
    } else {
      // 1/d_0 + 1/d_1 + ... over one denominator, which the next d multiplies.
      F above = F(1), below = d[0];
#pragma GCC unroll 4  // or the loop over i is not vectorised
      for (int k = 1; k < kCount; ++k) {
        above = fast_multiply_add(above, d[k], below);
        below *= d[k];
      }
      sum[i] += above / below;
    }
  }
}

// Sum over t of 1/d_t (value) or of the slope (gradient), for a block of |w|.
template <bool kGradient, class F>
void add_terms(Index n, const F* a, const Terms<F>& terms, F* sum) {
  // A group's product must stay finite for the largest weight of this block.
  const std::vector<F>& growth = terms.growth;
  const F largest = max_row(n, a, F(0)) + terms.eps;
  const F limit = sizeof(F) == 4 ? F(1e36) : F(1e300);
  std::fill_n(sum, n, F(0));
  for (std::size_t t = 0; t < growth.size();) {
    int count = 1;
    F product = F(1) + growth[t] * largest;
    while (count < kGroup && t + count < growth.size()) {
      product *= F(1) + growth[t + count] * largest;
      if (!(product < limit)) break;
      ++count;
    }
    switch (count) {
      case 4:
        add_group<kGradient, 4>(n, a, terms, t, sum);
        break;
      case 3:
        add_group<kGradient, 3>(n, a, terms, t, sum);
        break;
      case 2:
        add_group<kGradient, 2>(n, a, terms, t, sum);
        break;
      default:
        add_group<kGradient, 1>(n, a, terms, t, sum);
    }
    t += count;
  }
}

template <class F, class Storage>
const F* load_block(const Storage* from, Index n, F* buffer) {
  if constexpr (std::is_same<F, Storage>::value) {
    return from;
  } else {
    for (Index i = 0; i < n; ++i) buffer[i] = load(from[i]);
    return buffer;
  }
}

template <class Storage>
double value_of(const AllTerms& all, const Chunk& chunk) {
  using F = State<Storage>;
  const Terms<F>& terms = all.of(F());
  const Storage* weight = static_cast<const Storage*>(chunk.tensor->weight);
  F w_buffer[kBlock], a[kBlock], sum[kBlock];
  double total = 0;
  for (Index begin = chunk.begin; begin < chunk.end; begin += kBlock) {
    const Index n = std::min(kBlock, chunk.end - begin);
    const F* w = load_block(weight + begin, n, w_buffer);
    for (Index i = 0; i < n; ++i) a[i] = absolute(w[i]);
    add_terms<false>(n, a, terms, sum);
    for (Index i = 0; i < n; ++i) sum[i] *= a[i] * a[i];
    total += sum_row(n, sum);
  }
  return total;
}

template <class Storage>
void write_gradient(const AllTerms& all, const Chunk& chunk, double factor) {
  using F = State<Storage>;
  const Terms<F>& terms = all.of(F());
  const F scale = static_cast<F>(factor);
  const Storage* weight = static_cast<const Storage*>(chunk.tensor->weight);
  Storage* grad = static_cast<Storage*>(chunk.tensor->grad);
  F w_buffer[kBlock], a[kBlock], sum[kBlock];
  for (Index begin = chunk.begin; begin < chunk.end; begin += kBlock) {
    const Index n = std::min(kBlock, chunk.end - begin);
    const F* w = load_block(weight + begin, n, w_buffer);
    for (Index i = 0; i < n; ++i) a[i] = absolute(w[i]);
    add_terms<true>(n, a, terms, sum);
    Storage* to = grad + begin;
    if (chunk.tensor->accumulate) {
      for (Index i = 0; i < n; ++i) store(&to[i], load(to[i]) + scale * w[i] * sum[i]);
    } else {
      for (Index i = 0; i < n; ++i) store(&to[i], scale * w[i] * sum[i]);
    }
  }
}

int useful_threads(const std::vector<Chunk>& chunks, int threads) {
  Index size = 0;
  for (const Chunk& chunk : chunks) size += chunk.end - chunk.begin;
  return size < kSerial ? 1 : threads;
}

}  // namespace

double penalty_value(const PenaltySettings& settings, const std::vector<PenaltyTensor>& tensors,
                     int threads) {
  const std::vector<Chunk> chunks = make_chunks(tensors);
  const AllTerms terms(settings);
  std::vector<double> partial(chunks.size());
  parallel_for(static_cast<Index>(chunks.size()), useful_threads(chunks, threads),
               [&](Index index, int) {
                 visit_dtype(chunks[index].tensor->dtype, [&](auto storage) {
                   partial[index] = value_of<decltype(storage)>(terms, chunks[index]);
                 });
               });
  double total = 0;
  for (double sum : partial) total += sum;
  return settings.scale * total;
}

void penalty_gradient(const PenaltySettings& settings, const std::vector<PenaltyTensor>& tensors,
                      double upstream, int threads) {
  const std::vector<Chunk> chunks = make_chunks(tensors);
  const AllTerms terms(settings);
  parallel_for(
      static_cast<Index>(chunks.size()), useful_threads(chunks, threads), [&](Index index, int) {
        visit_dtype(chunks[index].tensor->dtype, [&](auto storage) {
          write_gradient<decltype(storage)>(terms, chunks[index], settings.scale * upstream);
        });
      });
}

}  // namespace TRT_ISA
}  // namespace trt
