// Products of bfloat16 with sums in float32, 32 x 32 at a time: the tile instructions of AMX, or what they are defined
// to do, written in C++.
//
//   C[r][c] += sum_k A[r][k] B[k/2][c][k%2]      r, c, k < 32
//
// The definition (Intel 64 and IA-32 Architectures Software Developer's Manual, TDPBF16PS): within 16 pairs of k, even
// and odd ones are added up apart from each other, each by fused multiply-adds; their sum is added to C. Everything is
// rounded to nearest; subnormal operands and results count as 0.
#pragma once

#include "vec.h"

#if defined(CACR_BF16_TILES) && CACR_VECTOR_BYTES != 64
#error "CACR_BF16_TILES needs CACR_VECTOR_BYTES=64"
#endif

namespace cacr::CACR_ISA {

using Bf16 = uint16_t;  // the upper half of a float

inline constexpr idx kTile = 32;  // rows, columns and depth of a product; as wide as a panel of floats

#if defined(__AMX_BF16__)

// While it lives, the thread has eight tiles of 16 rows of 64 bytes. Whoever else uses tiles sets them up likewise.
class TileConfig {
 public:
  TileConfig() {
    alignas(64) uint8_t config[64] = {1};  // palette 1
    for (int tile = 0; tile < 8; tile++) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
    asm volatile("" ::: "memory");  // the intrinsics do not say all that they read
    _tile_loadconfig(config);
  }
  ~TileConfig() { _tile_release(); }
  TileConfig(const TileConfig&) = delete;
  TileConfig& operator=(const TileConfig&) = delete;
};

// C lies in tiles 0 to 3. Strides are in elements.
struct TileProduct {
  CACR_INLINE void zero() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  CACR_INLINE void load(const float* C, idx stride) {
    asm volatile("" ::: "memory");
    _tile_loadd(0, C, stride * 4);
    _tile_loadd(1, C + 16, stride * 4);
    _tile_loadd(2, C + 16 * stride, stride * 4);
    _tile_loadd(3, C + 16 * stride + 16, stride * 4);
  }
  // A: rows `stride` apart; B: [16][32][2]
  CACR_INLINE void add(const Bf16* A, idx stride, const Bf16* B) {
    asm volatile("" ::: "memory");
    _tile_loadd(4, A, stride * 2);
    _tile_loadd(6, B, 128);
    _tile_loadd(7, B + 32, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, A + 16 * stride, stride * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  CACR_INLINE void store(float* C, idx stride) {
    _tile_stored(0, C, stride * 4);
    _tile_stored(1, C + 16, stride * 4);
    _tile_stored(2, C + 16 * stride, stride * 4);
    _tile_stored(3, C + 16 * stride + 16, stride * 4);
    asm volatile("" ::: "memory");
  }
};

#else

struct TileConfig {
  TileConfig() {}
  ~TileConfig() {}
};

struct TileProduct {
  float c[kTile][kTile];

  static float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0, x) : x; }
  static float number(Bf16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return flushed(f);
  }
  void zero() {
    for (auto& row : c)
      for (float& x : row) x = 0;
  }
  void load(const float* C, idx stride) {
    for (idx i = 0; i < kTile; i++)
      for (idx j = 0; j < kTile; j++) c[i][j] = C[i * stride + j];
  }
  void add(const Bf16* A, idx stride, const Bf16* B) {
    float b[kTile][kTile];
    for (idx k = 0; k < kTile; k++)
      for (idx j = 0; j < kTile; j++) b[k][j] = number(B[(k / 2 * kTile + j) * 2 + k % 2]);
    for (idx i = 0; i < kTile; i++) {
      float sum[2][kTile] = {};
      for (idx k = 0; k < kTile; k++) {
        const float a = number(A[i * stride + k]);
        for (idx j = 0; j < kTile; j++) sum[k % 2][j] = flushed(fused(a, b[k][j], sum[k % 2][j]));
      }
      for (idx j = 0; j < kTile; j++) c[i][j] = flushed(flushed(c[i][j]) + flushed(sum[0][j] + sum[1][j]));
    }
  }
  void store(float* C, idx stride) const {
    for (idx i = 0; i < kTile; i++)
      for (idx j = 0; j < kTile; j++) C[i * stride + j] = c[i][j];
  }
};

#endif

}  // namespace cacr::CACR_ISA
