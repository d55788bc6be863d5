"""A PTX interpreter: runs on the CPU what Triton emits for sm_80 and sm_90, and what nvcc emits for this project.

    kernels = ptx.load(text)
    kernels.launch("kernel", grid=(3,), block=(128,), args=[array, 5, 1.5], shared_bytes=4096, schedule=ptx.Random(1))

The threads of all resident blocks are lanes of numpy arrays. What the files hold, in the order to read them:

    syntax.py       text to instructions          table.py     all instructions that are known, and their spellings
    formats.py      bits to values, roundings     memory.py    state spaces, bounds, alignment
    machine.py      registers, counters, the loop schedule.py  who goes next: Lockstep, Random, Priority
    convergence.py  barriers, work in warps       copies.py    cp.async
    site.py         the operands an instruction works with; launch.py, arguments.py: a launch
    arithmetic.py, logic.py, conversion.py, moving.py, warp.py, matrix.py, control.py: what the instructions do
    warpgroup.py    wgmma, with descriptor.py     proxies.py   what wgmma sees of shared memory
                    and tensor_cores.py

Found, as an error that names the line of PTX: unknown instructions, modifiers and types; accesses outside the arrays
that were passed, outside the exact size of shared memory, or misaligned; threads that wait for ever, or at different
barriers; shuffles that read a thread that is not there. Found through wrong results, since shared memory, registers and
the targets of asynchronous copies hold NaN (all bits set) until they are written: missing barriers and waits, and
reading what nobody wrote. ``Random`` and ``Priority`` schedules, over some seeds, are what brings races out.

``wgmma`` is asynchronous, and as late or early as the PTX ISA allows: until the ``wait_group`` that covers it its sum
is NaN, and operands that are overwritten before then show. Shared memory that no ``fence.proxy.async`` orders before it
reads as NaN, the target of a ``cp.async`` included; a missing ``wgmma.fence`` is an error. Sums of tensor cores in
float32 are cut off as hardware cuts them off, which the promised errors have to allow for.

Not modelled:

- denormals in tensor cores, and what Hopper's keep beyond those of the A100 (``tensor_cores.py``);
- the error of ``ex2``, ``lg2``, ``rcp``, ``rsqrt``, ``sqrt``, ``div``, ``sin``, ``cos``, ``tanh`` in their approximate
  forms: the exact value, rounded. ``fma`` of float32 rounds a float64 sum, of float64 a double-double one: the last
  bit may differ where the hardware rounds once;
- weak memory: memory is sequentially consistent, so fences do nothing and a missing one is not seen, but for those of
  ``wgmma``: they are counted by warp, and only barriers of the block order one warp before another;
- that reading the registers of A, or of a sum of which nobody uses the value, is undefined while a ``wgmma`` goes on;
- ptxas and the hardware: register allocation, spills, occupancy, bank conflicts, launch limits, timing; atomics are
  indivisible whatever their scope;
- recursion and indirect calls, textures, and everything else that is not in the table: ``mbarrier``, bulk and tensor
  copies, ``wgmma`` of integers, FP8 and sparse matrices or with sums in float16, descriptors with a base offset. Triton
  emits none of these for the kernels of this project.
"""

from .arguments import Image, Pointer, Struct
from .errors import DeadlockError, PtxError
from .launch import Kernels, load
from .schedule import Lockstep, Priority, Random
from .table import TABLE

__all__ = [
    "TABLE",
    "DeadlockError",
    "Image",
    "Kernels",
    "Lockstep",
    "Pointer",
    "Priority",
    "PtxError",
    "Random",
    "Struct",
    "load",
]
