// The CUDA kernels of the TRT weight regularizer, run on the host from their own source, against
// the CPU core.
#include <cmath>
#include <memory>
#include <sstream>

#include "../../csrc/arguments.h"
#include "compare.h"

namespace {

using namespace trt;

// A parameter and its gradients, of any storage type.
class Parameter {
 public:
  virtual ~Parameter() = default;
  virtual PenaltyTensor of_cuda(bool accumulate) = 0;
  virtual PenaltyTensor of_cpu(bool accumulate) = 0;
  virtual void check_gradient(const std::string& description) const = 0;
};

template <class T>
class Typed : public Parameter {
 public:
  Typed(DType dtype, std::int64_t size, double scale)
      : dtype_(dtype),
        weight_(Tensor<T>(size, any_of(kOffsets)).fill([&] {
          return chance(0.02) ? 0.0 : scale * (below(2001) - 1000) * 1e-3;
        })),
        got_(Tensor<T>(size, any_of(kOffsets))),
        expected_(Tensor<T>(size, 0)) {
    got_.fill([&] { return (below(2001) - 1000) * 1e-3; });
    std::copy_n(got_.data(), size, expected_.data());
  }

  PenaltyTensor of_cuda(bool accumulate) override { return row(got_, accumulate); }
  PenaltyTensor of_cpu(bool accumulate) override { return row(expected_, accumulate); }
  void check_gradient(const std::string& description) const override {
    CHECK(got_.guards_intact() && weight_.guards_intact(), description);
    const double error = distance(got_, expected_);
    CHECK(error <= 2 * tolerance<T>(), description, error);
  }

 private:
  PenaltyTensor row(Tensor<T>& grad, bool accumulate) {
    return {dtype_, weight_.size(), weight_.data(), grad.data(), accumulate};
  }

  DType dtype_;
  Tensor<T> weight_, got_, expected_;
};

std::unique_ptr<Parameter> make_parameter(DType dtype, std::int64_t size, double scale) {
  std::unique_ptr<Parameter> parameter;
  visit_dtype(dtype, [&](auto storage) {
    parameter = std::make_unique<Typed<decltype(storage)>>(dtype, size, scale);
  });
  return parameter;
}

int cases = 0;

// `only` is the one dtype of the list, where there is one.
void compare(int tensors, int largest, int terms, double delta, double scale, const DType* only) {
  if (cases++ % kEvery != 0) return;
  std::ostringstream text;
  text << tensors << " tensors of up to " << largest << ", " << terms << " terms, delta " << delta
       << ", scale " << scale << (only ? "" : ", mixed");
  const std::string description = text.str();
  PenaltySettings settings{{}, 0.01, chance(0.5) ? 1e-5 : 0.1};
  for (int t = 0; t < terms; ++t) settings.growth.push_back(std::expm1(delta * t));
  std::vector<std::unique_ptr<Parameter>> parameters;
  bool twice = false;
  for (int i = 0; i < tensors; ++i) {
    const DType dtype = only ? *only : any_of(kDTypes);
    const std::int64_t size = below(largest + 1);
    parameters.push_back(make_parameter(dtype, size, scale));
    twice |= dtype == DType::float64;
  }
  const bool accumulate = chance(0.5);
  std::vector<PenaltyTensor> of_cuda, of_cpu;
  for (auto& parameter : parameters) {
    of_cuda.push_back(parameter->of_cuda(accumulate));
    of_cpu.push_back(parameter->of_cpu(accumulate));
  }

  std::int64_t elements = 0;
  for (const PenaltyTensor& tensor : of_cuda) elements += tensor.size;
  const auto workspace = [](std::int64_t bytes) {
    return Tensor<double>((bytes + 7) / 8, 0).poison();
  };
  auto space = workspace(cuda::penalty_value_workspace(settings, elements, tensors));
  const cuda::Queue queue{space.data(), 0, nullptr};
  auto out = Tensor<double>(1, 0).poison();
  auto out_single = Tensor<float>(1, 0).poison();
  const DType out_type = twice ? DType::float64 : DType::float32;
  void* to = twice ? static_cast<void*>(out.data()) : out_single.data();
  cuda::penalty_value(settings, of_cuda, out_type, to, queue);
  CHECK(space.guards_intact() && out.guards_intact() && out_single.guards_intact(), description);
  const double value = twice ? out[0] : out_single[0];
  const double expected = cpu::penalty_value(settings, of_cpu, kThreadsOfCPU);
  CHECK(std::fabs(value - expected) <= 2e-6 * std::fabs(expected), description, value, expected);
  cuda::penalty_value(settings, of_cuda, out_type, to, queue);
  CHECK((twice ? out[0] : out_single[0]) == value, description, "again");

  const bool with_upstream = chance(0.5);
  auto upstream = Tensor<float>(1, 0).fill([] { return -3.0; });
  auto gradient_space = workspace(cuda::penalty_gradient_workspace(settings));
  cuda::penalty_gradient(settings, of_cuda, 0.5, DType::float32,
                         with_upstream ? upstream.data() : nullptr,
                         {gradient_space.data(), 0, nullptr});
  cpu::penalty_gradient(settings, of_cpu, with_upstream ? -1.5 : 0.5, kThreadsOfCPU);
  CHECK(gradient_space.guards_intact(), description);
  for (auto& parameter : parameters) parameter->check_gradient(description);
}

}  // namespace

int main() {
  cpu::set_level("baseline");  // without FMA, as the kernels are compiled here
  for (const DType& dtype : kDTypes) {
    for (int terms : {1, 2, 3, 6, 7, 64, 65, 66, 150}) {
      for (double delta : {0.0, 0.25, 0.5}) {
        if (delta * terms > 41) continue;  // the caller leaves such terms out
        compare(3, 700, terms, delta, 0.3, &dtype);
        compare(4, 40, terms, delta, 30.0, &dtype);
      }
    }
    compare(1, 20000, 6, 0.25, 0.3, &dtype);
    compare(2, 0, 6, 0.25, 0.3, &dtype);
    compare(2, 2000, 10, 4.0, 1e3, &dtype);
  }
  for (int tensors : {1, 5, 79, 80, 81, 160, 810}) {
    for (int terms : {6, 70}) compare(tensors, 30, terms, 0.25, 0.3, nullptr);
  }
  std::cout << (cases + kEvery - 1) / kEvery << " cases, " << failed_checks() << " failed checks\n";
  return failed_checks() != 0;
}
