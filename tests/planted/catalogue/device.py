"""Devices, streams and threads: what shows on a GPU, or on the one of ``tests/fake_cuda``.

``/path/to/python -m tests.planted --only device`` with a Python that has a CUDA build of torch.
"""

from __future__ import annotations

from ..fault import Fault

BINDING = "csrc/cuda/binding.cpp"
TRITON = "cacr_kernels/backends/triton/"
GPU = "tests/device/test_gpu.py"
USES = "tests/device/test_gpu_uses.py"
THREADS = f"{USES} -k 'turns or thread or another_current'"

FAULTS = (
    Fault(
        "device-no-guard",
        BINDING,
        text="const torch::stable::accelerator::DeviceGuard guard(device);",
        replacement="",
        why="the current device of the caller is that of the tensors from then on",
        tests=f"{USES} -k 'cuda and turns'",
    ),
    Fault(
        "device-runtime-not-told",
        BINDING,
        text='STD_TORCH_CHECK(cudaSetDevice(device) == cudaSuccess, "cacr_kernels: the device cannot be used");',
        replacement="",
        why="kernels on tensors of another device than the first one are launched on the first one",
        tests=f"{GPU} -k 'cuda and another_device'",
    ),
    Fault(
        "device-of-the-first-thread",
        BINDING,
        text='STD_TORCH_CHECK(cudaSetDevice(device) == cudaSuccess, "cacr_kernels: the device cannot be used");',
        replacement='static const bool told = cudaSetDevice(device) == cudaSuccess;\n  STD_TORCH_CHECK(told, "");',
        why="a second thread has another current device, and the first one keeps its own for ever",
        tests=THREADS,
    ),
    Fault(
        "device-default-stream",
        BINDING,
        text="arithmetic(like, float_products)(call, current_stream(device), allocator);",
        replacement="arithmetic(like, float_products)(call, (void(current_stream(device)), nullptr), allocator);",
        why="kernels run on the default stream, not the current one",
        tests=f"{GPU} -k 'cuda and current_stream'",
    ),
    Fault(
        "device-stream-of-the-first-device",
        BINDING,
        text="TORCH_ERROR_CODE_CHECK(get(device, &stream));",
        replacement="TORCH_ERROR_CODE_CHECK(get(0 * device, &stream));",
        why="the stream of the first device is taken for all",
        tests=f"{USES} -k 'cuda and stream_of_another'",
    ),
    Fault(
        "device-workspace-freed-early",
        BINDING,
        text="return output(*m.last);",
        replacement="void* const memory = output(*m.last);\n                                    m.last.reset();\n"
        "                                    return memory;",
        why="the workspace is handed back before the kernels are launched",
        tests=f"{GPU} -k 'cuda and same_bits'",
    ),
    Fault(
        "device-triton-no-guard",
        TRITON + "launch.py",
        text="with torch.cuda.device(x.device):",
        replacement="with torch.cuda.device(torch.cuda.current_device()):",
        why="Triton launches on the current device, whatever device the tensors are on",
        tests=f"{GPU} -k 'triton and another_device'",
    ),
    Fault(
        "device-table-of-another-stream",
        TRITON + "pairs.py",
        text='stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0',
        replacement="stream = 0",
        why="a small table that one stream makes is read by another one before it is there",
        tests=f"{USES} -k 'triton and streams'",
    ),
    Fault(
        "device-result-passed-twice",
        TRITON + "contrast.py",
        text="return x.new_empty(0) if x is first else x",
        replacement="return x",
        why="compiled code reads a copy of the squared lengths that no kernel has written",
        tests=f"{USES} -k 'compiled and queue and dtype3'",
    ),
    Fault(
        "device-host-waits",
        TRITON + "cacr.py",
        text='    if device.type == "cpu":\n        return torch.tensor(numbers, dtype=torch.float64, device=device)\n',
        replacement="    return torch.tensor(numbers, dtype=torch.float64, device=device)\n",
        why="the host waits for the device at every call",
        tests=f"{GPU} -k 'triton and cacr and (never_waits or captured)'",
    ),
)
