// Work shared out over threads.
#pragma once

#include <cstdint>

#include "../api.h"

namespace cacr {

template <class F>
void parallel_for(const Parallel& parallel, int64_t n, F f) {
  if (n == 1 || parallel.threads == 1) {
    for (int64_t i = 0; i < n; i++) f(i);
    return;
  }
  parallel.run(n, [](void* arg, int64_t i) { (*static_cast<F*>(arg))(i); }, &f);
}

// Where the i-th of `parts` shares of n begins.
inline int64_t share(int64_t n, int64_t i, int64_t parts) { return n * i / parts; }

}  // namespace cacr
