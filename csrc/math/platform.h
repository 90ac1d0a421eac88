// What the mathematics needs from its compiler: one macro for host+device, bit casts, half types.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define TRT_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define TRT_HD inline __attribute__((always_inline))
#else
#define TRT_HD inline
#endif

// Every CPU instruction-set level compiles this code again with its own flags. The level is part of
// the namespace, so that the linker never hands one level's function to another.
#ifndef TRT_ISA
#define TRT_ISA portable
#endif

namespace trt {

// Storage types of half precision: bits only, arithmetic is done in float.
struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

inline namespace TRT_ISA {

template <class To, class From>
TRT_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// State type of a storage type: float for everything but double.
template <class Storage>
struct StateOf {
  using type = float;
};
template <>
struct StateOf<double> {
  using type = double;
};
template <class Storage>
using State = typename StateOf<Storage>::type;

TRT_HD float load(float value) { return value; }
TRT_HD double load(double value) { return value; }
TRT_HD float load(BFloat16 value) {
  return bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}
TRT_HD float load(Half value) {
#ifdef __CUDA_ARCH__
  float converted;
  asm("cvt.f32.f16 %0, %1;" : "=f"(converted) : "h"(value.bits));
  return converted;
#else
  // Integer shifts and one exact subtraction: unlike a multiplication by 2^112 this is right under
  // flush-to-zero as well, and every compiler vectorises it.
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t shifted = static_cast<std::uint32_t>(value.bits & 0x7fffu) << 13;
  const std::uint32_t exponent = shifted & 0x0f800000u;
  const std::uint32_t normal = shifted + 0x38000000u;
  const std::uint32_t special = shifted + 0x70000000u;  // infinity and NaN
  const float subnormal = bit_cast<float>(shifted + 0x38800000u) - bit_cast<float>(0x38800000u);
  std::uint32_t bits = exponent == 0x0f800000u ? special : normal;
  bits = exponent == 0u ? bit_cast<std::uint32_t>(subnormal) : bits;
  return bit_cast<float>(bits | sign);
#endif
}

TRT_HD void store(float* to, float value) { *to = value; }
TRT_HD void store(double* to, double value) { *to = value; }
TRT_HD void store(BFloat16* to, float value) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
  to->bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
TRT_HD void store(Half* to, float value) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(value));
#else
  const std::uint32_t all = bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (all >> 16) & 0x8000u;
  const std::uint32_t bits = all & 0x7fffffffu;
  const std::uint32_t normal = (bits + 0xc8000fffu + ((bits >> 13) & 1u)) >> 13;  // to nearest even
  // Adding 0.5 leaves the subnormal half in the low bits of the sum, rounded by the addition.
  const std::uint32_t subnormal =
      bit_cast<std::uint32_t>(bit_cast<float>(bits) + 0.5f) - 0x3f000000u;
  const std::uint32_t overflow = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  std::uint32_t half = bits < 0x38800000u ? subnormal : normal;
  half = bits >= 0x47800000u ? overflow : half;
  to->bits = static_cast<std::uint16_t>(half | sign);
#endif
}

// Two neighbours of half precision in one word, the first in its low half: a GPU converts a pair by
// as many instructions as one.
template <class Storage>
TRT_HD void load_pair(std::uint32_t both, float* to) {
  to[0] = load(Storage{static_cast<std::uint16_t>(both)});
  to[1] = load(Storage{static_cast<std::uint16_t>(both >> 16)});
}
template <class Storage>
TRT_HD std::uint32_t store_pair(const float* from) {
  Storage low, high;
  store(&low, from[0]);
  store(&high, from[1]);
  return low.bits | static_cast<std::uint32_t>(high.bits) << 16;
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <>
TRT_HD std::uint32_t store_pair<Half>(const float* from) {
  std::uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(from[1]), "f"(from[0]));
  return both;
}
template <>
TRT_HD std::uint32_t store_pair<BFloat16>(const float* from) {
  std::uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(from[1]), "f"(from[0]));
  return both;
}
#endif

template <class F>
TRT_HD F absolute(F value) {
  return std::fabs(value);
}

// The smaller of two numbers, or `b` where `a` is NaN; one instruction of a GPU for float.
TRT_HD float smaller(float a, float b) {
#ifdef __CUDA_ARCH__
  return fminf(a, b);
#else
  return a < b ? a : b;
#endif
}
TRT_HD double smaller(double a, double b) { return a < b ? a : b; }

// a * b + c, fused where that is one instruction. Only for what decides no spike.
TRT_HD float fast_multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__CUDA_ARCH__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

TRT_HD double fast_multiply_add(double a, double b, double c) { return a * b + c; }

// 1 / value, on a GPU within two units in the last place and 0 where the result is denormal. Only
// for what decides no spike.
TRT_HD float fast_reciprocal(float value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
#else
  return 1.0f / value;
#endif
}
TRT_HD double fast_reciprocal(double value) { return 1.0 / value; }

// 2^z for z <= 0, relative error below 2.5e-7. NaN stays NaN, and what underflows is 0.
TRT_HD float exp2_nonpositive(float z) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(z));
  return result;
#else
  // z = n + r; the minimax polynomial of degree 5 is within 7.5e-8 of 2^r.
  const float clamped = -127.0f > z ? -127.0f : z;
  const float shifted = clamped + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const float r = clamped - (shifted - 12582912.0f);
  float p = 0.00132764691f;
  p = fast_multiply_add(p, r, 0.00967554385f);
  p = fast_multiply_add(p, r, 0.055507133f);
  p = fast_multiply_add(p, r, 0.240221197f);
  p = fast_multiply_add(p, r, 0.693146967f);
  p = fast_multiply_add(p, r, 1.00000007f);
  // n in the exponent's place, which makes 0 of n = -127; a product, so that a NaN in p stays.
  const std::uint32_t power = (bit_cast<std::uint32_t>(shifted) << 23) + 0x3f800000u;
  return p * bit_cast<float>(power);
#endif
}
TRT_HD double exp2_nonpositive(double z) { return std::exp2(z); }

constexpr double kLog2E = 1.4426950408889634;

}  // namespace TRT_ISA
}  // namespace trt
