"""Two CUDA devices that are not there, for a CUDA build of torch: ``python -m tests.fake_cuda -m pytest ...``.

===========================  =========================================================================================
``native/device.h``, `.cpp`  streams whose work is put off, events, graphs, memory that knows who may use it
``native/cudart.cpp``        the CUDA runtime that torch calls, by LD_PRELOAD
``native/driver.cpp``        a libcuda that is found, and says nothing
``native/allocations.cpp``   what torch's own allocator gives away and takes back
``native/library.cpp``       with csrc/cuda/binding.cpp and ``emulated.cpp``: the CUDA library of the product
``runtime.py``               work of Python on those streams
``aten.py``                  torch's operators, by those of the CPU on the same memory
``counting.py``              how many kernels Triton would compile
``triton_launches.py``       Triton's launches, by the interpreter of ``tests/ptx``, as compiled for sm_80
``building.py``              compiles all that, and makes the environment
``install.py``, ``site/``    put it into torch and the package as soon as they are imported
===========================  =========================================================================================

Not modelled: time, occupancy and limits of launches; several kernels at the same moment (items of streams are done one
after the other, in orders that CUDA allows); the default stream's waiting for blocking streams, which torch never
makes; peer access, IPC, NCCL, cuBLAS, cuDNN; what the kernels of torch round, and TF32 in its products; Inductor's own
kernels. Memory that torch gives back to CUDA is never used again. Kernels of torch are refused where ``aten.py`` has
left one out.
"""
