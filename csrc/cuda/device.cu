// Which devices there are, and what this build runs on.
#include "launch.h"

namespace trt {
namespace cuda {

int device_count(std::string* reason) {
  int count = 0, driver = 0;
  if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) {
    *reason = "no CUDA driver is installed";
    return 0;
  }
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next launch would report this one
    *reason = cudaGetErrorString(error);
    return 0;
  }
  *reason = count ? "" : "no device";
  return count;
}

std::string architectures() { return TRT_KERNELS_CUDA_ARCHS; }

}  // namespace cuda
}  // namespace trt
