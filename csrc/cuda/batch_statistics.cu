// Mean and deviation of every channel over everything else: a pass of sums, and a small kernel.
#include "../arguments.h"
#include "launch.h"
#include "vector.h"
#include "walk.h"

namespace trt {
namespace cuda {
namespace {

using Index = std::int64_t;

// Loads in flight: the sums need little else.
constexpr int kTogether = 4;

// Sums of x and of its square, less the channel's first number; partial [2][chunks][channels].
template <class Storage, int kWidth, bool kTiles>
__global__ void __launch_bounds__(kThreads)
    moments_kernel(const Storage* x, const Walk walk, double* partial) {
  using F = State<Storage>;
  constexpr int kCount = kTiles ? kWidth : 1;
  using Elements = Vector<Storage, kWidth>;
  F shift[kCount];
  const Spot first = spot<kWidth>(walk, 0);
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const Index channel = first.channel + j;
    shift[j] = channel < walk.channels ? load(x[channel * walk.stride]) : F(0);
  }
  double sums[kCount] = {}, squares[kCount] = {};
  for (int item = 0; item < walk.items; item += kTogether) {
    Elements elements[kTogether] = {};
    bool exists[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const Spot here = spot<kWidth>(walk, item + i);
      exists[i] = item + i < walk.items && here.exists;
      if (exists[i]) elements[i] = *reinterpret_cast<const Elements*>(x + here.index);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (!exists[i]) continue;
      F values[kWidth];
      unpack(elements[i], values);
      // A few numbers in the state's type, whose sums then go into doubles.
      F sum[kCount] = {}, square[kCount] = {};
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const int c = kTiles ? j : 0;
        const F d = values[j] - shift[c];
        sum[c] += d;
        square[c] = fast_multiply_add(d, d, square[c]);
      }
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        sums[c] += sum[c];
        squares[c] += square[c];
      }
    }
  }
  sum_by_channel(walk, 0, sums, partial);
  sum_by_channel(walk, 1, squares, partial);
}

template <class Storage>
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(const Statistics a, const double* sums) {
  const Index channel = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (channel >= a.channels) return;
  const double shift = load(static_cast<const Storage*>(a.x)[channel * a.within]);
  write_statistics<State<Storage>>(a, channel, shift, sums[channel], sums[a.channels + channel]);
}

Index count(const Statistics& a) { return a.before * a.channels * a.within; }

// Calls f(width, whether a thread's neighbours are channels).
template <class Storage, class Function>
void visit_walk(const Statistics& a, Function&& f) {
  constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(Storage));
  const bool fits = aligned<Storage, kWidth>(a.x);
  const std::integral_constant<int, kWidth> full;
  if (a.within == 1 && a.channels > 1 && a.channels % kWidth == 0 && fits) {
    f(full, std::true_type());
  } else if (a.within % kWidth == 0 && fits) {
    f(full, std::false_type());
  } else {
    f(std::integral_constant<int, 1>(), std::false_type());
  }
}

template <class Storage>
void run(const Statistics& a, const Queue& queue) {
  visit_walk<Storage>(a, [&](auto width, auto tiles) {
    constexpr int kWidth = decltype(width)::value;
    constexpr bool kTiles = decltype(tiles)::value;
    const Walk walk = make_walk<kWidth>(count(a), a.channels, a.within);
    double* sums = static_cast<double*>(queue.workspace);
    double* partial = sums + 2 * a.channels;
    TRT_LAUNCH("batch statistics", (moments_kernel<Storage, kWidth, kTiles>), walk.blocks(),
               kThreads, 0, queue.stream, static_cast<const Storage*>(a.x), walk, partial);
    TRT_LAUNCH("channel sums", (channel_sums_kernel<double, double>),
               2 * ceil_div(a.channels, kWarp), kRowThreads, 0, queue.stream,
               static_cast<const double*>(partial), walk.chunks, a.channels, sums,
               static_cast<double*>(nullptr), 1.0);
    TRT_LAUNCH("batch statistics", statistics_kernel<Storage>, ceil_div(a.channels, kThreads),
               kThreads, 0, queue.stream, a, static_cast<const double*>(sums));
  });
}

}  // namespace

std::int64_t batch_statistics_workspace(const Statistics& a) {
  if (count(a) == 0) return 0;
  Index chunks = 0;
  visit_dtype(a.dtype, [&](auto storage) {
    visit_walk<decltype(storage)>(a, [&](auto width, auto) {
      chunks = make_walk<decltype(width)::value>(count(a), a.channels, a.within).chunks;
    });
  });
  return 2 * a.channels * (chunks + 1) * static_cast<Index>(sizeof(double));
}

void batch_statistics(const Statistics& a, const Queue& queue) {
  if (count(a) == 0) return;
  const DeviceGuard guard(queue.device);
  visit_dtype(a.dtype, [&](auto storage) { run<decltype(storage)>(a, queue); });
}

}  // namespace cuda
}  // namespace trt
