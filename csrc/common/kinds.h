// Sets of keys: which keys j belong to the softmax of query i. The numbers are those of cacr_kernels/types.py.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace cacr {

enum Kind : int32_t {
  kAll = 0,         // every key
  kSame = 1,        // id_j == id_i
  kOther = 2,       // id_j != id_i
  kSameNotSelf = 3  // id_j == id_i and j != i
};

constexpr int kMaxSoftmaxes = 2;  // of one row

// The kinds whose sets hold positives: keys with the id of the query.
CACR_HOST_DEVICE constexpr bool is_same(int kind) { return kind == kSame || kind == kSameNotSelf; }

// The test for membership on bit masks, for many pairs of query and key at once. Each field has all bits set, or none.
template <class Word>
struct MembershipTest {
  Word flip, not_self, all;

  static CACR_HOST_DEVICE constexpr MembershipTest of(int kind) {
    const Word none = 0, every = Word(~none);
    return {kind == kOther ? every : none, kind == kSameNotSelf ? every : none, kind == kAll ? every : none};
  }

  // same: the bits of the pairs whose ids are equal; self: of those that are one and the same row. Mask: Word, or a
  // vector of them.
  template <class Mask>
  CACR_HOST_DEVICE Mask members(const Mask& same, const Mask& self) const {
    return ((same ^ flip) & ~(self & not_self)) | all;
  }
};

}  // namespace cacr
