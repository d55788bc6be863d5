// Sums over rows.
#pragma once

#include <cstdint>

namespace cacr {

// sum of row(i) over [from, to), pairwise: one chain over many rows would lose an eps for every few of them. The order
// depends on nothing but the rows.
template <class Row>
double sum_rows(int64_t from, int64_t to, const Row& row) {
  if (to - from > 8) {
    const int64_t middle = from + (to - from) / 2;
    return sum_rows(from, middle, row) + sum_rows(middle, to, row);
  }
  double sum = 0;
  for (int64_t i = from; i < to; i++) sum += row(i);
  return sum;
}

}  // namespace cacr
