// Functions that a processor and a GPU compile from the same text.
//
// Always inlined: the CPU kernels are compiled once per instruction set, and a copy with a symbol of its own could be
// linked in the place of another one.
#pragma once

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || \
    defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || defined(__NO_SIGNED_ZEROS__)
#error "cacr_kernels needs IEEE arithmetic: compile without -ffast-math, -Ofast and their parts"
#endif

#ifdef __CUDACC__
#define CACR_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CACR_HOST_DEVICE inline __attribute__((always_inline))
#endif
