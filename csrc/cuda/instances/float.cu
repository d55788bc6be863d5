#include "../operators.cuh"
#include "instances.h"

cudaError_t cacr::run_float(const Call& call, cudaStream_t stream, const Allocator& memory) {
  return run_call<IeeeArithmetic<float>>(call, stream, memory);
}
