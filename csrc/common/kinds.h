// Sets of keys: which keys j belong to the softmax of query i. The numbers are those of cacr_kernels/types.py.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace cacr {

enum Kind : int32_t {
  kAll = 0,          // every key
  kSame = 1,         // id_j == id_i
  kOther = 2,        // id_j != id_i
  kSameNotSelf = 3,  // id_j == id_i and key j is not query i itself
  kOtherNotSelf = 4  // id_j != id_i, neither is negative, and key j is not query i itself
};
constexpr int kKinds = 5;

constexpr int kMaxSoftmaxes = 2;  // of one row

// The kinds whose sets hold positives: keys with the id of the query.
CACR_HOST_DEVICE constexpr bool is_same(int kind) { return kind == kSame || kind == kSameNotSelf; }

// The kinds whose sets hold keys with another id.
CACR_HOST_DEVICE constexpr bool is_other(int kind) { return kind == kOther || kind == kOtherNotSelf; }

// The test for membership on bit masks, for many pairs of query and key at once. Each field has all bits set, or none.
template <class Word>
struct MembershipTest {
  Word flip, not_self, all;

  static CACR_HOST_DEVICE constexpr MembershipTest of(int kind) {
    const Word none = 0, every = Word(~none);
    return {is_other(kind) ? every : none, kind == kSameNotSelf || kind == kOtherNotSelf ? every : none,
            kind == kAll ? every : none};
  }

  // same: the bits of the pairs whose ids are equal; self: of those that are one and the same row, and of those with
  // unequal ids of which one is negative. Mask: Word, or a vector of them.
  template <class Mask>
  CACR_HOST_DEVICE Mask members(const Mask& same, const Mask& self) const {
    return members(same, self, flip);
  }
  // flips: flip, by query.
  template <class Mask, class Flip>
  CACR_HOST_DEVICE Mask members(const Mask& same, const Mask& self, const Flip& flips) const {
    return ((same ^ flips) & ~(self & not_self)) | all;
  }
};

}  // namespace cacr
