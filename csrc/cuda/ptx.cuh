// Every instruction that CUDA C++ has no name for: the only file with inline PTX.
//
// A wrapper has two branches. nvcc takes the instruction; the emulation computes the same from the fragments of all 32
// lanes, laid out as the PTX ISA says ("Matrix fragments for mma.m16n8k16 ..."). In what follows lane = threadIdx % 32,
// group = lane / 4, quad = lane % 4, and two 16-bit values in a register stand lower index first.
#pragma once

#include "platform.cuh"

namespace cacr::ptx {

// ---- addresses in shared memory: add bytes to them, nothing else ----------------------------------------------------
#ifdef __CUDACC__
using SharedAddress = uint32_t;
CACR_DEVICE SharedAddress shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#else
using SharedAddress = const char*;
inline SharedAddress shared_address(const void* p) { return static_cast<const char*>(p); }
#endif

// ---- ldmatrix: 8 x 8 matrices of 16-bit values from shared memory ---------------------------------------------------
// Lanes 8 i ... 8 i + 7 give the addresses of the rows of matrix i, 16 aligned bytes each. r[i] receives the elements
// (row group, columns 2 quad and 2 quad + 1) of matrix i; with _trans (rows 2 quad and 2 quad + 1, column group).
// All lanes of the warp call it.
CACR_DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row CACR_SITE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
#else
  cuda_emulation::ldmatrix<4, false>("ldmatrix_x4", r, row, site);
#endif
}

CACR_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row CACR_SITE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
#else
  cuda_emulation::ldmatrix<4, true>("ldmatrix_x4_trans", r, row, site);
#endif
}

// ---- mma: d += a b on the tensor cores, for one warp ----------------------------------------------------------------
// d [16 x 8]: d[0], d[1] = (row group, columns 2 quad and 2 quad + 1), d[2], d[3] = the same of row group + 8.
// a [16 x 16]: a[0] = (row group, columns 2 quad, 2 quad + 1), a[1] = row group + 8, a[2] = columns + 8, a[3] = both.
// b [16 x 8]: b0 = (rows 2 quad, 2 quad + 1, column group), b1 = rows + 8.
// So ldmatrix of a row-major A gives a, ldmatrix of a row-major B^T gives b, and ldmatrix_trans takes A^T and B.
CACR_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 CACR_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  cuda_emulation::mma_m16n8k16<cuda_emulation::Bf16>("mma_bf16", d, a, b0, b1, site);
#endif
}

CACR_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 CACR_SITE) {
#ifdef __CUDACC__
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  cuda_emulation::mma_m16n8k16<cuda_emulation::F16>("mma_f16", d, a, b0, b1, site);
#endif
}

// d as above; a [16 x 8]: a[0] = (row group, column quad), a[1] = row group + 8, a[2] = column + 4, a[3] = both;
// b [8 x 8]: b0 = (row quad, column group), b1 = row + 4. Operands are floats whose low 13 bits are ignored: to_tf32()
// rounds to what is left. An ldmatrix of rows of four floats gives these fragments as well.
CACR_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 CACR_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  cuda_emulation::mma_m16n8k8_tf32("mma_tf32", d, a, b0, b1, site);
#endif
}

// ---- cp.async: global to shared memory without passing through registers --------------------------------------------
// Both addresses are multiples of 16. Only `valid` bytes are read, zeros fill the rest; with 0 the source is not
// read, but has to be an aligned address of global memory all the same.
CACR_DEVICE void cp_async_16(SharedAddress target, const void* source, int valid = 16 CACR_SITE) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(valid) : "memory");
#else
  cuda_emulation::cp_async<16>(target, source, valid, site);
#endif
}

// Makes a group of this thread's copies since the last commit, which may be none.
CACR_DEVICE void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  cuda_emulation::cp_async_commit();
#endif
}

// Waits until at most the kPending latest groups of this thread are under way. Other threads see the copies after the
// barrier that has to follow.
template <int kPending>
CACR_DEVICE void cp_async_wait(CACR_SITE_ONLY) {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  cuda_emulation::cp_async_wait(kPending, site);
#endif
}

// ---- order of reads -------------------------------------------------------------------------------------------------
// The compiler does not move reads of shared memory up across it, so that their results take no registers before they
// are needed. The program means the same without it.
CACR_DEVICE void keep_reads_below() {
#ifdef __CUDACC__
  __syncwarp();
#endif
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------
// 2^x to about 2 ulp; subnormal arguments and results are 0.
CACR_DEVICE float exp2_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return cuda_emulation::exp2_approx(x);
#endif
}

// The nearest number of 10 bits of fraction, ties away from zero, as the bits of a float.
CACR_DEVICE uint32_t to_tf32(float x) {
#ifdef __CUDACC__
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
#else
  return cuda_emulation::to_tf32(x);
#endif
}

// Two floats rounded to nearest even, packed for mma: `low` in the lower 16 bits.
CACR_DEVICE uint32_t pack_bf16(float low, float high) {
#ifdef __CUDACC__
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#else
  return cuda_emulation::Bf16::from_float(low) | static_cast<uint32_t>(cuda_emulation::Bf16::from_float(high)) << 16;
#endif
}

CACR_DEVICE uint32_t pack_f16(float low, float high) {
#ifdef __CUDACC__
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#else
  return cuda_emulation::F16::from_float(low) | static_cast<uint32_t>(cuda_emulation::F16::from_float(high)) << 16;
#endif
}

// Exact: the float with these 16 bits.
CACR_DEVICE float bf16_to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

CACR_DEVICE float f16_to_float(uint16_t bits) {
#ifdef __CUDACC__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
#else
  return cuda_emulation::F16::to_float(bits);
#endif
}

// ---- the whole grid -------------------------------------------------------------------------------------------------
// Barrier of all threads of a cooperative launch; what was written to global memory before it is seen after it.
CACR_DEVICE void grid_sync(CACR_SITE_ONLY) {
#ifdef __CUDACC__
  cooperative_groups::this_grid().sync();
#else
  cuda_emulation::grid_sync(site);
#endif
}

}  // namespace cacr::ptx
