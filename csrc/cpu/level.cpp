// The table of one level's entry points.
#include "kernels.h"

namespace trt {
inline namespace TRT_ISA {

Kernels kernels() {
  return {lif_forward, lif_backward, penalty_value, penalty_gradient, loss_value, loss_gradient};
}

}  // namespace TRT_ISA
}  // namespace trt
