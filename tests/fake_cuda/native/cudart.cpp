// Stands in for libcudart by LD_PRELOAD: what torch calls of it, on the devices of device.h.
//
// Kernels of torch itself cannot run here: a launch of one is an error. tests/fake_cuda/aten.py gives its operators
// other implementations, so that none is made.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>

#include "device.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

using namespace fake_cuda;

constexpr int kMajor = 8, kMinor = 0, kProcessors = 108;  // an A100: what tests/ptx can run is code for sm_80
constexpr size_t kMemory = size_t{8} << 30;
thread_local int current = 0;
thread_local int last_error = kSuccess;

cudaError_t say(int error) {
  if (error != kSuccess && error != kNotReady) last_error = error;
  return cudaError_t(error);
}
Stream& stream_here(cudaStream_t handle) { return *stream_of(handle, current); }
Point end_of(Stream& stream) {
  const std::lock_guard lock(device().mutex);
  return {&stream, stream.submitted};
}
Event& event_of(cudaEvent_t event) { return *reinterpret_cast<Event*>(event); }

int submit_here(cudaStream_t handle, Work work) { return submit(stream_here(handle), std::move(work)); }

// A copy, in the order of the stream; memory of the host that is not pinned is read at once, and written before the
// call is over.
int copy_async(void* target, const void* source, size_t bytes, cudaStream_t handle) {
  if (!bytes) return kSuccess;
  const auto to = reinterpret_cast<uintptr_t>(target), from = reinterpret_cast<uintptr_t>(source);
  Stream& stream = stream_here(handle);
  const bool reads_host = !on_device(from) && !is_pinned(from), writes_host = !on_device(to) && !is_pinned(to);
  if ((reads_host || writes_host) && is_capturing(stream)) return kCaptureUnsupported;
  std::string kept;
  if (reads_host) kept.assign(static_cast<const char*>(source), bytes);
  const int error = submit(stream, [=, kept = std::move(kept)] {
    std::memcpy(target, kept.empty() ? source : kept.data(), bytes);
    return std::string();
  });
  return error || !writes_host ? error : wait_until(end_of(stream));
}

int copy_now(void* target, const void* source, size_t bytes) {
  if (const int error = forbidden_while_capturing()) return error;
  const int error = copy_async(target, source, bytes, nullptr);
  return error ? error : wait_until(end_of(stream_here(nullptr)));
}

int fill_async(void* target, int value, size_t bytes, cudaStream_t handle) {
  return submit_here(handle, [=] { return std::memset(target, value, bytes), std::string(); });
}

int attribute(cudaDeviceAttr which) {
  switch (which) {
    case cudaDevAttrMultiProcessorCount:
      return kProcessors;
    case cudaDevAttrComputeCapabilityMajor:
      return kMajor;
    case cudaDevAttrComputeCapabilityMinor:
      return kMinor;
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrUnifiedAddressing:
      return 1;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return 163 * 1024;
    case cudaDevAttrWarpSize:
      return 32;
    default:
      return 0;
  }
}

}  // namespace

// ---- devices --------------------------------------------------------------------------------------------------------
API cudaError_t cudaGetDeviceCount(int* count) { return *count = kDevices, cudaSuccess; }
API cudaError_t cudaGetDevice(int* number) { return *number = current, cudaSuccess; }
API cudaError_t cudaSetDevice(int number) {
  if (number < 0 || number >= kDevices) return say(kInvalidDevice);
  return current = number, say(device().sticky);
}
API cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
API cudaError_t cudaGetLastError() {
  const int sticky = device().sticky, error = sticky ? sticky : last_error;
  return last_error = kSuccess, cudaError_t(error);
}
API cudaError_t cudaPeekAtLastError() { return cudaError_t(device().sticky ? device().sticky : last_error); }
API const char* cudaGetErrorName(cudaError_t error) { return error ? "an error of the fake CUDA" : "cudaSuccess"; }
API const char* cudaGetErrorString(cudaError_t error) {
  switch (int(error)) {
    case kSuccess:
      return "no error";
    case kInvalidDevice:
      return "invalid device ordinal";
    case kInvalidHandle:
      return "invalid resource handle";
    case kIllegalAddress:
      return "an illegal memory access was encountered";
    case kLaunchFailure:
      return "unspecified launch failure";
    case kNotSupported:
      return "operation not supported: the fake CUDA has no kernels of torch";
    case kCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case kCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case kCaptureUnjoined:
      return "capturing stream has unjoined work";
    case kCaptureImplicit:
      return "dependency created on uncaptured work in another stream";
    default:
      return "an error of the fake CUDA";
  }
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = {};
  strcpy(p->name, "Fake A100");
  p->major = kMajor, p->minor = kMinor, p->multiProcessorCount = kProcessors, p->totalGlobalMem = kMemory;
  p->warpSize = 32, p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
  p->sharedMemPerBlock = 48 * 1024, p->sharedMemPerBlockOptin = 163 * 1024, p->sharedMemPerMultiprocessor = 164 * 1024;
  p->regsPerMultiprocessor = p->regsPerBlock = 65536, p->l2CacheSize = 40 << 20;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->unifiedAddressing = p->cooperativeLaunch = p->concurrentKernels = 1;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return *value = attribute(which), cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int number) {
  return snprintf(text, size_t(length), "0000:0%d:00.0", number + 1), cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* value, int, int) { return *value = 0, cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize() {
  if (const int error = forbidden_while_capturing()) return say(error);
  return say(synchronize_all(current));
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** found, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
  *found = nullptr;
  if (result) *result = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// ---- memory ---------------------------------------------------------------------------------------------------------
API cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (const int error = forbidden_while_capturing()) return say(error);
  *memory = bytes > kMemory ? nullptr : allocate_segment(bytes, current);
  return say(*memory ? device().sticky : kOutOfMemory);
}
API cudaError_t cudaFree(void* memory) { return say(free_segment(memory)); }
API cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
  const std::lock_guard lock(device().mutex);
  device().pinned[reinterpret_cast<uintptr_t>(*memory)] = bytes;
  return cudaSuccess;
}
API cudaError_t cudaFreeHost(void* memory) {
  const std::lock_guard lock(device().mutex);
  device().pinned.erase(reinterpret_cast<uintptr_t>(memory));  // and kept: work may be under way that uses it
  return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) { return *free = *total = kMemory, cudaSuccess; }
API cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind) {
  return say(copy_now(target, source, bytes));
}
API cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return say(copy_async(target, source, bytes, stream));
}
API cudaError_t cudaMemcpyPeerAsync(void* target, int, const void* source, int, size_t bytes, cudaStream_t stream) {
  return say(copy_async(target, source, bytes, stream));
}
API cudaError_t cudaMemset(void* target, int value, size_t bytes) { return say(fill_async(target, value, bytes, 0)); }
API cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t stream) {
  return say(fill_async(target, value, bytes, stream));
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* about, const void* memory) {
  *about = {};
  const auto address = reinterpret_cast<uintptr_t>(memory);
  if (on_device(address, &about->device)) {
    about->type = cudaMemoryTypeDevice, about->devicePointer = const_cast<void*>(memory);
  } else {
    about->type = is_pinned(address) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    about->hostPointer = const_cast<void*>(memory);
  }
  return cudaSuccess;
}

// ---- streams and events ---------------------------------------------------------------------------------------------
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  if (flags != cudaStreamNonBlocking) return say(kNotSupported);  // those that wait for the default stream
  return *stream = reinterpret_cast<cudaStream_t>(new_stream(current)), cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (const int error = forbidden_while_capturing()) return say(error);
  return say(wait_until(end_of(stream_here(stream))));
}
API cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (is_capturing(stream_here(stream))) return say(kCaptureUnsupported);
  return say(passed(end_of(stream_here(stream))) ? device().sticky : kNotReady);
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return say(wait_event(stream_here(stream), event_of(event)));
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return say(submit_here(stream, [=] { return function(data), std::string(); }));
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  Event* made = new Event;
  made->device = current;
  return *event = reinterpret_cast<cudaEvent_t>(made), cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete &event_of(event), cudaSuccess; }
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return say(record(event_of(event), stream_here(stream)));
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
API cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (const int error = forbidden_while_capturing()) return say(error);
  return say(passed(event_of(event).point) ? device().sticky : kNotReady);
}
API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (const int error = forbidden_while_capturing()) return say(error);
  return say(wait_until(event_of(event).point));
}
API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  if (const int error = wait_until(event_of(to).point)) return say(error);
  return *milliseconds = float(1e3 * (*event_of(to).time - *event_of(from).time)), cudaSuccess;
}

// ---- graphs ---------------------------------------------------------------------------------------------------------
using Captured = std::shared_ptr<Graph>;
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return *mode = cudaStreamCaptureMode(exchange_capture_mode(*mode)), cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  return say(begin_capture(stream_here(stream), mode));
}
API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  auto* captured = new Captured;
  const int error = end_capture(stream_here(stream), captured);
  return *graph = reinterpret_cast<cudaGraph_t>(captured), say(error);
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = is_capturing(stream_here(stream)) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                         cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData**,
                                         size_t* count) {
  const Stream& stream = stream_here(handle);
  const std::lock_guard lock(device().mutex);
  *status = stream.capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id) *id = stream.capture ? stream.capture->id : 0;
  if (graph) *graph = nullptr;
  if (nodes) *nodes = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  return *count = (*reinterpret_cast<Captured*>(graph))->nodes.size(), cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  return *made = reinterpret_cast<cudaGraphExec_t>(new Captured(*reinterpret_cast<Captured*>(graph))), cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  return say(launch_graph(*reinterpret_cast<Captured*>(graph), stream_here(stream)));
}
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  return delete reinterpret_cast<Captured*>(graph), cudaSuccess;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete reinterpret_cast<Captured*>(graph), cudaSuccess; }

// ---- kernels of torch -----------------------------------------------------------------------------------------------
namespace {
cudaError_t refuse() {
  fprintf(stderr, "fake CUDA: a kernel of torch was launched; its operator is missing in tests/fake_cuda/aten.py\n");
  return say(kNotSupported);
}
}  // namespace
API cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return refuse(); }
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) { return refuse(); }
API cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) { return refuse(); }
API cudaError_t __cudaGetKernel(void** kernel, const void* function) {
  return *kernel = const_cast<void*>(function), cudaSuccess;
}
API unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* bytes, void* stream) {
  *grid = *block = {1, 1, 1}, *bytes = 0;
  return std::memset(stream, 0, sizeof(cudaStream_t)), cudaSuccess;
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* about, const void*) {
  *about = {};
  about->maxThreadsPerBlock = 1024, about->numRegs = 32, about->binaryVersion = about->ptxVersion = 80;
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t,
                                                                       unsigned) {
  return *blocks = 2, cudaSuccess;
}

// ---- for tests/fake_cuda --------------------------------------------------------------------------------------------
// Work of Python, by a number: `run` is called with it by the worker, and returns an error of CUDA.
using Callback = int(long number);
API int fake_submit(void* stream, int number, Callback* run, long work) {
  return submit(*stream_of(stream, number), [=] {
    const int error = run(work);
    return std::string(!error ? "" : error == kIllegalAddress ? "illegal memory, see above" : "failed, see above");
  });
}
// Work of C++: an error where the stream is one of another device than `number`.
API int fake_submit_work(void* handle, int number, Work* work) {
  Stream& stream = *stream_of(handle, number);
  if (stream.device != number) return kInvalidHandle;
  return submit(stream, std::move(*work));
}
API void fake_set_current(int number) { current = number; }
API void fake_work() { work_forever(); }
API int fake_has_worker() { return device().has_worker; }
API int fake_wait(void* stream, int number) {
  if (const int error = forbidden_while_capturing()) return error;
  return wait_until(end_of(*stream_of(stream, number)));
}
API void fake_close() {
  const std::lock_guard lock(device().mutex);
  device().closed = true;
  device().wanted.notify_all(), device().passed.notify_all();
}
API int fake_sticky() { return device().sticky; }
API int fake_is_capturing(void* stream, int number) { return is_capturing(*stream_of(stream, number)); }
API int fake_on_device(uintptr_t address) {
  int number = 0;
  return on_device(address, &number) ? number : -1;
}
API long fake_items() { return device().items; }
API void fake_block(int given, int number, uintptr_t address, size_t bytes, void* stream) {
  block_changes(given, number, address, bytes, stream);
}
API const char* fake_complaint(int number, uintptr_t address, size_t bytes) {
  thread_local std::string said;
  said = complaint(number, address, bytes);
  return said.empty() ? nullptr : said.c_str();
}
API void fake_set_order(const char* name, unsigned seed) {
  const std::lock_guard lock(device().mutex);
  const std::string order = name;
  device().order = order == "late" ? Order::kLate : order == "early" ? Order::kEarly : Order::kRandom;
  device().random.seed(seed);
}
// As an illegal access of a kernel would leave it; 0 heals, which no real device does.
API void fake_set_sticky(int error) {
  const std::lock_guard lock(device().mutex);
  device().sticky = error;
}
