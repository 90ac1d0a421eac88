// Runs CUDA kernels on the host, from their own source: include this before a .cu file.
//
// The blocks of a launch run one after the other. The threads of a block are real threads, so that
// barriers and shuffles work and ThreadSanitizer sees races between them; where a test says that a
// kernel needs neither, they run one after the other too, which is much faster.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>

#define TRT_CUDA_ON_HOST
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One copy serves, since no two blocks run at a time.
#define __shared__ static
#define TRT_DYNAMIC_SHARED(name) unsigned char* name = cuda_on_host::dynamic_shared()
#define TRT_LAUNCH(name, kernel, blocks, threads, shared_bytes, stream, ...) \
  cuda_on_host::launch(name, blocks, threads, shared_bytes, stream, [&] { kernel(__VA_ARGS__); })

namespace trt {
namespace cuda {
// Two warps, or four for a block that works alone: small, as every thread costs a real one.
constexpr int kWarp = 8;
constexpr int kThreads = 16;
constexpr int kMostThreads = 32;
}  // namespace cuda
}  // namespace trt

// The part of the runtime that the kernels' launchers use.

using cudaStream_t = void*;

namespace cuda_on_host {

inline bool concurrent = true;             // set by the test, for the launches to come
inline cudaStream_t the_stream = nullptr;  // where everything must go

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s\n", what);
  std::abort();
}

inline void check_stream(cudaStream_t stream) {
  if (stream != the_stream) fail("work on another stream");
}

}  // namespace cuda_on_host

enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  cuda_on_host::check_stream(stream);
  std::memset(to, value, bytes);
  return cudaSuccess;
}

// What a thread knows of its place.

struct HostIndex {
  unsigned x = 0;
};
inline thread_local HostIndex threadIdx, blockIdx;
inline HostIndex blockDim, gridDim;

namespace cuda_on_host {

class Barrier {
 public:
  void wait(unsigned threads) {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned round = round_;
    if (++arrived_ == threads) {
      arrived_ = 0;
      ++round_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return round_ != round; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  unsigned arrived_ = 0, round_ = 0;
};

constexpr int kMostWarps = trt::cuda::kMostThreads / trt::cuda::kWarp;
inline Barrier of_block, of_warp[kMostWarps];
inline double shuffled[trt::cuda::kMostThreads];

// Dynamic shared memory starts as NaN, and ends where the launch said, for AddressSanitizer.
inline std::vector<double> shared_memory;
inline unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>(shared_memory.data());
}

inline void launch(const char* name, std::int64_t blocks, int threads, int shared_bytes,
                   cudaStream_t stream, const std::function<void()>& kernel) {
  if (blocks < 1 || threads < 1 || threads > trt::cuda::kMostThreads || shared_bytes % 8 != 0) {
    std::fprintf(stderr, "%s: %lld blocks, %d threads, %d bytes\n", name,
                 static_cast<long long>(blocks), threads, shared_bytes);
    fail("a launch of impossible size");
  }
  check_stream(stream);
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(blocks);
  shared_memory.assign(std::max(1, shared_bytes / 8), std::numeric_limits<double>::quiet_NaN());
  shared_memory.shrink_to_fit();
  const auto run_thread = [&](unsigned thread) {
    threadIdx.x = thread;
    for (unsigned block = 0; block < gridDim.x; ++block) {
      blockIdx.x = block;
      kernel();
      if (concurrent) of_block.wait(blockDim.x);
    }
  };
  if (concurrent) {
    std::vector<std::thread> team;
    for (unsigned thread = 0; thread < blockDim.x; ++thread) team.emplace_back(run_thread, thread);
    for (std::thread& member : team) member.join();
  } else {
    for (unsigned thread = 0; thread < blockDim.x; ++thread) run_thread(thread);
  }
}

}  // namespace cuda_on_host

inline void __syncthreads() {
  if (!cuda_on_host::concurrent) cuda_on_host::fail("a barrier in a launch said to need none");
  cuda_on_host::of_block.wait(blockDim.x);
}

inline double __shfl_down_sync(unsigned, double value, int offset) {
  using namespace cuda_on_host;
  if (!concurrent) fail("a shuffle in a launch said to need none");
  constexpr unsigned kWarp = trt::cuda::kWarp;
  const unsigned lane = threadIdx.x % kWarp;
  const unsigned from = lane + offset < kWarp ? threadIdx.x + offset : threadIdx.x;
  shuffled[threadIdx.x] = value;
  of_warp[threadIdx.x / kWarp].wait(kWarp);
  const double result = shuffled[from];
  of_warp[threadIdx.x / kWarp].wait(kWarp);
  return result;
}
