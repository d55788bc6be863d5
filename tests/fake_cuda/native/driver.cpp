// A libcuda.so.1 that is only found: what asks it for a function is told that there is none.
#include <cstddef>

#define API extern "C" __attribute__((visibility("default")))

constexpr int kNotFound = 500;

API int cuInit(unsigned) { return 0; }
API int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
API int cuDeviceGetCount(int* count) { return *count = 2, 0; }
API int cuDeviceGet(int* device, int number) { return *device = number, 0; }
API int cuDeviceGetAttribute(int* value, int, int) { return *value = 0, 0; }
API int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { return *flags = 0, *active = 1, 0; }
API int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &*context, 0; }
API int cuCtxGetCurrent(void** context) { return *context = &*context, 0; }
API int cuCtxSetCurrent(void*) { return 0; }
API int cuGetErrorString(int, const char** text) { return *text = "the fake CUDA has no driver", 0; }
API int cuGetProcAddress(const char*, void** found, int, unsigned long) { return *found = nullptr, kNotFound; }
API int cuGetProcAddress_v2(const char*, void** found, int, unsigned long, int*) { return *found = nullptr, kNotFound; }
