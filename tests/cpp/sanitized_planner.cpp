// The operator `contrast` of the CPU under the address sanitizer, with a workspace that 64 threads do not fit into:
// fewer run, and own more rows each. The last one writes to the end of the memory that was asked for. Compared with one
// thread.
#include <cmath>
#include <cstdio>
#include <vector>

#include "../../csrc/cpu/api.h"

namespace {

using namespace cacr;

const int64_t kPairs = 64;  // units of work: one for each thread

template <class T>
std::vector<T> numbers(int64_t count, double size) {
  std::vector<T> x(count);
  uint32_t state = 1;
  for (T& one : x) state = state * 1664525u + 1013904223u, one = T(size * (state / 4294967296.0 - 0.5));
  return x;
}

Parallel parallel(int64_t threads) {
  return {threads, [](int64_t n, void (*body)(void*, int64_t), void* arg) {
            for (int64_t i = 0; i < n; i++) body(arg, i);
          }};
}

// Gradients of `contrast` with N queries and M keys, all of them or those of one side.
template <class T>
std::vector<T> gradients(int64_t N, int64_t M, int64_t D, bool want_dq, bool want_dk, int64_t threads) {
  const std::vector<T> q = numbers<T>(N * D, 1 / std::sqrt(double(D))), k = numbers<T>(M * D, 1 / std::sqrt(double(D)));
  const std::vector<int64_t> view(kPairs, 0);
  Contrast<T> p{};
  p.q = q.data(), p.k = k.data(), p.q_row_stride = p.k_row_stride = D;
  p.q_views = p.k_views = 1, p.N = N, p.M = M, p.D = D;
  p.pairs = kPairs, p.q_index = p.k_index = view.data();
  p.softmaxes = 1, p.kind[0] = kAll, p.tau[0] = -1.5;
  std::vector<double> rows[5];
  for (auto& row : rows) row.assign(kPairs * N, 0.0);
  std::vector<double> ones(kPairs * N, 1.0), zeros(kPairs * N, 0.0);
  const RowState<double> state{rows[2].data(), rows[3].data(), rows[4].data()};
  contrast_forward<T>(p, {rows[0].data(), rows[1].data(), nullptr, state}, parallel(threads));
  std::vector<T> found((want_dq ? N * D : 0) + (want_dk ? M * D : 0));
  T* const dk = want_dk ? found.data() + (want_dq ? N * D : 0) : nullptr;
  const BackwardRows back{rows[0].data(), {state.top, state.sum, state.delta}, ones.data(), zeros.data(), false};
  contrast_backward<T>(p, back, {want_dq ? found.data() : nullptr, dk, nullptr}, parallel(threads));
  return found;
}

template <class T>
bool agrees(int64_t N, int64_t M, int64_t D, bool want_dq, bool want_dk, double tolerance) {
  const auto one = gradients<T>(N, M, D, want_dq, want_dk, 1), many = gradients<T>(N, M, D, want_dq, want_dk, 64);
  double error = 0, size = 0;
  for (size_t i = 0; i < one.size(); i++) {
    error = std::fmax(error, std::fabs(double(one[i]) - double(many[i])));
    size = std::fmax(size, std::fabs(double(one[i])));
  }
  return size > 0 && error <= tolerance * size;
}

}  // namespace

int main() {
  int failures = 0, checks = 0;
  for (const bool want_dq : {false, true})
    for (const bool want_dk : {false, true})
      for (const int64_t D : {700, 1029}) {
        if (!want_dq && !want_dk) continue;
        failures += !agrees<float>(3, 257, D, want_dq, want_dk, 1e-5);
        failures += !agrees<double>(3, 257, D, want_dq, want_dk, 1e-13);
        checks += 2;
      }
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
