// Launches of kernels that take one struct of parameters, without the <<<>>> that only nvcc understands.
#pragma once

#include "platform.cuh"

namespace cacr {

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;  // sizeof the kernel's struct of buffers
  cudaStream_t stream;
};

#ifdef __CUDACC__

// Lets `kernel` use `bytes` of dynamic shared memory; CUDA wants to be asked for more than 48 KiB.
template <class Parameters>
cudaError_t permit_shared_memory(void (*kernel)(Parameters), size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

template <class Parameters>
cudaError_t launch(void (*kernel)(Parameters), const Launch& l, Parameters parameters) {
  if (const cudaError_t error = permit_shared_memory(kernel, l.shared_bytes)) return error;
  void* arguments[] = {&parameters};
  return cudaLaunchKernel(kernel, l.grid, l.block, arguments, l.shared_bytes, l.stream);
}

// Runs all blocks of the grid at once, so that the kernel may call grid_sync(). cudaErrorCooperativeLaunchTooLarge is
// cleared, because the caller then launches in another way.
template <class Parameters>
cudaError_t launch_cooperative(void (*kernel)(Parameters), const Launch& l, Parameters parameters) {
  if (const cudaError_t error = permit_shared_memory(kernel, l.shared_bytes)) return error;
  void* arguments[] = {&parameters};
  const cudaError_t error = cudaLaunchCooperativeKernel(kernel, l.grid, l.block, arguments, l.shared_bytes, l.stream);
  if (error == cudaErrorCooperativeLaunchTooLarge) cudaGetLastError();
  return error;
}

// How many blocks of `threads` threads the current device can hold at once: the largest cooperative grid. 0: none.
// The last answer is kept, because the questions take as long as a small loss.
template <class Parameters>
cudaError_t resident_blocks(void (*kernel)(Parameters), int threads, size_t shared_bytes, int* blocks) {
  struct Answer {
    void (*kernel)(Parameters);
    int device, blocks;
  };
  static thread_local Answer last{nullptr, 0, 0};
  int device = 0, processors = 0, cooperative = 0, per_processor = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (last.kernel != kernel || last.device != device) {
    if (const cudaError_t error = permit_shared_memory(kernel, shared_bytes)) return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))
      return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device))
      return error;
    if (const cudaError_t error =
            cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, shared_bytes))
      return error;
    last = {kernel, device, cooperative ? processors * per_processor : 0};
  }
  *blocks = last.blocks;
  return cudaSuccess;
}

#else

// In the emulation a kernel that goes wrong throws.
template <class Parameters>
cudaError_t launch(void (*kernel)(Parameters), const Launch& l, Parameters parameters) {
  return cuda_emulation::on_stream(l.stream, parameters, [=] {
    cuda_emulation::launch(l.grid, l.block, l.shared_bytes, [&] { kernel(parameters); });
  });
}

template <class Parameters>
cudaError_t launch_cooperative(void (*kernel)(Parameters), const Launch& l, Parameters parameters) {
  if (!cuda_emulation::has_room(l.grid)) return cudaErrorCooperativeLaunchTooLarge;
  return cuda_emulation::on_stream(l.stream, parameters, [=] {
    cuda_emulation::launch_cooperative(l.grid, l.block, l.shared_bytes, [&] { kernel(parameters); });
  });
}

template <class Parameters>
cudaError_t resident_blocks(void (*)(Parameters), int threads, size_t shared_bytes, int* blocks) {
  *blocks = cuda_emulation::resident_blocks(threads, shared_bytes);
  return cudaSuccess;
}

#endif

}  // namespace cacr
