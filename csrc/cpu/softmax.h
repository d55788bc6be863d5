// Elementwise work on a tile S[key][kPanel]: row statistics on the way forward, dL/dS on the way back.
//
// A tile holds u_ij = q_i.k_j - |k_j|^2/2, so that c_ij = |q_i|^2 - 2 u_ij: the exponent of a softmax is one FMA,
// log2(e) tau c = slope u + constant_i. Queries stand in the lanes: every row sum is a lane sum.
#pragma once

#include "../common/problem.h"
#include "vec.h"

namespace cacr::CACR_ISA {

// Rows of a block for one softmax; every array has one entry per query.
//
// Everything is measured from the key with the largest weight: its exponent is exactly 0 and no other is above it, and
// sums of differences from it lose nothing where one key has all the weight, however large tau or the norms are.
template <class T>
struct RowState {
  T* top;    // sign(slope) * u of the key with the largest exponent so far, -kHuge before any
  T* sum;    // sum e,  e_ij = 2^(slope (u_ij - u_top))
  T* sum_u;  // sum e (u - u_top)
  T* delta;  // sum w (u - u_top), on the way back
  T* a;      // dL/du_ij = e_ij (a_i + b_i (u_ij - u_top - delta_i)), the sum over both softmaxes where there are two
  T* b;
  T* moment;  // sum e (u - u_top - delta)^2
  T* factor;  // w = factor e
  T* ratio;   // of the second softmax: a_1 multiplies e_1 - ratio e_0, a_0 has what is left (see set_coefficients)

  RowState from(idx i) const {
    return {top + i, sum + i, sum_u + i, delta + i, a + i, b + i, moment + i, factor + i, ratio + i};
  }
};

template <class T>
struct TileIds {
  const int32_t* q_id;  // of the panel's first query, null where nothing is masked
  const int32_t* k_id;  // of the tile's first key
  idx q_row, k_row;     // their row numbers
};

// Lane masks of one key: which queries of the panel have it in their set.
template <class T>
struct Membership {
  using I = IntVec<T>;
  static constexpr int W = Lanes<T>::W;
  I id0, id1, row0, row1;
  const int32_t* k_id;
  idx k_row;
  typename Lanes<T>::Int flip, not_self, all;

  CACR_INLINE Membership make(const TileIds<T>& ids, int kind) {
    Membership m;
    for (int l = 0; l < W; l++) {
      m.id0[l] = ids.q_id[l], m.id1[l] = ids.q_id[W + l];
      m.row0[l] = typename Lanes<T>::Int(ids.q_row + l), m.row1[l] = typename Lanes<T>::Int(ids.q_row + W + l);
    }
    m.k_id = ids.k_id, m.k_row = ids.k_row;
    m.flip = kind == kOther ? -1 : 0;
    m.not_self = kind == kSameNotSelf ? -1 : 0;
    m.all = kind == kAll ? -1 : 0;
    return m;
  }
  inline __attribute__((always_inline)) void masks(idx j, I& m0, I& m1) const {
    using Int = typename Lanes<T>::Int;
    const I id = I{} + Int(k_id[j]), row = I{} + Int(k_row + j);
    m0 = (((id0 == id) ^ flip) & ~((row0 == row) & not_self)) | all;
    m1 = (((id1 == id) ^ flip) & ~((row1 == row) & not_self)) | all;
  }
};

// Adds keys [0, n) of a tile to the statistics of one panel of queries (r: at the panel's first row).
// kBounded: the caller knows |log2(e) tau c| <= 64 for every pair, so that no exponent leaves the range of 2^x.
template <class T, bool kBounded, bool kMasked>
CACR_NOINLINE void add_statistics(idx n, const T* S, T slope, const RowState<T>& r, int kind, const TileIds<T>& ids) {
  using V = Vec<T>;
  constexpr int W = Lanes<T>::W;
  Membership<T> member;
  if constexpr (kMasked) member = Membership<T>::make(ids, kind);
  IntVec<T> m0, m1;
  const T sign = slope < 0 ? T(-1) : T(1);
  const V old0 = load(r.top), old1 = load(r.top + W), none = splat<T>(-kHuge<T>);
  V top0 = old0, top1 = old1;
  for (idx j = 0; j < n; j++) {
    V z0 = sign * load(S + 2 * W * j), z1 = sign * load(S + 2 * W * j + W);
    if constexpr (kMasked) {
      member.masks(j, m0, m1);
      z0 = m0 ? z0 : none, z1 = m1 ? z1 : none;
    }
    top0 = max_vec<T>(top0, z0), top1 = max_vec<T>(top1, z1);
  }
  store<T>(r.top, top0), store<T>(r.top + W, top1);
  // how far the top has moved, 0 where there was none
  const V moved0 = old0 > none ? old0 - top0 : V{}, moved1 = old1 > none ? old1 - top1 : V{};
  const V scale0 = exp2_flushed<T>(sign * slope * moved0), scale1 = exp2_flushed<T>(sign * slope * moved1);
  const V u_top0 = sign * top0, u_top1 = sign * top1;
  V e0{}, e1{}, eu0{}, eu1{};
#pragma GCC unroll 2
  for (idx j = 0; j < n; j++) {
    V d0 = load(S + 2 * W * j) - u_top0, d1 = load(S + 2 * W * j + W) - u_top1, w0, w1;
    if constexpr (kBounded)
      w0 = exp2_in_range(slope * d0), w1 = exp2_in_range(slope * d1);
    else
      w0 = exp2_flushed<T>(slope * d0), w1 = exp2_flushed<T>(slope * d1);
    if constexpr (kMasked) {
      member.masks(j, m0, m1);
      w0 = select<T>(m0, w0), w1 = select<T>(m1, w1), d0 = select<T>(m0, d0), d1 = select<T>(m1, d1);
    }
    e0 += w0, e1 += w1, eu0 += w0 * d0, eu1 += w1 * d1;
  }
  const V sum0 = load(r.sum), sum1 = load(r.sum + W);
  store<T>(r.sum, sum0 * scale0 + e0), store<T>(r.sum + W, sum1 * scale1 + e1);
  store<T>(r.sum_u, load(r.sum_u) * scale0 + sum0 * scale0 * (sign * moved0) + eu0);
  store<T>(r.sum_u + W, load(r.sum_u + W) * scale1 + sum1 * scale1 * (sign * moved1) + eu1);
}

// H[j][:] = sum over softmaxes of e (a + b (u - u_top - delta));  row_sum[i] += sum_j H_ij;  columns[j][0:W] += both
// halves of H[j], if given. kMoment: the rows' moments are accumulated too (the gradient of tau needs them).
template <class T, int kSoftmaxes, bool kBounded, bool kMasked, bool kMoment>
CACR_NOINLINE void tile_gradient(idx n, const T* S, T* H, const T* slope, const RowState<T>* rows, const int32_t* kind,
                                 const TileIds<T>& ids, T* row_sum, T* columns) {
  using V = Vec<T>;
  constexpr int W = Lanes<T>::W;
  Membership<T> member[kSoftmaxes];
  V sum0{}, sum1{};
  V u_top0[kSoftmaxes], u_top1[kSoftmaxes], a0[kSoftmaxes], a1[kSoftmaxes], b0[kSoftmaxes], b1[kSoftmaxes];
  V delta0[kSoftmaxes], delta1[kSoftmaxes], moment0[kSoftmaxes], moment1[kSoftmaxes], ratio0{}, ratio1{};
  if constexpr (kSoftmaxes == 2) ratio0 = load(rows[1].ratio), ratio1 = load(rows[1].ratio + W);
  for (int s = 0; s < kSoftmaxes; s++) {
    if constexpr (kMasked) member[s] = Membership<T>::make(ids, kind[s]);
    const RowState<T>& r = rows[s];
    const T sign = slope[s] < 0 ? T(-1) : T(1);
    u_top0[s] = sign * load(r.top), u_top1[s] = sign * load(r.top + W);
    a0[s] = load(r.a), a1[s] = load(r.a + W), b0[s] = load(r.b), b1[s] = load(r.b + W);
    delta0[s] = load(r.delta), delta1[s] = load(r.delta + W);
    if constexpr (kMoment) moment0[s] = load(r.moment), moment1[s] = load(r.moment + W);
  }
#pragma GCC unroll 2
  for (idx j = 0; j < n; j++) {
    const V u0 = load(S + 2 * W * j), u1 = load(S + 2 * W * j + W);
    V h0{}, h1{}, first0{}, first1{};
    for (int s = 0; s < kSoftmaxes; s++) {
      V d0 = u0 - u_top0[s], d1 = u1 - u_top1[s], w0, w1;
      if constexpr (kBounded)
        w0 = exp2_in_range(slope[s] * d0), w1 = exp2_in_range(slope[s] * d1);
      else
        w0 = exp2_flushed<T>(slope[s] * d0), w1 = exp2_flushed<T>(slope[s] * d1);
      d0 -= delta0[s], d1 -= delta1[s];
      IntVec<T> m0, m1;
      if constexpr (kMasked) {
        member[s].masks(j, m0, m1);
        w0 = select<T>(m0, w0), w1 = select<T>(m1, w1);
        d0 = select<T>(m0, d0), d1 = select<T>(m1, d1);
      }
      if constexpr (kSoftmaxes == 1) {
        h0 = w0 * (a0[s] + b0[s] * d0), h1 = w1 * (a1[s] + b1[s] * d1);
      } else {
        const V x0 = s ? w0 - ratio0 * first0 : w0, x1 = s ? w1 - ratio1 * first1 : w1;
        h0 += a0[s] * x0 + b0[s] * (w0 * d0), h1 += a1[s] * x1 + b1[s] * (w1 * d1);
        first0 = w0, first1 = w1;
      }
      if constexpr (kMoment) {
        moment0[s] += w0 * d0 * d0, moment1[s] += w1 * d1 * d1;
      }
    }
    store<T>(H + 2 * W * j, h0), store<T>(H + 2 * W * j + W, h1);
    sum0 += h0, sum1 += h1;
    if (columns) store<T>(columns + W * j, load(columns + W * j) + (h0 + h1));
  }
  store<T>(row_sum, load(row_sum) + sum0), store<T>(row_sum + W, load(row_sum + W) + sum1);
  if constexpr (kMoment)
    for (int s = 0; s < kSoftmaxes; s++) store<T>(rows[s].moment, moment0[s]), store<T>(rows[s].moment + W, moment1[s]);
}

// As tile_gradient, where queries and keys are the same rows: H[j][i] = dL/du_ij + dL/du_ji, u_ji = u_ij + |k_j|^2/2 -
// |q_i|^2/2 (or u_ij where `shifted` says no). rows: in the lanes; keys: of the tile's first key. What each row
// receives as a key of others is added to row_sum (lanes) and columns; `total`: and what it gives as a query, too.
// `lanes`: how many rows of the panel exist; weights of the others would be anything. kMoment: moments of the rows are
// accumulated, and those of the keys, by lanes, in key_moments [softmaxes][moment_stride].
template <class T, int kSoftmaxes, bool kBounded, bool kMasked, bool kMoment>
CACR_NOINLINE void tile_gradient_symmetric(idx n, const T* S, T* H, const T* slope, const RowState<T>* rows,
                                           const RowState<T>* keys, const bool* shifted, const T* q_bias,
                                           const T* k_bias, const int32_t* kind, const TileIds<T>& ids, idx lanes,
                                           bool total, T* row_sum, T* columns, T* key_moments, idx moment_stride) {
  using V = Vec<T>;
  constexpr int W = Lanes<T>::W;
  Membership<T> member[kSoftmaxes];
  T sign[kSoftmaxes];
  for (int s = 0; s < kSoftmaxes; s++) {
    if constexpr (kMasked) member[s] = Membership<T>::make(ids, kind[s]);
    sign[s] = slope[s] < 0 ? T(-1) : T(1);
  }
  for (int half = 0; half < 2; half++) {
    const idx l = half * W;
    const V bias = load(q_bias + l);
    IntVec<T> exists;
    for (int x = 0; x < W; x++) exists[x] = -(l + x < lanes);
    V u_top[kSoftmaxes], a[kSoftmaxes], b[kSoftmaxes], delta[kSoftmaxes], moment[kSoftmaxes], ratio{}, sum{};
    if constexpr (kSoftmaxes == 2) ratio = load(rows[1].ratio + l);
    for (int s = 0; s < kSoftmaxes; s++) {
      const RowState<T>& r = rows[s];
      u_top[s] = sign[s] * load(r.top + l), a[s] = load(r.a + l), b[s] = load(r.b + l), delta[s] = load(r.delta + l);
      if constexpr (kMoment) moment[s] = load(r.moment + l);
    }
#pragma GCC unroll 2
    for (idx j = 0; j < n; j++) {
      const V u = load(S + 2 * W * j + l), other = u + (bias - k_bias[j]);
      V given{}, received{}, first{}, first_key{};
      for (int s = 0; s < kSoftmaxes; s++) {
        const RowState<T>& r = keys[s];
        V d = u - u_top[s], d_key = (shifted[s] ? other : u) - sign[s] * r.top[j], w, w_key;
        if constexpr (kBounded)
          w = exp2_in_range(slope[s] * d), w_key = exp2_in_range(slope[s] * d_key);
        else
          w = exp2_flushed<T>(slope[s] * d), w_key = exp2_flushed<T>(slope[s] * d_key);
        d -= delta[s], d_key -= r.delta[j];
        if constexpr (kMasked) {
          IntVec<T> m[2];
          member[s].masks(j, m[0], m[1]);
          w = select<T>(m[half], w), w_key = select<T>(m[half], w_key);
          d = select<T>(m[half], d), d_key = select<T>(m[half], d_key);
        }
        if constexpr (kMoment) {
          T* m = key_moments + s * moment_stride + W * j;
          moment[s] += w * d * d;
          store<T>(m, load(m) + select<T>(exists, w_key * d_key * d_key));
        }
        if constexpr (kSoftmaxes == 1) {
          given = w * (a[s] + b[s] * d), received = w_key * (r.a[j] + r.b[j] * d_key);
        } else {
          const V x = s ? w - ratio * first : w, x_key = s ? w_key - r.ratio[j] * first_key : w_key;
          given += a[s] * x + b[s] * (w * d), received += r.a[j] * x_key + r.b[j] * (w_key * d_key);
          first = w, first_key = w_key;
        }
      }
      received = select<T>(exists, received);
      const V h = given + received;
      store<T>(H + 2 * W * j + l, h);
      sum += total ? h : received;
      store<T>(columns + W * j, load(columns + W * j) + (total ? h : given));
    }
    store<T>(row_sum + l, load(row_sum + l) + sum);
    if constexpr (kMoment)
      for (int s = 0; s < kSoftmaxes; s++) store<T>(rows[s].moment + l, moment[s]);
  }
}

}  // namespace cacr::CACR_ISA
