// Tensors of more than 2^31 elements on the CUDA kernels: the first and the last blocks of a launch
// run on the host, over memory of which only the pages that they touch exist. What they write is
// what the CPU core writes for the same neurons in a small tensor.
#include <sys/mman.h>

#include "../../csrc/arguments.h"
#include "compare.h"
#include "cuda_on_host.h"

namespace {

using namespace trt;

constexpr std::int64_t kEdge = 64;  // elements looked at, at either end
constexpr std::int64_t kLarge = (std::int64_t{1} << 31) + 24;

// Memory of zeros that takes none until it is written to.
template <class T>
class Huge {
 public:
  explicit Huge(std::int64_t size) : bytes_(size * sizeof(T)) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) cuda_on_host::fail("no room for the addresses of a huge tensor");
  }
  ~Huge() { munmap(memory_, bytes_); }
  Huge(const Huge&) = delete;
  Huge& operator=(const Huge&) = delete;
  T* data() const { return static_cast<T*>(memory_); }

 private:
  std::size_t bytes_;
  void* memory_;
};

// Sixteen blocks hold more than kEdge elements at either end, however few a thread takes.
void run_only_the_ends() {
  cuda_on_host::only_blocks = [](unsigned block) { return block < 16 || block + 16 >= gridDim.x; };
}

// Places of both ends of a dimension of `size`, in a tensor that has them alone.
std::int64_t place(std::int64_t small, std::int64_t size) {
  return small < kEdge ? small : size - 2 * kEdge + small;
}

// The ends of every timestep of [outer][steps][inner], or of a state where steps is 1, in a small
// tensor [steps][2 kEdge]; neurons are counted over outer and inner.
template <class T, class Function>
void ends(const T* huge, const LIFShape& shape, std::int64_t steps, Function&& f) {
  for (std::int64_t t = 0; t < steps; ++t) {
    for (std::int64_t i = 0; i < 2 * kEdge; ++i) {
      const std::int64_t n = place(i, shape.neurons());
      const std::int64_t at = (n / shape.inner * steps + t) * shape.inner + n % shape.inner;
      f(const_cast<T*>(huge)[at], t * 2 * kEdge + i);
    }
  }
}

template <class T>
std::vector<T> gather(const T* huge, const LIFShape& shape, std::int64_t steps) {
  std::vector<T> small(steps * 2 * kEdge);
  ends(huge, shape, steps, [&](const T& from, std::int64_t i) { small[i] = from; });
  return small;
}

template <class T>
void scatter(T* huge, const LIFShape& shape, std::int64_t steps) {
  ends(huge, shape, steps, [&](T& to, std::int64_t) {
    store(&to, static_cast<State<T>>((below(4001) - 1500) * 1e-3));
  });
}

template <class T>
bool equal(const std::vector<T>& a, const std::vector<T>& b) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (load(a[i]) != load(b[i])) return false;
  }
  return true;
}

LIFSettings settings(const char* charge, const char* surrogate) {
  LIFSettings s = LIFSettings::make(charge, "hard", surrogate, "");
  s.surrogate_parameter = 1;
  s.decay = 0.5;
  s.tau = 2;
  s.threshold = 1;
  s.scale = 1;
  return s;
}

// Forward and backward; `general` takes the kernels of everything, else those of spikes alone.
void lif(LIFShape shape, bool general) {
  using T = BFloat16;
  shape.dtype = DType::bfloat16;
  shape.channels = 1;
  shape.channel_stride = shape.neurons();
  const LIFSettings s = settings(general ? "leak" : "decay", general ? "atan" : "triangle");
  const std::int64_t size = shape.neurons() * shape.steps;
  const Huge<T> x(size), spikes(size), grad(size), grad_x(size);
  const Huge<float> v_init(shape.neurons()), state(shape.neurons()), potential(general ? size : 1);
  scatter(x.data(), shape, shape.steps);
  scatter(grad.data(), shape, shape.steps);
  scatter(v_init.data(), shape, 1);

  LIFForward forward{};
  forward.shape = shape;
  forward.x = x.data();
  forward.v_init = v_init.data();
  forward.spikes = spikes.data();
  forward.state = state.data();
  forward.potential = general ? potential.data() : nullptr;
  forward.checkpoint_every = 16;
  LIFBackward backward{};
  backward.shape = shape;
  backward.x = x.data();
  backward.v_init = v_init.data();
  backward.grad_spikes = grad.data();
  backward.grad_x = grad_x.data();
  backward.checkpoint_every = 16;
  std::vector<char> space(cuda::lif_forward_workspace(s, forward) +
                          cuda::lif_backward_workspace(s, backward) + 1);
  cuda::lif_forward(s, forward, {space.data(), 0, nullptr});
  cuda::lif_backward(s, backward, {space.data(), 0, nullptr});

  LIFShape small = shape;
  small.outer = 1;
  small.inner = small.channel_stride = 2 * kEdge;
  const auto small_x = gather(x.data(), shape, shape.steps);
  const auto small_grad = gather(grad.data(), shape, shape.steps);
  const auto small_v = gather(v_init.data(), shape, 1);
  std::vector<T> small_spikes(small_x.size()), small_grad_x(small_x.size());
  std::vector<float> small_state(2 * kEdge), small_potential(small_x.size());
  forward.shape = backward.shape = small;
  forward.x = backward.x = small_x.data();
  forward.v_init = backward.v_init = small_v.data();
  forward.spikes = small_spikes.data();
  forward.state = small_state.data();
  if (general) forward.potential = small_potential.data();
  backward.grad_spikes = small_grad.data();
  backward.grad_x = small_grad_x.data();
  cpu::lif_forward(s, forward, 1);
  cpu::lif_backward(s, backward, 1);

  const auto spiked = gather(spikes.data(), shape, shape.steps);
  CHECK(equal(spiked, small_spikes), "spikes", general);
  CHECK(std::any_of(spiked.begin(), spiked.end(), [](T spike) { return load(spike) == 1; }), "");
  CHECK(equal(gather(state.data(), shape, 1), small_state), "state", general);
  if (general) {
    CHECK(equal(gather(potential.data(), shape, shape.steps), small_potential), "potential", "");
  }
  const auto gradient = gather(grad_x.data(), shape, shape.steps);
  for (std::size_t i = 0; i < gradient.size(); ++i) {
    const float a = load(gradient[i]), b = load(small_grad_x[i]);
    CHECK(std::fabs(a - b) <= 8e-3f * (std::fabs(b) + 0.1f), "gradient", general, i, a, b);
  }
}

void penalty() {
  using T = BFloat16;
  const Huge<T> weight(kLarge), grad(kLarge);
  const LIFShape flat{DType::bfloat16, 1, 1, kLarge};
  scatter(weight.data(), flat, 1);
  const auto small = gather(weight.data(), flat, 1);
  std::vector<T> expected(small.size());
  const PenaltySettings s{{0.0, 0.3, 0.7}, 0.01, 1e-5};
  std::vector<char> space(cuda::penalty_gradient_workspace(s) + 1);
  cuda::penalty_gradient(s, {{DType::bfloat16, kLarge, weight.data(), grad.data(), false}}, 1.0,
                         DType::float32, nullptr, {space.data(), 0, nullptr});
  cpu::penalty_gradient(s, {{DType::bfloat16, 2 * kEdge, small.data(), expected.data(), false}},
                        1.0, 1);
  const auto got = gather(grad.data(), flat, 1);
  for (std::size_t i = 0; i < got.size(); ++i) {
    const float a = load(got[i]), b = load(expected[i]);
    CHECK(b != 0 || load(small[i]) == 0, "no gradient", i);
    CHECK(std::fabs(a - b) <= 8e-3f * std::fabs(b), "penalty", i, a, b);
  }
}

void bits() {
  using T = BFloat16;
  const Huge<T> spikes(kLarge), again(kLarge);
  const Huge<std::uint8_t> packed((kLarge + 7) / 8);
  const LIFShape flat{DType::bfloat16, 1, 1, kLarge};
  ends(spikes.data(), flat, 1, [](T& to, std::int64_t) { store(&to, below(2) ? 1.0f : 0.0f); });
  std::uint8_t binary = 7;
  cuda::spike_pack(DType::bfloat16, kLarge, spikes.data(), packed.data(), &binary,
                   {nullptr, 0, nullptr});
  cuda::spike_unpack(DType::bfloat16, {packed.data(), 1, 1, kLarge}, again.data(),
                     {nullptr, 0, nullptr});
  CHECK(binary == 1, "binary", int(binary));
  const auto given = gather(spikes.data(), flat, 1), got = gather(again.data(), flat, 1);
  CHECK(equal(given, got), "bits", "");
  const std::int64_t last = kLarge - 1;
  CHECK((packed.data()[last / 8] >> last % 8 & 1) == (load(given.back()) == 1), "the last bit", "");
}

}  // namespace

int main() {
  cpu::set_level("baseline");
  run_only_the_ends();
  const std::int64_t third = kLarge / 2 + 8;
  for (const bool general : {false, true}) {
    lif({DType::bfloat16, 1, 3, third}, general);       // beyond 2^31 by its last timestep
    lif({DType::bfloat16, third / 8, 3, 8}, general);   // by its last samples
    lif({DType::bfloat16, 1, 2, kLarge + 1}, general);  // by its neurons, which no vector divides
  }
  penalty();
  bits();
  std::cout << failed_checks() << " failed checks\n";
  return failed_checks() != 0;
}
