// Blocks over threads, and scratch memory for each thread.
#pragma once

#include <cstdint>
#include <memory>

#include "../math/platform.h"
#include "../ops.h"

#ifdef _OPENMP
#include <omp.h>
#else
#include <thread>
#include <vector>
#endif

namespace trt {
inline namespace TRT_ISA {

// Elements below which a second thread does not pay. Builds with sanitizers have none, so that
// small cases have threads too.
constexpr std::int64_t serial_below(std::int64_t elements) {
#ifdef TRT_KERNELS_ALWAYS_THREADED
  return 0 * elements;
#else
  return elements;
#endif
}

// f(block, thread) for every block. Which thread takes a block is free; what a block is must depend
// on shapes alone, so that every sum has one order.
template <class Function>
void parallel_for(std::int64_t blocks, int threads, Function&& f) {
#ifdef _OPENMP
  if (threads > 1 && blocks > 1 && !cpu::forked() && !omp_in_parallel()) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t block = 0; block < blocks; ++block) f(block, omp_get_thread_num());
    return;
  }
#else
  // Started at every call, so only for those who have no OpenMP; ThreadSanitizer is one of them.
  if (threads > 1 && blocks > 1) {
    const auto share = [&](int thread) {
      const std::int64_t end = blocks * (thread + 1) / threads;
      for (std::int64_t block = blocks * thread / threads; block < end; ++block) f(block, thread);
    };
    std::vector<std::thread> team;
    for (int thread = 1; thread < threads; ++thread) team.emplace_back(share, thread);
    share(0);
    for (std::thread& member : team) member.join();
    return;
  }
#endif
  for (std::int64_t block = 0; block < blocks; ++block) f(block, 0);
}

constexpr std::size_t kCacheLine = 64;

// What a thread keeps of its scratch memory at most, in bytes: ample for anything but huge T.
constexpr std::size_t kMostHeld = 64 * 1024 * 1024;

// One aligned buffer of `count` elements for each thread, kept from call to call by the calling
// thread: taking it fresh would cost a page fault every 4 KB.
template <class F>
class Scratch {
 public:
  Scratch(std::size_t count, int threads)
      : stride_((count * sizeof(F) + kCacheLine - 1) / kCacheLine * kCacheLine) {
    const std::size_t bytes = stride_ * threads + kCacheLine;
    if (bytes > held().size) {
      held().memory.reset();
      held().size = 0;
      held().memory.reset(new char[bytes]);
      held().size = bytes;
    }
    const auto address = reinterpret_cast<std::uintptr_t>(held().memory.get());
    base_ = held().memory.get() + (kCacheLine - address % kCacheLine) % kCacheLine;
  }
  ~Scratch() {
    if (held().size <= kMostHeld) return;
    held().memory.reset();
    held().size = 0;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  F* of(int thread) const { return reinterpret_cast<F*>(base_ + stride_ * thread); }

 private:
  struct Held {
    std::unique_ptr<char[]> memory;
    std::size_t size = 0;
  };
  static Held& held() {
    thread_local Held held;
    return held;
  }
  std::size_t stride_;
  char* base_;
};

}  // namespace TRT_ISA
}  // namespace trt
