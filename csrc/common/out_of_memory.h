// What a failed allocation throws, with the bytes asked for; Python makes a MemoryError of it.
#pragma once

#include <cstdint>
#include <new>
#include <string>

namespace cacr {

class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(uint64_t bytes)
      : message_("cacr_kernels: out of memory: tried to allocate " + std::to_string(bytes) + " bytes") {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

}  // namespace cacr
