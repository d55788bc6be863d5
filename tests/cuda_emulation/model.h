// The execution model as data: grids of blocks of warps of threads, and who waits for whom.
//
// One thread of the operating system runs everything; every CUDA thread is a fiber, which gives way where it waits for
// others and at random points between. `current` is the thread that runs.
#pragma once

#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace cuda_emulation {

using Site = std::source_location;

inline bool same_site(const Site& a, const Site& b) {
  return a.line() == b.line() && std::string_view(a.file_name()) == b.file_name();
}

// What a thread waits in.
struct Wait {
  const char* operation = nullptr;
  Site site;

  std::string place() const {
    const std::string_view file = site.file_name();
    return std::string(file.substr(file.rfind('/') + 1)) + ":" + std::to_string(site.line());
  }
  std::string describe() const { return operation + (" at " + place()); }
};

// A kernel did what CUDA forbids or leaves undefined.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// How tensor cores add up float32 (tensor_cores.h).
enum class Sums { kTruncated, kNearest };

// What may differ from launch to launch though the program is the same.
struct Options {
  uint64_t seed = 0;        // of the schedule, and of when copies are made
  int resident_blocks = 4;  // what launch.cuh is told
  int room = -1;            // how many blocks of a cooperative launch there is room for, after all; -1: for all
  Sums sums = Sums::kTruncated;
  std::string left_out;  // "kernel.cuh:12": the barrier or wait in this line does nothing, as if it were forgotten
};
inline Options options;

inline bool left_out(const Wait& wait) { return !options.left_out.empty() && wait.place() == options.left_out; }

class Random {  // xorshift64*
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x1234567u) {}
  uint32_t below(uint32_t n) {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>((state_ * 0x2545f4914f6cdd1du) >> 33) % n;
  }

 private:
  uint64_t state_;
};

struct Warp;
struct Block;
struct Grid;

// A cp.async under way (cp_async.h).
struct Copy {
  char* target;
  const char* source;
  int bytes, valid;
  bool done;
};
struct Copies {
  std::deque<Copy> pending;
  std::deque<size_t> groups;  // sizes of the committed groups
  size_t uncommitted = 0;
};

struct Thread {
  Fiber fiber;
  Warp* warp = nullptr;
  Block* block = nullptr;
  int rank = 0;  // in its block
  int lane = 0;
  uint3 index{};
  bool exited = false;
  Wait wait;
  Copies copies;
};

// Lanes that meet in an operation of their warp. All arguments are there when the last one arrives, who computes.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  Wait wait;
  void* argument[32] = {};
  unsigned round = 0;
  char sanitizer_object[2] = {};  // of even and odd rounds: who is late must not learn what the next round brings
};

struct Warp {
  Block* block = nullptr;
  Thread* lane[32] = {};
  uint32_t live = 0, ready = 0;  // lanes
  uint32_t priority = 0;
  Meeting meetings[4];
};

struct Barrier {
  std::vector<Thread*> waiting;
  Wait wait;
  int sum = 0;                      // of what the threads brought
  int last_sum = 0, last_size = 0;  // of the round that was completed last
  unsigned round = 0;
  char sanitizer_object[2] = {};  // as above
};

struct ByteRange {
  char *begin, *end;
};

struct SharedMemory {
  std::unique_ptr<char[]> storage;
  char* begin = nullptr;
  size_t bytes = 0;
  const void* layout = nullptr;  // identifies the struct that lives there
  std::vector<ByteRange> redzones;
};

struct Block {
  uint3 index{};
  Grid* grid = nullptr;
  int live = 0;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  SharedMemory shared;
};

inline Thread* current = nullptr;

[[noreturn]] inline void fail(const std::string& message);

}  // namespace cuda_emulation
