// Tells the device what torch's own allocator gives away and takes back.
#include <c10/cuda/CUDACachingAllocator.h>

extern "C" void fake_block(int given, int device, uintptr_t address, size_t bytes, void* stream);

extern "C" __attribute__((visibility("default"))) void fake_watch_allocations() {
  using c10::CachingDeviceAllocator::TraceEntry;
  c10::cuda::CUDACachingAllocator::attachAllocatorTraceTracker([](const TraceEntry& entry) {
    const bool given = entry.action_ == TraceEntry::ALLOC;
    if (given || entry.action_ == TraceEntry::FREE_COMPLETED)
      fake_block(given, entry.device_, entry.addr_, entry.size_, entry.stream_);
  });
}
