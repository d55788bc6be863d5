// What csrc/cuda/binding.cpp is linked with instead of compiled kernels and a CUDA runtime of its own.
#include <cuda_runtime_api.h>

#include "instances/instances.h"

#define HIDDEN __attribute__((visibility("hidden")))

extern "C" int cacr_emulate(int arithmetic, const cacr::Call* call, cudaStream_t stream, const cacr::Allocator* memory);

// The runtime that is linked into the real library may have a current device of its own in every thread, which has to
// be set; and as both use one context of a thread, to set it there may change that of torch's. Here it is so in both
// ways.
static thread_local int current = 0;
extern "C" {
void fake_set_current(int device);
HIDDEN int cacr_fake_current_device() { return current; }
HIDDEN cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  fake_set_current(device);
  return current = device, cudaSuccess;
}
HIDDEN cudaError_t cudaGetLastError() { return cudaSuccess; }
HIDDEN const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice           ? "invalid device ordinal"
         : error == cudaErrorInvalidResourceHandle ? "invalid resource handle"
         : error == cudaErrorIllegalAddress        ? "an illegal memory access was encountered"
                                                   : "unspecified launch failure";
}
}

#define RUN(name, arithmetic)                                                              \
  cudaError_t cacr::name(const Call& call, cudaStream_t stream, const Allocator& memory) { \
    return cudaError_t(cacr_emulate(arithmetic, &call, stream, &memory));                  \
  }
RUN(run_bf16, 0)
RUN(run_f16, 1)
RUN(run_tf32, 2)
RUN(run_tf32x3, 3)
RUN(run_float, 4)
RUN(run_double, 5)
