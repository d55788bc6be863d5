// Raw rows that count as unit vectors: r = 1 / max(|x|, 1e-12), unit rows r x, their gradients
// (cacr_kernels/reference.py, unit_rows).
#pragma once

#include "../../common/rows.h"
#include "gemm.h"
#include "params.h"

namespace cacr::CACR_ISA {

template <class T>
CACR_INLINE void zero(T* p, idx n) {
  __builtin_memset(static_cast<void*>(p), 0, size_t(n) * sizeof(T));
}

// Sums over the lanes of row(0), ..., row(n - 1), one in each lane, n <= W.
template <class T, class Row>
CACR_INLINE Vec<T> lane_sums(idx n, Row row) {
  constexpr idx W = Lanes<T>::W;
  Vec<T> v[W] = {};
  for (idx l = 0; l < n; l++) v[l] = row(l);
  transpose_lanes<T>(v);
  Vec<T> sum = v[0];
  for (idx l = 1; l < W; l++) sum += v[l];
  return sum;
}

// |x|^2 by lanes of float64, with four numbers of float32 in a chain at most: an error of r moves a row along itself,
// which shows in costs of nearly equal rows.
CACR_INLINE Vec<double> exact_squares(idx D, const float* x) {
  typedef float Half __attribute__((vector_size(CACR_VECTOR_BYTES / 2), may_alias));
  constexpr idx W = Lanes<float>::W, kVectors = 16;
  Vec<double> sum{};
  idx d = 0;
  while (d + W <= D) {
    const idx end = min_of(D, d + kVectors * W);
    Vec<float> s[4] = {};
    for (; d + 4 * W <= end; d += 4 * W)
      for (int i = 0; i < 4; i++) s[i] += load(x + d + i * W) * load(x + d + i * W);
    for (int i = 0; d + W <= end; d += W, i++) s[i] += load(x + d) * load(x + d);
    alignas(64) float part[W];
    store<float>(part, (s[0] + s[1]) + (s[2] + s[3]));
    sum += __builtin_convertvector(*reinterpret_cast<const Half*>(part), Vec<double>) +
           __builtin_convertvector(*reinterpret_cast<const Half*>(part + W / 2), Vec<double>);
  }
  for (; d < D; d++) sum[d % Lanes<double>::W] += double(x[d]) * double(x[d]);
  return sum;
}
CACR_INLINE Vec<double> exact_squares(idx D, const double* x) {
  idx d;
  Vec<double> s = sum_of_squares<double>(D, d, [&](idx i) { return load(x + i); });
  for (; d < D; d++) s[d % Lanes<double>::W] += x[d] * x[d];
  return s;
}

// What a raw row is scaled by, and |r x|^2.
template <class T>
struct UnitRow {
  T r, squared_norm;

  CACR_INLINE UnitRow of(double square) {
    const T r = inverse_length<T>(__builtin_sqrt(square));
    return {r, T(double(r) * double(r) * square)};
  }
  CACR_INLINE UnitRow of(idx D, const T* x) {
    return of(lane_sums<double>(1, [&](idx) { return exact_squares(D, x); })[0]);
  }
};

// Of row i; no inverse lengths: the rows are taken as they are.
template <class T>
CACR_INLINE T factor_of(const T* r, idx i) {
  return r ? r[i] : T(1);
}

// Two rows, of which kRaw says whether they are to be scaled.
template <class T, bool kRaw>
struct RowPair {
  const T *x, *y;
  T x_r, y_r;

  // r_x x - r_y y, where nearly equal rows lose no digits to the rounding of the products (Kahan's difference of two
  // products).
  template <class V>
  CACR_INLINE V difference(V x, V x_r, V y, V y_r) {
    if constexpr (!kRaw) return x - y;
    const V product = y_r * y;
    return fused(x_r, x, -product) + fused(-y_r, y, product);
  }
  // Of W features from d on, or of one.
  inline __attribute__((always_inline)) Vec<T> at(idx d) const {
    return difference<Vec<T>>(load(x + d), splat<T>(x_r), load(y + d), splat<T>(y_r));
  }
  inline __attribute__((always_inline)) T one(idx d) const { return difference<T>(x[d], x_r, y[d], y_r); }

  // The squares of the difference, added up by lanes.
  Vec<T> squares(idx D) const {
    idx d;
    Vec<T> sum = sum_of_squares<T>(D, d, [&](idx i) __attribute__((always_inline)) { return at(i); });
    for (; d < D; d++) sum[d % Lanes<T>::W] += one(d) * one(d);
    return sum;
  }

  // The square of the distance, for positives: the product form cancels where they are close.
  T squared_distance(idx D) const {
    idx d;
    T s = sum_lanes<T>(sum_of_squares<T>(D, d, [&](idx i) __attribute__((always_inline)) { return at(i); }));
    for (; d < D; d++) s += one(d) * one(d);
    return s;
  }
};

// In place, what flows to unit rows x^ = r x as what flows to the raw rows: r (g - (g.x^) x^), nothing to rows that are
// too short to have a direction.
template <class T>
void to_raw_rows(const RawGradientParams<T>& t) {
  constexpr idx W = Lanes<T>::W;
  for (idx at = t.row0; at < t.row1; at += W) {
    const idx n = min_of(W, t.row1 - at);
    const Vec<T> along = lane_sums<T>(n, [&](idx l) {
      const T *x = t.x + (at + l) * t.row_stride, *g = t.gradient + (at + l) * t.D, r = t.r[at + l];
      idx d;
      Vec<T> sum = sum_by_lanes<T>(t.D, d, [&](idx j) { return load(g + j) * (r * load(x + j)); });
      for (; d < t.D; d++) sum[d % W] += g[d] * (r * x[d]);
      return sum;
    });
    for (idx l = 0; l < n; l++) {
      const T *x = t.x + (at + l) * t.row_stride, r = t.r[at + l], a = along[l];
      T* const g = t.gradient + (at + l) * t.D;
      idx d = is_short(r) ? t.D : 0;
      if (d > 0) zero(g, d);
      for (; d + W <= t.D; d += W) store<T>(g + d, r * (load(g + d) - a * (r * load(x + d))));
      for (; d < t.D; d++) g[d] = r * (g[d] - a * (r * x[d]));
    }
  }
}

}  // namespace cacr::CACR_ISA
