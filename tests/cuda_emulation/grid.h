// A launch: starts blocks, switches between their threads, and says who waits where when nobody can go on.
#pragma once

#include <algorithm>

#include "scheduler.h"
#include "shared_memory.h"

namespace cuda_emulation {

struct Grid {
  dim3 size, block_size;
  size_t shared_bytes = 0;
  bool cooperative = false;
  std::function<void()> kernel;
  Scheduler scheduler{options.seed};
  std::vector<std::unique_ptr<Block>> resident, finished;
  Barrier barrier;
  Fiber host;
  std::exception_ptr error;
  char sanitizer_object = 0;
  char fence_object = 0;

  int blocks() const { return static_cast<int>(size.x * size.y * size.z); }
  int block_threads() const { return static_cast<int>(block_size.x * block_size.y * block_size.z); }
};

inline std::string describe(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

[[noreturn]] inline void fail(const std::string& message) {
  throw Error(message + " [block " + describe(current->block->index) + ", thread " + std::to_string(current->rank) +
              "]");
}

// ---- switching ------------------------------------------------------------------------------------------------------
inline void make_ready(Thread& thread) {
  thread.warp->ready |= 1u << thread.lane;
  thread.wait.operation = nullptr;
}

// Lets others run. The caller has arranged for somebody to make it ready again, or is ready.
inline void give_way() {
  Thread* self = current;
  Thread* next = self->block->grid->scheduler.next();
  if (next == self) return;
  current = next;
  self->fiber.switch_to(next != nullptr ? next->fiber : self->block->grid->host);
}

inline void wait_in(const Wait& wait) {
  current->wait = wait;
  give_way();
}

// A place where a thread may be interrupted, although it has nothing to wait for.
inline void pause_point() {
  const sanitizers::Unobserved unobserved;
  if (!current->block->grid->scheduler.pauses_here()) return;
  make_ready(*current);
  give_way();
}

// ---- life of a thread -----------------------------------------------------------------------------------------------
inline void complete(Barrier& barrier);  // barriers.h

inline void thread_exits(Thread& thread) {
  Block& block = *thread.block;
  thread.exited = true;
  thread.warp->live &= ~(1u << thread.lane);
  block.live--;  // exited threads do not count at __syncthreads()
  if (block.live > 0 && static_cast<int>(block.barrier.waiting.size()) == block.live) complete(block.barrier);
}

inline void thread_main() {
  Thread* self = current;
  self->fiber.arrived();
  Grid& grid = *self->block->grid;
  try {
    grid.kernel();
  } catch (...) {
    const sanitizers::Unobserved unobserved;
    grid.error = std::current_exception();
  }
  sanitizers::release(&grid.sanitizer_object);
  Fiber* next = &grid.host;
  {
    const sanitizers::Unobserved unobserved;
    thread_exits(*self);
    const bool to_host = grid.error != nullptr || self->block->live == 0;
    current = to_host ? nullptr : grid.scheduler.next();
    if (current != nullptr) next = &current->fiber;
  }
  self->fiber.switch_to(*next, true);
  __builtin_unreachable();
}

// ---- life of a block ------------------------------------------------------------------------------------------------
inline void start_block(Grid& grid, int rank) {
  auto block = std::make_unique<Block>();
  const int threads = grid.block_threads();
  const auto place = [](int i, const dim3& size) {
    const unsigned u = static_cast<unsigned>(i);
    return uint3{u % size.x, u / size.x % size.y, u / size.x / size.y};
  };
  block->index = place(rank, grid.size);
  block->grid = &grid;
  block->live = threads;
  block->warps = std::vector<Warp>((threads + 31) / 32);
  allocate(block->shared, grid.shared_bytes);
  for (int i = 0; i < threads; i++) {
    auto thread = std::make_unique<Thread>();
    Warp& warp = block->warps[i / 32];
    thread->block = block.get();
    thread->warp = &warp;
    thread->rank = i;
    thread->lane = i % 32;
    thread->index = place(i, grid.block_size);
    thread->fiber.prepare(thread_main);
    warp.block = block.get();
    warp.lane[i % 32] = thread.get();
    warp.live |= 1u << i % 32;
    block->threads.push_back(std::move(thread));
  }
  for (Warp& warp : block->warps) warp.ready = warp.live;
  grid.scheduler.enlist(*block);
  grid.resident.push_back(std::move(block));
}

// Takes away the blocks whose threads have all exited. Under the thread sanitizer their stacks and shared memory are
// kept until the launch is over: memory used again would look like a race with the block that had it before.
inline void retire_blocks(Grid& grid) {
  for (auto& block : grid.resident) {
    if (block->live > 0) continue;
    grid.scheduler.dismiss(*block);
    check_redzones(block->shared);
    if (sanitizers::kThreads) grid.finished.push_back(std::move(block));
    block.reset();
  }
  std::erase(grid.resident, nullptr);
}

// "block (0, 0, 0): threads 0-31 wait in __syncthreads at kernel.cuh:12; threads 32-63 have exited", for every block.
inline std::string describe_waiting(const Grid& grid) {
  std::string text;
  for (const auto& block : grid.resident) {
    std::string separator = (text.empty() ? "block " : "\nblock ") + describe(block->index) + ": ";
    const auto state = [&](size_t i) {
      const Thread& thread = *block->threads[i];
      if (thread.exited) return std::string("have exited");
      return "wait in " + (thread.wait.operation != nullptr ? thread.wait.describe() : std::string("nothing"));
    };
    for (size_t first = 0, next = 0; first < block->threads.size(); first = next) {
      while (next < block->threads.size() && state(next) == state(first)) next++;
      text += separator + "threads " + std::to_string(first) + "-" + std::to_string(next - 1) + " " + state(first);
      separator = "; ";
    }
  }
  return text;
}

// Runs threads until nobody is ready or a block has finished.
inline void run_resident(Grid& grid) {
  current = grid.scheduler.next();
  if (current == nullptr) throw Error("deadlock: nobody can go on\n" + describe_waiting(grid));
  grid.host.switch_to(current->fiber);
  current = nullptr;
  if (grid.error != nullptr) std::rethrow_exception(grid.error);
  retire_blocks(grid);
}

inline void run(Grid& grid) {
  if (grid.blocks() < 1 || grid.block_threads() < 1 || grid.block_threads() > 1024 || grid.shared_bytes > (1u << 20))
    throw Error("a launch that no device accepts");
  std::vector<int> order(grid.blocks());
  Random& random = grid.scheduler.random;
  for (int i = 0; i < grid.blocks(); i++) order[i] = i;
  for (int i = grid.blocks() - 1; i > 0 && options.seed != 0; i--) std::swap(order[i], order[random.below(i + 1)]);
  const size_t room = grid.cooperative ? order.size() : options.seed == 0 ? 1 : 1 + random.below(3);
  size_t started = 0;
  while (started < order.size() || !grid.resident.empty()) {
    while (started < order.size() && grid.resident.size() < room) start_block(grid, order[started++]);
    run_resident(grid);
  }
}

inline void launch(dim3 size, dim3 block_size, size_t shared_bytes, std::function<void()> kernel,
                   bool cooperative = false) {
  const auto grid = std::make_unique<Grid>();
  grid->size = size;
  grid->block_size = block_size;
  grid->shared_bytes = shared_bytes;
  grid->cooperative = cooperative;
  grid->kernel = std::move(kernel);
  grid->host.adopt_caller();
  const sanitizers::Unobserved unobserved;
  struct Finally {
    Grid& grid;
    ~Finally() {
      current = nullptr;
      sanitizers::acquire(&grid.sanitizer_object);
    }
  } finally{*grid};
  run(*grid);
}

inline void launch_cooperative(dim3 size, dim3 block_size, size_t shared_bytes, std::function<void()> kernel) {
  if (static_cast<int>(size.x * size.y * size.z) > options.resident_blocks)
    throw Error("a cooperative grid of more blocks than can be resident");
  launch(size, block_size, shared_bytes, std::move(kernel), true);
}

inline bool has_room(dim3 size) {
  return options.room < 0 || static_cast<int>(size.x * size.y * size.z) <= options.room;
}

inline int resident_blocks(int /*threads*/, size_t /*shared_bytes*/) { return options.resident_blocks; }

}  // namespace cuda_emulation
