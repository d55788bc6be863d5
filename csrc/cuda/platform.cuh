// The two platforms that the kernels of this directory are compiled for: nvcc, and a plain C++ compiler with the
// stand-in for the CUDA execution model of tests/cuda_emulation, which runs the very same source on a CPU.
//
// What differs between the two stands in this file, in ptx.cuh (instructions), shared_memory.cuh and launch.cuh.
// Kernels use CUDA's own names everywhere else: __global__, threadIdx, __syncthreads(), __shfl_xor_sync(), float4 ...
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <math_constants.h>
#define CACR_SITE
#define CACR_SITE_ONLY
#else
#include "cuda_emulation.h"
// A collective operation reports its caller by file and line, in a default argument.
#define CACR_SITE , ::cuda_emulation::Site site = ::cuda_emulation::Site::current()
#define CACR_SITE_ONLY ::cuda_emulation::Site site = ::cuda_emulation::Site::current()
#endif

#define CACR_DEVICE __device__ __forceinline__
