#include "../operators.cuh"
#include "instances.h"

cudaError_t cacr::run_f16(const Call& call, cudaStream_t stream, const Allocator& memory) {
  return run_call<F16Arithmetic>(call, stream, memory);
}
