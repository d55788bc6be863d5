#include "../operators.cuh"
#include "instances.h"

cudaError_t cacr::run_bf16(const Call& call, cudaStream_t stream, const Allocator& memory) {
  return run_call<Bf16Arithmetic>(call, stream, memory);
}
