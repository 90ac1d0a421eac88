// Mean and deviation by channel: the CUDA kernels, run on the host from their own source, and the
// CPU core, against two passes in double.
#include <sstream>

#include "../../csrc/arguments.h"
#include "compare.h"

namespace {

using namespace trt;

int cases = 0;

// What batch normalisation needs of a channel, of the numbers as they are stored.
struct Exact {
  double mean, inverse, variance;
};
template <class Storage>
Exact exact(const Statistics& a, const Tensor<Storage>& x, std::int64_t channel) {
  const auto for_each = [&](auto&& f) {
    for (std::int64_t b = 0; b < a.before; ++b) {
      for (std::int64_t i = 0; i < a.within; ++i) f(x[(b * a.channels + channel) * a.within + i]);
    }
  };
  const double n = static_cast<double>(a.before * a.within);
  double sum = 0, squares = 0;
  for_each([&](double value) { sum += value; });
  for_each([&](double value) { squares += (value - sum / n) * (value - sum / n); });
  const double repeated = n * static_cast<double>(a.repeat);
  return {sum / n, 1 / std::sqrt(squares / n + a.eps),
          squares / n * repeated / (repeated > 1 ? repeated - 1 : 1)};
}

template <class Storage>
void compare(Statistics a, double mean, double deviation, bool extreme,
             const std::string& description) {
  using F = State<Storage>;
  Tensor<Storage> x(a.before * a.channels * a.within, any_of(kOffsets));
  std::normal_distribution<double> normal(mean, deviation);
  x.fill([&] { return normal(random_bits); });
  const bool infinite = extreme && x.size() > 0;
  if (infinite) store(x.data(), std::numeric_limits<F>::infinity());
  a.x = x.data();
  // Squares of an offset are summed in the state's type, and of halves as they are stored.
  const double within = std::is_same<F, double>::value ? 1e-12 : 2e-6;
  for (int threads : kWorkers) {
    Tensor<F> stats(4 * a.channels, 0);
    a.stats = stats.poison().data();
    if (threads == 0) {
      Tensor<double> space((cuda::batch_statistics_workspace(a) + 7) / 8, 0);
      cuda::batch_statistics(a, {space.poison().data(), 0, nullptr});
      CHECK(space.guards_intact(), description);
    } else {
      cpu::batch_statistics(a, threads);
    }
    CHECK(stats.guards_intact(), description, threads);
    if (x.size() == 0) {
      for (std::int64_t i = 0; i < stats.size(); ++i) CHECK(std::isnan(stats[i]), description);
      continue;
    }
    for (std::int64_t c = 0; c < a.channels; ++c) {
      if (infinite && c == 0) {
        CHECK(std::isnan(stats[0]) && std::isnan(stats[2 * a.channels]), description, threads);
        continue;
      }
      const Exact e = exact(a, x, c);
      const double got = stats[c] + stats[a.channels + c];
      CHECK(stats[c] == static_cast<double>(static_cast<F>(e.mean)) ||
                std::abs(stats[a.channels + c]) <=
                    std::abs(e.mean) * std::numeric_limits<F>::epsilon(),
            description, threads, c, stats[c], e.mean);
      CHECK(std::abs(got - e.mean) <= within * (deviation + 1e-9), description, threads, c, got,
            e.mean);
      CHECK(std::abs(stats[2 * a.channels + c] - e.inverse) <= within * e.inverse, description,
            threads, c, stats[2 * a.channels + c], e.inverse);
      CHECK(std::abs(stats[3 * a.channels + c] - e.variance) <=
                within * (e.variance + deviation * deviation),
            description, threads, c, stats[3 * a.channels + c], e.variance);
    }
  }
}

void compare(DType dtype, std::int64_t before, std::int64_t channels, std::int64_t within) {
  if (cases++ % kEvery != 0) return;
  // Far from 0 by as much as half precision still resolves.
  const double mean = any_of({0.0, 0.0, 1.0, -20.0});
  const double deviation = any_of({1.0, 0.25, 0.0});
  const Statistics a{dtype, before, channels, within, 1e-5, any_of({1, 1, 4}), nullptr, nullptr};
  const bool extreme = chance(0.1);
  std::ostringstream text;
  text << "dtype " << static_cast<int>(dtype) << ", [" << before << "][" << channels << "]["
       << within << "], repeat " << a.repeat << ", mean " << mean << ", deviation " << deviation
       << (extreme ? ", infinite" : "");
  visit_dtype(dtype, [&](auto storage) {
    compare<decltype(storage)>(a, mean, deviation, extreme, text.str());
  });
}

}  // namespace

int main() {
  cpu::set_level("baseline");
  for (const DType& dtype : kDTypes) {
    for (std::int64_t channels : {1, 2, 3, 5, 8, 64, 130}) {
      for (std::int64_t before : {1, 2, 7, 60}) {
        for (std::int64_t within : {1, 1, 2, 8, 49, 64}) {
          if (before * within > 1) compare(dtype, before, channels, within);
        }
      }
      compare(dtype, 1, channels, 1);
      compare(dtype, 0, channels, 4);
    }
    compare(dtype, 2500, 16, 1);  // several threads of the CPU
    compare(dtype, 3, 2, 6001);
  }
  std::cout << (cases + kEvery - 1) / kEvery << " cases, " << failed_checks() << " failed checks\n";
  return failed_checks() != 0;
}
