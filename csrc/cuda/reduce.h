// Sums in one order, whatever the number of blocks that run at a time.
#pragma once

#include <cstdint>

#include "launch.h"

namespace trt {
namespace cuda {

// A binary tree over neighbours.
template <int kCount>
__device__ __forceinline__ double sum_pairs(double (&values)[kCount]) {
#pragma unroll
  for (int step = 1; step < kCount; step *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2 * step) values[i] += values[i + step];
  }
  return values[0];
}

// The sum over a warp, in its first thread.
__device__ __forceinline__ double sum_warp(double value) {
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  return value;
}

// The sum over a block of kCount threads, in its first thread.
template <int kCount>
__device__ __forceinline__ double sum_block(double value) {
  __shared__ double of_warp[kCount / kWarp];
  value = sum_warp(value);
  __syncthreads();  // the sum before this one has been read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sums[kCount / kWarp];
#pragma unroll
  for (int i = 0; i < kCount / kWarp; ++i) sums[i] = of_warp[i];
  return sum_pairs(sums);
}

// The sum of `count` numbers by a block of kCount threads, in its first thread. Several loads are
// issued together: nothing else hides the latency of a block that works alone.
template <int kCount>
__device__ __forceinline__ double sum_all(const double* values, std::int64_t count) {
  constexpr int kTogether = 8;
  double total = 0;
  for (std::int64_t first = threadIdx.x; first < count; first += kCount * kTogether) {
    double part[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const std::int64_t index = first + i * kCount;
      part[i] = index < count ? values[index] : 0.0;
    }
    total += sum_pairs(part);
  }
  return sum_block<kCount>(total);
}

// What a counter of blocks takes of a workspace, so that doubles may follow.
constexpr std::int64_t kArrivedBytes = sizeof(double);

// True for all threads of the last of `blocks` blocks to come here, which sees what the first
// thread of the others wrote before: no other thread may have written. `arrived` was 0 before the
// launch, in memory of this call alone, so that neither another stream nor an aborted kernel can
// disturb the count.
__device__ __forceinline__ bool is_last_block(unsigned* arrived, unsigned blocks) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(arrived, 1u) == blocks - 1;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

}  // namespace cuda
}  // namespace trt
