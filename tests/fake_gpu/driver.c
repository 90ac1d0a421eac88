/* Stands for the driver (libcuda.so.1) where there is no GPU: Triton compiles, loads and launches
   through it, and nothing is computed. It answers as a GPU of the architecture in FAKE_GPU. */
#include <stdint.h>
#include <stdlib.h>

typedef int Result;

enum { SUCCESS = 0, INVALID_VALUE = 1 };
enum { MAX_THREADS_PER_BLOCK = 1, WARP_SIZE = 10, CLOCK_RATE = 13, MULTIPROCESSORS = 16 };
enum { MEMORY_CLOCK_RATE = 36, BUS_WIDTH = 37, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76 };
enum { REGISTERS_PER_BLOCK = 12, OPTIN_SHARED_MEMORY = 97 };

static long launches, bad_launches;
long fake_gpu_launches(void) { return launches; }
long fake_gpu_bad_launches(void) { return bad_launches; }

static int capability(void) {
  const char* text = getenv("FAKE_GPU");
  return text ? atoi(text) : 90;
}

Result cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }
Result cuDriverGetVersion(int* version) {
  *version = 13000;
  return SUCCESS;
}
Result cuDeviceGetCount(int* count) {
  *count = 1;
  return SUCCESS;
}
Result cuDeviceGet(int* device, int index) {
  *device = index;
  return index ? INVALID_VALUE : SUCCESS;
}
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case MAX_THREADS_PER_BLOCK:
      *value = 1024;
      break;
    case WARP_SIZE:
      *value = 32;
      break;
    case MULTIPROCESSORS:
      *value = 132;
      break;
    case REGISTERS_PER_BLOCK:
      *value = 65536;
      break;
    case CAPABILITY_MAJOR:
      *value = capability() / 10;
      break;
    case CAPABILITY_MINOR:
      *value = capability() % 10;
      break;
    /* sm_90 has 227 KB, sm_80 163 KB, sm_120 99 KB. */
    case OPTIN_SHARED_MEMORY:
      *value = (capability() >= 120 ? 99 : capability() >= 90 ? 227 : 163) * 1024;
      break;
    case CLOCK_RATE:
    case MEMORY_CLOCK_RATE:
      *value = 1000000;
      break;
    case BUS_WIDTH:
      *value = 5120;
      break;
    default:
      *value = 0;
  }
  return SUCCESS;
}
Result cuDevicePrimaryCtxRetain(void** context, int device) {
  (void)device;
  *context = (void*)1;
  return SUCCESS;
}
Result cuCtxGetCurrent(void** context) {
  *context = (void*)1;
  return SUCCESS;
}
Result cuCtxSetCurrent(void* context) { return context ? SUCCESS : INVALID_VALUE; }
Result cuCtxGetDevice(int* device) {
  *device = 0;
  return SUCCESS;
}
Result cuCtxGetLimit(size_t* value, int limit) {
  (void)limit;
  *value = 0;
  return SUCCESS;
}
Result cuCtxSetLimit(int limit, size_t value) {
  (void)limit, (void)value;
  return SUCCESS;
}
Result cuModuleLoadData(void** module, const void* image) {
  *module = (void*)2;
  return image ? SUCCESS : INVALID_VALUE;
}
Result cuModuleUnload(void* module) { return module ? SUCCESS : INVALID_VALUE; }
Result cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = (void*)3;
  return module && name && *name ? SUCCESS : INVALID_VALUE;
}
Result cuFuncGetAttribute(int* value, int attribute, void* function) {
  (void)function;
  *value = attribute == 0 ? 1024 : 0; /* threads of a block; no registers, spills or memory */
  return SUCCESS;
}
Result cuFuncSetAttribute(void* function, int attribute, int value) {
  (void)attribute, (void)value;
  return function ? SUCCESS : INVALID_VALUE;
}
Result cuFuncSetCacheConfig(void* function, int config) {
  (void)config;
  return function ? SUCCESS : INVALID_VALUE;
}
Result cuPointerGetAttribute(void* value, int attribute, uint64_t pointer) {
  (void)attribute;
  *(uint64_t*)value = pointer; /* a tensor on the CPU: its address is the device's */
  return SUCCESS;
}
/* Triton asks for a pointer's context, device, address and the like: all but the address are 0. */
Result cuPointerGetAttributes(unsigned count, const int* attributes, void** values,
                              uint64_t pointer) {
  const int device_pointer = 3;
  for (unsigned i = 0; i < count; ++i) {
    if (attributes[i] == device_pointer) *(uint64_t*)values[i] = pointer;
  }
  return SUCCESS;
}
Result cuGetErrorString(Result result, const char** text) {
  *text = result ? "refused by the fake driver" : "no error";
  return SUCCESS;
}

/* The head of CUlaunchConfig. */
struct Config {
  unsigned grid[3], block[3], shared_bytes;
};
Result cuLaunchKernelEx(const struct Config* config, void* function, void** params, void** extra) {
  (void)params, (void)extra;
  unsigned long threads = 1;
  int good = function && config->grid[0] <= 0x7fffffff;
  for (int i = 0; i < 3; ++i) {
    threads *= config->block[i];
    good = good && config->grid[i] && config->block[i] && (i == 0 || config->grid[i] <= 65535);
  }
  int shared = 0;
  cuDeviceGetAttribute(&shared, OPTIN_SHARED_MEMORY, 0);
  if (!good || threads > 1024 || config->shared_bytes > (unsigned)shared) {
    ++bad_launches;
    return INVALID_VALUE;
  }
  ++launches;
  return SUCCESS;
}
Result cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned a, unsigned b,
                      unsigned c, unsigned shared, void* stream, void** params, void** extra) {
  const struct Config config = {{x, y, z}, {a, b, c}, shared};
  (void)stream;
  return cuLaunchKernelEx(&config, function, params, extra);
}
Result cuOccupancyMaxActiveClusters(int* count, void* function, void* config) {
  (void)function, (void)config;
  *count = 1;
  return SUCCESS;
}
Result cuStreamIsCapturing(void* stream, int* status) {
  (void)stream;
  *status = 0;
  return SUCCESS;
}
/* No kernel of ours uses a tensor map. */
Result cuTensorMapEncodeTiled(void) { return INVALID_VALUE; }
Result cuTensorMapEncodeIm2col(void) { return INVALID_VALUE; }
