// A CUDA driver that does nothing, so that what the host does before it can be counted and timed without a GPU:
// one device of compute capability 9.0, every module loads, every launch is counted and runs no kernel.
#include <stddef.h>
#include <stdint.h>

typedef int Result;
enum { kSuccess = 0 };
static uint64_t launches, attributes;

uint64_t stub_launches(void) { return launches; }
uint64_t stub_pointer_queries(void) { return attributes; }

Result cuInit(unsigned flags) { return kSuccess; }
Result cuDriverGetVersion(int* version) { return *version = 13000, kSuccess; }
Result cuGetErrorString(Result error, const char** text) { return *text = "stub", kSuccess; }
Result cuDeviceGetCount(int* count) { return *count = 1, kSuccess; }
Result cuDeviceGet(int* device, int ordinal) { return *device = ordinal, kSuccess; }
Result cuCtxGetDevice(int* device) { return *device = 0, kSuccess; }
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR; of all others, shared memory is asked for.
  return *value = attribute == 75 ? 9 : attribute == 76 ? 0 : 232448, kSuccess;
}
Result cuCtxGetCurrent(void** context) { return *context = &launches, kSuccess; }
Result cuCtxSetCurrent(void* context) { return kSuccess; }
Result cuCtxGetLimit(size_t* value, int limit) { return *value = 0, kSuccess; }
Result cuCtxSetLimit(int limit, size_t value) { return kSuccess; }
Result cuDevicePrimaryCtxRetain(void** context, int device) { return *context = &launches, kSuccess; }
Result cuModuleLoadData(void** module, const void* image) { return *module = &launches, kSuccess; }
Result cuModuleUnload(void* module) { return kSuccess; }
Result cuModuleGetFunction(void** function, void* module, const char* name) {
  return *function = &launches, kSuccess;
}
Result cuFuncGetAttribute(int* value, int attribute, void* function) {
  return *value = attribute == 0 ? 1024 : 0, kSuccess;  // CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK
}
Result cuFuncSetAttribute(void* function, int attribute, int value) { return kSuccess; }
Result cuFuncSetCacheConfig(void* function, int config) { return kSuccess; }
Result cuOccupancyMaxActiveClusters(int* value, void* function, const void* config) {
  return *value = 1, kSuccess;
}
Result cuTensorMapEncodeTiled(void) { return kSuccess; }
Result cuTensorMapEncodeIm2col(void) { return kSuccess; }
Result cuPointerGetAttribute(void* value, int attribute, uint64_t pointer) {
  return attributes++, *(uint64_t*)value = pointer, kSuccess;
}
Result cuStreamIsCapturing(void* stream, int* status) { return *status = 0, kSuccess; }
Result cuLaunchKernelEx(const void* config, void* function, void** arguments, void** extra) {
  return launches++, kSuccess;
}
