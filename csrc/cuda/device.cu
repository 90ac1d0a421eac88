// Which devices there are, and what this build runs on.
#include "launch.h"

namespace trt {
namespace cuda {
namespace {

// Stands for every kernel: they are compiled for the same architectures.
__global__ void nothing() {}

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

}  // namespace

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
    if (error == cudaErrorInsufficientDriver) {
      *reason = "the driver is for CUDA " + version(driver) + " and this build for CUDA " +
                version(CUDART_VERSION) +
                ": update the driver, or build with an older toolkit, or use backend='triton'";
    }
    return 0;
  }
  *reason = count ? "" : "no device";
  return count;
}

std::string architectures() { return TRT_KERNELS_CUDA_ARCHS; }

std::string why_not(int device) {
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, nothing);
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "asking");
  const std::string number = std::to_string(major) + std::to_string(minor);
  return "this build has no kernels for device " + std::to_string(device) + ", sm_" + number +
         " (" + cudaGetErrorString(error) + "); it has " + architectures() +
         ": install again with TRT_KERNELS_CUDA_ARCHS=" + number + ", or use backend='triton'";
}

}  // namespace cuda
}  // namespace trt
