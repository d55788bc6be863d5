"""CUDA kernels on a CPU: the headers of ``csrc/cuda`` compiled by g++ against a stand-in for the execution model.

=====================  ===============================================================================================
``model.h``            the data: grids, blocks, warps, threads, barriers
``fiber.h``            a stack for every CUDA thread, and the switch between them
``scheduler.h``        who runs next: orderly, random and starving schedules from a seed
``grid.h``             a launch from beginning to end; a deadlock says who waits where
``barriers.h``         barriers of blocks and grids, meetings of the lanes of a warp
``shared_memory.h``    exact size, NaN until written, redzones around every buffer
``cp_async.h``         copies that are made at once or at the wait, and are NaN in between
``tensor_cores.h``     ldmatrix and mma in the fragment layouts of the PTX ISA
``builtins.h``         CUDA's own names
=====================  ===============================================================================================

What it does not model: the rounding of sums inside tensor cores, the error of ``ex2.approx``, the order in which other
threads see memory (every write is seen at once; the thread sanitizer knows barriers, fences and ``__syncwarp``), limits
of a launch, occupancy, and time. The text of the inline PTX is not compiled here at all: ``tests/ptx`` runs it.
"""
