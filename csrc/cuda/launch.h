// Launching kernels: the device set and restored, every error an exception with the kernel's name.
#pragma once

#include <stdexcept>
#include <string>

#include "../ops.h"

// The tests run these kernels on the host: tests/csrc/cuda_on_host.h then stands for what is here.
#ifndef TRT_CUDA_ON_HOST
#include <cuda_runtime.h>

#define TRT_LAUNCH(name, kernel, blocks, threads, shared_bytes, stream, ...) \
  do {                                                                       \
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes,           \
             static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);              \
    ::trt::cuda::check(cudaGetLastError(), "launching " name);               \
  } while (false)

#define TRT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace trt {
namespace cuda {
constexpr int kWarp = 32;
constexpr int kThreads = 128;          // of a block: small enough that many blocks share an SM
constexpr int kRowThreads = 256;       // of a block that takes a long row
constexpr int kMostThreads = 1024;     // of a block that works alone
constexpr int kMostWalkBlocks = 4096;  // of sums by channel: more only make more partial sums
}  // namespace cuda
}  // namespace trt
#endif

namespace trt {
namespace cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report this one
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes `device` current until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device == before_) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace cuda
}  // namespace trt
