// CUDA's own names, as far as the kernels use them.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>

#include "cp_async.h"
#include "tensor_cores.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::cuda_emulation::current->index)
#define blockIdx (::cuda_emulation::current->block->index)
#define blockDim (::cuda_emulation::current->block->grid->block_size)
#define gridDim (::cuda_emulation::current->block->grid->size)
inline constexpr int warpSize = 32;

// ---- the host's side ------------------------------------------------------------------------------------------------
using cudaStream_t = void*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorCooperativeLaunchTooLarge = 720 };

namespace cuda_emulation {

// Who runs launches when their stream comes to them (tests/fake_cuda); nobody: they are run at once. It is told the
// stream and the parameters of the kernel, and answers with an error of CUDA.
inline int (*submit)(cudaStream_t stream, const void* parameters, size_t bytes, std::function<void()> kernel) = nullptr;

template <class Parameters>
cudaError_t on_stream(cudaStream_t stream, const Parameters& parameters, std::function<void()> kernel) {
  if (submit != nullptr) return static_cast<cudaError_t>(submit(stream, &parameters, sizeof parameters, kernel));
  kernel();
  return cudaSuccess;
}

}  // namespace cuda_emulation

// ---- vectors --------------------------------------------------------------------------------------------------------
#define CUDA_EMULATION_VECTOR(name, scalar)                            \
  struct alignas(2 * sizeof(scalar)) name##2 { scalar x, y; };         \
  struct alignas(16) name##4 { scalar x, y, z, w; };                   \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; } \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
CUDA_EMULATION_VECTOR(float, float)
CUDA_EMULATION_VECTOR(double, double)
CUDA_EMULATION_VECTOR(int, int)
CUDA_EMULATION_VECTOR(uint, unsigned)
#undef CUDA_EMULATION_VECTOR

// ---- barriers and fences --------------------------------------------------------------------------------------------
inline void __syncthreads(cuda_emulation::Site site = cuda_emulation::Site::current()) {
  cuda_emulation::block_sync({"__syncthreads", site});
}
inline int __syncthreads_count(int predicate, cuda_emulation::Site site = cuda_emulation::Site::current()) {
  return cuda_emulation::block_sync({"__syncthreads_count", site}, predicate != 0).sum;
}
inline int __syncthreads_or(int predicate, cuda_emulation::Site site = cuda_emulation::Site::current()) {
  return cuda_emulation::block_sync({"__syncthreads_or", site}, predicate != 0).sum != 0;
}
inline int __syncthreads_and(int predicate, cuda_emulation::Site site = cuda_emulation::Site::current()) {
  const auto crossing = cuda_emulation::block_sync({"__syncthreads_and", site}, predicate != 0);
  return crossing.sum == crossing.threads;
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, cuda_emulation::Site site = cuda_emulation::Site::current()) {
  cuda_emulation::warp_sync(mask, site);
}
inline void __threadfence() { cuda_emulation::fence(); }
inline void __threadfence_block() { cuda_emulation::fence(); }

// ---- shuffles and votes ---------------------------------------------------------------------------------------------
namespace cuda_emulation {

// Every lane receives the value of the lane `source(lane, its argument, first and last lane of its segment)`.
template <class T, class Source>
T shuffle(const char* operation, uint32_t mask, T value, int argument, int width, const Site& site, Source source) {
  struct Argument {
    T value, result;
    int argument;
  } mine{value, value, argument};
  const Wait wait{operation, site};
  meet(mask, wait, mine, [&](Argument* const* lanes) {
    for (int lane = 0; lane < 32; lane++) {
      if (lanes[lane] == nullptr) continue;
      const int first = lane & ~(width - 1), from = source(lane, lanes[lane]->argument, first, first + width - 1);
      if (lanes[from] == nullptr) fail(wait.describe() + ": reads a lane outside the mask");
      lanes[lane]->result = lanes[from]->value;
    }
  });
  return mine.result;
}

inline uint32_t ballot(const char* operation, uint32_t mask, int predicate, const Site& site) {
  struct Argument {
    int predicate;
    uint32_t result;
  } mine{predicate, 0};
  meet(mask, {operation, site}, mine, [](Argument* const* lanes) {
    uint32_t votes = 0;
    for (int lane = 0; lane < 32; lane++)
      if (lanes[lane] != nullptr && lanes[lane]->predicate != 0) votes |= 1u << lane;
    for (int lane = 0; lane < 32; lane++)
      if (lanes[lane] != nullptr) lanes[lane]->result = votes;
  });
  return mine.result;
}

}  // namespace cuda_emulation

template <class T>
T __shfl_sync(uint32_t mask, T value, int lane, int width = 32,
              cuda_emulation::Site site = cuda_emulation::Site::current()) {
  const auto source = [width](int, int from, int first, int) { return first + (from & (width - 1)); };
  return cuda_emulation::shuffle("__shfl_sync", mask, value, lane, width, site, source);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32,
                  cuda_emulation::Site site = cuda_emulation::Site::current()) {
  // Lanes of earlier segments may be read, those of later ones not.
  const auto source = [](int lane, int x, int, int last) { return (lane ^ x) <= last ? lane ^ x : lane; };
  return cuda_emulation::shuffle("__shfl_xor_sync", mask, value, bits, width, site, source);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                 cuda_emulation::Site site = cuda_emulation::Site::current()) {
  const auto source = [](int lane, int x, int first, int) { return lane - x >= first ? lane - x : lane; };
  return cuda_emulation::shuffle("__shfl_up_sync", mask, value, static_cast<int>(delta), width, site, source);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                   cuda_emulation::Site site = cuda_emulation::Site::current()) {
  const auto source = [](int lane, int x, int, int last) { return lane + x <= last ? lane + x : lane; };
  return cuda_emulation::shuffle("__shfl_down_sync", mask, value, static_cast<int>(delta), width, site, source);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate,
                              cuda_emulation::Site site = cuda_emulation::Site::current()) {
  return cuda_emulation::ballot("__ballot_sync", mask, predicate, site);
}
inline int __any_sync(uint32_t mask, int predicate, cuda_emulation::Site site = cuda_emulation::Site::current()) {
  return cuda_emulation::ballot("__any_sync", mask, predicate, site) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, cuda_emulation::Site site = cuda_emulation::Site::current()) {
  return cuda_emulation::ballot("__all_sync", mask, predicate, site) == mask;
}

// ---- atomics: relaxed, as CUDA's are --------------------------------------------------------------------------------
namespace cuda_emulation {

template <class T, class Function>
T atomic_update(T* target, Function function) {
  pause_point();
  T old, next;
  __atomic_load(target, &old, __ATOMIC_RELAXED);
  do next = function(old);
  while (!__atomic_compare_exchange(target, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace cuda_emulation

template <class T>
T atomicAdd(T* target, std::type_identity_t<T> value) {
  return cuda_emulation::atomic_update(target, [value](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(T* target, std::type_identity_t<T> value) {
  return cuda_emulation::atomic_update(target, [value](T old) { return std::max(old, value); });
}
template <class T>
T atomicMin(T* target, std::type_identity_t<T> value) {
  return cuda_emulation::atomic_update(target, [value](T old) { return std::min(old, value); });
}
template <class T>
T atomicExch(T* target, std::type_identity_t<T> value) {
  return cuda_emulation::atomic_update(target, [value](T) { return value; });
}
template <class T>
T atomicCAS(T* target, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return cuda_emulation::atomic_update(target, [=](T old) { return old == expected ? value : old; });
}

// ---- memory and arithmetic ------------------------------------------------------------------------------------------
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}

using std::max;
using std::min;

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(unsigned x) { return std::countl_zero(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
