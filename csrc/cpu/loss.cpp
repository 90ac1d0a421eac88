// The temporal loss on the CPU: every row of every step once, each way.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "../math/loss.h"
#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace trt {
inline namespace TRT_ISA {
namespace {

using Index = std::int64_t;

constexpr Index kBlockElements = 8 * 1024;         // logits of one partial sum
constexpr Index kSerial = serial_below(8 * 1024);  // logits

// Divisors of the two means; both are the same for every step.
struct Means {
  double entropy;  // sum of the targets' class weights, or the batch for probabilities
  double square;   // rows that count, times classes
};

template <class F>
Means make_means(const LossSettings& s, const LossTensors& a) {
  const F* class_weight = static_cast<const F*>(a.class_weight);
  if (a.probabilities) return {double(s.batch), double(s.batch) * double(s.classes)};
  double weights = 0, rows = 0;
  for (Index b = 0; b < s.batch; ++b) {
    const Index y = a.target[b];
    if (y == s.ignore_index) continue;
    rows += 1;
    if (y >= 0 && y < s.classes) weights += class_weight ? double(class_weight[y]) : 1.0;
  }
  return {weights, rows * double(s.classes)};
}

// One row's shares q, smoothed targets p, and logits in the sum's type.
template <class F>
struct Row {
  F *logits, *share, *target, *work;
  double all_shares;
  bool ignored, invalid;
};

template <class Storage, class F>
const Storage* row_of(const LossSettings& s, const Storage* base, Index row) {
  return base + row / s.batch * s.step_stride + row % s.batch * s.batch_stride;
}

template <class Storage, class F>
void load_row(const LossSettings& s, const LossTensors& a, Index index, Row<F>& row) {
  const Index n = s.classes, b = index % s.batch;
  const F smoothing = static_cast<F>(s.label_smoothing), classes = static_cast<F>(n);
  const F* class_weight = static_cast<const F*>(a.class_weight);
  const F* probabilities = static_cast<const F*>(a.probabilities);
  const Index y = a.target ? a.target[b] : 0;
  row.ignored = a.target && y == s.ignore_index;
  row.invalid = a.target && !row.ignored && (y < 0 || y >= n);
  if (row.ignored || row.invalid) return;

  const Storage* from = row_of<Storage, F>(s, static_cast<const Storage*>(a.logits), index);
  for (Index c = 0; c < n; ++c) row.logits[c] = load(from[c]);
  if (probabilities) {
    for (Index c = 0; c < n; ++c) {
      row.target[c] = smoothed_target(probabilities[b * n + c], smoothing, classes);
    }
    for (Index c = 0; c < n; ++c) {
      row.share[c] = class_weight ? class_weight[c] * row.target[c] : row.target[c];
    }
  } else {
    // torch.nn.functional.cross_entropy weighs the label by its own class and the smoothing by
    // every class.
    const F spread = smoothed_target(F(0), smoothing, classes);
    for (Index c = 0; c < n; ++c) row.target[c] = spread;
    for (Index c = 0; c < n; ++c) row.share[c] = class_weight ? class_weight[c] * spread : spread;
    row.target[y] += F(1) - smoothing;
    row.share[y] += (F(1) - smoothing) * (class_weight ? class_weight[y] : F(1));
  }
  if (s.square_to_constant) std::fill_n(row.target, n, static_cast<F>(s.constant));
  row.all_shares = sum_row(n, row.share);
}

template <class F>
F log_normalizer(Row<F>& row, Index n) {
  const F largest = max_row(n, row.logits, -std::numeric_limits<F>::infinity());
  for (Index c = 0; c < n; ++c) row.work[c] = exp_nonpositive(row.logits[c] - largest);
  return largest + static_cast<F>(std::log(sum_row(n, row.work)));
}

// Shares of 0 are left out, so that a logit of minus infinity costs nothing where it has no target.
template <class F>
double cross_entropy(Row<F>& row, Index n, F normalizer) {
  for (Index c = 0; c < n; ++c) {
    row.work[c] = row.share[c] == F(0) ? F(0) : row.share[c] * (normalizer - row.logits[c]);
  }
  return sum_row(n, row.work);
}

template <class F>
double squared_distance(Row<F>& row, Index n) {
  for (Index c = 0; c < n; ++c) {
    const F distance = row.logits[c] - row.target[c];
    row.work[c] = distance * distance;
  }
  return sum_row(n, row.work);
}

template <class F>
void add_entropy_gradient(Index n, const F* __restrict__ logits, const F* __restrict__ share,
                          F normalizer, F all_shares, F scale, F* __restrict__ sum) {
  for (Index c = 0; c < n; ++c) {
    sum[c] += scale * entropy_gradient(logits[c], normalizer, share[c], all_shares);
  }
}

template <class F>
void add_square_gradient(Index n, const F* __restrict__ logits, const F* __restrict__ target,
                         F scale, F* __restrict__ sum) {
  for (Index c = 0; c < n; ++c) sum[c] += scale * square_gradient(logits[c], target[c]);
}

// Calls f(index, row) for every row, blocks of rows over threads.
template <class F, class Function>
void for_rows(const LossSettings& s, int threads, Function&& f) {
  const Index rows = s.steps * s.batch, n = s.classes;
  const Index height = std::max<Index>(1, kBlockElements / n);
  if (rows * n < kSerial) threads = 1;
  const Scratch<F> scratch(4 * n, threads);
  parallel_for((rows + height - 1) / height, threads, [&](Index block, int thread) {
    F* logits = scratch.of(thread);
    Row<F> row{logits, logits + n, logits + 2 * n, logits + 3 * n, 0, false, false};
    for (Index i = block * height; i < std::min(rows, (block + 1) * height); ++i) f(i, row);
  });
}

template <class Storage>
double value(const LossSettings& s, const LossTensors& a, int threads) {
  using F = State<Storage>;
  const Index n = s.classes;
  const Means means = make_means<F>(s, a);
  std::vector<double> entropy(s.steps * s.batch), square(s.steps * s.batch);
  for_rows<F>(s, threads, [&](Index index, Row<F>& row) {
    F& normalizer = static_cast<F*>(a.log_normalizer)[index];
    normalizer = std::numeric_limits<F>::quiet_NaN();
    load_row<Storage>(s, a, index, row);
    if (row.ignored) return;
    if (row.invalid) {
      entropy[index] = square[index] = std::numeric_limits<double>::quiet_NaN();
      return;
    }
    normalizer = log_normalizer(row, n);
    if (s.entropy_ratio != 0) entropy[index] = cross_entropy(row, n, normalizer);
    if (s.square_ratio != 0) square[index] = squared_distance(row, n);
  });
  const double steps = static_cast<double>(s.steps);
  double total = 0;
  if (s.entropy_ratio != 0) {
    total += s.entropy_ratio * sum_row(s.steps * s.batch, entropy.data()) / means.entropy / steps;
  }
  if (s.square_ratio != 0) {
    total += s.square_ratio * sum_row(s.steps * s.batch, square.data()) / means.square / steps;
  }
  return total;
}

template <class Storage>
void gradient(const LossSettings& s, const LossTensors& a, double upstream, void* grad,
              int threads) {
  using F = State<Storage>;
  const Index n = s.classes;
  const Means means = make_means<F>(s, a);
  const double steps = static_cast<double>(s.steps);
  const F entropy_scale = s.entropy_ratio != 0
                              ? static_cast<F>(upstream * s.entropy_ratio / means.entropy / steps)
                              : F(0);
  const F square_scale =
      s.square_ratio != 0 ? static_cast<F>(upstream * s.square_ratio / means.square / steps) : F(0);
  for_rows<F>(s, threads, [&](Index index, Row<F>& row) {
    load_row<Storage>(s, a, index, row);
    Storage* to =
        const_cast<Storage*>(row_of<Storage, F>(s, static_cast<const Storage*>(grad), index));
    if (row.ignored || row.invalid) {
      const F fill = row.invalid ? std::numeric_limits<F>::quiet_NaN() : F(0);
      for (Index c = 0; c < n; ++c) store(&to[c], fill);
      return;
    }
    std::fill_n(row.work, n, F(0));
    // A term of weight 0 is left out: infinite logits would make NaN of it.
    if (entropy_scale != F(0)) {
      const F normalizer = static_cast<const F*>(a.log_normalizer)[index];
      add_entropy_gradient(n, row.logits, row.share, normalizer, static_cast<F>(row.all_shares),
                           entropy_scale, row.work);
    }
    if (square_scale != F(0)) {
      add_square_gradient(n, row.logits, row.target, square_scale, row.work);
    }
    for (Index c = 0; c < n; ++c) store(&to[c], row.work[c]);
  });
}

}  // namespace

double loss_value(const LossSettings& settings, const LossTensors& tensors, int threads) {
  double result = 0;
  visit_dtype(settings.dtype,
              [&](auto storage) { result = value<decltype(storage)>(settings, tensors, threads); });
  return result;
}

void loss_gradient(const LossSettings& settings, const LossTensors& tensors, double upstream,
                   void* grad, int threads) {
  visit_dtype(settings.dtype, [&](auto storage) {
    gradient<decltype(storage)>(settings, tensors, upstream, grad, threads);
  });
}

}  // namespace TRT_ISA
}  // namespace trt
