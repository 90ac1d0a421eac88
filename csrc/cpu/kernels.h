// The entry points of one instruction-set level. Every file of csrc/cpu is compiled once a level,
// with TRT_ISA as its namespace; dispatch.cpp picks a level at run time.
#pragma once

#include "../arguments.h"

namespace trt {

struct Kernels {
  decltype(&cpu::lif_forward) lif_forward;
  decltype(&cpu::lif_backward) lif_backward;
  decltype(&cpu::batch_statistics) batch_statistics;
  decltype(&cpu::penalty_value) penalty_value;
  decltype(&cpu::penalty_gradient) penalty_gradient;
  decltype(&cpu::loss_value) loss_value;
  decltype(&cpu::loss_gradient) loss_gradient;
  decltype(&cpu::spike_pack) spike_pack;
  decltype(&cpu::spike_unpack) spike_unpack;
};

inline namespace TRT_ISA {

void lif_forward(const LIFSettings&, const LIFForward&, int threads);
void lif_backward(const LIFSettings&, const LIFBackward&, int threads);
void batch_statistics(const Statistics&, int threads);
double penalty_value(const PenaltySettings&, const std::vector<PenaltyTensor>&, int threads);
void penalty_gradient(const PenaltySettings&, const std::vector<PenaltyTensor>&, double upstream,
                      int threads);
double loss_value(const LossSettings&, const LossTensors&, int threads);
void loss_gradient(const LossSettings&, const LossTensors&, double upstream, void* grad,
                   int threads);
bool spike_pack(DType, std::int64_t count, const void* x, std::uint8_t* bits, int threads);
void spike_unpack(DType, const SpikeBits&, void* to, int threads);

Kernels kernels();

}  // namespace TRT_ISA
}  // namespace trt
