// Neighbouring elements moved by one instruction.
#pragma once

#include <cstdint>

#include "../math/platform.h"

namespace trt {
namespace cuda {

constexpr int kVectorBytes = 16;  // the widest access of one thread

template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  T data[kCount];
};

// The accesses that move kWidth elements of T.
template <class T, int kWidth>
struct Access {
  static constexpr int kMost = kVectorBytes / static_cast<int>(sizeof(T));
  static constexpr int kElements = kWidth < kMost ? kWidth : kMost;
  static constexpr int kCount = kWidth / kElements;
  using type = Vector<T, kElements>;
};

template <class T, int kWidth>
__device__ __forceinline__ void read(const T* from, T (&to)[kWidth]) {
  using A = Access<T, kWidth>;
#pragma unroll
  for (int i = 0; i < A::kCount; ++i) {
    const auto vector = reinterpret_cast<const typename A::type*>(from)[i];
#pragma unroll
    for (int j = 0; j < A::kElements; ++j) to[i * A::kElements + j] = vector.data[j];
  }
}

template <class T, int kWidth>
__device__ __forceinline__ void write(T* to, const T (&from)[kWidth]) {
  using A = Access<T, kWidth>;
#pragma unroll
  for (int i = 0; i < A::kCount; ++i) {
    typename A::type vector;
#pragma unroll
    for (int j = 0; j < A::kElements; ++j) vector.data[j] = from[i * A::kElements + j];
    reinterpret_cast<typename A::type*>(to)[i] = vector;
  }
}

// True if kWidth elements of T can be moved at `address`, or if it is null.
template <class T, int kWidth>
bool aligned(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % alignof(typename Access<T, kWidth>::type) == 0;
}

}  // namespace cuda
}  // namespace trt
