// Small loops over contiguous rows that several operators share.
#pragma once

#include <cstdint>

#include "../math/platform.h"

namespace trt {
inline namespace TRT_ISA {

// Lanes of a reduction: enough independent ones to hide the latency of an addition.
constexpr std::int64_t kLanes = 32;

// Sum of a row in double and in one fixed order.
template <class F>
double sum_row(std::int64_t n, const F* row) {
  double lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += row[i + lane];
  }
  for (std::int64_t lane = 0; i + lane < n; ++lane) lanes[lane] += row[i + lane];
  for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// Largest element, NaN left out; `least` for an empty row.
template <class F>
F max_row(std::int64_t n, const F* row, F least) {
  const auto larger = [](F a, F b) { return a > b ? a : b; };
  F lanes[kLanes];
  for (F& lane : lanes) lane = least;
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = larger(row[i + lane], lanes[lane]);
    }
  }
  for (std::int64_t lane = 0; i + lane < n; ++lane) {
    lanes[lane] = larger(row[i + lane], lanes[lane]);
  }
  for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::int64_t lane = 0; lane < half; ++lane) {
      lanes[lane] = larger(lanes[lane + half], lanes[lane]);
    }
  }
  return lanes[0];
}

}  // namespace TRT_ISA
}  // namespace trt
