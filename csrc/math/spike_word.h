// The two values of a spike as they lie in memory.
#pragma once

#include <cstdint>

#include "platform.h"

namespace trt {
inline namespace TRT_ISA {

// An unsigned integer of a storage type's size, and what a 1 is in it. A 0 is 0; -0 is another
// word.
template <class Storage>
struct SpikeWord;
template <>
struct SpikeWord<float> {
  using type = std::uint32_t;
  static constexpr type kOne = 0x3f800000u;
};
template <>
struct SpikeWord<double> {
  using type = std::uint64_t;
  static constexpr type kOne = 0x3ff0000000000000u;
};
template <>
struct SpikeWord<Half> {
  using type = std::uint16_t;
  static constexpr type kOne = 0x3c00u;
};
template <>
struct SpikeWord<BFloat16> {
  using type = std::uint16_t;
  static constexpr type kOne = 0x3f80u;
};

}  // namespace TRT_ISA
}  // namespace trt
