// Small loops over contiguous rows that several operators share.
#pragma once

#include <cstdint>

#include "../math/platform.h"

namespace trt {
inline namespace TRT_ISA {

// Sum of a row in double and in one fixed order: the lanes let the compiler vectorise it.
template <class F>
double sum_row(std::int64_t n, const F* row) {
  constexpr std::int64_t kLanes = 8;
  double lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += row[i + lane];
  }
  for (std::int64_t lane = 0; i < n; ++i, ++lane) lanes[lane] += row[i];
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

// Largest element, NaN left out; `least` for an empty row.
template <class F>
F max_row(std::int64_t n, const F* row, F least) {
  constexpr std::int64_t kLanes = 16;
  F lanes[kLanes];
  for (F& lane : lanes) lane = least;
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = row[i + lane] > lanes[lane] ? row[i + lane] : lanes[lane];
    }
  }
  for (std::int64_t lane = 0; i < n; ++i, ++lane) {
    lanes[lane] = row[i] > lanes[lane] ? row[i] : lanes[lane];
  }
  for (F lane : lanes) least = lane > least ? lane : least;
  return least;
}

}  // namespace TRT_ISA
}  // namespace trt
