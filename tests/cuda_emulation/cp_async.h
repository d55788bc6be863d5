// cp.async: copies that are under way until the thread that issued them has waited for their group.
//
// Nothing is known of the target in between. So a copy is made at once, or the target is filled with NaN until the
// wait, at random: whoever reads too early, or overwrites what is still read, finds the wrong bytes in one case or the
// other.
#pragma once

#include "grid.h"

namespace cuda_emulation {

inline void make_copy(const Copy& copy) {
  sanitizers::note_read(copy.source, copy.valid);
  sanitizers::note_write(copy.target, copy.bytes);
  std::memcpy(copy.target, copy.source, copy.valid);
  std::memset(copy.target + copy.valid, 0, copy.bytes - copy.valid);
}

template <int kBytes>
void cp_async(const char* target, const void* source, int valid, const Site& site) {
  pause_point();
  Copy copy{const_cast<char*>(target), static_cast<const char*>(source), kBytes, valid, false};
  {
    const sanitizers::Unobserved unobserved;
    check_shared("cp_async", site, target, kBytes);
    const auto refuse = [&](const std::string& why) { fail(Wait{"cp_async", site}.describe() + ": " + why); };
    if (reinterpret_cast<uintptr_t>(source) % kBytes != 0) refuse("misaligned source");
    if (valid < 0 || valid > kBytes) refuse(std::to_string(valid) + " valid bytes");
    copy.done = current->block->grid->scheduler.random.below(2) == 1;
    current->copies.pending.push_back(copy);
    current->copies.uncommitted++;
  }
  if (copy.done) {
    make_copy(copy);
  } else {
    sanitizers::note_write(copy.target, kBytes);
    std::memset(copy.target, kPoison, kBytes);
  }
}

inline void cp_async_commit() {
  const sanitizers::Unobserved unobserved;
  Copies& copies = current->copies;
  copies.groups.push_back(copies.uncommitted);
  copies.uncommitted = 0;
}

inline void cp_async_wait(size_t most_pending, const Site& site) {
  if (left_out({"cp_async_wait", site})) return;
  Copies& copies = current->copies;
  while (copies.groups.size() > most_pending) {
    for (; copies.groups.front() > 0; copies.groups.front()--) {
      if (!copies.pending.front().done) make_copy(copies.pending.front());
      copies.pending.pop_front();
    }
    copies.groups.pop_front();
  }
}

}  // namespace cuda_emulation
