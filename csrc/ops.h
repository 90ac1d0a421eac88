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
  double scale;  // of the normalised input
  bool batch;    // its mean and deviation are those of x itself
  int bits;      // planes of bits that the forward writes: none, spikes, where sigma' is not 0

  bool penalizes() const { return potential >= 0 || penalize_spike; }

  // Throws std::invalid_argument on an unknown name.
  static LIFSettings make(const std::string& charge, const std::string& reset,
                          const std::string& surrogate, const std::string& phi);
};

// The channel of neuron n of a state [outer][inner] is n / channel_stride % channels.
struct LIFShape {
  DType dtype;  // of x; states are float32, and float64 for float64
  std::int64_t outer, steps, inner;
  bool constant = false;  // x and its gradient have no time: [outer][inner]
  std::int64_t channels = 1, channel_stride = 1;
  std::int64_t neurons() const { return outer * inner; }
  std::int64_t bit_bytes() const { return (neurons() + 7) / 8; }  // of a plane's timestep
};

// What is given by channel, in the state's type. Null `neuron`: the settings hold for every
// channel. Null `stats`: the input is not normalised. Null weight and bias: 1 and 0.
struct LIFChannels {
  const void* neuron;  // [3][channels]: decay (tau for the charge "divide"), threshold, v_reset
  const void* stats;   // [3][channels]: mean, what is to be added to it, 1 / deviation
  const void* norm_weight;
  const void* norm_bias;
  const void* gains;  // [steps] or [steps][channels]
  bool gains_by_channel;
};

// Pointers that may be null: v_init, weight and all results but the spikes. Checkpoints are the
// potentials before every `checkpoint_every` steps but the first, which a GPU's backward pass of a
// longer sequence starts from: [ceil(steps / checkpoint_every) - 1][outer][inner], state type. The
// CPU neither writes nor reads them. Bit j of byte i of a timestep of `bits` is neuron 8i + j.
struct LIFForward {
  LIFShape shape;
  LIFChannels by_channel;
  const void* x;       // [outer, steps, inner], dtype
  const void* v_init;  // [outer, inner], state type
  const void* weight;  // [steps], state type
  void* spikes;        // like x
  void* potential;     // [outer, steps, inner], state type
  void* state;         // [outer, inner], state type
  void* penalty;       // scalar, state type
  void* rate;          // [steps], state type
  void* bits;          // [planes][steps][bit_bytes]
  void* checkpoints;
  int checkpoint_every;
};

// Any incoming gradient may be null (zero), and any result where nobody asks for it. With `bits`
// there is no x. A batch normalised input needs `means` to write grad_x: the means over everything
// but channels of dz xhat and of dz, where dz arrives at the normalised x, xhat without weight;
// where they are null, they are found first.
struct LIFBackward {
  LIFShape shape;
  LIFChannels by_channel;
  const void* x;
  const void* v_init;
  const void* weight;
  const void* bits;
  const void* means;           // [2][channels], state type
  const void* grad_spikes;     // like the spikes
  const void* grad_potential;  // [outer, steps, inner], state type
  const void* grad_state;      // [outer, inner], state type
  const void* grad_penalty;    // scalar, state type
  void* grad_x;                // like x
  void* grad_v_init;           // [outer, inner], state type
  void* grad_neuron;           // [3][channels], state type
  void* grad_affine;           // [2][channels], state type: sums of dz xhat and of dz
  void* grad_gains;            // [steps][channels], state type
  const void* checkpoints;
  int checkpoint_every;
};

// A tensor as [before][channels][within]; `repeat` times as many numbers in the unbiased variance.
struct Statistics {
  DType dtype;
  std::int64_t before, channels, within;
  double eps;
  std::int64_t repeat;
  const void* x;
  void*
      stats;  // [4][channels], state type: mean, what rounding left of it, 1 / deviation, variance
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

// Bits of spikes [outer][steps][inner]: [steps][ceil(outer * inner / 8)] bytes. Bit j of byte i of
// a timestep is neuron 8i + j in the order of memory.
struct SpikeBits {
  const std::uint8_t* bits;
  std::int64_t outer, steps, inner;
};

namespace cpu {

// Instruction-set levels compiled in and usable here, best last.
std::vector<std::string> levels();
std::string level();
void set_level(const std::string& name);  // throws std::invalid_argument
bool forked();                            // true in a forked child, where OpenMP would hang

void lif_forward(const LIFSettings&, const LIFForward&, int threads);
void lif_backward(const LIFSettings&, const LIFBackward&, int threads);
void batch_statistics(const Statistics&, int threads);
double penalty_value(const PenaltySettings&, const std::vector<PenaltyTensor>&, int threads);
void penalty_gradient(const PenaltySettings&, const std::vector<PenaltyTensor>&, double upstream,
                      int threads);
double loss_value(const LossSettings&, const LossTensors&, int threads);
void loss_gradient(const LossSettings&, const LossTensors&, double upstream, void* grad,
                   int threads);
// The bits of `count` elements, as of one timestep; false, and bits of no use, unless every element
// is exactly 0 or 1 (-0 is neither).
bool spike_pack(DType, std::int64_t count, const void* x, std::uint8_t* bits, int threads);
void spike_unpack(DType, const SpikeBits&, void* to, int threads);

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

std::int64_t lif_forward_workspace(const LIFSettings&, const LIFForward&);
std::int64_t lif_backward_workspace(const LIFSettings&, const LIFBackward&);
void lif_forward(const LIFSettings&, const LIFForward&, const Queue&);
void lif_backward(const LIFSettings&, const LIFBackward&, const Queue&);
std::int64_t batch_statistics_workspace(const Statistics&);
void batch_statistics(const Statistics&, const Queue&);
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
// `binary` is a byte on the device: what the CPU's function returns.
void spike_pack(DType, std::int64_t count, const void* x, std::uint8_t* bits, std::uint8_t* binary,
                const Queue&);
void spike_unpack(DType, const SpikeBits&, void* to, const Queue&);

}  // namespace cuda
}  // namespace trt
