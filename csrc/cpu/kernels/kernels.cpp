// Every kernel for one instruction set: compiled once per set, torch-free.
#include "aligned.h"
#include "aligned_costs.h"
#include "detached_keys.h"
#include "positives.h"
#include "strip.h"
#include "symmetric.h"

namespace cacr::CACR_ISA {
namespace {

template <class T>
void reduce(const ReduceParams<T>& t) {
  constexpr int W = Lanes<T>::W;
  const T scale = T(t.scale);
  for (idx i = t.row0; i < t.row1; i++) {
    T* out = t.out + i * t.out_stride;
    idx d = 0;
    for (; d + W <= t.D; d += W) {
      Vec<T> sum{};
      for (idx s = 0; s < t.count; s++) sum += load(t.slices[s] + i * t.slice_stride + d);
      store<T>(out + d, t.accumulate ? load(out + d) + scale * sum : scale * sum);
    }
    for (; d < t.D; d++) {
      T sum = 0;
      for (idx s = 0; s < t.count; s++) sum += t.slices[s][i * t.slice_stride + d];
      out[d] = t.accumulate ? out[d] + scale * sum : scale * sum;
    }
  }
}

template <class T>
constexpr Kernels<T> table() {
  Kernels<T> k{};
  k.panel = kPanel<T>, k.tile_rows = kTileRows;
  k.pack = pack<T>, k.reduce = reduce<T>, k.to_raw_rows = to_raw_rows<T>;
#if defined(CACR_BF16_TILES)
  if constexpr (kBf16Tiles<T>) k.pack_bf16 = pack_bf16;
#endif
  k.strip_scratch = strip_scratch<T>, k.strip = strip<T>;
  k.symmetric_scratch = symmetric_scratch<T>, k.symmetric_states = symmetric_states<T>;
  k.symmetric_sweep = symmetric_sweep<T>, k.symmetric_finish = symmetric_finish<T>;
  k.symmetric_prepare = symmetric_prepare<T>;
  k.aligned_scratch = aligned_scratch<T>, k.aligned = aligned<T>, k.aligned_costs = aligned_costs<T>;
  k.positives = positives<T>;
  k.detached_keys_scratch = detached_keys_scratch<T>, k.detached_keys_state = PanelState<T>::bytes;
  k.detached_keys = detached_keys<T>, k.detached_keys_merge = detached_keys_merge<T>;
  return k;
}

}  // namespace

extern const Kernels<float> kernels_float;
const Kernels<float> kernels_float = table<float>();
#if !defined(CACR_BF16_TILES)  // products of bfloat16 change nothing in float64: there AVX-512's are taken
extern const Kernels<double> kernels_double;
const Kernels<double> kernels_double = table<double>();
#endif

}  // namespace cacr::CACR_ISA
