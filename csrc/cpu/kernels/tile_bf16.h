// Products of bfloat16 with sums in float32, 32 x 32 at a time:
//
//   C[r][c] += sum_k A[r][k] B[k/2][c][k%2]      r, c, k < 32
//
// AMX (TDPBF16PS, Intel 64 and IA-32 Architectures Software Developer's Manual): within 16 pairs of k, even and odd
// ones are added up apart from each other, each by fused multiply-adds; their sum is added to C. AVX512-BF16
// (VDPBF16PS, the same manual; CACR_BF16_PAIRS): pair after pair is added to C, of each the odd one first, by fused
// multiply-adds. In both everything is rounded to nearest; subnormal operands and results count as 0. Without such a
// processor C++ does what the instructions are defined to do.
#pragma once

#include "vec.h"

#if defined(CACR_BF16_TILES) && CACR_VECTOR_BYTES != 64
#error "CACR_BF16_TILES needs CACR_VECTOR_BYTES=64"
#endif

namespace cacr::CACR_ISA {

using Bf16 = uint16_t;  // the upper half of a float

inline constexpr idx kTile = 32;  // rows, columns and depth of a product; as wide as a panel of floats

// C (+)= sum_s A_s B_s. Distances are in elements.
struct TileSum {
  idx steps;
  const Bf16* A;  // A_s: [32][32] at A + s a_step, its rows lda apart
  idx a_step, lda;
  const Bf16* B;  // B_s: [16][32][2] at B + s b_step
  idx b_step;
};

#if defined(CACR_BF16_PAIRS)

struct TileConfig {
  TileConfig() {}
  ~TileConfig() {}
};

using Pairs = Lanes<float>::Bits;  // of bfloat16; the lower half is the even one
typedef uint32_t PairsAt __attribute__((vector_size(CACR_VECTOR_BYTES), aligned(2), may_alias));

#if defined(__AVX512BF16__)
CACR_INLINE Vec<float> add_products(Vec<float> c, Pairs a, Pairs b) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#else
CACR_INLINE Vec<float> flushed(Vec<float> x) {
  const Pairs bits = reinterpret_cast<Pairs>(x);
  return reinterpret_cast<Vec<float>>((bits & 0x7f800000) == 0 ? bits & 0x80000000 : bits);
}
CACR_INLINE Vec<float> add_products(Vec<float> c, Pairs a, Pairs b) {
  const auto upper = [](Pairs x) { return flushed(reinterpret_cast<Vec<float>>(x & 0xffff0000)); };
  c = flushed(fused(upper(a), upper(b), flushed(c)));
  return flushed(fused(upper(a << 16), upper(b << 16), c));
}
#endif

// kRows rows from `row` on; their sums stay in registers.
template <int kRows>
CACR_INLINE void multiply_rows(bool add, const TileSum& t, idx row, float* C, idx ldc) {
  constexpr idx W = Lanes<float>::W;
  Vec<float> c[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++)
    for (int h = 0; h < 2; h++) c[r][h] = add ? load(C + (row + r) * ldc + h * W) : Vec<float>{};
  for (idx s = 0; s < t.steps; s++) {
    const Bf16 *A = t.A + s * t.a_step + row * t.lda, *B = t.B + s * t.b_step;
    for (idx k = 0; k < kTile; k += 2) {
      const Pairs b[2] = {*reinterpret_cast<const PairsAt*>(B + k * kTile),
                          *reinterpret_cast<const PairsAt*>(B + k * kTile + 2 * W)};
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++) {
        uint32_t pair;
        __builtin_memcpy(&pair, A + r * t.lda + k, 4);
        const Pairs a = Pairs{} + pair;
        for (int h = 0; h < 2; h++) c[r][h] = add_products(c[r][h], a, b[h]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++)
    for (int h = 0; h < 2; h++) store<float>(C + (row + r) * ldc + h * W, c[r][h]);
}

CACR_INLINE void multiply_tiles(bool add, const TileSum& t, float* C, idx ldc) {
  for (idx row = 0; row < kTile; row += 8) multiply_rows<8>(add, t, row, C, ldc);
}

#elif defined(__AMX_BF16__)

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

// C lies in tiles 0 to 3.
CACR_INLINE void multiply_tiles(bool add, const TileSum& t, float* C, idx ldc) {
  asm volatile("" ::: "memory");
  if (add) {
    _tile_loadd(0, C, ldc * 4);
    _tile_loadd(1, C + 16, ldc * 4);
    _tile_loadd(2, C + 16 * ldc, ldc * 4);
    _tile_loadd(3, C + 16 * ldc + 16, ldc * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (idx s = 0; s < t.steps; s++) {
    const Bf16 *A = t.A + s * t.a_step, *B = t.B + s * t.b_step;
    _tile_loadd(4, A, t.lda * 2);
    _tile_loadd(6, B, 128);
    _tile_loadd(7, B + 32, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, A + 16 * t.lda, t.lda * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, C, ldc * 4);
  _tile_stored(1, C + 16, ldc * 4);
  _tile_stored(2, C + 16 * ldc, ldc * 4);
  _tile_stored(3, C + 16 * ldc + 16, ldc * 4);
  asm volatile("" ::: "memory");
}

#else

struct TileConfig {
  TileConfig() {}
  ~TileConfig() {}
};

CACR_INLINE float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0, x) : x; }
CACR_INLINE float number(Bf16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return flushed(f);
}

CACR_INLINE void multiply_tiles(bool add, const TileSum& t, float* C, idx ldc) {
  for (idx i = 0; i < kTile && !add; i++)
    for (idx j = 0; j < kTile; j++) C[i * ldc + j] = 0;
  for (idx s = 0; s < t.steps; s++) {
    const Bf16 *A = t.A + s * t.a_step, *B = t.B + s * t.b_step;
    float b[kTile][kTile];
    for (idx k = 0; k < kTile; k++)
      for (idx j = 0; j < kTile; j++) b[k][j] = number(B[(k / 2 * kTile + j) * 2 + k % 2]);
    for (idx i = 0; i < kTile; i++) {
      float sum[2][kTile] = {};
      for (idx k = 0; k < kTile; k++) {
        const float a = number(A[i * t.lda + k]);
        for (idx j = 0; j < kTile; j++) sum[k % 2][j] = flushed(fused(a, b[k][j], sum[k % 2][j]));
      }
      float* const c = C + i * ldc;
      for (idx j = 0; j < kTile; j++) c[j] = flushed(flushed(c[j]) + flushed(sum[0][j] + sum[1][j]));
    }
  }
}

#endif

}  // namespace cacr::CACR_ISA
