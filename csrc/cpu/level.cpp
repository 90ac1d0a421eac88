// The table of one level's entry points.
#include "kernels.h"

namespace trt {
inline namespace TRT_ISA {

Kernels kernels() {
  return {lif_forward, lif_backward,  batch_statistics, penalty_value, penalty_gradient,
          loss_value,  loss_gradient, spike_pack,       spike_unpack};
}

}  // namespace TRT_ISA
}  // namespace trt
