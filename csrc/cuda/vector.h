// Neighbouring elements moved by one instruction, and taken apart into the state's type.
#pragma once

#include <cstdint>

#include "../math/platform.h"

namespace trt {
namespace cuda {

constexpr int kVectorBytes = 16;  // the widest access of one thread

template <class T, int kCount, bool kPairs = sizeof(T) == 2 && kCount % 2 == 0>
struct alignas(kCount * sizeof(T)) Vector {
  T data[kCount];
};
// Half precision by words, which is how registers hold it.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Vector<T, kCount, true> {
  std::uint32_t words[kCount / 2];
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

template <class T, int kWidth>
__device__ __forceinline__ void unpack(const Vector<T, kWidth, false>& vector,
                                       State<T> (&to)[kWidth]) {
#pragma unroll
  for (int j = 0; j < kWidth; ++j) to[j] = load(vector.data[j]);
}
template <class T, int kWidth>
__device__ __forceinline__ void unpack(const Vector<T, kWidth, true>& vector, float (&to)[kWidth]) {
#pragma unroll
  for (int j = 0; j < kWidth; j += 2) load_pair<T>(vector.words[j / 2], &to[j]);
}

template <class T, int kWidth>
__device__ __forceinline__ void pack(const State<T> (&from)[kWidth],
                                     Vector<T, kWidth, false>& vector) {
#pragma unroll
  for (int j = 0; j < kWidth; ++j) store(&vector.data[j], from[j]);
}
template <class T, int kWidth>
__device__ __forceinline__ void pack(const float (&from)[kWidth], Vector<T, kWidth, true>& vector) {
#pragma unroll
  for (int j = 0; j < kWidth; j += 2) vector.words[j / 2] = store_pair<T>(&from[j]);
}

// *to = vector, by one instruction: where steps are unrolled, nvcc splits the assignment of a
// struct of 16 bytes into four stores.
template <class T>
__device__ __forceinline__ void store_vector(T* to, const T& vector) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == kVectorBytes) {
    uint4 words;
    memcpy(&words, &vector, sizeof words);
    __stwb(reinterpret_cast<uint4*>(to), words);
    return;
  }
#endif
  *to = vector;
}

// True if kWidth elements of T can be moved at `address`, or if it is null.
template <class T, int kWidth>
bool aligned(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % alignof(typename Access<T, kWidth>::type) == 0;
}

}  // namespace cuda
}  // namespace trt
