// Memory of one call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../../common/out_of_memory.h"

namespace cacr {

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
    void* p = std::aligned_alloc(64, bytes);
    if (!p) throw OutOfMemory(bytes);
    chunks_.emplace_back(p);
    return p;
  }

  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::vector<std::unique_ptr<void, Free>> chunks_;
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
