"""A PTX interpreter: runs on the CPU what Triton emits for sm_80 and what nvcc emits for the kernels of this project.

    kernels = ptx.load(text)
    kernels.launch("kernel", grid=(3,), block=(128,), args=[array, 5, 1.5], shared_bytes=4096, schedule=ptx.Random(1))

The threads of all resident blocks are lanes of numpy arrays. What the files hold, in the order to read them:

    syntax.py       text to instructions          table.py     all instructions that are known, and their spellings
    formats.py      bits to values, roundings     memory.py    state spaces, bounds, alignment
    machine.py      registers, counters, the loop schedule.py  who goes next: Lockstep, Random, Priority
    convergence.py  barriers, work in warps       copies.py    cp.async
    site.py         the operands an instruction works with; launch.py, arguments.py: a launch
    arithmetic.py, logic.py, conversion.py, moving.py, warp.py, matrix.py, control.py: what the instructions do

Found, as an error that names the line of PTX: unknown instructions, modifiers and types; accesses outside the arrays
that were passed, outside the exact size of shared memory, or misaligned; threads that wait for ever, or at different
barriers; shuffles that read a thread that is not there. Found through wrong results, since shared memory, registers and
the targets of asynchronous copies hold NaN (all bits set) until they are written: missing barriers and waits, and
reading what nobody wrote. ``Random`` and ``Priority`` schedules, over some seeds, are what brings races out.

Not modelled:

- how tensor cores round while they accumulate (sums are formed in float64 and rounded once), and denormals in them;
- the error of ``ex2``, ``lg2``, ``rcp``, ``rsqrt``, ``sqrt``, ``div``, ``sin``, ``cos``, ``tanh`` in their approximate
  forms: the exact value, rounded. ``fma`` of float32 rounds a float64 sum, of float64 a double-double one: the last
  bit may differ where the hardware rounds once;
- weak memory: memory is sequentially consistent, so fences do nothing and a missing one is not seen;
- ptxas and the hardware: register allocation, spills, occupancy, bank conflicts, launch limits, timing; atomics are
  indivisible whatever their scope;
- recursion and indirect calls, textures, ``wgmma``, bulk copies and everything else that is not in the table.
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
