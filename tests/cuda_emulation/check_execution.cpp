// check_execution CASE SEED: runs a kernel that does what CUDA forbids, or asks how the emulation executes. Prints what
// the case has to say, or the error that the emulation found.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "launch.cuh"
#include "ptx.cuh"
#include "shared_memory.cuh"

namespace {

using namespace cacr;

constexpr uint32_t kAll = 0xffffffffu;

struct Numbers {
  int* out;
  const int* in;
};

struct Buffers {
  SharedArray<uint16_t, 64> values;
  SharedArray<int, 3> few;
};

template <class Kernel>
struct Case {
  const char* name;
  Kernel kernel;
  dim3 grid, block;
  bool cooperative = false;
  size_t shared_bytes = sizeof(Buffers);
};

// ---- barriers -------------------------------------------------------------------------------------------------------
__global__ void divergent_barrier(Numbers) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void barrier_of_a_half(Numbers) {
  if (threadIdx.x < 32)
    __syncthreads();
  else if (threadIdx.x < 48)
    __syncwarp();
}
__global__ void early_exit(Numbers p) {
  if (threadIdx.x >= 40) return;
  p.out[threadIdx.x] = __syncthreads_count(1);
}
__global__ void exit_before_barrier_of_the_grid(Numbers) {
  if (blockIdx.x == 1 && threadIdx.x >= 5) return;
  ptx::grid_sync();
}
__global__ void barrier_of_the_grid(Numbers) { ptx::grid_sync(); }
__global__ void reductions(Numbers p) {
  const int t = threadIdx.x;
  const int count = __syncthreads_count(t % 3 == 0), any = __syncthreads_or(t == 77), all = __syncthreads_and(t != 77);
  const int nobody = __syncthreads_or(t < 0), everybody = __syncthreads_and(t >= 0);
  p.out[t] = count * 10000 + any * 1000 + all * 100 + nobody * 10 + everybody;
}

// ---- warps ----------------------------------------------------------------------------------------------------------
__global__ void shuffle_of_some(Numbers p) {
  if (threadIdx.x % 2 == 1) p.out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 2);
}
__global__ void shuffle_in_two_places(Numbers p) {
  if (threadIdx.x % 2 == 1)
    p.out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 2);
  else
    p.out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 2);
}
__global__ void shuffle_of_the_exited(Numbers p) {
  if (threadIdx.x == 9) return;
  __syncthreads();
  p.out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 2);
}
__global__ void shuffle_without_oneself(Numbers p) { p.out[threadIdx.x] = __shfl_xor_sync(0xffu, 1, 2); }
__global__ void shuffle_from_outside(Numbers p) {
  if (threadIdx.x < 8) p.out[threadIdx.x] = __shfl_xor_sync(0xffu, 1, 8);
}
__global__ void overlapping_masks(Numbers) { __syncwarp(threadIdx.x < 16 ? 0xffffu : kAll); }
__global__ void halves_of_a_warp(Numbers p) {
  const int t = threadIdx.x;
  p.out[t] = t < 16 ? __shfl_xor_sync(0xffffu, t, 1) : __shfl_xor_sync(0xffff0000u, t, 2);
}

// ---- memory ---------------------------------------------------------------------------------------------------------
__global__ void misaligned_copy(Numbers p) {
  Buffers& shared = shared_memory<Buffers>();
  ptx::cp_async_16(ptx::shared_address(&shared.values[threadIdx.x + 2]), p.in);
}
__global__ void misaligned_source(Numbers p) {
  Buffers& shared = shared_memory<Buffers>();
  ptx::cp_async_16(ptx::shared_address(&shared.values[threadIdx.x * 8]), p.in + 1);
}
__global__ void copy_to_global_memory(Numbers p) { ptx::cp_async_16(ptx::shared_address(p.out + threadIdx.x), p.in); }
__global__ void copy_of_too_much(Numbers p) {
  Buffers& shared = shared_memory<Buffers>();
  ptx::cp_async_16(ptx::shared_address(&shared.values[threadIdx.x * 8]), p.in, 20);
}
__global__ void copy_under_way(Numbers p) {
  Buffers& shared = shared_memory<Buffers>();
  const auto second = [&] { return shared.values[2] | shared.values[3] << 16; };  // 32-bit number of the copy
  shared.values[2] = 7;
  ptx::cp_async_16(ptx::shared_address(&shared.values[0]), p.in, 8);
  ptx::cp_async_commit();
  p.out[0] = second();
  ptx::cp_async_wait<0>();
  p.out[1] = second();
}
__global__ void negative_index(Numbers p) { p.out[threadIdx.x] = shared_memory<Buffers>().few[-1]; }
__global__ void more_than_was_asked_for(Numbers p) { p.out[threadIdx.x] = shared_memory<Buffers>().few[0]; }
__global__ void poisoned_memory(Numbers p) {
  Buffers& shared = shared_memory<Buffers>();
  p.out[0] = shared.few[0];
  shared.few[0] = 5;
  p.out[1] = shared.few[0] + shared_memory<Buffers>().few[0];
  p.out[2] = shared_memory<SharedArray<int, 3>>()[0];
}

// ---- order ----------------------------------------------------------------------------------------------------------
__global__ void places(Numbers p) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  atomicAdd(&p.out[block * blockDim.x * blockDim.y * blockDim.z + thread], 1);
}
__global__ void order_of_threads(Numbers p) { p.out[1 + atomicAdd(p.out, 1)] = threadIdx.x + 100 * blockIdx.x + 1; }
__global__ void everybody_counts(Numbers p) {
  for (int i = 0; i < 10; i++) {
    atomicAdd(p.out, 1);
    atomicMax(p.out + 1, static_cast<int>(threadIdx.x));
    atomicMin(p.out + 2, -static_cast<int>(threadIdx.x));
  }
  if (threadIdx.x == 7 && blockIdx.x == 1) {
    p.out[3] = 1 + atomicCAS(p.out + 4, 0, 9);
    p.out[6] = atomicCAS(p.out + 4, 0, 8);
    p.out[5] = atomicExch(p.out + 4, 6);
  }
}
__global__ void last_block_sums(Numbers p) {  // out: counter, one number per block, their sum
  p.out[1 + blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
  __threadfence();
  if (atomicAdd(p.out, 1) + 1u != gridDim.x) return;
  __threadfence();
  int sum = 0;
  for (unsigned b = 0; b < gridDim.x; b++) sum += p.out[1 + b];
  p.out[1 + gridDim.x] = sum;
}

const Case<void (*)(Numbers)> kCases[] = {
    {"divergent_barrier", divergent_barrier, 1, 64},
    {"barrier_of_a_half", barrier_of_a_half, 2, 64},
    {"early_exit", early_exit, 1, 64},
    {"exit_before_barrier_of_the_grid", exit_before_barrier_of_the_grid, 2, 32, true},
    {"barrier_without_cooperation", barrier_of_the_grid, 2, 32},
    {"too_many_blocks", barrier_of_the_grid, 5, 32, true},
    {"too_many_threads", barrier_of_the_grid, 1, 1025},
    {"reductions", reductions, 1, 96},
    {"shuffle_of_some", shuffle_of_some, 1, 32},
    {"shuffle_in_two_places", shuffle_in_two_places, 1, 32},
    {"shuffle_of_the_exited", shuffle_of_the_exited, 1, 32},
    {"shuffle_without_oneself", shuffle_without_oneself, 1, 32},
    {"shuffle_from_outside", shuffle_from_outside, 1, 32},
    {"overlapping_masks", overlapping_masks, 1, 32},
    {"halves_of_a_warp", halves_of_a_warp, 1, 32},
    {"misaligned_copy", misaligned_copy, 1, 1},
    {"misaligned_source", misaligned_source, 1, 1},
    {"copy_to_global_memory", copy_to_global_memory, 1, 1},
    {"copy_of_too_much", copy_of_too_much, 1, 1},
    {"copy_under_way", copy_under_way, 1, 1},
    {"negative_index", negative_index, 1, 1},
    {"more_than_was_asked_for", more_than_was_asked_for, 1, 1, false, sizeof(Buffers) - 1},
    {"poisoned_memory", poisoned_memory, 1, 1},
    {"places", places, {2, 3, 2}, {3, 2, 5}},
    {"order_of_threads", order_of_threads, 3, 64},
    {"everybody_counts", everybody_counts, 3, 64},
    {"last_block_sums", last_block_sums, 7, 1},
};

template <class C>
void run(const C& c) {
  std::vector<int> out(1 << 10, 0), in = {0, 23};
  const auto start = c.cooperative ? launch_cooperative<Numbers> : launch<Numbers>;
  try {
    start(c.kernel, {c.grid, c.block, c.shared_bytes, nullptr}, {out.data(), in.data()});
  } catch (const cuda_emulation::Error& error) {
    std::puts(error.what());
    return;
  }
  while (!out.empty() && out.back() == 0) out.pop_back();
  for (const int x : out) std::printf("%d ", x);
  std::puts("");
}

}  // namespace

int main(int, char** arguments) {
  cuda_emulation::options.seed = std::strtoull(arguments[2], nullptr, 10);
  for (const auto& c : kCases)
    if (std::strcmp(c.name, arguments[1]) == 0) run(c);
}
