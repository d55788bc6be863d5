// Functions that a processor and a GPU compile from the same text.
//
// Always inlined: the CPU kernels are compiled once per instruction set, and a copy with a symbol of its own could be
// linked in the place of another one.
#pragma once

#ifdef __CUDACC__
#define CACR_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CACR_HOST_DEVICE inline __attribute__((always_inline))
#endif
