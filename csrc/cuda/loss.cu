// The temporal loss on the GPU: a group of threads takes a row of logits, all rows in one launch
// each way. The group is a warp, or a block where rows are long.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "../arguments.h"
#include "../math/loss.h"
#include "launch.h"
#include "reduce.h"

namespace trt {
namespace cuda {
namespace {

using Index = std::int64_t;

constexpr Index kWarpClasses = 32 * kWarp;  // the longest row of a warp
constexpr Index kMostBlocks = 1024;         // of the value, whose last block sums over all of them
constexpr int kTogether = 8;                // logits of a thread that are loaded before one is used

template <class F>
constexpr F kInfinity = std::numeric_limits<F>::infinity();

// The sum over a row's threads, in all of them, and one order.
template <int kRowThreads>
__device__ __forceinline__ double sum_row(double value) {
  __shared__ double total;
  if constexpr (kRowThreads == kWarp) {
    return __shfl_sync(0xffffffffu, sum_warp(value), 0);
  } else {
    value = sum_block<kRowThreads>(value);
    if (threadIdx.x == 0) total = value;
    __syncthreads();
    return total;
  }
}

// log sum exp of part of a row: log(scaled) + largest.
template <class F>
struct LogSum {
  F largest = -kInfinity<F>;
  F scaled = F(0);

  // Minus infinity adds nothing.
  __device__ __forceinline__ void add(const F (&logits)[kTogether]) {
    F above = largest;
#pragma unroll
    for (int k = 0; k < kTogether; ++k) above = logits[k] > above ? logits[k] : above;
    // Less itself, minus infinity would be NaN; where there is nothing else, exp takes it as it is.
    const F shift = above == -kInfinity<F> ? F(0) : above;
    scaled = scaled_to(above);
    largest = above;
#pragma unroll
    for (int k = 0; k < kTogether; ++k) scaled += exp_nonpositive(logits[k] - shift);
  }

  // Equal to exp(largest - above), for minus infinity as well.
  __device__ __forceinline__ F scaled_to(F above) const {
    return largest == above ? scaled : scaled * exp_nonpositive(largest - above);
  }

  __device__ __forceinline__ void join(const LogSum& other) {
    const F above = other.largest > largest ? other.largest : largest;
    scaled = scaled_to(above) + other.scaled_to(above);
    largest = above;
  }

  // The difference makes NaN of a row whose largest logit is infinite, as torch does.
  __device__ __forceinline__ F value() const {
    return largest + std::log(scaled) + (largest - largest);
  }
};

template <class F>
__device__ __forceinline__ LogSum<F> join_warp(LogSum<F> sum) {
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    LogSum<F> other;
    other.largest = __shfl_down_sync(0xffffffffu, sum.largest, offset);
    other.scaled = __shfl_down_sync(0xffffffffu, sum.scaled, offset);
    sum.join(other);
  }
  return sum;
}

// log sum exp of a row, in all of its threads.
template <int kRowThreads, class F>
__device__ __forceinline__ F join_row(LogSum<F> sum) {
  sum = join_warp(sum);
  if constexpr (kRowThreads == kWarp) {
    return __shfl_sync(0xffffffffu, sum.value(), 0);
  } else {
    constexpr int kWarps = kRowThreads / kWarp;
    __shared__ F largest[kWarps], scaled[kWarps];
    __syncthreads();  // the row before this one has been read
    if (threadIdx.x % kWarp == 0) {
      largest[threadIdx.x / kWarp] = sum.largest;
      scaled[threadIdx.x / kWarp] = sum.scaled;
    }
    __syncthreads();
    LogSum<F> row;
#pragma unroll 1
    for (int i = 0; i < kWarps; ++i) {
      LogSum<F> other;
      other.largest = largest[i];
      other.scaled = scaled[i];
      row.join(other);
    }
    return row.value();
  }
}

// What a row is compared with: the smoothed target p_c, and its share q_c of the cross entropy.
template <class F>
class Target {
 public:
  __device__ __forceinline__ Target(const LossSettings& s, const LossTensors& a, Index row)
      : classes_(s.classes),
        label_(a.target ? a.target[row % s.batch] : -1),
        class_weight_(static_cast<const F*>(a.class_weight)),
        probabilities_(a.probabilities
                           ? static_cast<const F*>(a.probabilities) + row % s.batch * s.classes
                           : nullptr),
        smoothing_(static_cast<F>(s.label_smoothing)),
        constant_(static_cast<F>(s.constant)),
        spread_(smoothing_ / static_cast<F>(s.classes)),
        to_constant_(s.square_to_constant),
        ignored_(a.target && label_ == s.ignore_index),
        invalid_(a.target && !ignored_ && (label_ < 0 || label_ >= s.classes)) {}

  __device__ __forceinline__ bool ignored() const { return ignored_; }
  __device__ __forceinline__ bool invalid() const { return invalid_; }
  // True if one class alone has a share.
  __device__ __forceinline__ bool is_label() const { return !probabilities_ && smoothing_ == F(0); }
  __device__ __forceinline__ Index label() const { return label_; }

  __device__ __forceinline__ F weight(Index c) const {
    return class_weight_ ? class_weight_[c] : F(1);
  }
  __device__ __forceinline__ F smoothed(Index c) const {
    if (probabilities_) {
      return smoothed_target(probabilities_[c], smoothing_, static_cast<F>(classes_));
    }
    return c == label_ ? spread_ + (F(1) - smoothing_) : spread_;
  }
  // Of the squared term.
  __device__ __forceinline__ F compared(Index c) const {
    return to_constant_ ? constant_ : smoothed(c);
  }
  // torch.nn.functional.cross_entropy weighs the label by its own class and the smoothing by every
  // class.
  __device__ __forceinline__ F share(Index c) const { return weight(c) * smoothed(c); }

  // The sum of all shares of the row, in all of its threads; `lane` is a thread's place among them.
  template <int kRowThreads>
  __device__ __forceinline__ F all_shares(int lane) const {
    if (is_label()) return weight(label_);
    double sum = 0;
    for (Index c = lane; c < classes_; c += kRowThreads) sum += static_cast<double>(share(c));
    return static_cast<F>(sum_row<kRowThreads>(sum));
  }

 private:
  Index classes_, label_;
  const F *class_weight_, *probabilities_;
  F smoothing_, constant_, spread_;
  bool to_constant_, ignored_, invalid_;
};

// The logits of classes c, c + kRowThreads, ..., minus infinity beyond the last. All loads are
// issued before one is used, and before anything is stored.
template <int kRowThreads, class Storage>
__device__ __forceinline__ void load_logits(const Storage* logits, Index c, Index classes,
                                            State<Storage> (&to)[kTogether]) {
  Storage loaded[kTogether];
#pragma unroll
  for (int k = 0; k < kTogether; ++k) {
    if (c + k * kRowThreads < classes) loaded[k] = logits[c + k * kRowThreads];
  }
#pragma unroll
  for (int k = 0; k < kTogether; ++k) {
    to[k] = c + k * kRowThreads < classes ? load(loaded[k]) : -kInfinity<State<Storage>>;
  }
}

__device__ __forceinline__ Index row_start(const LossSettings& s, Index row) {
  return row / s.batch * s.step_stride + row % s.batch * s.batch_stride;
}

// Sums over rows: of the cross entropy and of the squared distance.
struct Sums {
  double entropy = 0, square = 0;
};

// Adds one row, and writes its log sum exp. Every thread of the row has the sums.
template <class Storage, int kRowThreads>
__device__ __forceinline__ void add_row(const LossSettings& s, const LossTensors& a, Index row,
                                        int lane, Sums& sums) {
  using F = State<Storage>;
  const Target<F> target(s, a, row);
  F normalizer = std::numeric_limits<F>::quiet_NaN();
  if (target.invalid()) {
    sums.entropy = sums.square = std::numeric_limits<double>::quiet_NaN();
  } else if (!target.ignored()) {
    const Storage* logits = static_cast<const Storage*>(a.logits) + row_start(s, row);
    // The cross entropy is normalizer * (sum of q) - sum of q O, in double where it may cancel.
    const bool by_shares = s.entropy_ratio != 0 && !target.is_label();
    LogSum<F> log_sum;
    double shares = 0, shared = 0, square = 0;
    for (Index first = lane; first < s.classes; first += kRowThreads * kTogether) {
      F batch[kTogether];
      load_logits<kRowThreads>(logits, first, s.classes, batch);
      log_sum.add(batch);
      if (s.square_ratio == 0 && !by_shares) continue;
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        const Index c = first + k * kRowThreads;
        if (c >= s.classes) break;
        if (s.square_ratio != 0) {
          const F distance = batch[k] - target.compared(c);
          square += static_cast<double>(distance * distance);
        }
        if (by_shares) {
          // A share of 0 is left out, so that a logit of minus infinity costs nothing there.
          const F share = target.share(c);
          shares += static_cast<double>(share);
          if (share != F(0)) shared += static_cast<double>(share) * static_cast<double>(batch[k]);
        }
      }
    }
    normalizer = join_row<kRowThreads>(log_sum);
    if (s.square_ratio != 0) sums.square += sum_row<kRowThreads>(square);
    if (by_shares) {
      shares = sum_row<kRowThreads>(shares);
      shared = sum_row<kRowThreads>(shared);
      sums.entropy += static_cast<double>(normalizer) * shares - shared;
    } else if (s.entropy_ratio != 0) {
      const Index y = target.label();
      const F share = target.weight(y);
      const F entropy = share == F(0) ? F(0) : share * (normalizer - load(logits[y]));
      sums.entropy += static_cast<double>(entropy);
    }
  }
  if (lane == 0) static_cast<F*>(a.log_normalizer)[row] = normalizer;
}

// Divisors of the two means, in the first thread of the block.
template <class F, int kBlock>
__device__ __forceinline__ Sums divisors(const LossSettings& s, const LossTensors& a) {
  const double classes = static_cast<double>(s.classes);
  if (a.probabilities) {
    const double batch = static_cast<double>(s.batch);
    return {batch, batch * classes};
  }
  const F* class_weight = static_cast<const F*>(a.class_weight);
  double weights = 0, rows = 0;
  for (Index b = threadIdx.x; b < s.batch; b += kBlock) {
    const Index y = a.target[b];
    if (y == s.ignore_index) continue;
    rows += 1;
    if (y >= 0 && y < s.classes) weights += class_weight ? double(class_weight[y]) : 1.0;
  }
  weights = sum_block<kBlock>(weights);
  return {weights, sum_block<kBlock>(rows) * classes};
}

__device__ __forceinline__ double mean(double ratio, double sum, double divisor, double steps) {
  return ratio != 0 ? ratio * sum / divisor / steps : 0.0;
}

template <int kRowThreads>
constexpr int kBlockThreads = kRowThreads == kWarp ? kThreads : kRowThreads;

// Blocks of long rows that an SM must have registers for, to have enough loads in flight.
template <class Storage>
constexpr int kLeastBlocks = sizeof(Storage) == 8 ? 1 : 3;

// `partial` [2][blocks] has the sums of every block; `arrived` counts the blocks.
template <class Storage, int kRowThreads>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>, kLeastBlocks<Storage>)
    value_kernel(const LossSettings s, const LossTensors a, double* partial, unsigned* arrived,
                 State<Storage>* out) {
  using F = State<Storage>;
  constexpr int kBlock = kBlockThreads<kRowThreads>;
  constexpr int kRows = kBlock / kRowThreads;  // of a block at a time
  const int lane = threadIdx.x % kRowThreads;
  Sums sums;
  for (Index row = static_cast<Index>(blockIdx.x) * kRows + threadIdx.x / kRowThreads;
       row < s.steps * s.batch; row += static_cast<Index>(gridDim.x) * kRows) {
    add_row<Storage, kRowThreads>(s, a, row, lane, sums);
  }
  const double entropy = sum_block<kBlock>(lane == 0 ? sums.entropy : 0.0);
  const double square = sum_block<kBlock>(lane == 0 ? sums.square : 0.0);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = entropy;
    partial[gridDim.x + blockIdx.x] = square;
  }
  if (!is_last_block(arrived, gridDim.x)) return;
  const Sums all{sum_all<kBlock>(partial, gridDim.x),
                 sum_all<kBlock>(partial + gridDim.x, gridDim.x)};
  const Sums by = divisors<F, kBlock>(s, a);
  if (threadIdx.x != 0) return;
  const double steps = static_cast<double>(s.steps);
  *out = static_cast<F>(mean(s.entropy_ratio, all.entropy, by.entropy, steps) +
                        mean(s.square_ratio, all.square, by.square, steps));
  static_cast<F*>(a.divisors)[0] = static_cast<F>(by.entropy);
  static_cast<F*>(a.divisors)[1] = static_cast<F>(by.square);
}

template <class Storage, int kRowThreads>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>)
    gradient_kernel(const LossSettings s, const LossTensors a, const State<Storage>* upstream,
                    Storage* grad) {
  using F = State<Storage>;
  constexpr int kRows = kBlockThreads<kRowThreads> / kRowThreads;
  const int lane = threadIdx.x % kRowThreads;
  const Index row = static_cast<Index>(blockIdx.x) * kRows + threadIdx.x / kRowThreads;
  if (row >= s.steps * s.batch) return;
  const Target<F> target(s, a, row);
  const Index start = row_start(s, row);
  Storage* to = grad + start;
  if (target.ignored() || target.invalid()) {
    const F fill = target.invalid() ? std::numeric_limits<F>::quiet_NaN() : F(0);
    for (Index c = lane; c < s.classes; c += kRowThreads) store(&to[c], fill);
    return;
  }
  const Storage* logits = static_cast<const Storage*>(a.logits) + start;
  const F* by = static_cast<const F*>(a.divisors);
  const double from_above = static_cast<double>(*upstream), steps = static_cast<double>(s.steps);
  const F entropy_scale = static_cast<F>(mean(s.entropy_ratio, from_above, by[0], steps));
  const F square_scale = static_cast<F>(mean(s.square_ratio, from_above, by[1], steps));
  const F normalizer = static_cast<const F*>(a.log_normalizer)[row];
  const F all_shares = entropy_scale != F(0) ? target.template all_shares<kRowThreads>(lane) : F(0);
  for (Index first = lane; first < s.classes; first += kRowThreads * kTogether) {
    F batch[kTogether];
    load_logits<kRowThreads>(logits, first, s.classes, batch);
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const Index c = first + k * kRowThreads;
      if (c >= s.classes) break;
      F sum = F(0);
      // A term of weight 0 is left out: infinite logits would make NaN of it.
      if (entropy_scale != F(0)) {
        sum += entropy_scale * entropy_gradient(batch[k], normalizer, target.share(c), all_shares);
      }
      if (square_scale != F(0)) sum += square_scale * square_gradient(batch[k], target.compared(c));
      store(&to[c], sum);
    }
  }
}

// Calls f(Storage(), integral_constant of the threads of a row).
template <class Function>
void visit_kernel(const LossSettings& s, Function&& f) {
  visit_dtype(s.dtype, [&](auto storage) {
    if (s.classes <= kWarpClasses) {
      f(storage, std::integral_constant<int, kWarp>());
    } else {
      f(storage, std::integral_constant<int, kRowThreads>());
    }
  });
}

}  // namespace

std::int64_t loss_workspace(const LossSettings&) {
  return kArrivedBytes + 2 * kMostBlocks * static_cast<Index>(sizeof(double));
}

void loss_value(const LossSettings& s, const LossTensors& a, void* out, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  char* space = static_cast<char*>(queue.workspace);
  check(cudaMemsetAsync(space, 0, kArrivedBytes, static_cast<cudaStream_t>(queue.stream)),
        "clearing a counter");
  visit_kernel(s, [&](auto storage, auto row_threads) {
    using Storage = decltype(storage);
    constexpr int kOfRow = decltype(row_threads)::value;
    constexpr int kBlock = kBlockThreads<kOfRow>;
    // No row at all is a block's work too: the mean over nothing.
    const Index wanted = ceil_div(s.steps * s.batch, kBlock / kOfRow);
    const Index blocks = std::max<Index>(1, std::min(wanted, kMostBlocks));
    TRT_LAUNCH("temporal_loss value", (value_kernel<Storage, kOfRow>), blocks, kBlock, 0,
               queue.stream, s, a, reinterpret_cast<double*>(space + kArrivedBytes),
               reinterpret_cast<unsigned*>(space), static_cast<State<Storage>*>(out));
  });
}

void loss_gradient(const LossSettings& s, const LossTensors& a, const void* upstream, void* grad,
                   const Queue& queue) {
  if (s.steps * s.batch == 0) return;
  const DeviceGuard guard(queue.device);
  visit_kernel(s, [&](auto storage, auto row_threads) {
    using Storage = decltype(storage);
    constexpr int kOfRow = decltype(row_threads)::value;
    constexpr int kBlock = kBlockThreads<kOfRow>;
    TRT_LAUNCH("temporal_loss gradient", (gradient_kernel<Storage, kOfRow>),
               ceil_div(s.steps * s.batch, kBlock / kOfRow), kBlock, 0, queue.stream, s, a,
               static_cast<const State<Storage>*>(upstream), static_cast<Storage*>(grad));
  });
}

}  // namespace cuda
}  // namespace trt
