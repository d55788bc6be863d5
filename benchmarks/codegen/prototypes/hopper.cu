// Prototype, not part of the package: the two sweeps of raw bfloat16 rows of 128 features, by hand for sm_90a.
//
// What a kernel of our own can leave out where Triton's cannot: masks (only the tile on the diagonal has them, which
// comes first), the running maximum (logits of unit rows are bounded, so the host gives a shift), addresses and waits
// of most threads (a producer warp and bulk copies). `python -m benchmarks.codegen.prototype` counts what is left;
// nothing was timed. The instances `*_copied` copy by cp.async instead, which the PTX interpreter of the tests
// executes.
//
// A block has 128 rows of x, two warpgroups 64 each, and walks over tiles of 128 rows of y. Rows are a multiple of 128.

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

namespace {

constexpr int TILE = 128, D = 128, STAGES = 4, CONSUMERS = 256;
constexpr uint32_t HALF = TILE * 128;  // bytes of 64 features of a tile, whose rows have 128 bytes, swizzled

struct Shared {
  uint8_t x[2][HALF];  // [64 features, TILE rows]
  uint8_t y[STAGES][2][HALF];
  float4 columns[STAGES][TILE / 2];  // of two rows of y: {unit, bias - shift, unit, bias - shift}
  uint64_t full[STAGES], empty[STAGES];
};

__device__ uint32_t address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- copies ---------------------------------------------------------------------------------------------------------
__device__ void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(to)), "l"(from) : "memory");
}

// A tile by all threads of the consumers.
__device__ void copy_tile(uint8_t (*to)[HALF], const __nv_bfloat16* from) {
  for (int i = threadIdx.x; i < TILE * 16; i += CONSUMERS) {
    const int row = i / 16, chunk = i % 16;
    copy16(&to[chunk / 8][row * 128 + ((chunk ^ row) % 8) * 16], from + row * D + chunk * 8);
  }
}

__device__ void bulk_tile(uint8_t (*to)[HALF], const CUtensorMap* map, int row, uint64_t* full) {
  for (int half = 0; half < 2; half++)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3}], [%4];" ::"r"(address(to[half])),
        "l"(map), "r"(half * 64), "r"(row), "r"(address(full))
        : "memory");
}

__device__ void bulk_columns(float4* to, const float4* from, uint64_t* full) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address(to)),
      "l"(from), "r"(TILE * 8), "r"(address(full))
      : "memory");
}

__device__ void wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra.uni DONE;\nbra.uni AGAIN;\nDONE:\n}" ::"r"(address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

__device__ void expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
}

// ---- products -------------------------------------------------------------------------------------------------------
// Of 64 rows and 128 columns a thread holds sums[g][..]: columns 8 g + 2 (lane % 4) and the next one of row lane / 4 of
// its warp's 16, then the same of the row 8 below.
using Sums = float[16][4];

#define FOUR(s, g) "+f"(s[g][0]), "+f"(s[g][1]), "+f"(s[g][2]), "+f"(s[g][3])
#define ALL_SUMS(s)                                                                                           \
  FOUR(s, 0), FOUR(s, 1), FOUR(s, 2), FOUR(s, 3), FOUR(s, 4), FOUR(s, 5), FOUR(s, 6), FOUR(s, 7), FOUR(s, 8), \
      FOUR(s, 9), FOUR(s, 10), FOUR(s, 11), FOUR(s, 12), FOUR(s, 13), FOUR(s, 14), FOUR(s, 15)
#define NAMES                                                                                                        \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"  \
  "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
  "%58,%59,%60,%61,%62,%63}"
#define PRODUCT "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " NAMES ", "

// 128-byte swizzle; `leading`: from 64 lines to the next, where lines are neighbours in memory.
__device__ uint64_t descriptor(const void* p, uint32_t leading) {
  return uint64_t{address(p) >> 4} | uint64_t{leading >> 4} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

__device__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ void finish(Sums& sums) {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" : ALL_SUMS(sums)::"memory");
}

// S = x y' for 64 rows of x.
__device__ void similarities(Sums& sums, const uint8_t (*x)[HALF], const uint8_t (*y)[HALF]) {
  fence();
#pragma unroll
  for (int k = 0; k < 8; k++) {
    const uint64_t a = descriptor(&x[k / 4][k % 4 * 32], 0), b = descriptor(&y[k / 4][k % 4 * 32], 0);
    if (k == 0)
      asm volatile(PRODUCT "%64, %65, 0, 1, 1, 0, 0;" : ALL_SUMS(sums) : "l"(a), "l"(b));
    else
      asm volatile(PRODUCT "%64, %65, 1, 1, 1, 0, 0;" : ALL_SUMS(sums) : "l"(a), "l"(b));
  }
  finish(sums);
}

// sums += p y for 16 rows of y, with p in registers: 64 rows, and columns in the order of sums.
__device__ void add_product(Sums& sums, const uint32_t (&p)[4], const uint8_t* y) {
  fence();
  asm volatile(PRODUCT "{%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
               : ALL_SUMS(sums)
               : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(descriptor(y, HALF)));
}

// ---- what is done with a tile ---------------------------------------------------------------------------------------
__device__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ uint32_t packed(float low, float high) {
  uint32_t x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}

struct Statistics {
  struct Row {
    float factor, sum_e, sum_ez;  // factor: slope times the factor that makes a unit row
  };
  Row row[2] = {};

  __device__ void load(const float* rows, int i0, int) {
    for (int h = 0; h < 2; h++) row[h].factor = rows[i0 + 8 * h];
  }

  template <bool DIAGONAL>
  __device__ void see(Sums& s, const Shared& shared, int stage, int i) {
    const float4* columns = shared.columns[stage];
#pragma unroll
    for (int g = 0; g < 16; g++) {
      const float4 c = columns[4 * g + threadIdx.x % 4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        Row& r = row[j / 2];
        const float z = fmaf(s[g][j] * r.factor, j % 2 ? c.z : c.x, j % 2 ? c.w : c.y);
        const bool own = DIAGONAL && i + 8 * (j / 2) == 8 * g + 2 * int(threadIdx.x % 4) + j % 2;
        const float e = own ? 0.0f : exp2_of(z);
        r.sum_e += e;
        r.sum_ez = fmaf(e, z, r.sum_ez);
      }
    }
  }

  __device__ void store(float* out, int i0, int rows) {
    for (int h = 0; h < 2; h++)
      for (int lane = 1; lane < 4; lane *= 2) {
        row[h].sum_e += __shfl_xor_sync(~0u, row[h].sum_e, lane);
        row[h].sum_ez += __shfl_xor_sync(~0u, row[h].sum_ez, lane);
      }
    if (threadIdx.x % 4 == 0)
      for (int h = 0; h < 2; h++) {
        out[i0 + 8 * h] = row[h].sum_e;
        out[rows + i0 + 8 * h] = row[h].sum_ez;
      }
  }
};

struct Gradient {
  struct Row {
    float factor, a, b;  // dL/dc = e (a + b z)
  };
  Row row[2];
  Sums sums = {};  // sum_j dL/dc_ij unit_j y_j

  __device__ void load(const float* rows, int i0, int count) {
    for (int h = 0; h < 2; h++) row[h] = {rows[i0 + 8 * h], rows[count + i0 + 8 * h], rows[2 * count + i0 + 8 * h]};
  }

  template <bool DIAGONAL>
  __device__ void see(Sums& s, const Shared& shared, int stage, int i) {
    const float4* columns = shared.columns[stage];
#pragma unroll
    for (int k = 0; k < 8; k++) {
      uint32_t p[4];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int g = 2 * k + half;
        const float4 c = columns[4 * g + threadIdx.x % 4];
        float h[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const Row& r = row[j / 2];
          const float unit = j % 2 ? c.z : c.x;
          const float z = fmaf(s[g][j] * r.factor, unit, j % 2 ? c.w : c.y);
          const bool own = DIAGONAL && i + 8 * (j / 2) == 8 * g + 2 * int(threadIdx.x % 4) + j % 2;
          h[j] = own ? 0.0f : exp2_of(z) * fmaf(r.b, z, r.a) * unit;
        }
        p[2 * half] = packed(h[0], h[1]);
        p[2 * half + 1] = packed(h[2], h[3]);
      }
      add_product(sums, p, &shared.y[stage][0][k * 2048]);
    }
    finish(sums);
  }

  __device__ void store(float* out, int i0, int) {
#pragma unroll
    for (int g = 0; g < 16; g++)
      for (int h = 0; h < 2; h++) {
        float* to = out + size_t(i0 + 8 * h) * D + 8 * g + 2 * (threadIdx.x % 4);
        to[0] = sums[g][2 * h];
        to[1] = sums[g][2 * h + 1];
      }
  }
};

// ---- the sweep ------------------------------------------------------------------------------------------------------
struct Arrays {
  const __nv_bfloat16 *x, *y;  // [rows, D]
  const float* of_rows;        // [1 or 3, rows]
  const float4* of_columns;    // [rows / 2]
  float* out;
  int rows;
};

extern __shared__ uint8_t dynamic[];

__device__ Shared& shared_memory() {  // patterns begin at multiples of 1024 bytes
  return *reinterpret_cast<Shared*>(dynamic + (1024 - address(dynamic) % 1024) % 1024);
}

// Tiles in turn, the one on the diagonal first.
template <class Sweep>
__device__ void sweep_copied(const Arrays& arrays) {
  Shared& shared = shared_memory();
  const int tiles = arrays.rows / TILE;
  auto copy = [&](int t) {
    const int row = (blockIdx.x + t) % tiles * TILE, stage = t % STAGES;
    if (t < tiles) {
      copy_tile(shared.y[stage], arrays.y + size_t(row) * D);
      if (threadIdx.x < TILE / 2)
        copy16(&shared.columns[stage][threadIdx.x], arrays.of_columns + row / 2 + threadIdx.x);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  copy_tile(shared.x, arrays.x + size_t(blockIdx.x) * TILE * D);
  for (int t = 0; t < STAGES - 1; t++) copy(t);
  const int i = threadIdx.x / 128 * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4, i0 = blockIdx.x * TILE + i;
  Sweep sweep;
  sweep.load(arrays.of_rows, i0, arrays.rows);
  Sums s;
  for (int t = 0; t < tiles; t++) {
    asm volatile("cp.async.wait_group %0;\nfence.proxy.async.shared::cta;" ::"n"(STAGES - 2) : "memory");
    __syncthreads();
    copy(t + STAGES - 1);
    similarities(s, reinterpret_cast<uint8_t (*)[HALF]>(shared.x[0] + threadIdx.x / 128 * 64 * 128),
                 shared.y[t % STAGES]);
    if (t == 0)
      sweep.template see<true>(s, shared, 0, i);
    else
      sweep.template see<false>(s, shared, t % STAGES, i);
  }
  sweep.store(arrays.out, i0, arrays.rows);
}

template <class Sweep>
__device__ void sweep_bulk(const CUtensorMap* x, const CUtensorMap* y, const Arrays& arrays) {
  Shared& shared = shared_memory();
  const int tiles = arrays.rows / TILE;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nmbarrier.init.shared::cta.b64 [%1], 2;" ::"r"(
                       address(&shared.full[stage])),
                   "r"(address(&shared.empty[stage]))
                   : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x >= CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == CONSUMERS)
      for (int t = 0; t < tiles; t++) {
        const int row = (blockIdx.x + t) % tiles * TILE, stage = t % STAGES;
        wait(&shared.empty[stage], (t / STAGES + 1) % 2);
        expect(&shared.full[stage], 2 * HALF + TILE * 8 + (t == 0 ? 2 * HALF : 0));
        if (t == 0) bulk_tile(shared.x, x, blockIdx.x * TILE, &shared.full[0]);
        bulk_tile(shared.y[stage], y, row, &shared.full[stage]);
        bulk_columns(shared.columns[stage], arrays.of_columns + row / 2, &shared.full[stage]);
      }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  const int i = threadIdx.x / 128 * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4, i0 = blockIdx.x * TILE + i;
  Sweep sweep;
  sweep.load(arrays.of_rows, i0, arrays.rows);
  const auto* own = reinterpret_cast<uint8_t (*)[HALF]>(shared.x[0] + threadIdx.x / 128 * 64 * 128);
  Sums s;
  wait(&shared.full[0], 0);
  similarities(s, own, shared.y[0]);
  sweep.template see<true>(s, shared, 0, i);
  if (threadIdx.x % 128 == 0) arrive(&shared.empty[0]);
  int stage = 1, parity = 0;
#pragma unroll 1
  for (int t = 1; t < tiles; t++) {
    wait(&shared.full[stage], parity);
    similarities(s, own, shared.y[stage]);
    sweep.template see<false>(s, shared, stage, i);
    asm volatile("bar.sync %0, 128;" ::"r"(1 + int(threadIdx.x / 128)) : "memory");  // all have read the columns
    if (threadIdx.x % 128 == 0) arrive(&shared.empty[stage]);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    parity ^= stage == 0;
  }
  sweep.store(arrays.out, i0, arrays.rows);
}

}  // namespace

#ifdef COPIED
extern "C" __global__ void __launch_bounds__(CONSUMERS) statistics_copied(Arrays arrays) {
  sweep_copied<Statistics>(arrays);
}
extern "C" __global__ void __launch_bounds__(CONSUMERS) gradient_copied(Arrays arrays) {
  sweep_copied<Gradient>(arrays);
}
#else
extern "C" __global__ void __launch_bounds__(CONSUMERS + 128)
    statistics(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap y, Arrays arrays) {
  sweep_bulk<Statistics>(&x, &y, arrays);
}
extern "C" __global__ void __launch_bounds__(CONSUMERS + 128)
    gradient(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap y, Arrays arrays) {
  sweep_bulk<Gradient>(&x, &y, arrays);
}
#endif
