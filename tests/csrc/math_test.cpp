// The shared maths of csrc/math: half types, exponentials and surrogates against double precision.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

#include "../../csrc/math/surrogate.h"
#include "check.h"

namespace {

using namespace trt;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A binary format of 16 bits, by its definition.
struct Format {
  int mantissa_bits, least_exponent, largest_exponent;

  double value(std::uint32_t bits) const {
    const double sign = bits & 0x8000u ? -1 : 1;
    const int fraction = static_cast<int>(bits & ((1u << mantissa_bits) - 1));
    const int exponent = static_cast<int>((bits & 0x7fffu) >> mantissa_bits);
    if (exponent == 0) return sign * std::ldexp(fraction, least_exponent - mantissa_bits);
    const int power = exponent - 1 + least_exponent;
    if (power > largest_exponent) return fraction ? kNaN : sign * kInfinity;
    return sign * std::ldexp(fraction + (1 << mantissa_bits), power - mantissa_bits);
  }

  // The nearest value, to even where two are as near.
  double round(double value) const {
    if (value == 0 || !std::isfinite(value)) return value;
    const int power = std::max(std::ilogb(value), least_exponent);
    const double rounded =
        std::ldexp(std::nearbyint(std::ldexp(value, mantissa_bits - power)), power - mantissa_bits);
    return std::fabs(rounded) < std::ldexp(1.0, largest_exponent + 1)
               ? rounded
               : std::copysign(kInfinity, value);
  }
};

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

template <class T>
void check_store(const Format& format, float value) {
  T stored;
  store(&stored, value);
  const double got = load(stored), expected = format.round(value);
  CHECK(same(got, expected), value, got, expected);
}

template <class T>
void test_storage(const Format& format) {
  for (std::uint32_t bits = 0; bits < 0x10000u; ++bits) {
    T value{static_cast<std::uint16_t>(bits)};
    const double expected = format.value(bits);
    CHECK(same(load(value), expected), bits, load(value), expected);
    T again;
    store(&again, load(value));
    CHECK(std::isnan(expected) ? std::isnan(load(again)) : again.bits == bits, bits, again.bits);

    // Half way to the next value, and next to half way.
    const double next = format.value(bits + 1);
    if (!std::isfinite(expected) || !std::isfinite(next)) continue;
    const float middle = static_cast<float>((expected + next) / 2);
    check_store<T>(format, middle);
    check_store<T>(format, std::nextafter(middle, -std::numeric_limits<float>::infinity()));
    check_store<T>(format, std::nextafter(middle, std::numeric_limits<float>::infinity()));
  }
  std::mt19937 random(1);
  for (int i = 0; i < 1000000; ++i) {
    check_store<T>(format, bit_cast<float>(static_cast<std::uint32_t>(random())));
  }
  // What rounds past the largest value: half a step beyond it, and the largest float.
  const double beyond =
      std::ldexp(2 - std::ldexp(1.0, -format.mantissa_bits - 1), format.largest_exponent);
  check_store<T>(format, static_cast<float>(beyond));
  check_store<T>(format, std::nextafter(static_cast<float>(beyond), 0.0f));
  check_store<T>(format, std::numeric_limits<float>::max());
  check_store<T>(format, std::numeric_limits<float>::denorm_min());
}

void test_exp2() {
  double worst = 0;
  for (int i = 0; i <= 1000000; ++i) {
    const float z = -126.0f * static_cast<float>(i) / 1000000.0f;
    const double expected = std::exp2(static_cast<double>(z));
    worst = std::max(worst, std::fabs(exp2_nonpositive(z) - expected) / expected);
  }
  CHECK(worst < 2.5e-7, worst);
  CHECK(exp2_nonpositive(0.0f) <= 1.0000002f, exp2_nonpositive(0.0f));
  CHECK(exp2_nonpositive(-1000.0f) == 0, exp2_nonpositive(-1000.0f));
  CHECK(exp2_nonpositive(-std::numeric_limits<float>::infinity()) == 0, "infinity");
  CHECK(std::isnan(exp2_nonpositive(static_cast<float>(kNaN))), "NaN");
  CHECK(exp2_nonpositive(-3.0) == 0.125, exp2_nonpositive(-3.0));
}

double closed_form(Triangle, double u, double width) {
  return std::fmax(0, width - std::fabs(u)) / (width * width);
}
double closed_form(Sigmoid, double u, double alpha) {
  const double s = 1 / (1 + std::exp(-alpha * u));
  return alpha * s * (1 - s);
}
double closed_form(ATan, double u, double alpha) {
  return alpha / 2 / (1 + std::pow(std::acos(-1.0) * alpha * u / 2, 2));
}
double closed_form(Rectangle, double u, double width) {
  return std::fabs(u) < width / 2 ? 1 / width : 0;
}
double closed_form(FastSigmoid, double u, double slope) {
  return 1 / std::pow(1 + slope * std::fabs(u), 2);
}

double closed_form(SignedStep, double u, double height) { return u < 0 ? height : -height; }

template <class Surrogate, class F>
void test_surrogate(double tolerance) {
  for (double parameter : {0.5, 1.0, 2.0, 4.0, 25.0}) {
    for (int i = -400; i <= 400; ++i) {
      const F u = static_cast<F>(i) / F(128);  // exact, so that edges are met
      const double expected = closed_form(Surrogate(), u, parameter);
      const double got = Surrogate::derivative(u, static_cast<F>(parameter));
      CHECK(std::fabs(got - expected) <= tolerance * parameter, Surrogate::name, u, parameter, got,
            expected);
    }
    const auto derivative = [&](double u) -> double {
      return Surrogate::derivative(static_cast<F>(u), static_cast<F>(parameter));
    };
    CHECK(std::isnan(derivative(kNaN)), Surrogate::name);
    for (double u : {1e30, -1e30, kInfinity, -kInfinity}) {
      const double expected = closed_form(Surrogate(), u, parameter);
      CHECK(std::fabs(derivative(u) - expected) < 1e-30, Surrogate::name, u, derivative(u));
    }
  }
}

template <class... Kinds>
void test_surrogates(KindList<Kinds...>) {
  (test_surrogate<Kinds, float>(1e-6), ...);
  (test_surrogate<Kinds, double>(1e-13), ...);
}

}  // namespace

int main() {
  test_storage<Half>({10, -14, 15});
  test_storage<BFloat16>({7, -126, 127});
  test_exp2();
  test_surrogates(Surrogates());
  return failed_checks() != 0;
}
