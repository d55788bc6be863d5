// Barriers of blocks and grids, and meetings of the lanes of a warp.
#pragma once

#include "grid.h"

namespace cuda_emulation {

// ---- barriers -------------------------------------------------------------------------------------------------------
inline void complete(Barrier& barrier) {
  barrier.last_sum = barrier.sum;
  barrier.last_size = static_cast<int>(barrier.waiting.size());
  barrier.sum = 0;
  barrier.round++;
  for (Thread* thread : barrier.waiting) make_ready(*thread);
  barrier.waiting.clear();
}

struct Crossing {
  int sum, threads;  // of what the threads brought, and how many they were
};

// The running thread brings `value` and waits until `expected` threads are there.
inline Crossing cross(Barrier& barrier, size_t expected, const Wait& wait, int value = 0) {
  char* object = &barrier.sanitizer_object[barrier.round % 2];
  sanitizers::release(object);
  {
    const sanitizers::Unobserved unobserved;
    if (!barrier.waiting.empty() && !same_site(barrier.wait.site, wait.site))
      fail("divergent barrier: " + wait.describe() + ", while others wait in " + barrier.wait.describe());
    barrier.wait = wait;
    barrier.sum += value;
    barrier.waiting.push_back(current);
    current->wait = wait;
    if (barrier.waiting.size() == expected) complete(barrier);
    give_way();
  }
  sanitizers::acquire(object);
  return {barrier.last_sum, barrier.last_size};
}

inline Crossing block_sync(const Wait& wait, int value = 0) {
  if (left_out(wait)) return {value, 1};
  return cross(current->block->barrier, current->block->live, wait, value);
}

inline void grid_sync(const Site& site) {
  Grid& grid = *current->block->grid;
  if (!grid.cooperative) fail("grid_sync in a launch that is not cooperative");
  if (left_out({"grid_sync", site})) return;
  cross(grid.barrier, static_cast<size_t>(grid.blocks()) * grid.block_threads(), {"grid_sync", site});
}

// ---- warps ----------------------------------------------------------------------------------------------------------
// Where the lanes of `mask` meet: the meeting that has begun, or a free one.
inline Meeting& find_meeting(Warp& warp, uint32_t mask, const Wait& wait) {
  Meeting* free = nullptr;
  for (Meeting& meeting : warp.meetings) {
    if (meeting.arrived == 0) {
      free = &meeting;
    } else if (meeting.mask == mask) {
      if (!same_site(meeting.wait.site, wait.site) || std::string_view(meeting.wait.operation) != wait.operation)
        fail("divergent warp: " + wait.describe() + ", while others wait in " + meeting.wait.describe());
      return meeting;
    } else if ((meeting.mask & mask) != 0) {
      fail("overlapping masks: " + wait.describe() + ", while others wait in " + meeting.wait.describe());
    }
  }
  if (free == nullptr) fail("more groups of lanes in one warp than the emulation provides for: " + wait.describe());
  free->mask = mask;
  free->wait = wait;
  return *free;
}

inline void check_mask(uint32_t mask, const Wait& wait) {
  if ((mask >> current->lane & 1) == 0) fail(wait.describe() + ": the calling lane is not in its mask");
  if ((mask & ~current->warp->live) != 0)
    fail(wait.describe() + ": the mask names lanes that have exited or never were");
}

// All lanes of `mask` call it; the last to arrive calls function(arguments of the 32 lanes), null outside `mask`.
template <bool kOrdersMemory = false, class Argument, class Function>
void meet(uint32_t mask, const Wait& wait, Argument& argument, Function function) {
  char* object = nullptr;
  {
    const sanitizers::Unobserved unobserved;
    check_mask(mask, wait);
    Meeting& meeting = find_meeting(*current->warp, mask, wait);
    meeting.argument[current->lane] = &argument;
    meeting.arrived |= 1u << current->lane;
    if (kOrdersMemory) sanitizers::release(object = &meeting.sanitizer_object[meeting.round % 2]);
    current->wait = wait;
    if (meeting.arrived == mask) {
      Argument* arguments[32] = {};
      for (int l = 0; l < 32; l++)
        if (mask >> l & 1) arguments[l] = static_cast<Argument*>(meeting.argument[l]);
      function(arguments);
      meeting.arrived = 0;
      meeting.round++;
      current->warp->ready |= mask;
    }
    give_way();
    current->wait.operation = nullptr;
  }
  if (kOrdersMemory) sanitizers::acquire(object);
}

inline void warp_sync(uint32_t mask, const Site& site) {
  struct Nothing {
  } nothing;
  if (left_out({"__syncwarp", site})) return;
  meet<true>(mask, {"__syncwarp", site}, nothing, [](Nothing* const*) {});
}

// ---- fences ---------------------------------------------------------------------------------------------------------
// Memory is never reordered here, so a fence is a place to be interrupted. For the thread sanitizer everybody who calls
// one knows what the callers before knew, as in "write, fence, count; who counts last fences and reads".
inline void fence() {
  pause_point();
  Grid& grid = *current->block->grid;
  sanitizers::release(&grid.fence_object);
  sanitizers::acquire(&grid.fence_object);
}

}  // namespace cuda_emulation
