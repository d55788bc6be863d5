// Shared memory: always dynamic, always one struct that names every buffer.
//
//   struct Buffers {
//     SharedArray<float, 64 * 36> queries;
//     SharedArray<float, 64> lse;
//   };
//   __global__ void kernel(...) {
//     Buffers& shared = shared_memory<Buffers>();   // sizeof(Buffers) bytes were asked for at the launch
//
// A kernel may use its shared memory for one struct after another: shared_memory<Other>() begins the life of Other and
// ends that of Buffers, so there has to be a barrier before it.
#pragma once

#include "platform.cuh"

namespace cacr {

#ifdef __CUDACC__

template <class T, int kSize>
struct alignas(128) SharedArray {
  T data[kSize];

  CACR_DEVICE T& operator[](int i) { return data[i]; }
  CACR_DEVICE const T& operator[](int i) const { return data[i]; }
};

template <class Buffers>
CACR_DEVICE Buffers& shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return *reinterpret_cast<Buffers*>(dynamic_shared_memory);
}

#else

// Checks its index, is filled with NaN, and is followed by bytes that nobody may touch.
template <class T, int kSize>
using SharedArray = cuda_emulation::SharedArray<T, kSize>;

template <class Buffers>
Buffers& shared_memory() {
  return cuda_emulation::shared_memory<Buffers>();
}

#endif

}  // namespace cacr
