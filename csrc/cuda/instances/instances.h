// The arithmetics that are compiled, each in a file of its own.
#pragma once

#include <cuda_runtime_api.h>

#include "../call.h"

namespace cacr {

// Runs `call` on `stream` in one arithmetic, without waiting for it.
using Run = cudaError_t(const Call& call, cudaStream_t stream, const Allocator& memory);

Run run_bf16;    // bfloat16, coefficients in three pieces
Run run_f16;     // float16, coefficients scaled and in two pieces
Run run_tf32;    // float, products of operands rounded to TF32
Run run_tf32x3;  // float, nearly IEEE: operands as sums of two TF32 numbers
Run run_float;   // float, IEEE
Run run_double;  // double

}  // namespace cacr
