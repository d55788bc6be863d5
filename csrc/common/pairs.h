// Pairs of views whose rows are queries and negatives of one another (cacr_kernels/reference.py, view_pairs).
#pragma once

#include <cstdint>
#include <vector>

#include "host_device.h"

namespace cacr {

enum class Pairing : int32_t {
  kUnordered = 0,  // x < y
  kOrdered = 1,    // x != y
  kPooled = 2      // the rows of all views are one set: a single pair of a view with itself
};
constexpr int kPairings = 3;

inline int64_t count_view_pairs(int64_t views, Pairing pairing) {
  if (pairing == Pairing::kPooled) return 1;
  return views * (views - 1) / (pairing == Pairing::kOrdered ? 1 : 2);
}

struct ViewPairs {
  std::vector<int64_t> q_index, k_index;  // [pairs] the views x of the queries and y of the keys
};

inline ViewPairs view_pairs(int64_t views, Pairing pairing) {
  if (pairing == Pairing::kPooled) return {{0}, {0}};
  ViewPairs pairs;
  for (int64_t x = 0; x < views; x++)
    for (int64_t y = pairing == Pairing::kOrdered ? 0 : x + 1; y < views; y++)
      if (x != y) pairs.q_index.push_back(x), pairs.k_index.push_back(y);
  return pairs;
}

// What each of `rows` rows in each of `groups` views or pairs counts in a mean that is multiplied by `factor`.
CACR_HOST_DEVICE double mean_weight(double factor, int64_t groups, int64_t rows) {
  return factor / (double(groups) * double(rows));
}

}  // namespace cacr
