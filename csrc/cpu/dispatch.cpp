// Chooses the instruction-set level once, by what this processor can do, and forwards to it.
#include <pthread.h>

#include <atomic>
#include <stdexcept>

#include "kernels.h"

namespace trt {

namespace baseline {
Kernels kernels();
}
#ifdef TRT_KERNELS_X86
namespace avx2 {
Kernels kernels();
}
namespace avx512 {
Kernels kernels();
}
#endif

namespace cpu {
namespace {

struct Level {
  const char* name;
  bool usable;
  Kernels kernels;
};

// Best last.
const std::vector<Level>& all_levels() {
  static const std::vector<Level> levels = {
      {"baseline", true, baseline::kernels()},
#ifdef TRT_KERNELS_X86
      {"avx2",
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi2"),
       avx2::kernels()},
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl"),
       avx512::kernels()},
#endif
  };
  return levels;
}

const Level* best_level() {
  const Level* best = nullptr;
  for (const Level& level : all_levels()) {
    if (level.usable) best = &level;
  }
  return best;
}

std::atomic<const Level*>& current() {
  static std::atomic<const Level*> level{best_level()};
  return level;
}

// Registered when the module loads: a child must know even if its parent never called a kernel.
std::atomic<bool> in_forked_child{false};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true); });

const Kernels& kernels() { return current().load(std::memory_order_relaxed)->kernels; }

}  // namespace

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (const Level& level : all_levels()) {
    if (level.usable) names.push_back(level.name);
  }
  return names;
}

std::string level() { return current().load()->name; }

void set_level(const std::string& name) {
  std::string usable;
  for (const Level& level : all_levels()) {
    if (!level.usable) continue;
    if (name == level.name) {
      current() = &level;
      return;
    }
    usable += std::string(usable.empty() ? "" : ", ") + level.name;
  }
  throw std::invalid_argument("CPU level '" + name + "' is not usable here; usable: " + usable);
}

bool forked() { return fork_handler == 0 && in_forked_child.load(std::memory_order_relaxed); }

void lif_forward(const LIFSettings& settings, const LIFForward& a, int threads) {
  kernels().lif_forward(settings, a, threads);
}
void lif_backward(const LIFSettings& settings, const LIFBackward& a, int threads) {
  kernels().lif_backward(settings, a, threads);
}
void batch_statistics(const Statistics& a, int threads) { kernels().batch_statistics(a, threads); }
double penalty_value(const PenaltySettings& settings, const std::vector<PenaltyTensor>& tensors,
                     int threads) {
  return kernels().penalty_value(settings, tensors, threads);
}
void penalty_gradient(const PenaltySettings& settings, const std::vector<PenaltyTensor>& tensors,
                      double upstream, int threads) {
  kernels().penalty_gradient(settings, tensors, upstream, threads);
}
double loss_value(const LossSettings& settings, const LossTensors& tensors, int threads) {
  return kernels().loss_value(settings, tensors, threads);
}
void loss_gradient(const LossSettings& settings, const LossTensors& tensors, double upstream,
                   void* grad, int threads) {
  kernels().loss_gradient(settings, tensors, upstream, grad, threads);
}
bool spike_pack(DType dtype, std::int64_t count, const void* x, std::uint8_t* bits, int threads) {
  return kernels().spike_pack(dtype, count, x, bits, threads);
}
void spike_unpack(DType dtype, const SpikeBits& bits, void* to, int threads) {
  kernels().spike_unpack(dtype, bits, to, threads);
}

}  // namespace cpu
}  // namespace trt
