// A block of queries in a sweep: what is given, where it works, and its similarities with a tile of keys.
//
// Three values, each with one job: SweepSetup is what the planner asked for and what follows from it, Block says which
// queries are at hand, BlockScratch is memory. The steps of a sweep are functions of these: on the way forward in
// forward.h, on the way back in backward.h. strip.h and symmetric.h put them in their order.
#pragma once

#include "products_bf16.h"
#include "tiles.h"

namespace cacr::CACR_ISA {

// ---- what is given --------------------------------------------------------------------------------------------------
template <class T>
struct SweepSetup {
  static constexpr idx PW = kPanel<T>, W = Lanes<T>::W;
  const SweepParams<T>& t;
  const Contrast<T>& p;
  T slope[kMaxSoftmaxes];
  bool forward, backward;
  bool bf16;      // products_bf16.h
  bool diagonal;  // only keys on diagonals need a mask: members elsewhere are all keys
  // A softmax over positives: their entries of S are replaced by -c/2, c from differences where the product form
  // cancels. It then counts as one with |q|^2 = 0.
  bool positive[kMaxSoftmaxes], any_positive = false;
  bool holes = false;     // a kind leaves out rows with a negative id
  bool but_self = false;  // or the query itself
  bool cancelling;        // two softmaxes over one set (rbf): their sum must carry the rounding errors of H itself
  idx Dp;                 // D rounded up to panels

  explicit SweepSetup(const SweepParams<T>& params) : t(params), p(*params.problem), Dp(padded<T>(p.D)) {
    diagonal = p.period >= PW;
    for (int s = 0; s < p.softmaxes; s++) {
      slope[s] = T(-2 * p.tau[s] * kLog2e);
      diagonal &= p.kind[s] == kOther || p.kind[s] == kAll;
      positive[s] = is_same(p.kind[s]);
      any_positive |= positive[s];
      holes |= p.kind[s] == kOtherNotSelf;
      but_self |= p.kind[s] == kOtherNotSelf || p.kind[s] == kSameNotSelf;
    }
    for (int s = 0; s < p.softmaxes; s++) any_positive &= p.kind[s] != kAll;  // which reads the same entries
    for (int s = 0; s < p.softmaxes; s++) positive[s] &= any_positive;
    cancelling = p.softmaxes == 2 && p.kind[0] == p.kind[1];
    forward = t.gradient != Gradient::kGiven;
    backward = t.gradient != Gradient::kNone;
    bf16 = kBf16Tiles<T> && t.bf16;
  }

  bool strip() const { return forward && backward; }
  double sign(int s) const { return slope[s] < 0 ? -1 : 1; }
  idx tile_count() const { return (t.share.key1 - t.share.key0 + t.blocking.keys - 1) / t.blocking.keys; }
};

// ---- which queries are at hand --------------------------------------------------------------------------------------
template <class T>
struct Block {
  idx pair, row0, rows, panels;  // rows: those that exist, panels * PW >= rows

  const T* q(const Contrast<T>& p) const { return p.q + p.q_index[pair] * p.q_view_stride + row0 * p.q_row_stride; }
  const T* k(const Contrast<T>& p, idx j) const { return p.k + p.k_index[pair] * p.k_view_stride + j * p.k_row_stride; }
  const T* k_bias(const SweepSetup<T>& g) const { return g.t.packed.k_bias + g.p.k_index[pair] * g.p.M; }
  // Inverse lengths of the queries from row0 on, and of all keys; null: rows are taken as they are.
  const T* q_r(const SweepSetup<T>& g) const {
    return g.p.normalize ? g.t.packed.q_r + g.p.q_index[pair] * g.p.N + row0 : nullptr;
  }
  const T* k_r(const SweepSetup<T>& g) const {
    return g.p.normalize ? g.t.packed.k_r + g.p.k_index[pair] * g.p.M : nullptr;
  }
  idx rows_of_panel(idx i) const { return min_of(kPanel<T>, rows - i * kPanel<T>); }
  // Where row i of the block stands in arrays [softmaxes][pairs][N].
  idx row_index(const Contrast<T>& p, int s, idx i) const { return (s * p.pairs + pair) * p.N + row0 + i; }
};

// Keys [j0, j0 + n) of a tile.
struct Keys {
  idx j0, n;
};

// ---- where it works -------------------------------------------------------------------------------------------------
// What a block knows of its rows; every array has one entry per query.
template <class T>
struct BlockRows {
  SoftmaxRows<T> softmax[kMaxSoftmaxes];
  T* row_sum;    // sum_j H_ij, added up
  T* known_sum;  // the same, from the weights' sum of 1
};

// Operands of products_bf16.h.
struct Bf16Block {
  float* q_r;           // [rows] inverse lengths
  Bf16* feature_pairs;  // [rows/32][Dp/2][32][2]      queries: operand of S
  Bf16* query_pairs;    // [rows/32][Dp/32][16][32][2] queries: operand of dK
  Bf16* h_rows;         // [rows/32][keys][32]         H rounded: operand of dK
  Bf16* h_pairs;        // [rows/32][keys/2][32][2]    H rounded: operand of dQ

  static Bf16Block layout(idx rows, idx keys, idx Dp, char*& at) {
    const auto some = [&](idx count) { return carve<Bf16>(at, count); };
    float* const q_r = carve<float>(at, rows);
    return {q_r, some(rows * Dp), some(rows * Dp), some(rows * keys), some(rows * keys)};
  }
};

template <class T>
struct BlockScratch {
  T* S;             // [tiles][rows/PW][keys][PW] similarities; one tile where nothing is kept
  T* H;             // [rows/PW][keys][PW] dL/dS
  T* q_columns;     // [rows/PW][D][PW]    queries transposed: operand of S
  T* q_panels;      // [Dp/PW][rows][PW]   queries by panels of features: operand of dK
  T* dq_panels;     // [Dp/PW][rows][PW]; in products of bfloat16 [rows/PW][Dp][PW]
  T* columns;       // [keys of the share][W]  sum_i H_ij, by lanes
  T* q_norm;        // [rows]
  int32_t* q_id;    // [rows]
  int32_t* q_self;  // [rows]
  int32_t* lists;   // [2][keys or rows] parts of a tile
  BlockRows<T> rows;
  Bf16Block bf16;

  // Cuts the memory for one tile, or for as many as the strip keeps, from `at`, which moves behind it.
  static BlockScratch layout(const SweepParams<T>& t, char*& at) {
    constexpr idx PW = kPanel<T>;
    const Contrast<T>& p = *t.problem;
    const idx R = t.blocking.rows, K = t.blocking.keys, Dp = padded<T>(p.D), keys = t.share.key1 - t.share.key0;
    const SweepSetup<T> setup(t);
    BlockScratch s;
    s.S = carve<T>(at, (setup.strip() ? setup.tile_count() : 1) * R * K);
    s.H = carve<T>(at, R * K);
    s.q_columns = carve<T>(at, setup.bf16 ? 0 : R * p.D);
    s.q_panels = carve<T>(at, t.want_dk && !setup.bf16 ? R * Dp : 0);
    s.dq_panels = carve<T>(at, t.want_dq ? R * Dp : 0);
    s.columns = carve<T>(at, t.want_dk ? keys * (PW / 2) : 0);
    s.rows.row_sum = carve<T>(at, R);
    s.rows.known_sum = carve<T>(at, R);
    s.q_norm = carve<T>(at, R);
    s.q_id = carve<int32_t>(at, R);
    s.q_self = carve<int32_t>(at, p.q_self ? R : 0);
    s.lists = carve<int32_t>(at, p.q_id ? 2 * max_of(R, K) : 0);
    s.bf16 = setup.bf16 ? Bf16Block::layout(R, K, tiled(p.D), at) : Bf16Block{};
    for (SoftmaxRows<T>& rows : s.rows.softmax) rows = SoftmaxRows<T>::of(carve<T>(at, SoftmaxRows<T>::kArrays * R), R);
    return s;
  }
};

// ---- steps ----------------------------------------------------------------------------------------------------------
// Copies of the queries as the products want them, their norms and ids.
template <class T>
void pack_queries(const SweepSetup<T>& g, const Block<T>& b, const BlockScratch<T>& s) {
  constexpr idx PW = kPanel<T>;
  const Contrast<T>& p = g.p;
  const T *q = b.q(p), *r = b.q_r(g);
  for (idx i = 0; i < b.panels && !g.bf16; i++)
    transpose_panel(b.rows_of_panel(i), p.D, q + i * PW * p.q_row_stride, p.q_row_stride, r ? r + i * PW : nullptr,
                    s.q_columns + i * p.D * PW);
  if (g.backward && g.t.want_dk && !g.bf16) pack_panels(g, b, s);
  if constexpr (kBf16Tiles<T>)
    if (g.bf16) pack_queries_bf16(g, b, s);
  load_norms(g, b, s);
  if (p.q_id)
    for (idx i = 0; i < b.panels * PW; i++) s.q_id[i] = i < b.rows ? p.q_id[b.row0 + i] : -1;
  if (p.q_self)
    for (idx i = 0; i < b.panels * PW; i++) s.q_self[i] = i < b.rows ? p.q_self[b.row0 + i] : -1;
}

template <class T>
void pack_queries_bf16(const SweepSetup<T>& g, const Block<T>& b, const BlockScratch<T>& s) {
  const Contrast<T>& p = g.p;
  const T *q = b.q(p), *r = b.q_r(g);
  for (idx i = 0; i < b.panels; i++) {
    const idx n = b.rows_of_panel(i), at = i * kTile * tiled(p.D);
    const T* rows = q + i * kTile * p.q_row_stride;
    pack_feature_pairs(n, p.D, rows, p.q_row_stride, s.bf16.feature_pairs + at);
    if (g.backward && g.t.want_dk) pack_query_pairs(n, p.D, rows, p.q_row_stride, s.bf16.query_pairs + at);
  }
  for (idx i = 0; i < b.panels * kTile; i++) s.bf16.q_r[i] = i < b.rows ? factor_of(r, i) : T(0);
}

template <class T>
void load_norms(const SweepSetup<T>& g, const Block<T>& b, const BlockScratch<T>& s) {
  const T* norm = g.t.packed.q_norm + g.p.q_index[b.pair] * g.p.N + b.row0;
  for (idx i = 0; i < b.panels * kPanel<T>; i++) s.q_norm[i] = i < b.rows ? norm[i] : T(0);
}

template <class T>
void pack_panels(const SweepSetup<T>& g, const Block<T>& b, const BlockScratch<T>& s) {
  constexpr idx PW = kPanel<T>;
  const idx R = b.panels * PW;
  const T *q = b.q(g.p), *r = b.q_r(g);
  for (idx f = 0; f < g.Dp / PW; f++)
    for (idx i = 0; i < R; i++) {
      T* out = s.q_panels + (f * R + i) * PW;
      const idx n = i < b.rows ? min_of(PW, g.p.D - f * PW) : 0;
      const T* x = q + i * g.p.q_row_stride + f * PW;
      const T factor = n > 0 ? factor_of(r, i) : T(0);
      for (idx l = 0; l < n; l++) out[l] = factor * x[l];
      for (idx l = n; l < PW; l++) out[l] = 0;
    }
}

// The ids of panel i against keys from j on.
template <class T>
TileIds<T> tile_ids(const SweepSetup<T>& g, const Block<T>& b, const BlockScratch<T>& s, idx i, idx j) {
  return {s.q_id + i * kPanel<T>, g.p.k_id ? g.p.k_id + j : nullptr, b.row0 + i * kPanel<T>, j,
          g.p.q_self ? s.q_self + i * kPanel<T> : nullptr};
}

// Keys of a tile that do need a mask for a panel of queries, or that do not. Without a mask no key has the id of a
// query: in a set of positives there is none of them, in one of others there are all.
struct Part {
  idx first;      // the tile's keys are counted from here
  TileKeys keys;  // of which these
  bool masked;
};

// The softmaxes that have members in a part.
struct Active {
  int count, softmax[kMaxSoftmaxes];

  template <class T>
  static Active of(const SweepSetup<T>& g, const Part& part) {
    Active active{};
    for (int s = 0; s < g.p.softmaxes; s++)
      if (part.masked || !is_same(g.p.kind[s])) active.softmax[active.count++] = s;
    return active;
  }
};

// Parts by a filter of ids: where there are many classes a panel meets few of them. lists: [2 keys]
template <class T, class F>
void for_parts_by_id(const SweepSetup<T>& g, Keys keys, const TileIds<T>& ids, int32_t* lists, F f) {
  constexpr idx PW = kPanel<T>, kSlots = 1024;
  const auto slot = [](int32_t id) { return uint32_t(id) % kSlots; };
  uint8_t met[kSlots] = {};
  for (idx l = 0; l < PW; l++) {
    if (g.holes && ids.q_id[l] < 0) return f(Part{keys.j0, {keys.n, nullptr}, true});  // in no set
    met[slot(ids.q_id[l])] = 1;
    const idx self = (ids.q_self ? ids.q_self[l] : ids.q_row + l) - ids.k_row;  // whose id may be another one
    if (g.but_self && self >= 0 && self < keys.n) met[slot(ids.k_id[self])] = 1;
  }
  int32_t *const plain = lists, *const masked = lists + keys.n;
  idx plains = 0, some = 0;
  for (idx j = 0; j < keys.n; j++) {
    const bool mask = met[slot(ids.k_id[j])] | (g.holes & (ids.k_id[j] < 0));
    masked[some] = plain[plains] = int32_t(j);
    some += mask, plains += !mask;
  }
  if (plains) f(Part{keys.j0, {plains, some ? plain : nullptr}, false});
  if (some) f(Part{keys.j0, {some, plains ? masked : nullptr}, true});
}

// f(part) over the parts of the keys for the panel of queries at `row`. ids: of the panel and the keys
template <class T, class F>
void for_parts(const SweepSetup<T>& g, idx row, Keys keys, const TileIds<T>& ids, int32_t* lists, F f) {
  constexpr idx PW = kPanel<T>;
  const idx period = g.p.period, end = keys.j0 + keys.n;
  if (!g.p.q_id) return f(Part{keys.j0, {keys.n, nullptr}, false});
  if (!g.diagonal) return for_parts_by_id(g, keys, ids, lists, f);
  const idx first = row % period;
  idx at = keys.j0;
  for (idx m = (keys.j0 - first - PW + 1) / period - 1; at < end; m++) {  // diagonal m covers [lo, lo + PW)
    const idx lo = m * period + first;
    if (lo + PW <= at) continue;
    if (lo > at) f(Part{at, {min_of(lo, end) - at, nullptr}, false});
    at = max_of(at, min_of(lo, end));
    if (at < end) f(Part{at, {min_of(lo + PW, end) - at, nullptr}, true});
    at = min_of(lo + PW, end);
  }
}

// S: tiles of the panels, `blocking.keys` keys apart.
template <class T>
void compute_similarities(const SweepSetup<T>& g, const Block<T>& b, const BlockScratch<T>& s, T* S, Keys keys) {
  const Contrast<T>& p = g.p;
  const T *k = b.k(p, keys.j0), *r = b.k_r(g);
  const KeyTerms<T> terms{r ? r + keys.j0 : nullptr, b.k_bias(g) + keys.j0};
  if constexpr (kBf16Tiles<T>)
    if (g.bf16) similarities_bf16(g, b, s, terms, S, keys);
  for (idx i = 0; i < b.panels && !g.bf16; i++)
    similarity<T>(keys.n, p.D, k, p.k_row_stride, s.q_columns + i * p.D * kPanel<T>, terms,
                  S + i * g.t.blocking.keys * kPanel<T>);
  if (g.any_positive) replace_positives(g, b, s, S, keys);
}

template <class T>
void similarities_bf16(const SweepSetup<T>& g, const Block<T>& b, const BlockScratch<T>& s, const KeyTerms<T>& terms,
                       T* S, Keys keys) {
  const Bf16Keys& packed = g.t.packed.keys;
  const Bf16* K = packed.rows + (g.p.k_index[b.pair] * packed.view_rows + keys.j0) * packed.row_stride;
  const TileConfig config;
  for (idx i = 0; i < b.panels; i++)
    similarity_tiles(keys.n, g.p.D, K, packed.row_stride, s.bf16.feature_pairs + i * kTile * tiled(g.p.D),
                     terms.r ? s.bf16.q_r + i * kTile : nullptr, terms, S + i * g.t.blocking.keys * kTile);
}

template <class T>
void replace_positives(const SweepSetup<T>& g, const Block<T>& b, const BlockScratch<T>& s, T* S, Keys keys) {
  for (idx i = 0; i < b.panels; i++) {
    const TileIds<T> ids = tile_ids(g, b, s, i, keys.j0);
    const Membership<T> same = Membership<T>::make(ids, kSame);
    const Panel<T> norm = load_panel(s.q_norm + i * kPanel<T>);
    const T* bias = b.k_bias(g) + keys.j0;
    for_parts(g, b.row0 + i * kPanel<T>, keys, ids, s.lists, [&](const Part& part) {
      for (idx x = 0; part.masked && x < part.keys.n; x++) {
        const idx j = part.keys[x];
        const PanelMask<T> mask = same.of_key(j);
        if (!any_lane(mask)) continue;
        T* const u = S + (i * g.t.blocking.keys + j) * kPanel<T>;
        const Panel<T> product = load_panel(u), cost = norm - T(2) * product;
        store_panel(u, choose(mask, T(-0.5) * cost, product));
        const PanelMask<T> close = without(mask, cost > T(0.5) * (norm - splat_panel(2 * bias[j])));
        if (!g.p.inner_product && any_lane(close)) replace_close(g, b, u, close, i, keys.j0 + j);
      }
    });
  }
}

// u [PW]: of panel i and key j, from differences where `close` says so.
template <class T>
void replace_close(const SweepSetup<T>& g, const Block<T>& b, T* u, const PanelMask<T>& close, idx i, idx j) {
  const Contrast<T>& p = g.p;
  const T *q = b.q(p) + i * kPanel<T> * p.q_row_stride, *q_r = b.q_r(g), *k_r = b.k_r(g);
  for (idx l = 0; l < b.rows_of_panel(i); l++) {
    if (!close.v[l / Lanes<T>::W][l % Lanes<T>::W]) continue;
    const T* x = q + l * p.q_row_stride;
    const T cost = k_r ? RowPair<T, true>{x, b.k(p, j), q_r[i * kPanel<T> + l], k_r[j]}.squared_distance(p.D)
                       : RowPair<T, false>{x, b.k(p, j), 1, 1}.squared_distance(p.D);
    u[l] = -cost / 2;
  }
}

}  // namespace cacr::CACR_ISA
