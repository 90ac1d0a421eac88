// Which numbers of a tensor [before][channels][stride] a thread takes where sums are wanted by
// channel, and how the sums of blocks become those of channels, in an order of shapes alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../arguments.h"
#include "launch.h"
#include "reduce.h"

namespace trt {
namespace cuda {

// A block takes a chunk of one channel, in runs of `stride` neighbours. Where channels themselves
// are neighbours (stride 1), it takes a chunk of a tile of channels: its threads are `lanes` across
// channels times kThreads / lanes across the rest. A thread takes kWidth neighbours, `items` times.
struct Walk {
  std::int64_t channels, stride, of_channel;  // numbers of a channel
  std::int64_t chunks;
  int items, lanes;  // lanes is 0 for a channel a block

  std::int64_t across;  // channels, or tiles

  std::int64_t blocks() const { return chunks * across; }
  // Threads that share a channel, within a block of a tile.
  TRT_HD int rows() const { return kThreads / lanes; }
};

constexpr int kMostItems = 64;  // of a thread

template <int kWidth>
Walk make_walk(std::int64_t count, std::int64_t channels, std::int64_t stride) {
  Walk walk{channels, stride, count / channels, 1, 1, 0, channels};
  std::int64_t groups = ceil_div(walk.of_channel, kThreads * kWidth);
  if (stride == 1 && channels > 1) {
    walk.lanes = 1;
    while (walk.lanes < kWarp && walk.lanes * kWidth < channels) walk.lanes *= 2;
    walk.across = ceil_div(channels, walk.lanes * kWidth);
    groups = ceil_div(walk.of_channel, walk.rows());
  }
  const std::int64_t items = ceil_div(groups * walk.across, kMostWalkBlocks);
  walk.items = static_cast<int>(std::min<std::int64_t>(items, kMostItems));
  walk.chunks = ceil_div(groups, walk.items);
  return walk;
}

// The first of kWidth numbers, and its channel.
struct Spot {
  bool exists;
  std::int64_t index, channel;
};

template <int kWidth>
__device__ __forceinline__ Spot spot(const Walk& walk, int item) {
  const std::int64_t chunk = blockIdx.x % walk.chunks, part = blockIdx.x / walk.chunks;
  const std::int64_t group = chunk * walk.items + item;
  if (walk.lanes == 0) {
    const std::int64_t k = (group * kThreads + threadIdx.x) * kWidth;
    const std::int64_t run = k / walk.stride;
    return {k < walk.of_channel, (run * walk.channels + part) * walk.stride + k % walk.stride,
            part};
  }
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % walk.lanes, row = thread / walk.lanes;
  const std::int64_t channel = (part * walk.lanes + lane) * kWidth;
  const std::int64_t position = group * walk.rows() + row;
  return {channel < walk.channels && position < walk.of_channel, position * walk.channels + channel,
          channel};
}

// partial[row][chunk][channel] = the sum over the block. `values` are a thread's own sums: of its
// kCount channels where it has several, else of the one.
template <int kCount>
__device__ __forceinline__ void sum_by_channel(const Walk& walk, int row, double (&values)[kCount],
                                               double* partial) {
  const std::int64_t chunk = blockIdx.x % walk.chunks, part = blockIdx.x / walk.chunks;
  double* to = partial + (row * walk.chunks + chunk) * walk.channels;
  if (walk.lanes == 0) {
    const double total = sum_block<kThreads>(values[0]);
    if (threadIdx.x == 0) to[part] = total;
    return;
  }
  __shared__ double shared[kThreads];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % walk.lanes;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    __syncthreads();
    shared[thread] = values[j];
    __syncthreads();
    const std::int64_t channel = (part * walk.lanes + lane) * kCount + j;
    if (thread < walk.lanes && channel < walk.channels) {
      double total = 0;
      for (int i = lane; i < kThreads; i += walk.lanes) total += shared[i];
      to[channel] = total;
    }
  }
}

// out[row][channel] = the sum over `parts` of partial[row][part][channel], and also[row][channel]
// that times `scale`; either may be null. A block takes 32 channels of a row.
constexpr int kSumParts = kRowThreads / kWarp;
template <class Partial, class F>
__global__ void __launch_bounds__(kRowThreads)
    channel_sums_kernel(const Partial* partial, std::int64_t parts, std::int64_t channels, F* out,
                        F* also, double scale) {
  __shared__ double shared[kRowThreads];
  const std::int64_t across = (channels + kWarp - 1) / kWarp;
  const std::int64_t row = blockIdx.x / across;
  const std::int64_t channel = blockIdx.x % across * kWarp + threadIdx.x % kWarp;
  double sum = 0;
  if (channel < channels) {
    const Partial* from = partial + row * parts * channels + channel;
#pragma unroll 8
    for (std::int64_t part = threadIdx.x / kWarp; part < parts; part += kSumParts) {
      sum += static_cast<double>(from[part * channels]);
    }
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x < kWarp && channel < channels) {
    double total = 0;
    for (int i = threadIdx.x; i < kRowThreads; i += kWarp) total += shared[i];
    if (out) out[row * channels + channel] = static_cast<F>(total);
    if (also) also[row * channels + channel] = static_cast<F>(total * scale);
  }
}

}  // namespace cuda
}  // namespace trt
