// Keys without a gradient: statistics and all that the gradient of a query is made of from one sweep over the keys.
//
// With weights e_j = 2^(slope d_j), d_j = u_j - u_top, measured from the top key so far (csrc/common/rows.h, which
// points to cacr_kernels/reference.py), a row adds up
//
//   sum e,  sum e d,  sum e d^2,  sum e k_j,  sum e d k_j
//
// tile by tile, and all of them are rescaled when a tile moves the top. One panel of queries meets one tile of keys at
// a time: its similarities, weights and gradients stay in the first-level cache, and nothing of size rows x M exists.
// 2 U floating-point operations (U = 2 N M D), 3 U where the weights are differentiated.
#pragma once

#include "products_bf16.h"
#include "weigh_tile.h"

namespace cacr::CACR_ISA {

// ---- what is given, and where it works ------------------------------------------------------------------------------
template <class T>
struct DetachedSetup {
  const DetachedKeysParams<T>& t;
  const Contrast<T>& p;
  idx Dp, per_pair;  // D rounded up to panels; panels of a pair
  T slope;
  bool bf16;  // products_bf16.h, where rows are in their range

  explicit DetachedSetup(const DetachedKeysParams<T>& params)
      : t(params),
        p(*params.problem),
        Dp(padded<T>(p.D)),
        per_pair(padded<T>(p.N) / kPanel<T>),
        slope(T(-2 * p.tau[0] * kLog2e)),
        bf16(kBf16Tiles<T> && t.bf16) {}

  double sign() const { return slope < 0 ? -1 : 1; }
  const T* query_row(idx pair, idx i) const { return p.q + p.q_index[pair] * p.q_view_stride + i * p.q_row_stride; }
};

// The sums of one panel of queries, contiguous. Sums over rows are float64: many tiles are added up.
template <class T>
struct PanelState {
  T* top;          // [PW] sign(slope) u_top, -kHuge before any
  double* sum;     // [PW] sum e
  double* sum_d;   // [PW] sum e d
  double* sum_dd;  // [PW] sum e d^2
  double* used;    // [PW] sum e of the mean
  double* used_d;  // [PW] sum e d of the spread
  T* mean;         // [Dp/PW][PW][PW] sum e k; while a block is at work on tiles of bfloat16, [Dp][PW]
  T* spread;       // likewise sum e d k

  static PanelState layout(const DetachedKeysParams<T>& t, char*& at) {
    constexpr idx PW = kPanel<T>;
    const idx Dp = padded<T>(t.problem->D);
    PanelState s;
    s.top = carve<T>(at, PW);
    s.sum = carve<double>(at, PW), s.sum_d = carve<double>(at, PW), s.sum_dd = carve<double>(at, PW);
    s.used = carve<double>(at, PW), s.used_d = carve<double>(at, PW);
    s.mean = carve<T>(at, t.want_mean ? PW * Dp : 0);
    s.spread = carve<T>(at, t.want_mean && t.want_moments ? PW * Dp : 0);
    return s;
  }
  static size_t bytes(const DetachedKeysParams<T>& t) {
    return bytes_of([&](char*& at) { layout(t, at); });
  }
};

template <class T>
struct DetachedPanel {
  idx pair, row0, rows;  // rows: those that exist
  int32_t low_id, high_id;
  bool in_range;        // of products of bfloat16
  Bf16* feature_pairs;  // [Dp/2][PW][2] their operand
  T* r;                 // [PW] and inverse lengths
  T* columns;           // [D][PW] the queries transposed
  int32_t* id;          // [PW]
  PanelState<T> state;
};

template <class T>
struct DetachedScratch {
  DetachedPanel<T>* panels;  // [panels] of the block at hand
  T* S;                      // [keys][PW] similarities, then weights
  T* ED;                     // [keys][PW] weights times d
  T* bias;                   // [keys]
  T* k_r;                    // [keys] inverse lengths, where rows are raw
  T* k_panels;               // [Dp/PW][keys][PW]
  T* columns;                // [panels][D][PW]
  int32_t* ids;              // [panels][PW]
  Bf16 *k_rows, *k_columns;  // [keys][row stride], [keys/32][Dp][32]
  Bf16 *e_pairs, *ed_pairs;  // [keys/2][PW][2]
  Bf16* feature_pairs;       // [panels][Dp/2][PW][2]
  T* q_r;                    // [panels][PW]
  char* states;              // [panels], where the keys are not shared out

  static DetachedScratch layout(const DetachedKeysParams<T>& t, char*& at) {
    constexpr idx PW = kPanel<T>;
    const idx D = t.problem->D, K = t.blocking.keys, n = t.blocking.rows / PW;
    DetachedScratch s;
    s.panels = carve<DetachedPanel<T>>(at, n);
    s.S = carve<T>(at, K * PW), s.ED = carve<T>(at, t.want_moments ? K * PW : 0);
    s.bias = carve<T>(at, K), s.k_r = carve<T>(at, t.problem->normalize ? K : 0),
    s.k_panels = carve<T>(at, t.want_mean ? K * padded<T>(D) : 0);
    s.columns = carve<T>(at, n * PW * D), s.ids = carve<int32_t>(at, n * PW);
    const bool bf16 = kBf16Tiles<T> && t.bf16;
    const auto some = [&](idx count) { return carve<Bf16>(at, bf16 ? count : 0); };
    s.k_rows = some(K * bf16_stride(D)), s.k_columns = some(t.want_mean ? K * tiled(D) : 0);
    s.e_pairs = some(t.want_mean ? K * PW : 0), s.ed_pairs = some(t.want_mean && t.want_moments ? K * PW : 0);
    s.feature_pairs = some(n * PW * tiled(D)), s.q_r = carve<T>(at, bf16 ? n * PW : 0);
    s.states = carve<char>(at, t.states ? 0 : n * idx(PanelState<T>::bytes(t)));
    return s;
  }
};

// ---- the sweep ------------------------------------------------------------------------------------------------------
// Does an instruction that takes subnormal numbers for 0 see such a row as it is? Of its |x|^2, or of its inverse
// length where rows count as unit vectors. False for NaN.
template <class T>
CACR_INLINE bool in_bf16_range(T x, bool is_length) {
  return (x >= (is_length ? T(0x1p-50) : T(0x1p-80)) && x <= T(0x1p80)) || (x == 0 && !is_length);
}

// r: [PW] inverse lengths, where rows are raw.
template <class T>
void start_panel_bf16(const DetachedSetup<T>& g, const DetachedScratch<T>& s, idx i, DetachedPanel<T>& panel,
                      const T* r) {
  const Contrast<T>& p = g.p;
  const T* const q = g.query_row(panel.pair, panel.row0);
  panel.feature_pairs = s.feature_pairs + i * kTile * tiled(p.D), panel.r = s.q_r + i * kTile;
  pack_feature_pairs(panel.rows, p.D, q, p.q_row_stride, panel.feature_pairs);
  panel.in_range = true;
  for (idx l = 0; l < kTile; l++) {
    panel.r[l] = r[l];
    if (l < panel.rows)
      panel.in_range &= in_bf16_range(p.normalize ? r[l] : squared_norm(p.D, q + l * p.q_row_stride), p.normalize);
  }
}

// Keys of a tile, whose inverse lengths or biases are known; are they in range?
template <class T>
bool pack_tile_bf16(const DetachedSetup<T>& g, const DetachedScratch<T>& s, const T* k, idx n) {
  const Contrast<T>& p = g.p;
  const T* const x = p.normalize ? s.k_r : s.bias;
  for (idx j = 0; j < n; j++)
    if (!in_bf16_range(p.normalize ? x[j] : -2 * x[j], p.normalize)) return false;
  pack_bf16(
      {k, p.k_row_stride, p.D, n, 0, tiled(n), s.k_rows, g.t.want_mean ? s.k_columns : nullptr, bf16_stride(p.D)});
  return true;
}

// Panel i of the block: queries of a unit, with empty sums.
template <class T>
DetachedPanel<T> start_panel(const DetachedSetup<T>& g, const DetachedScratch<T>& s, idx i, idx unit) {
  constexpr idx PW = kPanel<T>;
  const Contrast<T>& p = g.p;
  DetachedPanel<T> panel{};
  panel.pair = unit / g.per_pair, panel.row0 = (unit - panel.pair * g.per_pair) * PW;
  panel.rows = min_of(PW, p.N - panel.row0);
  panel.columns = s.columns + i * p.D * PW;
  T r[PW] = {};
  for (idx l = 0; p.normalize && l < panel.rows; l++)
    r[l] = UnitRow<T>::of(p.D, g.query_row(panel.pair, panel.row0 + l)).r;
  transpose_panel(panel.rows, p.D, g.query_row(panel.pair, panel.row0), p.q_row_stride, p.normalize ? r : nullptr,
                  panel.columns);
  if constexpr (kBf16Tiles<T>)
    if (g.bf16) start_panel_bf16(g, s, i, panel, r);
  panel.id = s.ids + i * PW;
  for (idx l = 0; l < PW && p.q_id; l++) {  // lanes without a query repeat the last one
    const int32_t id = panel.id[l] = p.q_id[panel.row0 + min_of(l, panel.rows - 1)];
    panel.low_id = l ? min_of(panel.low_id, id) : id, panel.high_id = l ? max_of(panel.high_id, id) : id;
  }
  const idx bytes = idx(PanelState<T>::bytes(g.t));
  char* at = g.t.states ? g.t.states + (g.t.part * g.t.units + unit) * bytes : s.states + i * bytes;
  zero(at, bytes);
  panel.state = PanelState<T>::layout(g.t, at);
  for (idx l = 0; l < PW; l++) panel.state.top[l] = -kHuge<T>;
  return panel;
}

// Into the second-level cache: rows [from, to) of the keys.
template <class T>
void prefetch_rows(const Contrast<T>& p, const T* k, idx from, idx to) {
  for (idx j = from; j < to; j++)
    for (idx d = 0; d < p.D; d += 64 / idx(sizeof(T))) __builtin_prefetch(k + j * p.k_row_stride + d, 0, 2);
}

// A mask is needed where a key may have the id of a query.
template <class T>
bool needs_mask(const Contrast<T>& p, const DetachedPanel<T>& panel, idx j0, idx n) {
  if (!p.q_id) return false;
  int32_t found = 0;
  for (idx j = j0; j < j0 + n; j++) found |= (p.k_id[j] >= panel.low_id) & (p.k_id[j] <= panel.high_id);
  return found != 0;
}

template <class T>
void move_means(const DetachedSetup<T>& g, const PanelState<T>& state, const TileSums<T>& sums, bool tiles) {
  constexpr idx PW = kPanel<T>;
  const Panel<T> scale = load_panel(sums.scale), moved = load_panel(sums.moved);
  for (idx f = 0; f < g.Dp && tiles; f++) {
    T *mean = state.mean + f * PW, *spread = state.spread + f * PW;
    const Panel<T> m = load_panel(mean) * scale;
    if (g.t.want_moments) store_panel(spread, load_panel(spread) * scale + moved * m);
    store_panel(mean, m);
  }
  if (tiles) return;
  for (idx f = 0; f < g.Dp; f += PW)
    for (idx l = 0; l < PW; l++) {
      T *mean = state.mean + (f + l) * PW, *spread = state.spread + (f + l) * PW;
      for (idx d = 0; g.t.want_moments && d < PW; d++)
        spread[d] = spread[d] * sums.scale[l] + sums.moved[l] * (mean[d] * sums.scale[l]);
      for (idx d = 0; d < PW; d++) mean[d] *= sums.scale[l];
    }
}

// With m = old - new top, d = d_old + m for older keys: their sums move, and shrink.
template <class T>
void add_sums(const DetachedSetup<T>& g, const PanelState<T>& state, const TileSums<T>& sums, bool tiles) {
  if (sums.any_moved && g.t.want_mean) move_means(g, state, sums, tiles);
  for (idx l = 0; l < kPanel<T>; l++) {
    const double m = sums.moved[l], scale = sums.scale[l], e = state.sum[l], ed = state.sum_d[l];
    state.sum[l] = e * scale + double(sums.e[l]);
    state.sum_d[l] = (ed + m * e) * scale + double(sums.ed[l]);
    const double used = state.used[l], used_d = state.used_d[l];
    state.used[l] = used * scale + double(sums.used[l]);
    state.used_d[l] = (used_d + m * used) * scale + double(sums.used_d[l]);
    state.sum_dd[l] = (state.sum_dd[l] + m * (2 * ed + m * e)) * scale + double(sums.edd[l]);
  }
}

// One panel of queries and one tile of keys: k: row j0 of the keys at hand. tiles: by products of bfloat16, for which
// the thread is set up.
template <class T>
void meet_tile(const DetachedSetup<T>& g, const DetachedScratch<T>& s, const DetachedPanel<T>& panel, const T* k,
               idx j0, idx n, bool tiles) {
  constexpr idx PW = kPanel<T>;
  const Contrast<T>& p = g.p;
  const KeyTerms<T> terms{p.normalize ? s.k_r : nullptr, s.bias};
  if constexpr (kBf16Tiles<T>)
    if (tiles) {
      similarity_tiles(n, p.D, s.k_rows, bf16_stride(p.D), panel.feature_pairs, p.normalize ? panel.r : nullptr, terms,
                       s.S);
    }
  if (!tiles) similarity<T>(n, p.D, k, p.k_row_stride, panel.columns, terms, s.S);
  const TileIds<T> ids{panel.id, p.k_id + (p.q_id ? j0 : 0), panel.row0, j0, nullptr};
  TileSums<T> sums;
  const bool masked = needs_mask(p, panel, j0, n);
  (masked ? find_top<T, true> : find_top<T, false>)(n, s.S, g.slope, panel.state.top, sums, ids);
  with_flags(
      [&](auto in_range, auto mask, auto moments) {
        weigh_tile<T, in_range.value, mask.value, moments.value>(n, s.S, s.ED, g.slope, panel.state.top, sums, ids);
      },
      sums.in_range, masked, g.t.want_moments);
  for (idx l = 0; l < PW; l++) sums.used[l] = sums.e[l], sums.used_d[l] = sums.ed[l];
  if constexpr (kBf16Tiles<T>)
    if (tiles && g.t.want_mean) {
      round_weights(n, s.S, terms.r, s.e_pairs, sums.used);
      if (g.t.want_moments) round_weights(n, s.ED, terms.r, s.ed_pairs, sums.used_d);
      add_sums(g, panel.state, sums, true);
      query_gradient_tiles(n, g.Dp, s.e_pairs, s.k_columns, panel.state.mean);
      if (g.t.want_moments) query_gradient_tiles(n, g.Dp, s.ed_pairs, s.k_columns, panel.state.spread);
      return;
    }
  add_sums(g, panel.state, sums, tiles);
  for (idx f = 0; g.t.want_mean && f < g.Dp / PW; f++) {
    query_gradient_panel<T>(n, s.S, s.k_panels + f * n * PW, panel.state.mean + f * PW * PW);
    if (g.t.want_moments) query_gradient_panel<T>(n, s.ED, s.k_panels + f * n * PW, panel.state.spread + f * PW * PW);
  }
}

// ---- results --------------------------------------------------------------------------------------------------------
// The states of one unit, of all parts of the keys, `stride` bytes apart.
struct PartialStates {
  char* first;
  idx stride, parts;
};

template <class T>
PanelState<T> state_of(const DetachedSetup<T>& g, const PartialStates& states, idx part) {
  char* at = states.first + part * states.stride;
  return PanelState<T>::layout(g.t, at);
}

// Of lane l of one part: its top minus the common one in u, and the factor of its weights.
struct Shift {
  double moved, scale;
};
template <class T>
Shift shift_of(const DetachedSetup<T>& g, const PanelState<T>& part, idx l, T top) {
  const double z = part.top[l] > -kHuge<T> ? double(part.top[l]) - double(top) : 0, moved = g.sign() * z;
  return {moved, z == 0 ? 1 : __builtin_exp2(double(g.slope) * moved)};
}

struct DetachedRow {
  RowResult result;
  double sum_dd;
  double used_factor, used_delta;  // factor and delta of the weights that multiply keys
};

template <class T>
T query_norm(const DetachedSetup<T>& g, const T* q) {
  return g.p.normalize ? UnitRow<T>::of(g.p.D, q).squared_norm : squared_norm(g.p.D, q);
}

template <class T>
DetachedRow finish_detached_row(const DetachedSetup<T>& g, const PartialStates& states, idx l, T top, const T* q) {
  double sum = 0, sum_d = 0, sum_dd = 0, used = 0, used_d = 0;
  for (idx i = 0; i < states.parts; i++) {
    const PanelState<T> part = state_of(g, states, i);
    const Shift s = shift_of(g, part, l, top);
    const double m = s.moved, e = part.sum[l], ed = part.sum_d[l];
    sum += s.scale * e, sum_d += s.scale * (ed + m * e);
    sum_dd += s.scale * (part.sum_dd[l] + m * (2 * ed + m * e));
    used += s.scale * part.used[l], used_d += s.scale * (part.used_d[l] + m * part.used[l]);
  }
  const double top_cost = (g.p.inner_product ? 0 : double(query_norm(g, q))) - 2 * g.sign() * double(top);
  const RowResult r = finish_row<LseOrder::kSumFirst>(sum, sum_d, top_cost, g.p.tau[0], g.slope - g.slope == 0);
  if (!g.bf16 || r.empty) return {r, sum_dd, r.factor, r.delta};
  return {r, sum_dd, r.factor * (sum / used), used_d / used};
}

// at: of the row in mean and spread.
template <class T>
void finish_means(const DetachedSetup<T>& g, const PartialStates& states, idx l, T top, const DetachedRow& row,
                  idx at) {
  constexpr idx PW = kPanel<T>;
  for (idx f = 0; f < g.Dp; f += PW) {
    double mean[PW] = {}, spread[PW] = {};
    for (idx i = 0; i < states.parts; i++) {
      const PanelState<T> part = state_of(g, states, i);
      const Shift s = shift_of(g, part, l, top);
      const T *a = part.mean + (f + l) * PW, *b = part.spread + (f + l) * PW;
      for (idx d = 0; d < PW; d++) mean[d] += s.scale * double(a[d]);
      for (idx d = 0; g.t.want_moments && d < PW; d++) spread[d] += s.scale * (double(b[d]) + s.moved * double(a[d]));
    }
    for (idx d = 0; d < min_of(PW, g.p.D - f); d++) {
      const double weighted = row.used_factor * mean[d];
      g.t.out.mean[at + f + d] = T(weighted);
      if (g.t.want_moments)
        g.t.out.spread[at + f + d] = T(-2 * (row.used_factor * spread[d] - row.used_delta * weighted));
    }
  }
}

// Adds up the states of all parts, in their order.
template <class T>
void finish_unit(const DetachedSetup<T>& g, idx unit, const PartialStates& states) {
  constexpr idx PW = kPanel<T>;
  const DetachedStatistics<T>& out = g.t.out;
  const idx pair = unit / g.per_pair, row0 = (unit - pair * g.per_pair) * PW;
  for (idx l = 0; l < min_of(PW, g.p.N - row0); l++) {
    T top = -kHuge<T>;
    for (idx i = 0; i < states.parts; i++) top = max_of(top, state_of(g, states, i).top[l]);
    const DetachedRow row = finish_detached_row(g, states, l, top, g.query_row(pair, row0 + l));
    const RowResult& r = row.result;
    const idx at = pair * g.p.N + row0 + l;
    out.value[at] = r.value, out.lse[at] = r.lse;
    if (g.t.want_moments) out.variance[at] = 4 * (r.factor * row.sum_dd - r.delta * r.delta);
    if (g.t.want_mean) finish_means(g, states, l, top, row, at * g.p.D);
  }
}

// ---- the kernels ----------------------------------------------------------------------------------------------------
// From the layout of one kind of products to that of the other.
template <class T>
void turn_means(const DetachedSetup<T>& g, const DetachedScratch<T>& s, idx panels) {
  if constexpr (kBf16Tiles<T>)
    for (idx i = 0; i < panels && g.t.want_mean; i++) {
      turn_query_gradients(1, g.Dp, s.panels[i].state.mean);
      if (g.t.want_moments) turn_query_gradients(1, g.Dp, s.panels[i].state.spread);
    }
}

// Units [unit0, unit1), which share the keys of one view.
template <class T>
void detached_block(const DetachedSetup<T>& g, const DetachedScratch<T>& s, idx view, idx unit0, idx unit1) {
  const DetachedKeysParams<T>& t = g.t;
  const Contrast<T>& p = g.p;
  const idx n = unit1 - unit0, bytes = idx(PanelState<T>::bytes(t));
  bool tiles = g.bf16;
  for (idx i = 0; i < n; i++) {
    s.panels[i] = start_panel(g, s, i, unit0 + i);
    if (g.bf16) tiles &= s.panels[i].in_range;
  }
  for (idx j0 = t.share.key0; j0 < t.share.key1; j0 += t.blocking.keys) {
    if (t.interrupt()) return;
    const idx keys = min_of(t.blocking.keys, t.share.key1 - j0);
    const T* k = p.k + view * p.k_view_stride + j0 * p.k_row_stride;
    pack<T>({k, p.k_row_stride, p.D, keys, 0, keys, p.inner_product, p.normalize ? s.k_r : nullptr, nullptr, s.bias,
             t.want_mean && !tiles ? s.k_panels : nullptr});
    bool tile = tiles;
    if constexpr (kBf16Tiles<T>)
      if (tiles && !(tile = pack_tile_bf16(g, s, k, keys))) {
        pack<T>({k, p.k_row_stride, p.D, keys, 0, keys, p.inner_product, p.normalize ? s.k_r : nullptr, nullptr, s.bias,
                 t.want_mean ? s.k_panels : nullptr});
        turn_means(g, s, n);
      }
    const auto meet_all = [&] {
      const idx ahead = min_of(t.blocking.keys, t.share.key1 - j0 - keys);
      for (idx i = 0; i < n; i++) {
        prefetch_rows(p, k + keys * p.k_row_stride, ahead * i / n, ahead * (i + 1) / n);  // of the next tile
        meet_tile(g, s, s.panels[i], k, j0, keys, tile);
      }
    };
    if (tile) {
      const TileConfig config;
      meet_all();
    } else {
      meet_all();
    }
    if (tile != tiles) turn_means(g, s, n);
  }
  if (tiles) turn_means(g, s, n);
  for (idx i = 0; i < n && !t.states; i++) finish_unit(g, unit0 + i, {s.states + i * bytes, 0, 1});
}

template <class T>
size_t detached_keys_scratch(const DetachedKeysParams<T>& t) {
  return bytes_of([&](char*& at) { DetachedScratch<T>::layout(t, at); });
}

template <class T>
void detached_keys(const DetachedKeysParams<T>& t) {
  const DetachedSetup<T> g(t);
  char* memory = static_cast<char*>(t.scratch);
  const DetachedScratch<T> s = DetachedScratch<T>::layout(t, memory);
  const idx most = t.blocking.rows / kPanel<T>;
  for (idx at = t.share.unit0; at < t.share.unit1;) {  // pairs that share their keys share blocks
    const idx view = g.p.k_index[at / g.per_pair];
    idx end = at;
    while (end < t.share.unit1 && g.p.k_index[end / g.per_pair] == view)
      end = min_of(t.share.unit1, (end / g.per_pair + 1) * g.per_pair);
    const idx n = end - at, blocks = (n + most - 1) / most;
    for (idx b = 0; b < blocks; b++) detached_block(g, s, view, at + n * b / blocks, at + n * (b + 1) / blocks);
    at = end;
  }
}

// Adds up the parts of units [unit0, unit1).
template <class T>
void detached_keys_merge(const DetachedKeysParams<T>& t) {
  const DetachedSetup<T> g(t);
  const idx bytes = idx(PanelState<T>::bytes(t));
  for (idx unit = t.share.unit0; unit < t.share.unit1; unit++)
    finish_unit(g, unit, {t.states + unit * bytes, t.units * bytes, t.parts});
}

}  // namespace cacr::CACR_ISA
