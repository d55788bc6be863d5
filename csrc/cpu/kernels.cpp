// Every kernel for one instruction set: compiled once per set, torch-free.
#include "aligned.h"
#include "frozen.h"
#include "symmetric.h"

namespace cacr::CACR_ISA {
namespace {

template <class T>
size_t sweep_scratch(const Task<T>& task) {
  Scratch<T> s;
  return Scratch<T>::layout(task, nullptr, s);
}

template <class T>
void sweep(const Task<T>& task) {
  task.symmetric ? SymmetricSweep<T>(task).run() : Sweep<T>(task).run();
}

template <class T>
int64_t symmetric_states(const Task<T>& task) {
  return SymmetricSweep<T>::states(task);
}

template <class T>
void finish(const Task<T>& task) {
  SymmetricSweep<T>(task).finish();
}

template <class T>
void prepare(const Task<T>& task) {
  SymmetricSweep<T>(task).prepare();
}

template <class T>
void aligned(const AlignedTask<T>& task) {
  Aligned<T>(task).run();
}

template <class T>
void reduce(const ReduceTask<T>& t) {
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
size_t frozen_scratch(const FrozenTask<T>& task) {
  FrozenScratch<T> s;
  return FrozenScratch<T>::layout(task, nullptr, s);
}

template <class T>
void frozen(const FrozenTask<T>& task) {
  Frozen<T>(task).run();
}

template <class T>
void frozen_merge(const FrozenTask<T>& task) {
  Frozen<T>(task).merge();
}

template <class T>
constexpr Kernels<T> table() {
  return {kPanel<T>,
          kTileRows,
          sweep_scratch<T>,
          Aligned<T>::scratch,
          pack<T>,
          sweep<T>,
          symmetric_states<T>,
          finish<T>,
          prepare<T>,
          aligned<T>,
          reduce<T>,
          frozen_scratch<T>,
          FrozenState<T>::bytes,
          frozen<T>,
          frozen_merge<T>};
}

}  // namespace

extern const Kernels<float> kernels_float;
extern const Kernels<double> kernels_double;
const Kernels<float> kernels_float = table<float>();
const Kernels<double> kernels_double = table<double>();

}  // namespace cacr::CACR_ISA
