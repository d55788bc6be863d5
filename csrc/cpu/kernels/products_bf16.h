// The three products of a block (gemm.h) of bfloat16, tile by tile (tile_bf16.h), and their operands.
//
//   S   [key][query]    A = keys [key][feature]         B = queries [feature/2][query][2]
//   dQ' [feature][query] A = keys [feature][key]        B = H       [key/2][query][2]
//   dK  [key][feature]  A = H    [key][query]           B = queries [query/2][feature][2]
//
// Rows are not scaled: their inverse lengths multiply similarities, and dL/dS before it is rounded, once, to bfloat16.
// Everything is padded with zeros to multiples of 32.
#pragma once

#include "pack.h"
#include "tile_bf16.h"

namespace cacr::CACR_ISA {

#if defined(CACR_BF16_TILES)
template <class T>
inline constexpr bool kBf16Tiles = sizeof(T) == 4;
#else
template <class T>
inline constexpr bool kBf16Tiles = false;
#endif

// Coefficients of one panel and `n` keys; what is rounded is padded with zeros to whole tiles.
template <class T>
struct RoundedCoefficients {
  const T* H;            // [n][kTile] dL/dS
  const T *q_r, *k_r;    // [kTile], [n] inverse lengths; k_r null: rows are taken as they are
  Bf16 *rows, *pairs;    // [n][kTile] of H_ij r_i, [n/2][kTile][2] of H_ij r_j
  T *row_sum, *columns;  // [kTile] sum_j H_ij and [n][W] H_ij by lanes are added to it; columns null: not wanted
};

// Distance of rows of bfloat16: rows a multiple of 1 KiB apart would share few lines of the first-level cache.
CACR_INLINE idx bf16_stride(idx D) {
  const idx width = (D + kTile - 1) / kTile * kTile;
  return width % 512 ? width : width + kTile;
}

CACR_INLINE idx tiled(idx n) { return (n + kTile - 1) / kTile * kTile; }

#if defined(CACR_BF16_TILES)

// ---- rounding -------------------------------------------------------------------------------------------------------
using Bits = Lanes<float>::Bits;
typedef Bf16 HalfBits __attribute__((vector_size(CACR_VECTOR_BYTES / 2)));
typedef Bf16 HalfBitsAt __attribute__((vector_size(CACR_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t BitsAt __attribute__((vector_size(CACR_VECTOR_BYTES), aligned(2), may_alias));

// To the nearest bfloat16, of two the even one; the lower half is 0. NaN stays NaN.
CACR_INLINE Bits rounded_bits(Vec<float> x) {
  const Bits bits = reinterpret_cast<Bits>(x), up = bits + (0x7fff + ((bits >> 16) & 1));
  const IntVec<float> is_nan = x != x;
  return (is_nan ? bits | 0x400000 : up) & 0xffff0000;
}
CACR_INLINE Vec<float> as_floats(Bits bits) { return reinterpret_cast<Vec<float>>(bits); }

// The upper halves of W numbers.
CACR_INLINE void store_row(Bf16* out, Bits x) {
  *reinterpret_cast<HalfBitsAt*>(out) = __builtin_convertvector(x >> 16, HalfBits);
}
// out[l][0], out[l][1]: of two rows.
CACR_INLINE void store_pairs(Bf16* out, Bits first, Bits second) {
  *reinterpret_cast<BitsAt*>(out) = first >> 16 | second;
}

// ---- operands -------------------------------------------------------------------------------------------------------
// f(x [features][kTile] transposed, first feature, features of it) of n <= kTile rows, zeros in the others; a part of
// the features at a time, the last of which is padded to a multiple of 32.
template <class F>
CACR_INLINE void in_transposed_parts(idx n, idx D, const float* rows, idx stride, F f) {
  constexpr idx kPart = 64;
  alignas(64) float x[kPart * kTile];
  for (idx d = 0; d < D; d += kPart) {
    const idx count = min_of(kPart, D - d);
    transpose_panel<float>(n, count, rows + d, stride, nullptr, x);
    zero(x + count * kTile, (tiled(count) - count) * kTile);
    f(x, d, tiled(count));
  }
}

// out[d], d < D rounded up to 32
CACR_INLINE void round_row(idx D, const float* x, Bf16* out) {
  constexpr idx W = Lanes<float>::W;
  idx d = 0;
  for (; d + W <= D; d += W) store_row(out + d, rounded_bits(load(x + d)));
  for (; d < tiled(D); d += W) {
    Vec<float> some{};
    for (idx l = 0; d + l < D; l++) some[l] = x[d + l];
    store_row(out + d, rounded_bits(some));
  }
}

CACR_NOINLINE void pack_bf16(const Bf16PackParams& t) {
  constexpr idx W = Lanes<float>::W;
  const idx Dp = tiled(t.D);
  for (idx j = t.row0; j < t.row1; j += kTile) {
    const idx n = max_of<idx>(0, min_of(kTile, t.count - j));
    const float* x = t.x + j * t.row_stride;
    for (idx i = 0; i < n; i++) round_row(t.D, x + i * t.row_stride, t.rows + (j + i) * t.out_stride);
    for (idx i = n; i < kTile; i++) zero(t.rows + (j + i) * t.out_stride, Dp);
    if (!t.columns) continue;
    in_transposed_parts(n, t.D, x, t.row_stride, [&](const float* part, idx d, idx count) {
      Bf16* out = t.columns + j * Dp + d * kTile;
      for (idx i = 0; i < count * kTile; i += W) store_row(out + i, rounded_bits(load(part + i)));
    });
  }
}

// One panel of queries, of which n exist: pairs of features [Dp/2][kTile][2].
CACR_NOINLINE void pack_feature_pairs(idx n, idx D, const float* q, idx stride, Bf16* out) {
  constexpr idx W = Lanes<float>::W;
  in_transposed_parts(n, D, q, stride, [&](const float* part, idx d, idx count) {
    for (idx e = 0; e < count; e += 2)
      for (idx l = 0; l < kTile; l += W)
        store_pairs(out + (d + e) * kTile + 2 * l, rounded_bits(load(part + e * kTile + l)),
                    rounded_bits(load(part + (e + 1) * kTile + l)));
  });
}

// The same in pairs of queries: [Dp/32][kTile/2][32][2].
CACR_NOINLINE void pack_query_pairs(idx n, idx D, const float* q, idx stride, Bf16* out) {
  constexpr idx W = Lanes<float>::W;
  for (idx i = 0; i < kTile; i += 2) {
    const float *first = q + i * stride, *second = first + stride;
    for (idx d = 0; d < tiled(D); d += W) {
      Vec<float> x{}, y{};
      if (i + 1 < n && d + W <= D) {
        x = load(first + d), y = load(second + d);
      } else {
        for (idx l = 0; i < n && l < W && d + l < D; l++) x[l] = first[d + l], y[l] = i + 1 < n ? second[d + l] : 0.f;
      }
      store_pairs(out + d / kTile * kTile * kTile + (i * kTile + d % kTile * 2), rounded_bits(x), rounded_bits(y));
    }
  }
}

// ---- coefficients ---------------------------------------------------------------------------------------------------
// The sums are those of what multiplies the rows. Of unit rows they only serve to subtract what the gradient of raw
// rows loses anyhow, its part along the row, and are those of H itself.
template <bool kRaw>
CACR_NOINLINE void round_coefficients(idx n, const RoundedCoefficients<float>& t) {
  constexpr idx W = Lanes<float>::W;
  const Panel<float> q_r = kRaw ? load_panel(t.q_r) : Panel<float>{};
  Panel<float> sum{};
  const auto round_key = [&](idx j, Bits(&for_dq)[2]) __attribute__((always_inline)) {
    const Panel<float> h = load_panel(t.H + j * kTile);
    Panel<float> counted = h;
    for (int i = 0; i < 2; i++) {
      const Bits for_dk = rounded_bits(kRaw ? h.v[i] * q_r.v[i] : h.v[i]);
      for_dq[i] = kRaw ? rounded_bits(h.v[i] * t.k_r[j]) : for_dk;
      if constexpr (!kRaw) counted.v[i] = as_floats(for_dk);
      store_row(t.rows + j * kTile + i * W, for_dk);
    }
    sum += counted;
    if (t.columns) store<float>(t.columns + W * j, load(t.columns + W * j) + (counted.v[0] + counted.v[1]));
  };
  for (idx j = 0; j < n; j += 2) {
    Bits first[2], second[2] = {};
    round_key(j, first);
    if (j + 1 < n) round_key(j + 1, second);
    for (int i = 0; i < 2; i++) store_pairs(t.pairs + j * kTile + 2 * i * W, first[i], second[i]);
  }
  store_panel(t.row_sum, load_panel(t.row_sum) + sum);
  zero(t.rows + n * kTile, (tiled(n) - n) * kTile);
  zero(t.pairs + (n + 1) / 2 * 2 * kTile, (tiled(n) - (n + 1) / 2 * 2) * kTile);
}
CACR_INLINE void round_coefficients(idx n, const RoundedCoefficients<float>& t) {
  t.k_r ? round_coefficients<true>(n, t) : round_coefficients<false>(n, t);
}

// pairs [n/2][kTile][2] of E_j r_j, [n][kTile], padded likewise; sum: [kTile] of what multiplies the rows, as above.
template <bool kRaw>
CACR_NOINLINE void round_weights(idx n, const float* E, const float* r, Bf16* pairs, float* sum) {
  constexpr idx W = Lanes<float>::W;
  Panel<float> counted{};
  const auto round_key = [&](idx j, int i) __attribute__((always_inline)) {
    const Vec<float> e = load(E + j * kTile + i * W);
    const Bits bits = rounded_bits(kRaw ? r[j] * e : e);
    counted.v[i] += kRaw ? e : as_floats(bits);
    return bits;
  };
  for (idx j = 0; j < n; j += 2)
    for (int i = 0; i < 2; i++) {
      const Bits first = round_key(j, i), second = j + 1 < n ? round_key(j + 1, i) : Bits{};
      store_pairs(pairs + j * kTile + 2 * i * W, first, second);
    }
  zero(pairs + (n + 1) / 2 * 2 * kTile, (tiled(n) - (n + 1) / 2 * 2) * kTile);
  store_panel(sum, counted);
}
CACR_INLINE void round_weights(idx n, const float* E, const float* r, Bf16* pairs, float* sum) {
  r ? round_weights<true>(n, E, r, pairs, sum) : round_weights<false>(n, E, r, pairs, sum);
}

// ---- products -------------------------------------------------------------------------------------------------------
// One panel of queries against n keys: S[j][:] = r[j] q_r[:] K[j] . q[:] + bias[j]; up to a whole tile more is written.
CACR_NOINLINE void similarity_tiles(idx n, idx D, const Bf16* K, idx ldk, const Bf16* q_pairs, const float* q_r,
                                    KeyTerms<float> keys, float* S) {
  for (idx j = 0; j < n; j += kTile) {
    float* const out = S + j * kTile;
    multiply_tiles(false, {tiled(D) / kTile, K + j * ldk, kTile, ldk, q_pairs, kTile * kTile}, out, kTile);
    for (idx i = 0; i < min_of(kTile, n - j); i++) {
      Panel<float> u = load_panel(out + i * kTile);
      if (q_r) u = keys.r[j + i] * (load_panel(q_r) * u);
      store_panel(out + i * kTile, u + keys.bias[j + i]);
    }
  }
}

// One panel of queries and all features: dQ'[f][:] += sum_j K[j][f] H[j][:].
// K: [keys/32][Dp][32]
CACR_NOINLINE void query_gradient_tiles(idx n, idx Dp, const Bf16* pairs, const Bf16* K, float* dQ) {
  for (idx f = 0; f < Dp; f += kTile) {
    const TileSum sum{tiled(n) / kTile, K + f * kTile, kTile * Dp, kTile, pairs, kTile * kTile};
    multiply_tiles(true, sum, dQ + f * kTile, kTile);
  }
}

// `panels` panels of queries, whose coefficients are `ldh` apart: dK[j][:] += sum_i H[j][i] Q[i][:]
// Q: [panels][Dp/32][kTile/2][32][2]; rows of dK are `ldk` apart.
CACR_NOINLINE void key_gradient_tiles(idx n, idx panels, idx Dp, const Bf16* rows, idx ldh, const Bf16* Q, float* dK,
                                      idx ldk) {
  for (idx j = 0; j < n; j += kTile)
    for (idx f = 0; f < Dp; f += kTile) {
      float* const out = dK + j * ldk + f;
      const TileSum sum{panels, rows + j * kTile, ldh, kTile, Q + f * kTile, Dp * kTile};
      if (j + kTile <= n) {
        multiply_tiles(true, sum, out, ldk);
      } else {
        alignas(64) float some[kTile * kTile];
        multiply_tiles(false, sum, some, kTile);
        for (idx i = 0; i < n - j; i++)
          store_panel(out + i * ldk, load_panel(out + i * ldk) + load_panel(some + i * kTile));
      }
    }
}

// In place, [panels][Dp][query] becomes [panels][Dp/32][query][32].
CACR_NOINLINE void turn_query_gradients(idx panels, idx Dp, float* dQ) {
  constexpr idx W = Lanes<float>::W;
  for (idx i = 0; i < panels * Dp; i += kTile)
    for (idx y = 0; y < kTile; y += W)
      for (idx x = 0; x <= y; x += W) {
        Vec<float> a[W], b[W];
        float *const below = dQ + (i + y) * kTile + x, *const above = dQ + (i + x) * kTile + y;
#pragma GCC unroll 16
        for (idx l = 0; l < W; l++) a[l] = load(below + l * kTile), b[l] = load(above + l * kTile);
        transpose_lanes<float>(a), transpose_lanes<float>(b);
#pragma GCC unroll 16
        for (idx l = 0; l < W; l++) store<float>(below + l * kTile, b[l]), store<float>(above + l * kTile, a[l]);
      }
}

#endif

}  // namespace cacr::CACR_ISA
