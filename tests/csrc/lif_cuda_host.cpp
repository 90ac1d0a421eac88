// The CUDA kernels of the LIF, run on the host from their own source, against the CPU core.
#include <sstream>
#include <string>

#include "../../csrc/arguments.h"
#include "compare.h"

namespace {

using namespace trt;

const char* const kCharges[] = {"decay", "divide",      "leak", "leak_divide",
                                "rest",  "rest_divide", "box",  "delayed"};
const char* const kResets[] = {"hard", "soft", "none"};
const char* const kSurrogates[] = {"triangle",  "sigmoid",      "atan",
                                   "rectangle", "fast_sigmoid", "signed_step"};
const char* const kPhis[] = {"", "square", "trt", "range", "spike"};
const int kSteps[] = {0, 1, 2, 6, 16, 17, 33, 50};
const int kInner[] = {1, 3, 7, 8, 64, 130};
const int kOuter[] = {1, 3};

// Channels in memory, `stride` neurons each, `repeats` times in a timestep of each of `outer`.
struct Layout {
  std::int64_t channels, stride, repeats, outer;
};
// Neighbours in memory, by whole vectors and not; runs by whole vectors and not; outside of time.
const Layout kLayouts[] = {
    {1, 1, 37, 2},  {3, 1, 5, 1},   {4, 1, 9, 2},   {5, 1, 8, 3},   {64, 1, 6, 1}, {64, 1, 1, 5},
    {130, 1, 3, 1}, {128, 1, 3, 2}, {2, 4, 9, 1},   {3, 8, 2, 2},   {64, 4, 1, 2}, {5, 16, 3, 2},
    {3, 49, 2, 1},  {5, 7, 3, 2},   {64, 3, 2, 1},  {130, 2, 1, 2}, {3, 2, 40, 1}, {4, 512, 2, 1},
    {2, 49, 16, 1}, {3, 40, 0, 6},  {5, 13, 0, 10}, {7, 1, 0, 14},  {8, 4, 0, 8}};
const int kBlockSteps[] = {1, 4, 17, 33};

struct Case {
  std::string description;
  LIFSettings settings;
  LIFShape shape;
  int checkpoint_every;
  bool extremes;  // infinity and NaN among x
  bool neuron, stats, affine, means, rate;
  int gains;  // none, [steps], [steps][channels]
};

template <class Storage>
class Comparison {
 public:
  using F = State<Storage>;

  explicit Comparison(const Case& c)
      : c_(c),
        state_(c.shape.neurons()),
        sequence_(state_ * c.shape.steps),
        common_(any_of(kOffsets)),
        penalized_(c.settings.penalize_spike || c.settings.potential >= 0) {
    const auto near_threshold = [&] {
      const double value = (below(4001) - 1500) * 1e-3;
      if (c.extremes && chance(0.01)) {
        return chance(0.5) ? std::numeric_limits<double>::infinity()
                           : std::numeric_limits<double>::quiet_NaN();
      }
      return chance(0.2) ? std::round(value * 4) / 4 : value;  // exact ties with the threshold
    };
    const auto gradient = [&] { return (below(2001) - 1000) * 1e-3; };
    x_ = like_x().fill(near_threshold);
    if (chance(0.5)) v_init_ = state().fill([&] { return (below(2001) - 1000) * 1e-3; });
    if (penalized_) {
      weight_ = Tensor<F>(steps(), 0).fill([&] { return 0.1 + below(100) * 0.01; });
      grad_penalty_ = Tensor<F>(1, 0).fill([&] { return below(2) ? 3.0 : -20.0; });
    }
    if (chance(0.8)) grad_spikes_ = sequence<Storage>().fill(gradient);
    if (chance(0.4)) grad_potential_ = sequence<F>().fill(gradient);
    if (chance(0.4)) grad_state_ = state().fill(gradient);
    with_penalty_gradient_ = penalized_ && chance(0.8);
    give_by_channel();
  }

  void run() {
    forward();
    backward();
  }

 private:
  struct Forward {
    Tensor<Storage> spikes;
    Tensor<F> potential, state, penalty, rate;
    std::vector<std::uint8_t> bits;
  };
  struct Backward {
    Tensor<Storage> grad_x;
    Tensor<F> grad_v_init, grad_neuron, grad_affine, grad_gains;
  };

  const LIFSettings& settings() const { return c_.settings; }
  std::int64_t steps() const { return c_.shape.steps; }
  std::int64_t channels() const { return c_.shape.channels; }

  // Most tensors of a case share their misalignment, so that every width of access is met.
  int offset() const { return chance(0.95) ? common_ : any_of(kOffsets); }
  template <class T>
  Tensor<T> sequence() const {
    return Tensor<T>(sequence_, offset());
  }
  Tensor<F> state() const { return Tensor<F>(state_, offset()); }
  Tensor<Storage> like_x() const {
    return Tensor<Storage>(c_.shape.constant ? state_ : sequence_, offset());
  }

  void give_by_channel() {
    // Rows that begin at `from`. No guards behind them: AddressSanitizer has its own.
    const auto table = [&](std::int64_t length, std::initializer_list<double> from, double width) {
      std::vector<F> to;
      to.reserve(from.size() * length);  // no more: reads behind the last are then found
      for (const double first : from) {
        for (std::int64_t i = 0; i < length; ++i) {
          to.push_back(static_cast<F>(first + below(33) * width / 32));
        }
      }
      return to;
    };
    const std::int64_t count = channels();
    bool divides = false;
    visit_kind(Charges(), settings().charge, [&](auto charge) { divides = charge.divides; });
    if (c_.neuron) neuron_ = table(count, {divides ? 1.0 : 0.25, 0.75, -0.5}, 0.75);
    if (!c_.stats) return;
    stats_ = table(count, {-0.5, 0.01, 0.5, 1.0}, 1.0);
    if (chance(0.8)) norm_weight_ = table(count, {0.5}, 1.0);
    if (chance(0.8)) norm_bias_ = table(count, {-0.25}, 1.0);
    if (c_.means) means_ = table(count, {-0.1, -0.2}, 0.3);
    if (c_.gains) gains_ = table(c_.gains == 2 ? steps() * count : steps(), {0.5}, 1.0);
  }

  LIFChannels by_channel() {
    const auto of = [](const std::vector<F>& table) {
      return table.empty() ? nullptr : table.data();
    };
    return {of(neuron_), of(stats_), of(norm_weight_), of(norm_bias_), of(gains_), c_.gains == 2};
  }

  Forward forward_outputs(bool with_potential, bool with_state) const {
    Forward out;
    out.spikes = sequence<Storage>().poison();
    if (with_potential) out.potential = sequence<F>().poison();
    if (with_state) out.state = state().poison();
    if (penalized_) out.penalty = Tensor<F>(1, 0).poison();
    if (c_.rate) out.rate = Tensor<F>(steps(), 0).poison();
    // A byte more than is written, which must stay.
    out.bits.assign(settings().bits * steps() * c_.shape.bit_bytes() + 1, 0xa5);
    return out;
  }

  LIFForward arguments(Forward& out, Tensor<F>* checkpoints = nullptr) {
    return {c_.shape,
            by_channel(),
            x_.data(),
            v_init_.data(),
            weight_.data(),
            out.spikes.data(),
            out.potential.data(),
            out.state.data(),
            out.penalty.data(),
            out.rate.data(),
            settings().bits ? out.bits.data() : nullptr,
            checkpoints ? checkpoints->data() : nullptr,
            c_.checkpoint_every};
  }

  Tensor<F> empty_checkpoints() const {
    const std::int64_t segments = ceil_div(steps(), c_.checkpoint_every);
    if (segments < 2) return {};
    return Tensor<F>((segments - 1) * state_, offset()).poison();
  }

  Tensor<double> workspace(std::int64_t bytes) const {
    return Tensor<double>((bytes + 7) / 8, 0).poison();
  }

  void cuda_forward(Forward& out) {
    checkpoints_ = empty_checkpoints();
    const LIFForward a = arguments(out, &checkpoints_);
    auto space = workspace(cuda::lif_forward_workspace(settings(), a));
    cuda::lif_forward(settings(), a, {space.data(), 0, nullptr});
    CHECK(checkpoints_.guards_intact(), c_.description);
    CHECK(space.guards_intact(), c_.description);
    CHECK(out.spikes.guards_intact(), c_.description);
    for (const Tensor<F>* t : {&out.potential, &out.state, &out.penalty, &out.rate}) {
      CHECK(t->guards_intact(), c_.description);
    }
  }

  void forward() {
    const bool with_potential = chance(0.5), with_state = chance(0.5);
    Forward expected = forward_outputs(with_potential, with_state);
    cpu::lif_forward(settings(), arguments(expected), kThreadsOfCPU);
    Forward got = forward_outputs(with_potential, with_state);
    cuda_forward(got);
    CHECK(same(got.spikes, expected.spikes), c_.description);
    CHECK(same(got.potential, expected.potential), c_.description);
    CHECK(same(got.state, expected.state), c_.description);
    CHECK(same(got.rate, expected.rate), c_.description);
    CHECK(got.bits == expected.bits, c_.description);
    bits_ = std::move(got.bits);
    const double error = distance(got.penalty, expected.penalty);
    CHECK(error <= tolerance<F>(), c_.description, error);
    if (!penalized_ || !chance(0.2)) return;
    common_ = 1 - (common_ & 1);  // another width of access
    x_ = [&] {
      Tensor<Storage> moved(x_.size(), common_);
      std::copy_n(x_.data(), x_.size(), moved.data());
      return moved;
    }();
    Forward again = forward_outputs(with_potential, with_state);
    cuda_forward(again);
    CHECK(same(again.penalty, got.penalty), c_.description, again.penalty[0], got.penalty[0]);
  }

  LIFBackward arguments(Backward& out) {
    const bool from_bits = settings().bits == 2;
    return {c_.shape,
            by_channel(),
            from_bits ? nullptr : x_.data(),
            v_init_.data(),
            weight_.data(),
            from_bits ? bits_.data() : nullptr,
            means_.empty() ? nullptr : means_.data(),
            grad_spikes_.data(),
            grad_potential_.data(),
            grad_state_.data(),
            with_penalty_gradient_ ? grad_penalty_.data() : nullptr,
            out.grad_x.data(),
            out.grad_v_init.data(),
            out.grad_neuron.data(),
            out.grad_affine.data(),
            out.grad_gains.data(),
            from_bits ? nullptr : checkpoints_.data(),
            c_.checkpoint_every};
  }

  void backward() {
    const bool with_v_init = chance(0.5), with_neuron = c_.neuron && chance(0.8);
    const bool with_gains = c_.gains && chance(0.8);
    const bool with_x = chance(0.9) || !(with_neuron || c_.affine);
    const auto outputs = [&] {
      Backward out;
      if (with_x) out.grad_x = like_x().poison();
      if (with_v_init) out.grad_v_init = state().poison();
      if (with_neuron) out.grad_neuron = Tensor<F>(3 * channels(), 0).poison();
      if (c_.affine) out.grad_affine = Tensor<F>(2 * channels(), 0).poison();
      if (with_gains) out.grad_gains = Tensor<F>(steps() * channels(), 0).poison();
      return out;
    };
    Backward expected = outputs(), got = outputs();
    cpu::lif_backward(settings(), arguments(expected), kThreadsOfCPU);
    const LIFBackward a = arguments(got);
    auto space = workspace(cuda::lif_backward_workspace(settings(), a));
    cuda::lif_backward(settings(), a, {space.data(), 0, nullptr});
    CHECK(space.guards_intact(), c_.description);
    CHECK(got.grad_x.guards_intact(), c_.description);
    const double x_error = distance(got.grad_x, expected.grad_x, 1);
    CHECK(x_error <= tolerance<Storage>(), c_.description, x_error);
    const double v_error = distance(got.grad_v_init, expected.grad_v_init, 1);
    CHECK(v_error <= tolerance<F>(), c_.description, v_error);
    // What a sum of gradients of random signs is about: one that is less has cancelled.
    const double of_sum = std::sqrt(static_cast<double>(sequence_));
    for (auto sums : {&Backward::grad_neuron, &Backward::grad_affine, &Backward::grad_gains}) {
      CHECK((got.*sums).guards_intact() && (got.grad_v_init).guards_intact(), c_.description);
      const double error = distance(got.*sums, expected.*sums, of_sum);
      CHECK(error <= 4 * tolerance<F>(), c_.description, error);
    }
  }

  const Case& c_;
  const std::int64_t state_, sequence_;
  int common_;
  bool penalized_, with_penalty_gradient_;
  Tensor<Storage> x_, grad_spikes_;
  Tensor<F> v_init_, weight_, grad_potential_, grad_state_, grad_penalty_, checkpoints_;
  std::vector<F> neuron_, stats_, norm_weight_, norm_bias_, means_, gains_;
  std::vector<std::uint8_t> bits_;
};

int cases = 0;

// A case with what is common to all, or false where this build leaves it out.
bool begin(Case& c, DType dtype, const char* charge, const char* reset, bool detach,
           const char* surrogate, const char* phi, bool fire_at_threshold) {
  if (cases++ % kEvery != 0) return false;
  c.settings = LIFSettings::make(charge, reset, surrogate, phi);
  c.settings.detach_reset = detach;
  c.settings.fire_at_threshold = fire_at_threshold;
  c.settings.surrogate_parameter = surrogate == std::string("fast_sigmoid") ? 25 : 1 + below(3);
  c.settings.decay = chance(0.5) ? 0.5 : 0.9;
  c.settings.tau = 1 / c.settings.decay;
  c.settings.threshold = 1;
  c.settings.v_reset = chance(0.5) ? 0 : -0.25;
  c.settings.delta = chance(0.9) ? 0.5 : 30;  // the second reaches the largest growth
  c.settings.eps = 1e-5;
  c.settings.scale = 1;
  c.settings.batch = false;
  c.settings.bits = 0;
  c.shape.dtype = dtype;
  c.checkpoint_every = chance(0.8) ? 16 : 1 + below(5);
  std::ostringstream description;
  description << "dtype " << static_cast<int>(dtype) << " " << charge << " " << reset
              << (detach ? " detached " : " ") << surrogate << " phi '" << phi << "'"
              << (fire_at_threshold ? " >=" : " >");
  c.description = description.str();
  return true;
}

void run(Case& c) {
  std::ostringstream description;
  description << c.description << " " << c.shape.outer << "x" << c.shape.steps << "x"
              << c.shape.inner << (c.extremes ? " extremes" : "");
  if (c.shape.channels > 1) {
    description << " channels " << c.shape.channels << " stride " << c.shape.channel_stride;
  }
  description << (c.shape.constant ? " constant" : "") << (c.rate ? " rate" : "")
              << (c.neuron ? " neuron" : "") << (c.stats ? " stats" : "")
              << (c.settings.batch ? " batch" : "") << (c.means ? " means" : "")
              << (c.affine ? " affine" : "") << " gains " << c.gains << " bits " << c.settings.bits;
  c.description = description.str();
  visit_dtype(c.shape.dtype, [&](auto storage) { Comparison<decltype(storage)>(c).run(); });
}

// Nothing given by channel.
void compare(DType dtype, const char* charge, const char* reset, bool detach, const char* surrogate,
             const char* phi, bool fire_at_threshold, int outer, int steps, int inner) {
  Case c{};
  if (!begin(c, dtype, charge, reset, detach, surrogate, phi, fire_at_threshold)) return;
  c.shape = {dtype, outer, steps, inner};
  c.extremes = chance(0.05);
  run(c);
}

// Anything that the plain kernels do not serve.
void compare_block(DType dtype, const Layout& layout, int steps) {
  Case c{};
  const bool from_bits = chance(0.2);
  const bool detach = chance(0.5);
  const char* reset = any_of(kResets);
  if (from_bits && !detach && reset == kResets[0]) reset = kResets[1];
  const char* surrogate = from_bits ? "rectangle" : any_of(kSurrogates);
  const char* phi = from_bits ? any_of({"", "spike"}) : chance(0.2) ? any_of(kPhis) : "";
  if (!begin(c, dtype, any_of(kCharges), reset, detach, surrogate, phi, chance(0.5))) return;
  const std::int64_t whole = layout.channels * layout.stride * layout.repeats;
  c.shape = {dtype,        layout.outer,    steps, whole ? whole : layout.stride,
             chance(0.25), layout.channels, 1};
  c.shape.channel_stride = layout.channels == 1 ? c.shape.neurons() : layout.stride;
  c.rate = chance(0.3);
  c.neuron = chance(0.6);
  c.settings.bits = from_bits ? 2 : chance(0.3) ? 1 : 0;
  c.stats = !from_bits && chance(0.6);
  if (c.stats) {
    c.settings.scale = chance(0.5) ? 1 : 0.75;
    c.settings.batch = steps > 0 && chance(0.7);  // nothing has no mean
    c.affine = chance(0.7);
    c.means = c.settings.batch && chance(0.3);
    c.gains = below(3);
  }
  run(c);
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
          for (int flags = 0; flags < 4; ++flags) {
            compare(dtype, charge, reset, flags & 1, surrogate, any_of(kPhis), flags & 2,
                    any_of(kOuter), any_of(kSteps), any_of(kInner));
          }
        }
      }
    }
    compare(dtype, "decay", "hard", false, "triangle", "square", false, 0, 4, 8);
    compare(dtype, "decay", "hard", false, "triangle", "square", false, 3, 4, 0);
    for (const Layout& layout : kLayouts) {
      for (int steps : kBlockSteps) {
        for (int repeat = 0; repeat < 3; ++repeat) compare_block(dtype, layout, steps);
      }
      compare_block(dtype, layout, 0);
    }
    compare_block(dtype, {3, 8, 2, 0}, 4);
    compare_block(dtype, {4, 1, 0, 0}, 4);
  }
  std::cout << (cases + kEvery - 1) / kEvery << " cases, " << failed_checks() << " failed checks\n";
  return failed_checks() != 0;
}
