// What the tests of CUDA kernels on the host share: random cases, guarded tensors, comparisons.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "../../csrc/math/platform.h"
#include "../../csrc/ops.h"
#include "check.h"

namespace trt {

#if defined(__SANITIZE_THREAD__)
constexpr int kEvery = 24;  // of the cases: every CUDA thread is a real one, or they take minutes
#elif defined(__SANITIZE_ADDRESS__)
constexpr int kEvery = 6;
#else
constexpr int kEvery = 2;
#endif

// Under sanitizers all of them work in small cases too.
constexpr int kThreadsOfCPU = 3;
constexpr int kWorkers[] = {0, 1, kThreadsOfCPU};  // 0 stands for CUDA

constexpr DType kDTypes[] = {DType::float32, DType::float64, DType::float16, DType::bfloat16};
constexpr int kOffsets[] = {0, 0, 1, 2, 4};  // of every pointer, in elements

inline std::mt19937 random_bits(20240607);

inline int below(int count) {
  return static_cast<int>(random_bits() % static_cast<unsigned>(count));
}
inline bool chance(double share) { return random_bits() < share * 4294967296.0; }
template <class T, std::size_t kCount>
const T& any_of(const T (&list)[kCount]) {
  return list[below(kCount)];
}

// A tensor somewhere in a larger one, whose elements before and behind it must stay.
template <class T>
class Tensor {
 public:
  Tensor() = default;
  Tensor(std::int64_t size, int offset)
      : memory_(kGuard + offset + size + kGuard), offset_(kGuard + offset), size_(size) {
    std::memset(static_cast<void*>(memory_.data()), kSentinel, memory_.size() * sizeof(T));
  }

  explicit operator bool() const { return !memory_.empty(); }
  T* data() { return memory_.empty() ? nullptr : memory_.data() + offset_; }
  std::int64_t size() const { return size_; }
  double operator[](std::int64_t i) const {
    return static_cast<double>(load(memory_[offset_ + i]));
  }

  template <class Draw>
  Tensor& fill(Draw&& draw) {
    for (std::int64_t i = 0; i < size_; ++i) {
      store(data() + i, static_cast<State<T>>(draw()));
    }
    return *this;
  }
  Tensor& poison() {
    return fill([] { return std::numeric_limits<double>::quiet_NaN(); });
  }

  bool guards_intact() const {
    const auto* bytes = reinterpret_cast<const unsigned char*>(memory_.data());
    const std::size_t begin = offset_ * sizeof(T), end = (offset_ + size_) * sizeof(T);
    for (std::size_t i = 0; i < memory_.size() * sizeof(T); ++i) {
      if ((i < begin || i >= end) && bytes[i] != kSentinel) return false;
    }
    return true;
  }

 private:
  static constexpr int kGuard = 16;  // elements: keeps the alignment of the memory itself
  static constexpr unsigned char kSentinel = 0xa5;
  std::vector<T> memory_;
  std::int64_t offset_ = 0, size_ = 0;
};

// Equal values, with any NaN equal to any other.
template <class T>
bool same(const Tensor<T>& a, const Tensor<T>& b) {
  for (std::int64_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i] && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
    if (std::signbit(a[i]) != std::signbit(b[i]) && !std::isnan(a[i])) return false;
  }
  return true;
}

// The norm of the difference over that of `b`, which counts as `least` at least; infinite where
// only one of them is NaN.
template <class T>
double distance(const Tensor<T>& a, const Tensor<T>& b, double least = 0) {
  double difference = 0, norm = least * least;
  for (std::int64_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) && std::isnan(b[i])) continue;
    if (!std::isfinite(a[i]) || !std::isfinite(b[i])) {
      if (a[i] == b[i]) continue;
      return std::numeric_limits<double>::infinity();
    }
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

// State gradients in float are a few roundings apart; what is stored in half precision
// may be rounded to neighbours.
template <class T>
double tolerance() {
  if (std::is_same<T, double>::value) return 1e-14;
  if (std::is_same<T, float>::value) return 1e-6;
  return std::is_same<T, Half>::value ? 1e-3 : 8e-3;
}

}  // namespace trt
