// Rows of embeddings as the operands of the products in gemm.h.
#pragma once

#include "unit_rows.h"

namespace cacr::CACR_ISA {

// `count` numbers of scratch memory, aligned; `at` moves behind them.
template <class T>
CACR_INLINE T* carve(char*& at, idx count) {
  T* p = reinterpret_cast<T*>(at);
  at += (size_t(count) * sizeof(T) + 63) / 64 * 64;
  return p;
}

// How many bytes `layout` cuts from the pointer it is given.
template <class Layout>
CACR_INLINE size_t bytes_of(Layout layout) {
  char *const base = reinterpret_cast<char*>(64), *at = base;  // nothing may be added to a null pointer
  layout(at);
  return size_t(at - base);
}

// |x|^2
template <class T>
T squared_norm(idx D, const T* x) {
  idx d;
  T s = sum_lanes<T>(sum_of_squares<T>(D, d, [&](idx i) { return load(x + i); }));
  for (; d < D; d++) s += x[d] * x[d];
  return s;
}

template <class T>
CACR_INLINE void store_norm(const PackParams<T>& t, idx i, T norm) {
  if (t.q_norm) t.q_norm[i] = t.inner_product ? T(0) : norm;
  if (t.k_bias) t.k_bias[i] = t.inner_product ? T(0) : T(-0.5) * norm;
}

// With the inverse lengths, where they are wanted.
template <class T>
void pack_norms(const PackParams<T>& t) {
  constexpr idx W = Lanes<double>::W;
  for (idx i = t.row0; !t.r && i < t.row1; i++)
    store_norm(t, i, t.inner_product ? T(0) : squared_norm(t.D, t.x + i * t.row_stride));
  for (idx at = t.row0; t.r && at < t.row1; at += W) {
    const idx n = min_of(W, t.row1 - at);
    const Vec<double> squares =
        lane_sums<double>(n, [&](idx l) { return exact_squares(t.D, t.x + (at + l) * t.row_stride); });
    for (idx l = 0; l < n; l++) {
      const UnitRow<T> row = UnitRow<T>::of(squares[l]);
      t.r[at + l] = row.r;
      store_norm(t, at + l, row.squared_norm);
    }
  }
}

template <class T>
void pack(const PackParams<T>& t) {
  constexpr idx PW = kPanel<T>;
  pack_norms(t);
  for (idx i = t.row0; t.panels && i < t.row1; i++) {
    const T *x = t.x + i * t.row_stride, r = factor_of(t.r, i);
    for (idx f = 0; f * PW < t.D; f++) {
      T* out = t.panels + (f * t.rows + i) * PW;
      if ((f + 1) * PW <= t.D) {
        store_panel(out, r * load_panel(x + f * PW));
      } else {
        for (idx l = 0; l < PW; l++) out[l] = f * PW + l < t.D ? r * x[f * PW + l] : T(0);
      }
    }
  }
}

// out[d][l] = r[l] rows[l][d] of one panel, of which `n` rows exist, `stride` apart; the others are 0. r: null: 1.
template <class T>
CACR_INLINE void transpose_panel(idx n, idx D, const T* rows, idx stride, const T* r, T* out) {
  constexpr idx W = Lanes<T>::W, PW = kPanel<T>;
  alignas(64) T factor[PW] = {};
  for (idx l = 0; l < n; l++) factor[l] = factor_of(r, l);
  if (n < PW) zero(out, D * PW);
  for (idx l = 0; l < PW && l < n; l += W) {
    idx d = 0;
    for (; l + W <= n && d + W <= D; d += W) {
      Vec<T> v[W];
#pragma GCC unroll 16
      for (idx x = 0; x < W; x++) v[x] = load(rows + (l + x) * stride + d);
      transpose_lanes<T>(v);
#pragma GCC unroll 16
      for (idx x = 0; x < W; x++) store<T>(out + (d + x) * PW + l, load(factor + l) * v[x]);
    }
    for (idx x = l; x < min_of(n, l + W); x++)
      for (idx e = d; e < D; e++) out[e * PW + x] = factor[x] * rows[x * stride + e];
  }
}

}  // namespace cacr::CACR_ISA
