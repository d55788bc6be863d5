// Raw rows that count as unit vectors: r = 1 / max(|x|, 1e-12), unit rows r x, their gradients
// (cacr_kernels/reference.py, unit_rows).
#pragma once

#include "../../common/rows.h"
#include "gemm.h"
#include "params.h"

namespace cacr::CACR_ISA {

// |x|^2 in float64: an error of r moves a row along itself, which shows in costs of nearly equal rows.
CACR_INLINE double exact_squared_norm(idx D, const float* x) {
  typedef float Half __attribute__((vector_size(CACR_VECTOR_BYTES / 2), aligned(4), may_alias));
  constexpr idx W = Lanes<double>::W;
  Vec<double> s[4] = {};
  idx d = 0;
  for (; d + 4 * W <= D; d += 4 * W)
    for (int i = 0; i < 4; i++) {
      const Vec<double> v = __builtin_convertvector(*reinterpret_cast<const Half*>(x + d + i * W), Vec<double>);
      s[i] += v * v;
    }
  double sum = sum_lanes<double>((s[0] + s[1]) + (s[2] + s[3]));
  for (; d < D; d++) sum += double(x[d]) * double(x[d]);
  return sum;
}
CACR_INLINE double exact_squared_norm(idx D, const double* x) {
  idx d;
  double s = sum_lanes<double>(sum_of_squares<double>(D, d, [&](idx i) { return load(x + i); }));
  for (; d < D; d++) s += x[d] * x[d];
  return s;
}

// What a raw row is scaled by, and |r x|^2.
template <class T>
struct UnitRow {
  T r, squared_norm;

  CACR_INLINE UnitRow of(idx D, const T* x) {
    const double square = exact_squared_norm(D, x);
    const T r = inverse_length<T>(__builtin_sqrt(square));
    return {r, T(double(r) * double(r) * square)};
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
  for (idx i = t.row0; i < t.row1; i++) {
    const T *x = t.x + i * t.row_stride, r = t.r[i];
    T* const g = t.gradient + i * t.D;
    if (is_short(r)) {
      for (idx d = 0; d < t.D; d++) g[d] = 0;
      continue;
    }
    idx d;
    T along = sum_lanes<T>(sum_by_lanes<T>(t.D, d, [&](idx j) { return load(g + j) * (r * load(x + j)); }));
    for (; d < t.D; d++) along += g[d] * (r * x[d]);
    for (d = 0; d + W <= t.D; d += W) store<T>(g + d, r * (load(g + d) - along * (r * load(x + d))));
    for (; d < t.D; d++) g[d] = r * (g[d] - along * (r * x[d]));
  }
}

}  // namespace cacr::CACR_ISA
