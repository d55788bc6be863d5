// Memory of one call, and what is kept of it for the next.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../../common/out_of_memory.h"

#if defined(__SANITIZE_ADDRESS__)
#define CACR_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CACR_ASAN
#endif
#endif

namespace cacr {

// Chunks of finished calls, kept for the next ones of the same thread: memory fresh from the system costs a page fault
// for each 4 KiB, which is up to 6 % of a call (benchmarks/NOTES.md). Under ASan nothing is kept, so that it sees what
// is read too late.
class KeptChunks {
 public:
#if defined(CACR_ASAN)
  static constexpr size_t kMost = 0;
#else
  static constexpr size_t kMost = size_t(32) << 20;
#endif

  static KeptChunks& of_this_thread() {
    thread_local KeptChunks kept;
    return kept;
  }

  // At least so many bytes, aligned to a line of the cache; `bytes` becomes how many there are.
  void* take(size_t& bytes) {
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it)
      if (it->bytes >= bytes && it->bytes / 2 <= bytes && (best == free_.end() || it->bytes < best->bytes)) best = it;
    if (best == free_.end()) return std::aligned_alloc(64, bytes);
    const Chunk found = *best;
    free_.erase(best), kept_ -= found.bytes;
    bytes = found.bytes;
    return found.data;
  }

  // Forgets the oldest where it would be too much.
  void give(void* data, size_t bytes) noexcept {
    if (bytes > kMost) return std::free(data);
    try {
      free_.push_back({data, bytes}), kept_ += bytes;
    } catch (const std::bad_alloc&) {
      std::free(data);
    }
    while (kept_ > kMost) std::free(free_.front().data), kept_ -= free_.front().bytes, free_.erase(free_.begin());
  }

  ~KeptChunks() {
    for (const Chunk& chunk : free_) std::free(chunk.data);
  }

 private:
  struct Chunk {
    void* data;
    size_t bytes;
  };
  std::vector<Chunk> free_;
  size_t kept_ = 0;
};

// Aligned memory that lives as long as one call, cut from chunks: a small problem allocates once.
class Workspace {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (std::max<size_t>(1, size_t(count) * sizeof(T)) + 63) / 64 * 64;
    if (bytes > kChunk / 4 && bytes > left_) return static_cast<T*>(chunk(bytes));
    if (bytes > left_) at_ = static_cast<char*>(chunk(kChunk)), left_ = kChunk;
    char* p = at_;
    at_ += bytes, left_ -= bytes;
    return reinterpret_cast<T*>(p);
  }
  template <class T>
  T* zeros(int64_t count) {
    T* p = get<T>(count);
    std::memset(static_cast<void*>(p), 0, size_t(count) * sizeof(T));
    return p;
  }

 private:
  static constexpr size_t kChunk = size_t(96) << 10;

  void* chunk(size_t bytes) {
    void* p = KeptChunks::of_this_thread().take(bytes);
    if (!p) throw OutOfMemory(bytes);
    chunks_.emplace_back(p, GiveBack{bytes});
    return p;
  }

  struct GiveBack {
    size_t bytes;
    void operator()(void* p) const { KeptChunks::of_this_thread().give(p, bytes); }
  };
  std::vector<std::unique_ptr<void, GiveBack>> chunks_;
  char* at_ = nullptr;
  size_t left_ = 0;
};

// `bytes` of scratch memory for each of some threads.
struct ThreadScratch {
  char* base;
  size_t bytes;

  static ThreadScratch get(Workspace& memory, size_t bytes, int64_t threads) {
    return {memory.get<char>(int64_t(bytes) * threads), bytes};
  }
  char* of(int64_t thread) const { return base + size_t(thread) * bytes; }
};

}  // namespace cacr
