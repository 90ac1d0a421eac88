// Packing and unpacking of spikes: the CUDA kernels, run on the host from their own source, and the
// CPU core, against loops over single elements.
#include <sstream>

#include "../../csrc/arguments.h"
#include "compare.h"

namespace {

using namespace trt;
using Bytes = std::vector<std::uint8_t>;

constexpr std::uint8_t kGuard = 0xa5;

int cases = 0;

// A byte more than is written, which must stay.
Bytes guarded(std::int64_t bytes) { return Bytes(bytes + 1, kGuard); }

template <class T>
void compare_pack(DType dtype, std::int64_t count, double stranger,
                  const std::string& description) {
  Tensor<T> x(count, any_of(kOffsets));
  Bytes expected = guarded((count + 7) / 8);
  std::fill_n(expected.begin(), (count + 7) / 8, 0);
  const double rate = any_of({0.0, 0.1, 0.5, 1.0});
  x.fill([&] { return chance(rate) ? 1.0 : 0.0; });
  for (std::int64_t i = 0; i < count; ++i) expected[i / 8] |= (x[i] == 1.0) << (i % 8);
  const bool strange = stranger != 1.0 && count > 0;
  if (strange) store(x.data() + below(static_cast<int>(count)), static_cast<State<T>>(stranger));
  for (int threads : kWorkers) {
    Bytes bits = guarded((count + 7) / 8);
    std::uint8_t flags[3] = {kGuard, kGuard, kGuard};
    if (threads == 0) {
      cuda::spike_pack(dtype, count, x.data(), bits.data(), &flags[1], {nullptr, 0, nullptr});
    } else {
      flags[1] = cpu::spike_pack(dtype, count, x.data(), bits.data(), threads);
    }
    CHECK(flags[0] == kGuard && flags[2] == kGuard, description, threads);
    CHECK(flags[1] == !strange, description, threads, stranger);
    CHECK(bits.back() == kGuard, description, threads);
    CHECK(strange || bits == expected, description, threads);
  }
}

template <class T>
void compare_unpack(DType dtype, std::int64_t outer, std::int64_t steps, std::int64_t inner,
                    const std::string& description) {
  const std::int64_t bytes_of_step = (outer * inner + 7) / 8;
  Bytes bits(steps * bytes_of_step);
  for (std::uint8_t& byte : bits) byte = static_cast<std::uint8_t>(below(256));
  Tensor<T> expected(outer * steps * inner, 0);
  std::int64_t next = 0;
  for (std::int64_t o = 0; o < outer; ++o) {
    for (std::int64_t t = 0; t < steps; ++t) {
      for (std::int64_t i = 0; i < inner; ++i) {
        const std::int64_t neuron = o * inner + i;
        const int bit = bits[t * bytes_of_step + neuron / 8] >> (neuron % 8) & 1;
        store(expected.data() + next++, static_cast<State<T>>(bit));
      }
    }
  }
  const SpikeBits packed{bits.data(), outer, steps, inner};
  for (int threads : kWorkers) {
    Tensor<T> to(expected.size(), any_of(kOffsets));
    to.poison();
    if (threads == 0) {
      cuda::spike_unpack(dtype, packed, to.data(), {nullptr, 0, nullptr});
    } else {
      cpu::spike_unpack(dtype, packed, to.data(), threads);
    }
    CHECK(to.guards_intact() && same(to, expected), description, threads);
  }
}

void compare(DType dtype, std::int64_t outer, std::int64_t steps, std::int64_t inner) {
  if (cases++ % kEvery != 0) return;
  std::ostringstream text;
  text << "dtype " << static_cast<int>(dtype) << ", [" << outer << "][" << steps << "][" << inner
       << "]";
  visit_dtype(dtype, [&](auto storage) {
    using T = decltype(storage);
    compare_unpack<T>(dtype, outer, steps, inner, text.str());
    const double strangers[] = {1.0, 1.0, -0.0, -1.0, 2.0, 0.5, std::nan("")};
    compare_pack<T>(dtype, outer * steps * inner, any_of(strangers), text.str());
  });
}

}  // namespace

int main() {
  for (const DType& dtype : kDTypes) {
    for (std::int64_t outer : {1, 3, 8}) {
      for (std::int64_t steps : {1, 2, 5}) {
        for (std::int64_t inner : {0, 1, 3, 8, 24, 129}) compare(dtype, outer, steps, inner);
      }
    }
    compare(dtype, 1, 1, 70000);  // several threads of the CPU
    compare(dtype, 3, 4, 6001);
    compare(dtype, 70000, 1, 1);
  }
  std::cout << (cases + kEvery - 1) / kEvery << " cases, " << failed_checks() << " failed checks\n";
  return failed_checks() != 0;
}
