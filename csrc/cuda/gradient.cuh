// The phase of the gradients: a unit owns 64 rows of a view and some chunks of its features, meets all rows that these
// were paired with, as queries and as keys, and writes what it has added up once. Nothing is shared between units, so
// the result does not depend on their order. Per tile: similarities anew, dL/du, then g += dL/du rows.
#pragma once

#include <type_traits>

#include "coefficients.cuh"

namespace cacr {

// A unit's way through what its rows were paired with: entry 2 p + side, tiles of it, steps of a tile.
struct Cursor {
  int entry, tile, step;
};

template <class A, class P>
struct GradientUnit {
  using Element = typename A::Element;
  using Acc = typename A::Acc;
  using Total = std::conditional_t<A::kCompensated, Sum<Acc>, PlainSum<Acc>>;  // of what tiles give
  using Gradient = Total[A::kGradientChunks][A::kColumns][4];
  static constexpr int kStage = kTile * kStride<Element>;
  const P& p;
  Buffers<Element, Acc>& shared;
  Where w;
  int view, share, shares, chunks, chunk0, steps, owned;  // owned: chunks of the gradient that exist
  bool is_key_view;                                       // a view of separate keys

  CACR_DEVICE GradientUnit(const P& p_, Buffers<Element, Acc>& buffers, int unit) : p(p_), shared(buffers) {
    chunks = int((p.D + kChunk<Element> - 1) / kChunk<Element>);
    is_key_view = unit >= p.q_units.count;
    if (is_key_view) unit -= p.q_units.count;
    const int groups = is_key_view ? p.k_units.groups : p.q_units.groups;
    const int blocks = is_key_view ? p.k_units.blocks : p.q_units.blocks;
    shares = is_key_view ? p.k_units.shares : p.q_units.shares;
    share = unit % shares, unit /= shares;
    chunk0 = unit % groups * A::kGradientChunks, unit /= groups;
    w.row0 = int64_t(unit % blocks) * kTile, view = unit / blocks;
    w.rows = int(min(int64_t(kTile), rows_of_target().rows - w.row0));
    owned = is_wanted() ? min(A::kGradientChunks, chunks - chunk0) : 0;
    steps = chunks + owned;
  }

  CACR_DEVICE bool is_wanted() const { return is_key_view ? p.want_k : p.want_q; }
  CACR_DEVICE bool has_moment() const { return p.want_moment && !is_key_view && chunk0 == 0; }

  // ---- the way ------------------------------------------------------------------------------------------------------
  // Even entries: the rows are queries. What nobody wants is left out.
  CACR_DEVICE bool meets(int entry) const {
    const int pair = entry / 2;
    if (entry % 2 == 0) return !is_key_view && p.q_index[pair] == view && (owned > 0 || has_moment());
    return (p.own || is_key_view) && p.k_index[pair] == view && owned > 0;
  }
  CACR_DEVICE Rows<Element> others(int entry) const {
    const int pair = entry / 2;
    if (entry % 2 == 0) return {p.k + p.k_index[pair] * p.M * p.D, p.M, p.D};
    return {p.q + p.q_index[pair] * p.N * p.D, p.N, p.D};
  }
  CACR_DEVICE const Acc* norm_of_others(int entry) const {
    const int pair = entry / 2;
    return entry % 2 == 0 ? p.k_norm + p.k_index[pair] * p.M : p.q_norm + p.q_index[pair] * p.N;
  }
  // The first entry from `entry` on that has tiles; 2 * pairs: none.
  CACR_DEVICE int next_entry(int entry) const {
    while (entry < 2 * p.pairs && !(meets(entry) && first_tile(entry) < last_tile(entry))) entry++;
    return entry;
  }
  CACR_DEVICE int first_tile(int entry) const { return shared.unit.tile0[entry % 2]; }
  CACR_DEVICE int last_tile(int entry) const { return shared.unit.tile1[entry % 2]; }  // and one more
  CACR_DEVICE Cursor start(int from_entry) const {
    const int entry = next_entry(from_entry);
    return {entry, first_tile(entry), 0};
  }
  CACR_DEVICE void advance(Cursor& c) const {
    if (++c.step < steps) return;
    c.step = 0;
    if (++c.tile < last_tile(c.entry)) return;
    c = start(c.entry + 1);
  }

  // Steps 0 ... chunks - 1 of a tile multiply rows with rows, the rest need chunks of the others alone.
  CACR_DEVICE void load(const Cursor& c, int stage) {
    if (c.entry < 2 * p.pairs) {
      const bool similarity = c.step < chunks;
      const int64_t d0 = int64_t(similarity ? c.step : chunk0 + c.step - chunks) * kChunk<Element>;
      if (similarity) load_chunk(shared.a, stage, own(), w.row0, d0, p.aligned);
      load_chunk(shared.b, stage, others(c.entry), int64_t(c.tile) * kTile, d0, p.aligned);
    }
    ptx::cp_async_commit();
  }

  // ---- facts of the unit --------------------------------------------------------------------------------------------
  CACR_DEVICE void stage_facts(float scale) {
    const int x = threadIdx.x;
    const Acc* const norm = is_key_view ? p.k_norm + view * p.M : p.q_norm + view * p.N;
    if (x < kTile) {
      const bool exists = x < w.rows;
      shared.unit.norm[x] = exists && !p.inner ? norm[w.row0 + x] : Acc(0);
      shared.unit.id[x] = exists ? id_of(p, is_key_view ? p.k_id : p.q_id, w.row0 + x) : -1;
    }
    if (x < kMaxSoftmaxes) shared.unit.slope[x] = x < p.softmaxes ? slope_of<Acc>(p, x) : Acc(0);
    if (x < 2) {
      const int tiles = int(((x == 0 ? p.M : p.N) + kTile - 1) / kTile);
      shared.unit.tile0[x] = share_of(tiles, share, shares);
      shared.unit.tile1[x] = share_of(tiles, share + 1, shares);
    }
    if (x == 0) shared.unit.scale[0] = scale, shared.unit.own[0] = rows_of_target();
  }
  CACR_DEVICE Rows<Element> rows_of_target() const {
    if (is_key_view) return {p.k + view * p.M * p.D, p.M, p.D};
    return {p.q + view * p.N * p.D, p.N, p.D};
  }
  CACR_DEVICE Rows<Element> own() const { return shared.unit.own[0]; }
  CACR_DEVICE RowFacts<Acc> own_facts() const {
    const int row = Place::of_thread().row;
    return {{shared.unit.id[row], shared.unit.id[row + 8]}, {shared.unit.norm[row], shared.unit.norm[row + 8]}};
  }

  // ---- coefficients of queries --------------------------------------------------------------------------------------
  // Those of 64 queries from `first` on, of which `count` exist.
  CACR_DEVICE void stage_coefficients(int pair, int64_t first, int count) {
    const int64_t rows = p.pairs * p.N;
    for (int x = threadIdx.x; x < p.softmaxes * kTile; x += kThreads) {
      const int64_t at = x / kTile * rows + pair * p.N + first + x % kTile;
      shared.coefficients[x] = x % kTile < count ? p.coefficients[at] : Coefficients<Acc>{0, 0, 0, 0};
    }
    if (threadIdx.x < kTile)
      shared.ratio[threadIdx.x] = int(threadIdx.x) < count ? p.ratio[pair * p.N + first + threadIdx.x] : Acc(0);
  }

  // ---- one tile -----------------------------------------------------------------------------------------------------
  // u becomes dL/du; row_sum: of its rows.
  template <bool kAreQueries>
  CACR_DEVICE void differentiate(Acc (&u)[kFragments][4], const Elements& elements, Total (&row_sum)[2],
                                 Total (&moment)[kMaxSoftmaxes][2]) {
    const Place at = Place::of_thread();
    const uint32_t members[kMaxSoftmaxes] = {elements.of_kind(p.kind[0]), elements.of_kind(p.kind[1])};
    Acc sum[2] = {}, squares[kMaxSoftmaxes][2] = {};
#pragma unroll
    for (int n = 0; n < kFragments; n++) {
      ptx::read_no_further();  // coefficients of all columns do not fit the registers
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int query = kAreQueries ? at.row + e / 2 * 8 : at.column + 8 * n + e % 2;
        ElementGradient<Acc> gradient{0, 0};
        gradient.add(shared.coefficients[query], 0, shared.unit.slope[0], u[n][e], members[0] >> bit_of(n, e) & 1,
                     squares[0][e / 2]);
        if (p.softmaxes == 2)
          gradient.add(shared.coefficients[kTile + query], shared.ratio[query], shared.unit.slope[1], u[n][e],
                       members[1] >> bit_of(n, e) & 1, squares[1][e / 2]);
        sum[e / 2] += gradient.h;
        u[n][e] = A::kScaled ? gradient.h * shared.unit.scale[0] : gradient.h;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      row_sum[h].add(sum[h]);
#pragma unroll
      for (int s = 0; s < kMaxSoftmaxes; s++) moment[s][h].add(squares[s][h]);
    }
  }

  // All tiles of one entry.
  CACR_DEVICE void meet(int entry, Cursor& ahead, int& stage, Gradient& g, Total (&row_sum)[2]) {
    const bool are_queries = entry % 2 == 0;
    const Place at = Place::of_thread();
    const int warp_rows = int(threadIdx.x / 32) * 16 * kStride<Element>;
    Total moment[kMaxSoftmaxes][2] = {}, sums[2] = {};
    const Rows<Element> columns = others(entry);
    for (int tile = first_tile(entry); tile < last_tile(entry); tile++) {
      w.column0 = int64_t(tile) * kTile, w.columns = int(min(int64_t(kTile), columns.rows - w.column0));
      Acc u[kFragments][4] = {};
      for (int c = 0; c < chunks; c++) {
        step(ahead, stage);
        if (c == 0) {
          stage_columns(p, shared, !are_queries, norm_of_others(entry), w);
          are_queries ? stage_coefficients(entry / 2, w.row0, w.rows)
                      : stage_coefficients(entry / 2, w.column0, w.columns);
        }
        A::product(u, shared.a, stage * kStage + warp_rows, shared.b, stage * kStage);
      }
      __syncthreads();  // the columns are there
      const RowFacts<Acc> facts = own_facts();
      const Elements elements = find_elements(shared.id, w.columns, is_masked(p), facts.id, w.shift());
      finish_similarities(p, shared, are_queries, u, facts, own(), columns, w, elements);
      are_queries ? differentiate<true>(u, elements, sums, moment) : differentiate<false>(u, elements, sums, moment);
#pragma unroll
      for (int c = 0; c < A::kGradientChunks; c++) {
        if (c >= owned) continue;
        step(ahead, stage);
        A::accumulate(g[c], u, shared.b, stage * kStage);
      }
    }
    if (are_queries && has_moment()) write_moment(entry / 2, moment);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int64_t i = w.row0 + at.row + 8 * h;
      if (are_queries && !p.cancelling) {  // known to the last digit: the weights add up to 1
        sums[h] = {};
        if (at.column == 0 && share == 0 && i < own().rows) sums[h].add(p.known_sum[entry / 2 * p.N + i]);
      }
      row_sum[h].add(sums[h]);
    }
  }

  // Waits for the stage that `ahead` has started and starts the next one; `stage` becomes the one to read.
  CACR_DEVICE void step(Cursor& ahead, int& stage) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is there, the other one has been read
    stage ^= 1;
    advance(ahead);
    load(ahead, stage ^ 1);
  }

  CACR_DEVICE void run(float scale) {
    if (w.rows <= 0) return;
    Gradient g = {};
    Total row_sum[2] = {};
    __syncthreads();  // the unit before has read its last stage and its facts
    stage_facts(scale);
    __syncthreads();  // the facts are there
    int stage = 1;
    Cursor ahead = start(0);
    load(ahead, 0);
    for (int entry = next_entry(0); entry < 2 * p.pairs; entry = next_entry(entry + 1))
      meet(entry, ahead, stage, g, row_sum);
    if (owned > 0) write(g, row_sum);
  }

  // ---- results ------------------------------------------------------------------------------------------------------
  CACR_DEVICE void write_moment(int pair, const Total (&moment)[kMaxSoftmaxes][2]) {
    const Place at = Place::of_thread();
    const int64_t rows = p.pairs * p.N;
#pragma unroll
    for (int s = 0; s < kMaxSoftmaxes; s++) {
      if (s >= p.softmaxes) continue;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        double sum = moment[s][h].value();
        sum += __shfl_xor_sync(kFullWarp, sum, 1);
        sum += __shfl_xor_sync(kFullWarp, sum, 2);
        const int64_t i = w.row0 + at.row + 8 * h, row = pair * p.N + i;
        if (at.column != 0 || i >= p.N) continue;
        const double total = p.sum[row_of(p, s, row)];  // c - F = -2 (u - u_top - delta)
        p.moment[(int64_t(share) * p.softmaxes + s) * rows + row] = total == 0 ? 0 : 4 * sum / total;
      }
    }
  }

  CACR_DEVICE void write(const Gradient& g, const Total (&row_sums)[2]) {
    const Place at = Place::of_thread();
    const Acc back = A::kScaled ? Acc(1) / shared.unit.scale[0] : Acc(1);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      Acc row_sum = row_sums[h].rounded();
      row_sum += __shfl_xor_sync(kFullWarp, row_sum, 1);
      row_sum += __shfl_xor_sync(kFullWarp, row_sum, 2);
      if (p.inner) row_sum = 0;
      const int64_t row = w.row0 + at.row + 8 * h, d0 = int64_t(chunk0) * kChunk<Element> + at.column;
      if (row >= own().rows) continue;
      const Element* const x = own().data + row * p.D + d0;
      Acc* const to = gradient_row(row) + d0;
      const bool adds = p.accumulate && shares == 1;
#pragma unroll
      for (int c = 0; c < A::kGradientChunks; c++)
#pragma unroll
        for (int n = 0; n < A::kColumns; n++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int d = c * kChunk<Element> + 8 * n + e;
            if (c >= owned || d0 + d >= p.D) continue;
            const Acc gradient = g[c][n][2 * h + e].rounded() * back - row_sum * Acc(widen(x[d]));
            to[d] = adds ? to[d] + gradient : gradient;
          }
    }
  }

  // Where a row goes: shares are added up later (loss.cuh).
  CACR_DEVICE Acc* gradient_row(int64_t row) const {
    Acc* const all = is_key_view ? shares > 1 ? p.k_partial : p.grad_k : shares > 1 ? p.q_partial : p.grad_q;
    const int64_t views = int64_t(share) * (is_key_view ? p.k_views : p.q_views) + view;
    return all + (views * own().rows + row) * p.D;
  }
};

template <class A, class P>
CACR_DEVICE void gradients_phase(const P& p, Buffers<typename A::Element, typename A::Acc>& shared) {
  const float scale = A::kScaled ? gradient_scale(p, shared.reduction) : 1.0f;
  const int units = p.q_units.count + p.k_units.count;
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x) GradientUnit<A, P>(p, shared, unit).run(scale);
}

}  // namespace cacr
