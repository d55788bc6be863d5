// The kernel of csrc/cuda for one arithmetic, -DARITHMETIC=...; and how much shared memory it wants.
#include "kernel.cuh"

template __global__ void cacr::run_phases<cacr::ARITHMETIC>(const __grid_constant__ cacr::JobOf<cacr::ARITHMETIC>);

extern "C" __device__ unsigned shared_bytes = sizeof(cacr::Buffers<cacr::ARITHMETIC::Element, cacr::ARITHMETIC::Acc>);
