// Eight bytes of 0 or 1 as the bits of one, and back.
#pragma once

#include <cstdint>
#include <cstring>

#include "../math/platform.h"

namespace trt {
inline namespace TRT_ISA {

// Gathers eight bytes of 0 or 1 in the top byte of the product, the first of them in its low bit.
constexpr std::uint64_t kGather =
    __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? 0x0102040810204080u : 0x8040201008040201u;

inline std::uint8_t gather_bits(const std::uint8_t* eight) {
  std::uint64_t all;
  std::memcpy(&all, eight, 8);
  return static_cast<std::uint8_t>(all * kGather >> 56);
}

// f(i, bit) for n bits from bit `first` on, by whole bytes where it may.
template <class Function>
void spread_bits(const std::uint8_t* bits, std::int64_t first, std::int64_t n, Function&& f) {
  const auto bit = [&](std::int64_t i) {
    return (bits[(first + i) / 8] >> ((first + i) % 8) & 1) != 0;
  };
  std::int64_t i = 0;
  for (; i < n && (first + i) % 8 != 0; ++i) f(i, bit(i));
  const std::uint8_t* bytes = bits + (first + i) / 8;
  for (; i + 8 <= n; i += 8) {
    const unsigned byte = *bytes++;
    for (int j = 0; j < 8; ++j) f(i + j, (byte & 1u << j) != 0);
  }
  for (; i < n; ++i) f(i, bit(i));
}

}  // namespace TRT_ISA
}  // namespace trt
