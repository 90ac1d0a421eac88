// The CUDA kernels of the LIF, run on the host from their own source, against the CPU core.
#include <sstream>
#include <string>

#include "../../csrc/arguments.h"
#include "compare.h"

namespace {

using namespace trt;

const char* const kCharges[] = {"decay", "divide"};
const char* const kResets[] = {"hard", "soft", "none"};
const char* const kSurrogates[] = {"triangle", "sigmoid", "atan", "rectangle", "fast_sigmoid"};
const char* const kPhis[] = {"", "square", "trt", "range", "spike"};
const int kSteps[] = {0, 1, 2, 6, 16, 17, 33, 50};
const int kInner[] = {1, 3, 7, 8, 64, 130};
const int kOuter[] = {1, 3};

struct Case {
  std::string description;
  LIFSettings settings;
  std::int64_t outer, steps, inner;
  int checkpoint_every;
  bool extremes;  // infinity and NaN among x
};

template <class Storage>
class Comparison {
 public:
  using F = State<Storage>;

  explicit Comparison(const Case& c)
      : c_(c), sequence_(c.outer * c.steps * c.inner), state_(c.outer * c.inner) {
    common_ = any_of(kOffsets);
    const auto near_threshold = [&] {
      const double value = (below(4001) - 1500) * 1e-3;
      if (c.extremes && chance(0.01)) {
        return chance(0.5) ? std::numeric_limits<double>::infinity()
                           : std::numeric_limits<double>::quiet_NaN();
      }
      return chance(0.2) ? std::round(value * 4) / 4 : value;  // exact ties with the threshold
    };
    const auto gradient = [&] { return (below(2001) - 1000) * 1e-3; };
    penalized_ = settings().penalize_spike || settings().potential >= 0;
    x_ = sequence<Storage>().fill(near_threshold);
    if (chance(0.5)) v_init_ = state().fill([&] { return (below(2001) - 1000) * 1e-3; });
    if (penalized_) {
      weight_ = Tensor<F>(c.steps, 0).fill([&] { return 0.1 + below(100) * 0.01; });
      grad_penalty_ = Tensor<F>(1, 0).fill([&] { return below(2) ? 3.0 : -20.0; });
    }
    if (chance(0.8)) grad_spikes_ = sequence<Storage>().fill(gradient);
    if (chance(0.4)) grad_potential_ = sequence<F>().fill(gradient);
    if (chance(0.4)) grad_state_ = state().fill(gradient);
    with_penalty_gradient_ = penalized_ && chance(0.8);
  }

  void run() {
    forward();
    backward();
  }

 private:
  struct Forward {
    Tensor<Storage> spikes;
    Tensor<F> potential, state, penalty;
  };
  struct Backward {
    Tensor<Storage> grad_x;
    Tensor<F> grad_v_init;
  };

  const LIFSettings& settings() const { return c_.settings; }
  LIFShape shape() const { return {dtype(), c_.outer, c_.steps, c_.inner}; }
  static DType dtype() {
    if (std::is_same<Storage, float>::value) return DType::float32;
    if (std::is_same<Storage, double>::value) return DType::float64;
    return std::is_same<Storage, Half>::value ? DType::float16 : DType::bfloat16;
  }

  // Most tensors of a case share their misalignment, so that every width of access is met.
  int offset() const { return chance(0.95) ? common_ : any_of(kOffsets); }
  template <class T>
  Tensor<T> sequence() const {
    return Tensor<T>(sequence_, offset());
  }
  Tensor<F> state() const { return Tensor<F>(state_, offset()); }

  Forward forward_outputs(bool with_potential, bool with_state) const {
    Forward out;
    out.spikes = sequence<Storage>().poison();
    if (with_potential) out.potential = sequence<F>().poison();
    if (with_state) out.state = state().poison();
    if (penalized_) out.penalty = Tensor<F>(1, 0).poison();
    return out;
  }

  LIFForward arguments(Forward& out, Tensor<F>* checkpoints = nullptr) {
    return {shape(),
            x_.data(),
            v_init_.data(),
            weight_.data(),
            out.spikes.data(),
            out.potential.data(),
            out.state.data(),
            out.penalty.data(),
            checkpoints ? checkpoints->data() : nullptr,
            c_.checkpoint_every};
  }

  Tensor<F> empty_checkpoints() const {
    const std::int64_t segments = ceil_div(c_.steps, c_.checkpoint_every);
    if (segments < 2) return {};
    return Tensor<F>((segments - 1) * state_, offset()).poison();
  }

  Tensor<double> workspace(std::int64_t bytes) const {
    return Tensor<double>((bytes + 7) / 8, 0).poison();
  }

  void cuda_forward(Forward& out) {
    auto space = workspace(cuda::lif_forward_workspace(settings(), shape()));
    checkpoints_ = empty_checkpoints();
    cuda::lif_forward(settings(), arguments(out, &checkpoints_), {space.data(), 0, nullptr});
    CHECK(checkpoints_.guards_intact(), c_.description);
    CHECK(space.guards_intact(), c_.description);
    CHECK(out.spikes.guards_intact(), c_.description);
    CHECK(out.potential.guards_intact(), c_.description);
    CHECK(out.state.guards_intact(), c_.description);
    CHECK(out.penalty.guards_intact(), c_.description);
  }

  void forward() {
    const bool with_potential = chance(0.5), with_state = chance(0.5);
    Forward expected = forward_outputs(with_potential, with_state);
    cpu::lif_forward(settings(), arguments(expected), 1);
    Forward got = forward_outputs(with_potential, with_state);
    cuda_forward(got);
    CHECK(same(got.spikes, expected.spikes), c_.description);
    CHECK(same(got.potential, expected.potential), c_.description);
    CHECK(same(got.state, expected.state), c_.description);
    const double error = distance(got.penalty, expected.penalty);
    CHECK(error <= tolerance<F>(), c_.description, error);
    if (!penalized_ || !chance(0.2)) return;
    common_ = 1 - (common_ & 1);  // another width of access
    x_ = [&] {
      Tensor<Storage> moved(sequence_, common_);
      std::copy_n(x_.data(), sequence_, moved.data());
      return moved;
    }();
    Forward again = forward_outputs(with_potential, with_state);
    cuda_forward(again);
    CHECK(same(again.penalty, got.penalty), c_.description, again.penalty[0], got.penalty[0]);
  }

  LIFBackward arguments(Backward& out) {
    return {shape(),
            x_.data(),
            v_init_.data(),
            weight_.data(),
            grad_spikes_.data(),
            grad_potential_.data(),
            grad_state_.data(),
            with_penalty_gradient_ ? grad_penalty_.data() : nullptr,
            out.grad_x.data(),
            out.grad_v_init.data(),
            checkpoints_.data(),
            c_.checkpoint_every};
  }

  void backward() {
    const bool with_v_init = chance(0.5);
    const auto outputs = [&] {
      Backward out;
      out.grad_x = sequence<Storage>().poison();
      if (with_v_init) out.grad_v_init = state().poison();
      return out;
    };
    Backward expected = outputs(), got = outputs();
    cpu::lif_backward(settings(), arguments(expected), 1);
    auto space = workspace(cuda::lif_backward_workspace(settings(), shape()));
    cuda::lif_backward(settings(), arguments(got), {space.data(), 0, nullptr});
    CHECK(space.guards_intact(), c_.description);
    CHECK(got.grad_x.guards_intact(), c_.description);
    CHECK(got.grad_v_init.guards_intact(), c_.description);
    const double x_error = distance(got.grad_x, expected.grad_x);
    CHECK(x_error <= tolerance<Storage>(), c_.description, x_error);
    const double v_error = distance(got.grad_v_init, expected.grad_v_init);
    CHECK(v_error <= tolerance<F>(), c_.description, v_error);
  }

  const Case& c_;
  std::int64_t sequence_, state_;
  int common_;
  bool penalized_, with_penalty_gradient_;
  Tensor<Storage> x_, grad_spikes_;
  Tensor<F> v_init_, weight_, grad_potential_, grad_state_, grad_penalty_, checkpoints_;
};

int cases = 0;

void compare(DType dtype, const char* charge, const char* reset, bool detach, const char* surrogate,
             const char* phi, bool fire_at_threshold, int outer, int steps, int inner) {
  if (cases++ % kEvery != 0) return;
  Case c{"",          LIFSettings::make(charge, reset, surrogate, phi),
         outer,       steps,
         inner,       chance(0.8) ? 16 : 1 + below(5),
         chance(0.05)};
  std::ostringstream description;
  description << "dtype " << static_cast<int>(dtype) << " " << charge << " " << reset
              << (detach ? " detached " : " ") << surrogate << " phi '" << phi << "'"
              << (fire_at_threshold ? " >= " : " > ") << outer << "x" << steps << "x" << inner
              << (c.extremes ? " extremes" : "");
  c.description = description.str();
  c.settings.detach_reset = detach;
  c.settings.fire_at_threshold = fire_at_threshold;
  c.settings.surrogate_parameter = surrogate == std::string("fast_sigmoid") ? 25 : 1 + below(3);
  c.settings.decay = chance(0.5) ? 0.5 : 0.9;
  c.settings.tau = 1 / c.settings.decay;
  c.settings.threshold = 1;
  c.settings.v_reset = chance(0.5) ? 0 : -0.25;
  c.settings.delta = chance(0.9) ? 0.5 : 30;  // the second reaches the largest growth
  c.settings.eps = 1e-5;
  visit_dtype(dtype, [&](auto storage) { Comparison<decltype(storage)>(c).run(); });
}

}  // namespace

int main() {
  cpu::set_level("baseline");  // without FMA, as this file is compiled
  // Every shape with some settings, and every setting with some shape.
  for (DType dtype : kDTypes) {
    for (int steps : kSteps) {
      for (int inner : kInner) {
        for (int outer : kOuter) {
          for (int repeat = 0; repeat < 3; ++repeat) {
            compare(dtype, any_of(kCharges), any_of(kResets), chance(0.5), any_of(kSurrogates),
                    repeat == 0 ? any_of(kPhis) : "", chance(0.5), outer, steps, inner);
          }
        }
      }
    }
    for (const char* charge : kCharges) {
      for (const char* reset : kResets) {
        for (const char* surrogate : kSurrogates) {
          for (const char* phi : kPhis) {
            for (int flags = 0; flags < 4; ++flags) {
              compare(dtype, charge, reset, flags & 1, surrogate, phi, flags & 2, any_of(kOuter),
                      any_of(kSteps), any_of(kInner));
            }
          }
        }
      }
    }
    compare(dtype, "decay", "hard", false, "triangle", "square", false, 0, 4, 8);
    compare(dtype, "decay", "hard", false, "triangle", "square", false, 3, 4, 0);
  }
  std::cout << (cases + kEvery - 1) / kEvery << " cases, " << failed_checks() << " failed checks\n";
  return failed_checks() != 0;
}
