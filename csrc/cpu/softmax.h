// Elementwise work on a tile S[key][kPanel]: row statistics on the way forward, dL/dS on the way back.
//
// A tile holds u_ij = q_i.k_j - |k_j|^2/2, so that c_ij = |q_i|^2 - 2 u_ij: the exponent of a softmax is one FMA,
// log2(e) tau c = slope u + offset_i. Queries stand in the lanes: every row sum is a lane sum.
#pragma once

#include "../common/problem.h"
#include "vec.h"

namespace cacr::CACR_ISA {

// Rows of a block for one softmax; every array has one entry per query.
template <class T>
struct RowState {
  T* shift;   // minus the maximum of slope * u so far (bounded: in the first tile)
  T* sum;     // sum e
  T* sum_u;   // sum e (u - pivot)
  T* pivot;   // a u that has weight
  T* offset;  // on the way back: w = factor 2^(slope u + offset)
  T* a;       // dL/du_ij = 2^(slope u + offset) (a_i + b_i (u_ij - mean_i))
  T* b;
  T* mean;    // sum w u
  T* moment;  // sum w (u - mean)^2 / factor
  T* factor;

  RowState from(idx i) const {
    return {shift + i, sum + i, sum_u + i, pivot + i, offset + i, a + i, b + i, mean + i, moment + i, factor + i};
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
// kBounded: the caller knows |log2(e) tau c| <= 64 for every pair, so that the shift found in one tile suffices.
template <class T, bool kBounded, bool kMasked>
CACR_NOINLINE void add_statistics(idx n, const T* S, T slope, const RowState<T>& r, int kind, const TileIds<T>& ids) {
  using V = Vec<T>;
  constexpr int W = Lanes<T>::W;
  Membership<T> member;
  if constexpr (kMasked) member = Membership<T>::make(ids, kind);
  IntVec<T> m0, m1;
  V shift0 = load(r.shift), shift1 = load(r.shift + W);
  V scale0 = splat<T>(1), scale1 = splat<T>(1);
  V pivot0 = load(r.pivot), pivot1 = load(r.pivot + W);
  if constexpr (!kBounded) {
    V top0 = -shift0, top1 = -shift1;
    for (idx j = 0; j < n; j++) {
      V z0 = slope * load(S + 2 * W * j), z1 = slope * load(S + 2 * W * j + W);
      if constexpr (kMasked) {
        member.masks(j, m0, m1);
        z0 = m0 ? z0 : top0, z1 = m1 ? z1 : top1;
      }
      top0 = max_vec<T>(top0, z0), top1 = max_vec<T>(top1, z1);
    }
    scale0 = exp2_flushed<T>(-shift0 - top0), scale1 = exp2_flushed<T>(-shift1 - top1);
    shift0 = -top0, shift1 = -top1;
    store<T>(r.shift, shift0), store<T>(r.shift + W, shift1);
    const T inverse = slope == 0 ? T(0) : 1 / slope;
    const Vec<T> none = splat<T>(-kHuge<T>);  // pivot only where a member was found: the product may overflow elsewhere
    pivot0 = ((load(r.sum) == T(0)) & (top0 > none)) ? inverse * top0 : pivot0;
    pivot1 = ((load(r.sum + W) == T(0)) & (top1 > none)) ? inverse * top1 : pivot1;
    store<T>(r.pivot, pivot0), store<T>(r.pivot + W, pivot1);
  }
  V e0{}, e1{}, eu0{}, eu1{};
#pragma GCC unroll 2
  for (idx j = 0; j < n; j++) {
    V u0 = load(S + 2 * W * j), u1 = load(S + 2 * W * j + W);
    V w0, w1;
    if constexpr (kBounded)
      w0 = exp2_in_range(slope * u0 + shift0), w1 = exp2_in_range(slope * u1 + shift1);
    else
      w0 = exp2_flushed<T>(slope * u0 + shift0), w1 = exp2_flushed<T>(slope * u1 + shift1);
    if constexpr (kMasked) {
      member.masks(j, m0, m1);
      w0 = select<T>(m0, w0), w1 = select<T>(m1, w1);
      u0 = m0 ? u0 : pivot0, u1 = m1 ? u1 : pivot1;
    }
    e0 += w0, e1 += w1, eu0 += w0 * (u0 - pivot0), eu1 += w1 * (u1 - pivot1);
  }
  store<T>(r.sum, load(r.sum) * scale0 + e0), store<T>(r.sum + W, load(r.sum + W) * scale1 + e1);
  store<T>(r.sum_u, load(r.sum_u) * scale0 + eu0), store<T>(r.sum_u + W, load(r.sum_u + W) * scale1 + eu1);
}

// H[j][:] = sum over softmaxes of 2^(slope u + offset) (a + b (u - mean));  columns[j][0:W] += both halves of H[j], if
// given. kMoment: the rows' moments are accumulated too (the gradient of tau needs them).
template <class T, int kSoftmaxes, bool kBounded, bool kMasked, bool kMoment>
CACR_NOINLINE void tile_gradient(idx n, const T* S, T* H, const T* slope, const RowState<T>* rows, const int32_t* kind,
                                 const TileIds<T>& ids, T* row_sum, T* columns) {
  using V = Vec<T>;
  constexpr int W = Lanes<T>::W;
  Membership<T> member[kSoftmaxes];
  V sum0{}, sum1{};
  V o0[kSoftmaxes], o1[kSoftmaxes], a0[kSoftmaxes], a1[kSoftmaxes], b0[kSoftmaxes], b1[kSoftmaxes];
  V mean0[kSoftmaxes], mean1[kSoftmaxes], moment0[kSoftmaxes], moment1[kSoftmaxes];
  for (int s = 0; s < kSoftmaxes; s++) {
    if constexpr (kMasked) member[s] = Membership<T>::make(ids, kind[s]);
    const RowState<T>& r = rows[s];
    o0[s] = load(r.offset), o1[s] = load(r.offset + W);
    a0[s] = load(r.a), a1[s] = load(r.a + W), b0[s] = load(r.b), b1[s] = load(r.b + W);
    mean0[s] = load(r.mean), mean1[s] = load(r.mean + W);
    if constexpr (kMoment) moment0[s] = load(r.moment), moment1[s] = load(r.moment + W);
  }
#pragma GCC unroll 2
  for (idx j = 0; j < n; j++) {
    const V u0 = load(S + 2 * W * j), u1 = load(S + 2 * W * j + W);
    V h0{}, h1{};
    for (int s = 0; s < kSoftmaxes; s++) {
      V w0, w1;
      if constexpr (kBounded)
        w0 = exp2_in_range(slope[s] * u0 + o0[s]), w1 = exp2_in_range(slope[s] * u1 + o1[s]);
      else
        w0 = exp2_flushed<T>(slope[s] * u0 + o0[s]), w1 = exp2_flushed<T>(slope[s] * u1 + o1[s]);
      const V d0 = u0 - mean0[s], d1 = u1 - mean1[s];
      V g0 = w0 * (a0[s] + b0[s] * d0), g1 = w1 * (a1[s] + b1[s] * d1);
      IntVec<T> m0, m1;
      if constexpr (kMasked) {
        member[s].masks(j, m0, m1);
        g0 = select<T>(m0, g0), g1 = select<T>(m1, g1);
      }
      h0 += g0, h1 += g1;
      if constexpr (kMoment) {
        V v0 = w0 * d0 * d0, v1 = w1 * d1 * d1;
        if constexpr (kMasked) v0 = select<T>(m0, v0), v1 = select<T>(m1, v1);
        moment0[s] += v0, moment1[s] += v1;
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

}  // namespace cacr::CACR_ISA
