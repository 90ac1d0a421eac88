// The CUDA kernels of the temporal loss, run on the host from their own source, against the CPU
// core.
#include <cmath>
#include <sstream>

#include "../../csrc/arguments.h"
#include "compare.h"

namespace {

using namespace trt;

struct Case {
  std::string description;
  LossSettings settings;
  bool probabilities, class_weight, extremes;
  int invalid;  // rows with a class out of range
};

template <class Storage>
class Comparison {
 public:
  using F = State<Storage>;

  explicit Comparison(const Case& c)
      : c_(c), elements_(s().steps * s().batch * s().classes), rows_(s().steps * s().batch) {
    logits_ = Tensor<Storage>(elements_, any_of(kOffsets)).fill([&] {
      if (c.extremes && chance(0.02)) return chance(0.5) ? -kInfinite : 1e4;
      return (below(4001) - 2000) * 3e-3;
    });
    if (c.class_weight) {
      class_weight_ = Tensor<F>(s().classes, 0).fill([] { return 0.1 + below(100) * 0.01; });
    }
    if (c.probabilities) {
      probabilities_ = Tensor<F>(s().batch * s().classes, 0).fill([&] {
        return below(100) / (50.0 * static_cast<double>(s().classes));
      });
    } else {
      for (std::int64_t b = 0; b < s().batch; ++b) target_.push_back(below(int(s().classes)));
      for (int i = 0; i < c.invalid && i < s().batch; ++i) target_[i] = s().classes + i;
    }
    upstream_ = Tensor<F>(1, 0).fill([] { return 3.0; });
  }

  void run() {
    auto space = Tensor<double>((cuda::loss_workspace(s()) + 7) / 8, 0).poison();
    const cuda::Queue queue{space.data(), 0, nullptr};
    auto out = Tensor<F>(1, 0).poison();
    auto divisors = Tensor<F>(2, 0).poison();
    auto normalizer = Tensor<F>(rows_, any_of(kOffsets)).poison();
    auto expected_normalizer = Tensor<F>(rows_, 0).poison();
    const LossTensors of_cuda = tensors(normalizer, &divisors);
    const LossTensors of_cpu = tensors(expected_normalizer, nullptr);

    cuda::loss_value(s(), of_cuda, out.data(), queue);
    const double expected = cpu::loss_value(s(), of_cpu, kThreadsOfCPU), value = out[0];
    CHECK(space.guards_intact() && out.guards_intact() && divisors.guards_intact() &&
              normalizer.guards_intact(),
          c_.description);
    // The loss of a sure prediction is a difference of numbers about 1.
    const double bound = 2 * tolerance<F>() * std::max(0.1, std::fabs(expected));
    CHECK((std::isnan(value) && std::isnan(expected)) || value == expected ||
              std::fabs(value - expected) <= bound,
          c_.description, value, expected);
    const double error = distance(normalizer, expected_normalizer);
    CHECK(error <= tolerance<F>(), c_.description, error);

    auto grad = Tensor<Storage>(elements_, any_of(kOffsets)).poison();
    auto expected_grad = Tensor<Storage>(elements_, 0).poison();
    cuda::loss_gradient(s(), of_cuda, upstream_.data(), grad.data(), queue);
    cpu::loss_gradient(s(), of_cpu, upstream_[0], expected_grad.data(), kThreadsOfCPU);
    CHECK(grad.guards_intact(), c_.description);
    // So is its gradient.
    const double grad_error = distance(grad, expected_grad, 1.0);
    CHECK(grad_error <= 2 * tolerance<Storage>(), c_.description, grad_error);
  }

 private:
  static constexpr double kInfinite = std::numeric_limits<double>::infinity();

  const LossSettings& s() const { return c_.settings; }
  LossTensors tensors(Tensor<F>& normalizer, Tensor<F>* divisors) {
    return {logits_.data(),        c_.probabilities ? nullptr : target_.data(),
            probabilities_.data(), class_weight_.data(),
            normalizer.data(),     divisors ? divisors->data() : nullptr};
  }

  const Case& c_;
  std::int64_t elements_, rows_;
  Tensor<Storage> logits_;
  Tensor<F> class_weight_, probabilities_, upstream_;
  std::vector<std::int64_t> target_;
};

int cases = 0;

void compare(DType dtype, int steps, int batch, int classes) {
  if (cases++ % kEvery != 0) return;
  const bool batch_first = chance(0.3), to_constant = chance(0.2);
  const double square = chance(0.3) ? 0 : chance(0.1) ? 1 : 0.05;
  Case c{"",
         {dtype, steps, batch, classes, batch_first ? classes : batch * classes,
          batch_first ? steps * classes : classes, 1 - square, square, to_constant, 0.5,
          chance(0.5) ? 0 : 0.1, chance(0.3) ? 0 : -100},
         chance(0.3),
         chance(0.4),
         chance(0.1),
         chance(0.1) ? 1 : 0};
  std::ostringstream text;
  text << "dtype " << static_cast<int>(dtype) << " " << steps << "x" << batch << "x" << classes
       << " square " << square << " smoothing " << c.settings.label_smoothing << " ignore "
       << c.settings.ignore_index << (c.probabilities ? " probabilities" : "")
       << (c.class_weight ? " weighted" : "") << (c.extremes ? " extremes" : "")
       << (to_constant ? " to a constant" : "") << (c.invalid ? " invalid" : "");
  c.description = text.str();
  visit_dtype(dtype, [&](auto storage) { Comparison<decltype(storage)>(c).run(); });
}

}  // namespace

int main() {
  cpu::set_level("baseline");  // without FMA, as the kernels are compiled here
  for (DType dtype : kDTypes) {
    for (int classes : {1, 2, 7, 8, 9, 33, 256, 257, 600}) {  // a warp's row ends at 256 here
      for (int batch : {1, 2, 5, 17}) {
        for (int steps : {1, 3}) {
          for (int repeat = 0; repeat < 3; ++repeat) compare(dtype, steps, batch, classes);
        }
      }
    }
    compare(dtype, 2, 1500, 3);  // more rows than the blocks of the value
    compare(dtype, 0, 3, 4);
    compare(dtype, 3, 0, 4);
  }
  std::cout << (cases + kEvery - 1) / kEvery << " cases, " << failed_checks() << " failed checks\n";
  return failed_checks() != 0;
}
