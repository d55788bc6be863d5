// What nvcc makes of ordinary CUDA C++: one kernel per feature; test_nvcc.py says what each has to compute.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

struct Problem {
  const float* x;  // [n]
  double* y;       // [n]
  long long n;
  float scale;
  int table[5];
};

extern "C" __global__ void struct_parameter(const __grid_constant__ Problem p) {
  const long long i = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
  if (i < p.n) p.y[i] = p.x[i] * p.scale + p.table[i % 5];
}

extern "C" __global__ void elementary(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  if (i >= n) return;
  const float a = x[i];
  y[0 * n + i] = expf(a);
  y[1 * n + i] = logf(fabsf(a));
  y[2 * n + i] = exp2f(a) + log2f(fabsf(a));
  y[3 * n + i] = sqrtf(fabsf(a)) / (a * a + 1.0f);
  y[4 * n + i] = log1pf(a * a) + expm1f(a);
  y[5 * n + i] = rsqrtf(fabsf(a)) + rintf(10.0f * a) + truncf(a);
  y[6 * n + i] = sinf(a);
  y[7 * n + i] = __fdividef(1.0f, a) + __expf(a);
}

extern "C" __global__ void elementary_double(const double* x, double* y, int n) {
  const int i = threadIdx.x;
  if (i >= n) return;
  const double a = x[i];
  y[0 * n + i] = exp(a);
  y[1 * n + i] = log(fabs(a));
  y[2 * n + i] = exp2(a) + log1p(a * a);
  y[3 * n + i] = sqrt(fabs(a)) / (a * a + 1.0);
  y[4 * n + i] = fmax(a, 0.5) + fmin(a, -0.5) + rsqrt(fabs(a));
}

extern "C" __global__ void integers(const long long* x, const long long* d, long long* y, int n) {
  const int i = threadIdx.x;
  if (i >= n) return;
  const auto a = x[i], b = d[i];
  const auto ua = static_cast<unsigned long long>(a), ub = static_cast<unsigned long long>(b);
  y[0 * n + i] = a / b;
  y[1 * n + i] = a % b;
  y[2 * n + i] = static_cast<long long>(ua / ub);
  y[3 * n + i] = __mul64hi(a, b);
  y[4 * n + i] = static_cast<int>(a) / 7 + static_cast<int>(a) % 11;  // by multiplication
  y[5 * n + i] = __popcll(ua) + __clzll(a) + __ffsll(a) + static_cast<int>(__brev(static_cast<unsigned>(a)));
}

extern "C" __global__ void local_array(const int* index, int* y) {
  int a[24];
  for (int k = 0; k < 24; ++k) a[k] = k * k + static_cast<int>(threadIdx.x);
  a[index[threadIdx.x]] = -1;
  y[threadIdx.x] = a[index[threadIdx.x + blockDim.x]];
}

extern "C" __global__ void choice(const int* x, int* y) {
  int r = 0;
  switch (x[threadIdx.x]) {
    case 0:
      r = 7;
      break;
    case 1:
      r = threadIdx.x;
      break;
    case 2:
      r = -3;
      [[fallthrough]];
    case 3:
      r += 100;
      break;
    case 4:
      r = threadIdx.x * threadIdx.x;
      break;
    case 5:
      r = 55;
      break;
    default:
      r = 1;
  }
  y[threadIdx.x] = r;
}

__device__ __noinline__ float by_call(float x, int n) {
  float s = 0;
  for (int k = 0; k < n; ++k) s += x * k;
  return s;
}

extern "C" __global__ void call(const float* x, float* y) {
  float s = x[threadIdx.x];
  if (threadIdx.x % 3) s = by_call(s, threadIdx.x);
  y[threadIdx.x] = by_call(s, 2);
}

extern "C" __global__ void half_types(const __half* h, const __nv_bfloat16* b, float* y, int n) {
  const int i = threadIdx.x;
  y[0 * n + i] = __half2float(h[i]) + __bfloat162float(b[i]);
  y[1 * n + i] = __half2float(__hfma(h[i], h[i], h[i]));
  y[2 * n + i] = __half2float(__float2half_rn(__half2float(h[i]) * 1.001f));
  y[3 * n + i] = __bfloat162float(__float2bfloat16_rn(__half2float(h[i]) * 1.001f));
}

extern "C" __global__ void warps(const float* x, float* y, int* votes) {
  float s = x[threadIdx.x];
  for (int other = 16; other; other /= 2) s += __shfl_xor_sync(0xffffffffu, s, other);
  y[threadIdx.x] = s;
  votes[threadIdx.x] = __ballot_sync(0xffffffffu, x[threadIdx.x] > 0) + __syncthreads_count(x[threadIdx.x] > 0);
}

// Reverses x through shared memory, in place over the whole grid.
extern "C" __global__ void grid_reverse(float* x, double* total, int n) {
  extern __shared__ float shared[];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  shared[threadIdx.x] = i < n ? x[i] : 0;
  __syncthreads();
  const float mine = shared[blockDim.x - 1 - threadIdx.x];
  const int source = blockIdx.x * blockDim.x + blockDim.x - 1 - threadIdx.x;
  cooperative_groups::this_grid().sync();
  if (source < n) x[n - 1 - source] = mine;
  if (source < n) atomicAdd(total, static_cast<double>(mine));
}
