// Runs CUDA kernels on the host, from their own source: include this before a .cu file.
//
// The blocks of a launch run one after the other. The threads of a block are fibers that take turns
// at barriers and shuffles; under ThreadSanitizer they are real threads, so that it sees races
// between them.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define TRT_CUDA_ON_HOST
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// One copy serves, since no two blocks run at a time.
#define __shared__ static
#define TRT_DYNAMIC_SHARED(name) unsigned char* name = cuda_on_host::dynamic_shared()
#define TRT_LAUNCH(name, kernel, blocks, threads, shared_bytes, stream, ...) \
  cuda_on_host::launch(name, blocks, threads, shared_bytes, stream, [&] { kernel(__VA_ARGS__); })

namespace trt {
namespace cuda {
// Two warps, or four for a block with much to do: small, so that tiny tensors have several blocks.
constexpr int kWarp = 8;
constexpr int kThreads = 16;
constexpr int kRowThreads = 32;
constexpr int kMostThreads = 32;
constexpr int kMostWalkBlocks = 24;
}  // namespace cuda
}  // namespace trt

// The part of the runtime that the kernels' launchers use.

using cudaStream_t = void*;

namespace cuda_on_host {

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
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
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

// Which blocks of a launch run, where not all of them do: the tests of huge tensors run a few.
inline bool (*only_blocks)(unsigned block) = nullptr;
inline bool runs(unsigned block) { return !only_blocks || only_blocks(block); }

constexpr int kMostWarps = trt::cuda::kMostThreads / trt::cuda::kWarp;

#ifdef __SANITIZE_THREAD__

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

inline Barrier of_block, of_warp[kMostWarps];

inline void run(const std::function<void()>& kernel) {
  std::vector<std::thread> team;
  for (unsigned thread = 0; thread < blockDim.x; ++thread) {
    team.emplace_back([&kernel, thread] {
      threadIdx.x = thread;
      for (unsigned block = 0; block < gridDim.x; ++block) {
        if (!runs(block)) continue;
        blockIdx.x = block;
        kernel();
        of_block.wait(blockDim.x);
      }
    });
  }
  for (std::thread& member : team) member.join();
}

#else

struct Fiber {
  // Ample for a kernel and its arguments; AddressSanitizer clears as much at every turn.
  static constexpr std::size_t kStackBytes = 96 * 1024;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = false;
};

inline ucontext_t scheduler;
inline Fiber* current = nullptr;
inline const std::function<void()>* current_kernel = nullptr;
inline bool moved = false;  // something happened since it was last cleared

inline void yield() { swapcontext(&current->context, &scheduler); }

class Barrier {
 public:
  void wait(unsigned threads) {
    const unsigned round = round_;
    if (++arrived_ == threads) {
      arrived_ = 0;
      ++round_;
      moved = true;
    } else {
      while (round_ == round) yield();
    }
  }

 private:
  unsigned arrived_ = 0, round_ = 0;
};

inline Barrier of_block, of_warp[kMostWarps];

inline void run_block(const std::function<void()>& kernel) {
  static Fiber fibers[trt::cuda::kMostThreads];
  current_kernel = &kernel;
  for (unsigned thread = 0; thread < blockDim.x; ++thread) {
    Fiber& fiber = fibers[thread];
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStackBytes;
    fiber.context.uc_link = &scheduler;
    void (*entry)() = [] {
      (*current_kernel)();
      current->done = moved = true;
    };
    makecontext(&fiber.context, entry, 0);
  }
  for (bool running = true; running;) {
    running = moved = false;
    for (unsigned thread = 0; thread < blockDim.x; ++thread) {
      if (fibers[thread].done) continue;
      threadIdx.x = thread;
      current = &fibers[thread];
      swapcontext(&scheduler, &current->context);
      running |= !current->done;
    }
    if (running && !moved) fail("a barrier that some threads never reach");
  }
}

inline void run(const std::function<void()>& kernel) {
  for (unsigned block = 0; block < gridDim.x; ++block) {
    if (!runs(block)) continue;
    blockIdx.x = block;
    run_block(kernel);
  }
}

#endif

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
  static bool running = false;
  if (running) fail("a launch among the arguments of a launch");
  running = true;
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(blocks);
  shared_memory.assign(std::max(1, shared_bytes / 8), std::numeric_limits<double>::quiet_NaN());
  shared_memory.shrink_to_fit();
  run(kernel);
  running = false;
}

inline void sync_warp() { of_warp[threadIdx.x / trt::cuda::kWarp].wait(trt::cuda::kWarp); }

// `value` of the thread `from` of this warp.
template <class T>
T shuffle(T value, unsigned from) {
  static T shuffled[trt::cuda::kMostThreads];
  shuffled[threadIdx.x] = value;
  sync_warp();
  const T result = shuffled[threadIdx.x / trt::cuda::kWarp * trt::cuda::kWarp + from];
  sync_warp();
  return result;
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::of_block.wait(blockDim.x); }
inline void __threadfence() {}  // no two blocks run at a time

template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return cuda_on_host::shuffle(value, static_cast<unsigned>(from));
}
template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  const unsigned lane = threadIdx.x % trt::cuda::kWarp;
  const unsigned from = lane + static_cast<unsigned>(offset);
  return cuda_on_host::shuffle(value, from < trt::cuda::kWarp ? from : lane);
}

inline unsigned atomicAdd(unsigned* counter, unsigned value) {
  return __atomic_fetch_add(counter, value, __ATOMIC_SEQ_CST);
}
