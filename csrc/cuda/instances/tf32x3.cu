#include "../operators.cuh"
#include "instances.h"

cudaError_t cacr::run_tf32x3(const Call& call, cudaStream_t stream, const Allocator& memory) {
  return run_call<Tf32Arithmetic<2>>(call, stream, memory);
}
