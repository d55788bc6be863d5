// The three products of a block, on register tiles of up to kTileRows x one panel.
//
//   S  [key][query]   = K q - |k|^2/2     similarity tile: keys as rows, one panel of queries in the lanes
//   dQ [query][D]    += H K               query gradients: H read down a panel's column
//   dK [key][D]      += H^T Q             key gradients: H read along its rows
//
// Tile layout of S and H: [panel of queries][key][kPanel]. GCC 12 spills fully unrolled micro-kernels: every inner loop
// has a hidden trip count and is unrolled by four.
#pragma once

#include "vec.h"

namespace cacr::CACR_ISA {

// C[r][0:kPanel] += sum_k A[r*row + k*step] * B[k][0:kPanel]
template <class T, int R>
CACR_INLINE void multiply_tile(idx n, const T* A, idx row, idx step, const T* B, Panel<T> (&C)[R]) {
#pragma GCC unroll 4
  for (idx k = 0; k < n; k++) {
    const Panel<T> b = load_panel(B);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const T a = A[r * row];
      C[r] += a * b;
    }
    A += step;
    B += kPanel<T>;
  }
}

// Calls f(first, integral_constant<rows>) over n rows in tiles of nearly equal height.
template <int R>
struct Rows {
  static constexpr int value = R;
};
template <int R, class F>
CACR_INLINE void with_rows(int rows, idx at, F& f) {
  if constexpr (R == 1) {
    f(at, Rows<1>{});
  } else {
    if (rows == R)
      f(at, Rows<R>{});
    else
      with_rows<R - 1>(rows, at, f);
  }
}
template <class F>
CACR_INLINE void for_tiles(idx n, F f) {
  if (n <= 0) return;
  const idx tiles = (n + kTileRows - 1) / kTileRows, low = n / tiles, extra = n - low * tiles;
  idx at = 0;
  for (idx t = 0; t < tiles; t++) {
    const int rows = int(low + (t < extra));
    with_rows<kTileRows>(rows, at, f);
    at += rows;
  }
}

// What makes a similarity of the product of a query with row j of the keys: r[j] times it plus bias[j].
template <class T>
struct KeyTerms {
  const T *r, *bias;  // r: inverse lengths; null: the keys are taken as they are

  // S[j][:] of a register tile from row `first` on.
  template <int R>
  inline __attribute__((always_inline)) void store_tile(const Panel<T> (&product)[R], idx first, T* S) const {
    if (r)
      for (int i = 0; i < R; i++) store_panel(S + i * kPanel<T>, r[first + i] * product[i] + bias[first + i]);
    else
      for (int i = 0; i < R; i++) store_panel(S + i * kPanel<T>, product[i] + bias[first + i]);
  }
};

// One panel of queries against `n` keys: S[j][:] = r[j] K[j] . q + bias[j].   K: rows `ldk` apart; q: [D][kPanel]
template <class T, idx kFixedD>
CACR_NOINLINE void similarity_panel(idx n, idx D, const T* K, idx ldk, const T* q, KeyTerms<T> keys, T* S) {
  if (kFixedD) D = ldk = kFixedD;
  for_tiles(n, [&](idx j, auto rows) __attribute__((always_inline)) {
    constexpr int R = decltype(rows)::value;
    Panel<T> c[R] = {};
    multiply_tile<T, R>(D, K + j * ldk, ldk, 1, q, c);
    keys.template store_tile<R>(c, j, S + j * kPanel<T>);
  });
}

// Additions in one chain, about as many as a BLAS makes: over many features, whose products are all alike in binary
// codes, a single chain would be off by an eps for every few of them. Up to kOneChain features are one.
inline constexpr idx kChain = 192, kOneChain = 256;

// The same for many features, part after part: sums of the parts so far stand in S.
template <class T>
CACR_NOINLINE void similarity_panel_in_parts(idx n, idx D, const T* K, idx ldk, const T* q, KeyTerms<T> keys, T* S) {
  const idx parts = (D + kChain - 1) / kChain;
  for (idx part = 0; part < parts; part++) {
    const idx d = D * part / parts, count = D * (part + 1) / parts - d;
    for_tiles(n, [&](idx j, auto rows) __attribute__((always_inline)) {
      constexpr int R = decltype(rows)::value;
      Panel<T> c[R] = {};
      multiply_tile<T, R>(count, K + j * ldk + d, ldk, 1, q + d * kPanel<T>, c);
      T* const out = S + j * kPanel<T>;
      for (int r = 0; r < R && part > 0; r++) c[r] = load_panel(out + r * kPanel<T>) + c[r];
      if (part + 1 < parts)
        for (int r = 0; r < R; r++) store_panel(out + r * kPanel<T>, c[r]);
      else
        keys.template store_tile<R>(c, j, out);
    });
  }
}

// One panel of queries, one panel of features: dQ[i][:] += sum_j H[j][i] * K[j][:].   K: [n][kPanel]
template <class T>
CACR_NOINLINE void query_gradient_panel(idx n, const T* H, const T* K, T* dQ) {
  constexpr idx PW = kPanel<T>;
  for_tiles(PW, [&](idx i, auto rows) __attribute__((always_inline)) {
    constexpr int R = decltype(rows)::value;
    Panel<T> c[R] = {};  // added up on their own first: the sum over a tile loses less than one over all keys
    multiply_tile<T, R>(n, H + i, 1, PW, K, c);
    for (int r = 0; r < R; r++) {
      T* out = dQ + (i + r) * PW;
      store_panel(out, load_panel(out) + c[r]);
    }
  });
}

// `panels` panels of queries (tiles of H `ldh` apart), one panel of features: dK[j][:] += sum_i H[j][i] * Q[i][:].
// Q: [panels * kPanel][kPanel]; rows of dK are `ldk` apart.
template <class T>
CACR_NOINLINE void key_gradient_panel(idx n, idx panels, const T* H, idx ldh, const T* Q, T* dK, idx ldk) {
  constexpr idx PW = kPanel<T>;
  for_tiles(n, [&](idx j, auto rows) __attribute__((always_inline)) {
    constexpr int R = decltype(rows)::value;
    T* out = dK + j * ldk;
    Panel<T> c[R] = {};
    const T *a = H + j * PW, *b = Q;
    for (idx p = 0; p < panels; p++, a += ldh, b += PW * PW) {
      idx trips = PW;
      asm volatile("" : "+r"(trips));  // hidden: a fully unrolled panel spills
      multiply_tile<T, R>(trips, a, PW, 1, b, c);
    }
    for (int r = 0; r < R; r++) store_panel(out + r * ldk, load_panel(out + r * ldk) + c[r]);
  });
}

template <class T>
CACR_INLINE void similarity(idx n, idx D, const T* K, idx ldk, const T* q, KeyTerms<T> keys, T* S) {
  if (D == 128 && ldk == 128)
    similarity_panel<T, 128>(n, D, K, ldk, q, keys, S);
  else if (D == 64 && ldk == 64)
    similarity_panel<T, 64>(n, D, K, ldk, q, keys, S);
  else if (D == 256 && ldk == 256)
    similarity_panel<T, 256>(n, D, K, ldk, q, keys, S);
  else if (D > kOneChain)
    similarity_panel_in_parts<T>(n, D, K, ldk, q, keys, S);
  else
    similarity_panel<T, 0>(n, D, K, ldk, q, keys, S);
}

// Sum by lanes of term(d), term(d + 1), ... over whole panels of features; d: the first that is left.
template <class T, class Term>
CACR_INLINE Vec<T> sum_by_lanes(idx D, idx& d, Term term) {
  constexpr int W = Lanes<T>::W;
  d = 0;
  const auto part = [&](idx end) __attribute__((always_inline)) {
    Vec<T> s0{}, s1{};
    for (; d + 2 * W <= end; d += 2 * W) s0 += term(d), s1 += term(d + W);
    return s0 + s1;
  };
  Vec<T> sum = part(min_of(D, kChain * 2 * W));
  while (d + 2 * W <= D) sum += part(min_of(D, d + kChain * 2 * W));
  return sum;
}
template <class T, class At>
CACR_INLINE Vec<T> sum_of_squares(idx D, idx& d, At at) {
  return sum_by_lanes<T>(D, d, [&](idx i) __attribute__((always_inline)) {
    const Vec<T> x = at(i);
    return x * x;
  });
}

}  // namespace cacr::CACR_ISA
