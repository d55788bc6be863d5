// Shared memory of a block: exactly as many bytes as were asked for, NaN until written, with redzones around every
// buffer. A wrong index is found by SharedArray, a wrong pointer by the address sanitizer, a wrong address given to
// ldmatrix or cp.async by check_shared(), and what else writes beyond a buffer when the block ends.
#pragma once

#include <cstring>
#include <new>

#include "model.h"

namespace cuda_emulation {

inline constexpr size_t kRedzone = 128;  // also the alignment of every buffer
inline constexpr int kPoison = 0xff;     // a NaN in every floating-point format
inline constexpr char kUntouched = 0x5a;

inline void pause_point();

inline void forget_layout(SharedMemory& shared) {
  shared.redzones = {{shared.begin - kRedzone, shared.begin},
                     {shared.begin + shared.bytes, shared.begin + shared.bytes + kRedzone}};
}

// Everything is unwritten, and the redzones are closed.
inline void poison(SharedMemory& shared) {
  std::memset(shared.begin, kPoison, shared.bytes);
  for (const ByteRange& zone : shared.redzones) {
    std::memset(zone.begin, kUntouched, zone.end - zone.begin);
    sanitizers::forbid(zone.begin, zone.end - zone.begin);
  }
}

inline void allocate(SharedMemory& shared, size_t bytes) {
  shared.storage = std::make_unique<char[]>(bytes + 3 * kRedzone);
  const uintptr_t address = reinterpret_cast<uintptr_t>(shared.storage.get());
  shared.begin = shared.storage.get() + (kRedzone - address % kRedzone) + kRedzone;
  shared.bytes = bytes;
  forget_layout(shared);
  poison(shared);
}

// Whether nobody has written between the buffers; they may be written from here on.
inline void check_redzones(SharedMemory& shared) {
  sanitizers::permit(shared.storage.get(), shared.bytes + 3 * kRedzone);
  for (const ByteRange& zone : shared.redzones)
    for (const char* p = zone.begin; p < zone.end; p++)
      if (*p != kUntouched)
        throw Error("byte " + std::to_string(p - shared.begin) + " of shared memory, outside all buffers, was written");
}

// An access of the running thread to shared memory by address.
inline void check_shared(const char* operation, const Site& site, const char* address, size_t bytes) {
  const SharedMemory& shared = current->block->shared;
  const auto refuse = [&](const char* why) { fail(Wait{operation, site}.describe() + ": " + why); };
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) refuse("misaligned address in shared memory");
  for (const ByteRange& zone : shared.redzones)
    if (address < zone.end && address + bytes > zone.begin) refuse("address beyond a buffer of shared memory");
  if (address < shared.begin || address + bytes > shared.begin + shared.bytes) refuse("address outside shared memory");
}

template <class T, int kSize>
class alignas(kRedzone) SharedArray {
 public:
  SharedArray() {
    current->block->shared.redzones.push_back(
        {reinterpret_cast<char*>(data_ + kSize), reinterpret_cast<char*>(this) + sizeof(*this)});
  }
  SharedArray(const SharedArray&) = delete;
  SharedArray& operator=(const SharedArray&) = delete;

  T& operator[](int i) { return data_[checked(i)]; }
  const T& operator[](int i) const { return data_[checked(i)]; }

 private:
  static int checked(int i) {
    pause_point();
    if (i < 0 || i >= kSize)
      fail("index " + std::to_string(i) + " in a shared array of " + std::to_string(kSize) + " elements");
    return i;
  }

  T data_[kSize];
  char redzone_[kRedzone];
};

// The first thread of a block to ask for a struct begins its life.
template <class Buffers>
Buffers& shared_memory() {
  static const char layout = 0;
  const sanitizers::Unobserved unobserved;
  SharedMemory& shared = current->block->shared;
  if (sizeof(Buffers) > shared.bytes)
    fail("the launch gives " + std::to_string(shared.bytes) + " bytes of shared memory, the kernel's buffers are " +
         std::to_string(sizeof(Buffers)));
  if (shared.layout != &layout) {
    check_redzones(shared);
    forget_layout(shared);
    new (shared.begin) Buffers;
    poison(shared);
    shared.layout = &layout;
  }
  return *std::launder(reinterpret_cast<Buffers*>(shared.begin));
}

}  // namespace cuda_emulation
