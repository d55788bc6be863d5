// One kernel for every wrapper of ptx.cuh and every warp operation: a warp takes words in and gives words out, which
// test_primitives.py compares with a statement of its own, here and in the PTX that nvcc makes of this file.
#pragma once

#include "launch.cuh"
#include "ptx.cuh"
#include "shared_memory.cuh"

namespace primitives {

using namespace cacr;

struct Words {
  const uint32_t* in;  // [32 lanes][words of the operation], unless said otherwise
  uint32_t* out;       // [32 lanes][words of the operation]
};

constexpr int kTile = 512;  // 16-bit values
struct Tile {
  SharedArray<uint16_t, kTile> values;
};

// in: [32 lanes][16 words of the tile, one offset in bytes]
template <class Load>
CACR_DEVICE void load_matrices(const Words& p, Load load) {
  Tile& tile = shared_memory<Tile>();
  const uint32_t* in = p.in + threadIdx.x * 9;
  for (int i = 0; i < 8; i++) {
    tile.values[threadIdx.x * 16 + 2 * i] = static_cast<uint16_t>(in[i]);
    tile.values[threadIdx.x * 16 + 2 * i + 1] = static_cast<uint16_t>(in[i] >> 16);
  }
  __syncwarp();
  uint32_t r[4];
  load(r, ptx::shared_address(&tile.values[0]) + in[8]);
  for (int i = 0; i < 4; i++) p.out[threadIdx.x * 4 + i] = r[i];
}

extern "C" __global__ void ldmatrix_x4(const __grid_constant__ Words p) {
  load_matrices(p, [](uint32_t (&r)[4], ptx::SharedAddress row) { ptx::ldmatrix_x4(r, row); });
}
extern "C" __global__ void ldmatrix_x4_trans(const __grid_constant__ Words p) {
  load_matrices(p, [](uint32_t (&r)[4], ptx::SharedAddress row) { ptx::ldmatrix_x4_trans(r, row); });
}

// in: a0 ... a3, b0, b1, d0 ... d3; out: d0 ... d3
template <class Mma>
CACR_DEVICE void multiply(const Words& p, Mma mma) {
  const uint32_t* in = p.in + threadIdx.x * 10;
  const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
  float d[4];
  for (int i = 0; i < 4; i++) d[i] = __uint_as_float(in[6 + i]);
  mma(d, a, in[4], in[5]);
  for (int i = 0; i < 4; i++) p.out[threadIdx.x * 4 + i] = __float_as_uint(d[i]);
}

extern "C" __global__ void mma_bf16(const __grid_constant__ Words p) {
  multiply(p, [](float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { ptx::mma_bf16(d, a, b0, b1); });
}
extern "C" __global__ void mma_f16(const __grid_constant__ Words p) {
  multiply(p, [](float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { ptx::mma_f16(d, a, b0, b1); });
}
extern "C" __global__ void mma_tf32(const __grid_constant__ Words p) {
  multiply(p, [](float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { ptx::mma_tf32(d, a, b0, b1); });
}

// in: [32 lanes][4 words of the source], [32 lanes][offset of the target, offset of the source, valid bytes];
// out: the tile, 256 words, after the copies of all lanes.
extern "C" __global__ void cp_async_16(const __grid_constant__ Words p) {
  Tile& tile = shared_memory<Tile>();
  for (int i = threadIdx.x; i < kTile; i += 32) tile.values[i] = 0x1234;
  __syncwarp();
  const uint32_t* order = p.in + 128 + threadIdx.x * 3;
  ptx::cp_async_16(ptx::shared_address(&tile.values[0]) + order[0], reinterpret_cast<const char*>(p.in) + order[1],
                   static_cast<int>(order[2]));
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  for (int i = threadIdx.x; i < kTile / 2; i += 32)
    p.out[i] = tile.values[2 * i] | static_cast<uint32_t>(tile.values[2 * i + 1]) << 16;
}

// in: x, y; out: exp2 x, x in tf32, (x, y) in bf16, (x, y) in f16, x's low half from bf16, from f16
extern "C" __global__ void arithmetic(const __grid_constant__ Words p) {
  const uint32_t* in = p.in + threadIdx.x * 2;
  uint32_t* out = p.out + threadIdx.x * 6;
  const float x = __uint_as_float(in[0]), y = __uint_as_float(in[1]);
  out[0] = __float_as_uint(ptx::exp2_approx(x));
  out[1] = ptx::to_tf32(x);
  out[2] = ptx::pack_bf16(x, y);
  out[3] = ptx::pack_f16(x, y);
  out[4] = __float_as_uint(ptx::bf16_to_float(static_cast<uint16_t>(in[0])));
  out[5] = __float_as_uint(ptx::f16_to_float(static_cast<uint16_t>(in[0])));
}

// in: x, y < 32; out: shuffles of x: from lane y, the same in segments of 8, xor 5, xor 12 in segments of 8, up 3,
// up 3 in segments of 16, down 2, down 2 in segments of 4; votes on y > 15: ballot, any, all.
extern "C" __global__ void shuffles(const __grid_constant__ Words p) {
  constexpr uint32_t kAll = 0xffffffffu;
  const uint32_t x = p.in[threadIdx.x * 2], y = p.in[threadIdx.x * 2 + 1];
  const int lane = static_cast<int>(y);
  uint32_t* out = p.out + threadIdx.x * 11;
  out[0] = __shfl_sync(kAll, x, lane);
  out[1] = __shfl_sync(kAll, x, lane, 8);
  out[2] = __shfl_xor_sync(kAll, x, 5);
  out[3] = __shfl_xor_sync(kAll, x, 12, 8);
  out[4] = __shfl_up_sync(kAll, x, 3);
  out[5] = __shfl_up_sync(kAll, x, 3, 16);
  out[6] = __shfl_down_sync(kAll, x, 2);
  out[7] = __shfl_down_sync(kAll, x, 2, 4);
  out[8] = __ballot_sync(kAll, y > 15);
  out[9] = __any_sync(kAll, y > 15);
  out[10] = __all_sync(kAll, y > 15);
}

}  // namespace primitives
