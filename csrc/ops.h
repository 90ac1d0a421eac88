// The bridge between bindings and kernels: plain arguments and one entry point an operator.
// Pointers, sizes in elements, and nothing of torch. Sequences are dense [outer][steps][inner].
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace trt {

enum class DType { float32, float64, float16, bfloat16 };

// What stays the same from call to call; made once from names by `LIFSettings::make`.
struct LIFSettings {
  int charge, reset, surrogate;
  int potential;        // phi of the regularizer in `Potentials`, -1 for none
  bool penalize_spike;  // phi is the spike itself
  bool detach_reset, fire_at_threshold;
  double surrogate_parameter, decay, tau, threshold, v_reset, delta, eps;

  bool penalizes() const { return potential >= 0 || penalize_spike; }

  // Throws std::invalid_argument on an unknown name.
  static LIFSettings make(const std::string& charge, const std::string& reset,
                          const std::string& surrogate, const std::string& phi);
};

struct LIFShape {
  DType dtype;  // of x; states are float32, and float64 for float64
  std::int64_t outer, steps, inner;
  std::int64_t neurons() const { return outer * inner; }
};

// Pointers that may be null: v_init, weight, potential, state, penalty, checkpoints. Checkpoints
// are the potentials before every `checkpoint_every` steps but the first, which a GPU's backward
// pass of a longer sequence starts from: [ceil(steps / checkpoint_every) - 1][outer][inner], state
// type. The CPU neither writes nor reads them.
struct LIFForward {
  LIFShape shape;
  const void* x;       // [outer, steps, inner], dtype
  const void* v_init;  // [outer, inner], state type
  const void* weight;  // [steps], state type
  void* spikes;        // like x
  void* potential;     // [outer, steps, inner], state type
  void* state;         // [outer, inner], state type
  void* penalty;       // scalar, state type
  void* checkpoints;
  int checkpoint_every;
};

// Any incoming gradient may be null (zero), and grad_v_init where nobody asks for it.
struct LIFBackward {
  LIFShape shape;
  const void* x;
  const void* v_init;
  const void* weight;
  const void* grad_spikes;     // like x
  const void* grad_potential;  // [outer, steps, inner], state type
  const void* grad_state;      // [outer, inner], state type
  const void* grad_penalty;    // scalar, state type
  void* grad_x;                // like x
  void* grad_v_init;           // [outer, inner], state type
  const void* checkpoints;
  int checkpoint_every;
};

struct PenaltyTensor {
  DType dtype;
  std::int64_t size;
  const void* weight;
  void* grad;
  bool accumulate;  // adds to `grad` instead of writing it
};

// growth[t] = expm1(delta t) of the terms that count; `scale` is weight / steps.
struct PenaltySettings {
  std::vector<double> growth;
  double scale, eps;
};

struct LossSettings {
  DType dtype;  // of the logits; sums are float32, and float64 for float64
  std::int64_t steps, batch, classes;
  std::int64_t step_stride, batch_stride;  // of the logits and their gradient
  double entropy_ratio, square_ratio;      // weights of the cross entropy and the squared term
  bool square_to_constant;                 // (O - constant)^2 instead of (O - target)^2
  double constant, label_smoothing;
  std::int64_t ignore_index;
};

struct LossTensors {
  const void* logits;
  const std::int64_t* target;  // [batch] class indices, or null
  const void* probabilities;   // [batch, classes] in the sum's type, or null
  const void* class_weight;    // [classes] in the sum's type, or null
  void* log_normalizer;        // [steps, batch] in the sum's type: log sum exp of every row
  void* divisors;              // [2] in the sum's type: of the two means; the CPU leaves it alone
};

namespace cpu {

// Instruction-set levels compiled in and usable here, best last.
std::vector<std::string> levels();
std::string level();
void set_level(const std::string& name);  // throws std::invalid_argument
bool forked();                            // true in a forked child, where OpenMP would hang

void lif_forward(const LIFSettings&, const LIFForward&, int threads);
void lif_backward(const LIFSettings&, const LIFBackward&, int threads);
double penalty_value(const PenaltySettings&, const std::vector<PenaltyTensor>&, int threads);
void penalty_gradient(const PenaltySettings&, const std::vector<PenaltyTensor>&, double upstream,
                      int threads);
double loss_value(const LossSettings&, const LossTensors&, int threads);
void loss_gradient(const LossSettings&, const LossTensors&, double upstream, void* grad,
                   int threads);

}  // namespace cpu

namespace cuda {

// How many devices there are, and why there are none.
int device_count(std::string* reason);
std::string architectures();
// Why this build cannot run on a device; empty if it can.
std::string why_not(int device);

// Where to launch: a device, a stream of it, and memory for partial results, which is the caller's
// to allocate, of as many bytes as the operator's `workspace` says.
struct Queue {
  void* workspace;
  int device;
  void* stream;
};

std::int64_t lif_forward_workspace(const LIFSettings&, const LIFShape&);
std::int64_t lif_backward_workspace(const LIFSettings&, const LIFShape&);
void lif_forward(const LIFSettings&, const LIFForward&, const Queue&);
void lif_backward(const LIFSettings&, const LIFBackward&, const Queue&);
// `out` and `upstream` are scalars of type `dtype` on the device; a null `upstream` is 1.
std::int64_t penalty_value_workspace(const PenaltySettings&, std::int64_t elements,
                                     std::int64_t tensors);
std::int64_t penalty_gradient_workspace(const PenaltySettings&);
void penalty_value(const PenaltySettings&, const std::vector<PenaltyTensor>&, DType dtype,
                   void* out, const Queue&);
void penalty_gradient(const PenaltySettings&, const std::vector<PenaltyTensor>&, double scale,
                      DType dtype, const void* upstream, const Queue&);
std::int64_t loss_workspace(const LossSettings&);
void loss_value(const LossSettings&, const LossTensors&, void* out, const Queue&);
void loss_gradient(const LossSettings&, const LossTensors&, const void* upstream, void* grad,
                   const Queue&);

}  // namespace cuda
}  // namespace trt
