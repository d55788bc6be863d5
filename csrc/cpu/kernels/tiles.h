// Elementwise work on a tile S[key][kPanel]: sums of the rows on the way forward, dL/dS on the way back.
//
// A tile holds u_ij = q_i.k_j - |k_j|^2/2, so that c_ij = |q_i|^2 - 2 u_ij: the exponent of a softmax is one FMA,
// log2(e) tau c = slope u + constant_i. Queries stand in the lanes: every row sum is a lane sum. The formulas are those
// of csrc/common/rows.h, which points to cacr_kernels/reference.py.
#pragma once

#include "../../common/rows.h"
#include "../api.h"
#include "vec.h"

namespace cacr::CACR_ISA {

// Rows of a block for one softmax; every array has one entry per query.
//
// Everything is measured from the key with the largest weight: its exponent is exactly 0 and no other is above it, and
// sums of differences from it lose nothing where one key has all the weight, however large tau or the norms are.
template <class T>
struct SoftmaxRows {
  T* top;    // sign(slope) u of the key with the largest exponent so far, -kHuge before any
  T* sum;    // sum_j e_j,  e_ij = 2^(slope d_ij),  d_ij = u_ij - u_top
  T* sum_d;  // sum_j e_j d_j
  T* delta;  // sum_j w_j d_j, on the way back
  T* a;      // dL/du_ij = e_ij (a_i + b_i (d_ij - delta_i)), the sum over both softmaxes where there are two
  T* b;
  T* moment;  // sum_j e_j (d_j - delta)^2
  T* factor;  // w = factor e
  T* ratio;   // of the second softmax: its a multiplies e_1 - ratio e_0 (csrc/common/rows.h, cancelling_coefficients)

  static constexpr int kArrays = 9;

  // memory: [kArrays][count]
  static SoftmaxRows of(T* memory, idx count) {
    auto array = [&](int i) { return memory + i * count; };
    return {array(0), array(1), array(2), array(3), array(4), array(5), array(6), array(7), array(8)};
  }
  SoftmaxRows from(idx i) const {
    return {top + i, sum + i, sum_d + i, delta + i, a + i, b + i, moment + i, factor + i, ratio + i};
  }
};

// ---- which queries of a panel have a key in their set ---------------------------------------------------------------
template <class T>
struct TileIds {
  const int32_t* q_id;    // [kPanel] of the panel's queries, null where nothing is masked
  const int32_t* k_id;    // of the tile's first key
  idx q_row, k_row;       // their row numbers
  const int32_t* q_self;  // [kPanel] the keys that are the queries; null: those with their row numbers
};

// kHoles: a kind may leave out rows with a negative id.
template <class T, bool kHoles = false>
struct Membership {
  using Int = typename Lanes<T>::Int;
  PanelMask<T> id, row, flip;  // of the queries
  const int32_t* k_id;
  int32_t least;  // rows with a smaller id are in no set
  idx k_row;
  MembershipTest<Int> test;

  CACR_INLINE Membership make(const TileIds<T>& ids, int kind) {
    constexpr int W = Lanes<T>::W;
    Membership m;
    m.k_id = ids.k_id, m.k_row = ids.k_row;
    m.least = kind == kOtherNotSelf ? 0 : INT32_MIN;
    m.test = MembershipTest<Int>::of(kind);
    for (int h = 0; h < 2; h++)
      for (int l = 0; l < W; l++) {
        const idx i = h * W + l;
        m.id.v[h][l] = ids.q_id[i], m.row.v[h][l] = ids.q_self ? Int(ids.q_self[i]) : Int(ids.q_row + i);
        if constexpr (kHoles) m.flip.v[h][l] = ids.q_id[i] < m.least ? 0 : m.test.flip;
      }
    return m;
  }

  inline __attribute__((always_inline)) PanelMask<T> of_key(idx j) const {
    const IntVec<T> key = IntVec<T>{} + Int(k_id[j]), key_row = IntVec<T>{} + Int(k_row + j);
    if constexpr (kHoles) {
      if (k_id[j] < least) return {};
      return {{test.template members<IntVec<T>>(id.v[0] == key, row.v[0] == key_row, flip.v[0]),
               test.template members<IntVec<T>>(id.v[1] == key, row.v[1] == key_row, flip.v[1])}};
    }
    return {{test.template members<IntVec<T>>(id.v[0] == key, row.v[0] == key_row),
             test.template members<IntVec<T>>(id.v[1] == key, row.v[1] == key_row)}};
  }
};

// Which keys of a tile a function is about: the first n, or the n of `order`.
struct TileKeys {
  idx n;
  const int32_t* order;  // null: 0, 1, ...

  idx operator[](idx x) const { return order ? order[x] : x; }
};

// ---- forward --------------------------------------------------------------------------------------------------------
// How far the top of a panel has moved, as u_before - u_now, and what that makes of the weights so far.
template <class T>
struct MovedTop {
  Panel<T> u_top, moved, scale;
};

template <class T>
CACR_INLINE MovedTop<T> move_top(T slope, Panel<T> before, Panel<T> now) {
  const T sign = slope < 0 ? T(-1) : T(1);
  const Panel<T> moved = choose(before > splat_panel(-kHuge<T>), before - now, Panel<T>{});
  return {sign * now,
          sign * moved,
          {{exp2_flushed<T>(sign * slope * moved.v[0]), exp2_flushed<T>(sign * slope * moved.v[1])}}};
}

// Adds keys of a tile to the sums of one panel of queries (r: at the panel's first row).
// kBounded: the caller knows |log2(e) tau c| <= 64 for every pair, so that no exponent leaves the range of 2^x.
template <class T, bool kBounded, bool kMasked, bool kHoles>
CACR_NOINLINE void add_statistics(TileKeys keys, const T* S, T slope, const SoftmaxRows<T>& r, int kind,
                                  const TileIds<T>& ids) {
  constexpr idx PW = kPanel<T>;
  Membership<T, kHoles> member;
  if constexpr (kMasked) member = Membership<T, kHoles>::make(ids, kind);
  const T sign = slope < 0 ? T(-1) : T(1);
  const Panel<T> before = load_panel(r.top), none = splat_panel(-kHuge<T>);
  Panel<T> top = before;
  for (idx x = 0; x < keys.n; x++) {
    const idx j = keys[x];
    Panel<T> z = sign * load_panel(S + PW * j);
    if constexpr (kMasked) z = choose(member.of_key(j), z, none);
    top = max_vec(top, z);
  }
  store_panel(r.top, top);
  const MovedTop<T> m = move_top(slope, before, top);
  Panel<T> e{}, ed{};
#pragma GCC unroll 2
  for (idx x = 0; x < keys.n; x++) {
    const idx j = keys[x];
    Panel<T> d = load_panel(S + PW * j) - m.u_top, w = exp2_panel<kBounded>(slope * d);
    if constexpr (kMasked) {
      const PanelMask<T> mask = member.of_key(j);
      w = select(mask, w), d = select(mask, d);
    }
    e += w, ed += w * d;
  }
  const Panel<T> sum = load_panel(r.sum);
  store_panel(r.sum, sum * m.scale + e);
  const Panel<T> shrunk = load_panel(r.sum_d) * m.scale;
  store_panel(r.sum_d, shrunk + sum * m.scale * m.moved + ed);
}

// ---- backward -------------------------------------------------------------------------------------------------------
// One panel of queries against keys of a tile.
template <class T>
struct GradientTile {
  TileKeys keys;
  const T* S;  // [keys][PW]
  T* H;        // [keys][PW] dL/du
  T slope[kMaxSoftmaxes];
  int32_t kind[kMaxSoftmaxes];
  SoftmaxRows<T> rows[kMaxSoftmaxes];  // at the panel's first row
  TileIds<T> ids;
  T* row_sum;  // [PW] sum_j H_ij is added to it
  T* columns;  // [keys][W] both halves of H[j] are added to it, if given
};

// What the tile functions keep in registers of a panel's rows in one softmax.
template <class T>
struct GradientRows {
  Panel<T> u_top, a, b, delta;

  CACR_INLINE GradientRows make(const SoftmaxRows<T>& r, T slope) {
    const T sign = slope < 0 ? T(-1) : T(1);
    return {sign * load_panel(r.top), load_panel(r.a), load_panel(r.b), load_panel(r.delta)};
  }
};

// H[j][:] = dL/du of key j, summed over the softmaxes. kMoment: the rows' moments are accumulated too (the gradient of
// tau needs them).
template <class T, int kSoftmaxes, bool kBounded, bool kMasked, bool kMoment, bool kHoles>
CACR_NOINLINE void tile_gradient(const GradientTile<T>& tile) {
  constexpr idx PW = kPanel<T>, W = Lanes<T>::W;
  const TileKeys keys = tile.keys;
  const T* const S = tile.S;
  T *const H = tile.H, *const columns = tile.columns;
  Membership<T, kHoles> member[kSoftmaxes];
  GradientRows<T> row[kSoftmaxes];
  Panel<T> moment[kSoftmaxes], ratio{}, sum{};
  T slope[kSoftmaxes];
  if constexpr (kSoftmaxes == 2) ratio = load_panel(tile.rows[1].ratio);
  for (int s = 0; s < kSoftmaxes; s++) {
    slope[s] = tile.slope[s];
    if constexpr (kMasked) member[s] = Membership<T, kHoles>::make(tile.ids, tile.kind[s]);
    row[s] = GradientRows<T>::make(tile.rows[s], slope[s]);
    if constexpr (kMoment) moment[s] = load_panel(tile.rows[s].moment);
  }
#pragma GCC unroll 2
  for (idx x = 0; x < keys.n; x++) {
    const idx j = keys[x];
    const Panel<T> u = load_panel(S + PW * j);
    Panel<T> h{}, first{};
    for (int s = 0; s < kSoftmaxes; s++) {
      Panel<T> d = u - row[s].u_top, w = exp2_panel<kBounded>(slope[s] * d);
      d -= row[s].delta;
      if constexpr (kMasked) {
        const PanelMask<T> mask = member[s].of_key(j);
        w = select(mask, w), d = select(mask, d);
      }
      if constexpr (kSoftmaxes == 1) {
        h = key_gradient(w, d, row[s].a, row[s].b);
      } else {
        h += key_gradient(w, s ? ratio * first : Panel<T>{}, d, row[s].a, row[s].b);
        first = w;
      }
      if constexpr (kMoment) moment[s] += w * d * d;
    }
    store_panel(H + PW * j, h);
    sum += h;
    if (columns) store<T>(columns + W * j, load(columns + W * j) + (h.v[0] + h.v[1]));
  }
  store_panel(tile.row_sum, load_panel(tile.row_sum) + sum);
  if constexpr (kMoment)
    for (int s = 0; s < kSoftmaxes; s++) store_panel(tile.rows[s].moment, moment[s]);
}

// The same where queries and keys are the same rows: H[j][i] = dL/du_ij + dL/du_ji, where u_ji = u_ij + |k_j|^2/2 -
// |q_i|^2/2 (or u_ij where `shifted` says no). What each row receives as a key of others is added to the row sums
// (lanes) and columns; `total`: and what it gives as a query, too. All rows of the panel exist: the last one, where
// some may not, has no keys to the right of its square.
template <class T>
struct SymmetricTile {
  GradientTile<T> tile;
  SoftmaxRows<T> keys[kMaxSoftmaxes];  // of the tile's first key
  bool shifted[kMaxSoftmaxes];
  const T* q_bias;  // [PW] -|q|^2/2
  const T* k_bias;  // [keys] -|k|^2/2
  bool total;
  T* key_moments;  // [softmaxes][keys][W], moment_stride apart: the keys' moments, by lanes
  idx moment_stride;
};

template <class T, int kSoftmaxes, bool kBounded, bool kMasked, bool kMoment, bool kHoles>
CACR_NOINLINE void tile_gradient_symmetric(const SymmetricTile<T>& symmetric) {
  using V = Vec<T>;
  constexpr idx PW = kPanel<T>, W = Lanes<T>::W;
  const GradientTile<T>& tile = symmetric.tile;
  const TileKeys those = tile.keys;
  const idx moment_stride = symmetric.moment_stride;
  const T *const S = tile.S, *const k_bias = symmetric.k_bias;
  T *const H = tile.H, *const columns = tile.columns, *const key_moments = symmetric.key_moments;
  const bool total = symmetric.total;
  Membership<T, kHoles> member[kSoftmaxes];
  SoftmaxRows<T> keys[kSoftmaxes];
  T slope[kSoftmaxes], sign[kSoftmaxes];
  bool shifted[kSoftmaxes];
  for (int s = 0; s < kSoftmaxes; s++) {
    if constexpr (kMasked) member[s] = Membership<T, kHoles>::make(tile.ids, tile.kind[s]);
    keys[s] = symmetric.keys[s], shifted[s] = symmetric.shifted[s];
    slope[s] = tile.slope[s], sign[s] = slope[s] < 0 ? T(-1) : T(1);
  }
  for (int half = 0; half < 2; half++) {  // one after the other: rows and keys of both would not fit the registers
    const idx l = half * W;
    const V bias = load(symmetric.q_bias + l);
    V u_top[kSoftmaxes], a[kSoftmaxes], b[kSoftmaxes], delta[kSoftmaxes], moment[kSoftmaxes], ratio{}, sum{};
    if constexpr (kSoftmaxes == 2) ratio = load(tile.rows[1].ratio + l);
    for (int s = 0; s < kSoftmaxes; s++) {
      const SoftmaxRows<T>& r = tile.rows[s];
      u_top[s] = sign[s] * load(r.top + l), a[s] = load(r.a + l), b[s] = load(r.b + l), delta[s] = load(r.delta + l);
      if constexpr (kMoment) moment[s] = load(r.moment + l);
    }
#pragma GCC unroll 2
    for (idx x = 0; x < those.n; x++) {
      const idx j = those[x];
      const V u = load(S + PW * j + l), other = u + (bias - k_bias[j]);
      V given{}, received{}, first{}, first_key{};
      for (int s = 0; s < kSoftmaxes; s++) {
        const SoftmaxRows<T>& r = keys[s];
        V d = u - u_top[s], d_key = (shifted[s] ? other : u) - sign[s] * r.top[j], w, w_key;
        if constexpr (kBounded)
          w = exp2_in_range(slope[s] * d), w_key = exp2_in_range(slope[s] * d_key);
        else
          w = exp2_flushed<T>(slope[s] * d), w_key = exp2_flushed<T>(slope[s] * d_key);
        d -= delta[s], d_key -= r.delta[j];
        if constexpr (kMasked) {
          const IntVec<T> mask = member[s].of_key(j).v[half];
          w = select<T>(mask, w), w_key = select<T>(mask, w_key);
          d = select<T>(mask, d), d_key = select<T>(mask, d_key);
        }
        if constexpr (kMoment) {
          T* m = key_moments + s * moment_stride + W * j;
          moment[s] += w * d * d;
          store<T>(m, load(m) + w_key * d_key * d_key);
        }
        if constexpr (kSoftmaxes == 1) {
          given = key_gradient(w, d, a[s], b[s]), received = key_gradient(w_key, d_key, r.a[j], r.b[j]);
        } else {
          given += key_gradient(w, s ? ratio * first : V{}, d, a[s], b[s]);
          received += key_gradient(w_key, s ? r.ratio[j] * first_key : V{}, d_key, r.a[j], r.b[j]);
          first = w, first_key = w_key;
        }
      }
      const V h = given + received;
      store<T>(H + PW * j + l, h);
      sum += total ? h : received;
      if (columns) store<T>(columns + W * j, load(columns + W * j) + (total ? h : given));
    }
    store<T>(tile.row_sum + l, load(tile.row_sum + l) + sum);
    if constexpr (kMoment)
      for (int s = 0; s < kSoftmaxes; s++) store<T>(tile.rows[s].moment + l, moment[s]);
  }
}

}  // namespace cacr::CACR_ISA
