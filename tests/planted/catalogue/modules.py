"""The modules, above all the queue that one of them keeps: ``cacr_kernels/modules.py``."""

from __future__ import annotations

from ..fault import Fault

FILE = "cacr_kernels/modules.py"
QUEUE = "tests/losses/test_queue.py"
STATE = "tests/losses/test_queue_state.py"

FAULTS = (
    Fault(
        "modules-newest-keys",
        FILE,
        text="keys = keys[-self.queue_size :]",
        replacement="keys = keys[: self.queue_size]",
        why="of a batch larger than the queue the oldest keys stay",
        tests=QUEUE,
    ),
    Fault(
        "modules-leaving-keys",
        "cacr_kernels/ring.py",
        text="size, start = ring.shape[0], int(count.clamp_(min=0)) % ring.shape[0]",
        replacement="size, start = ring.shape[0], 0",
        why="the newest keys leave the queue instead of the oldest",
        tests=QUEUE,
    ),
    Fault(
        "modules-length-of-a-queue-that-fills",
        "cacr_kernels/ring.py",
        text="return count.clamp(0, size)",
        replacement="return count.clamp(size, size)",
        why="zeros that fill up the queue count as keys",
        tests=QUEUE,
    ),
    Fault(
        "modules-queue-in-place",
        FILE,
        text="        elif state.is_shared(buffer):\n            buffer.data = buffer.clone()\n",
        replacement="",
        why="a pending backward reads a queue that has been overwritten",
        tests=STATE,
    ),
    Fault(
        "modules-queue-that-the-user-saved",
        FILE,
        text="if state.is_saved(buffer) or buffer.is_inference():",
        replacement="if buffer.is_inference():",
        why="a term of the user over the queue differentiates with the rows of the next step",
        tests=STATE,
    ),
    Fault(
        "modules-reset-in-place",
        FILE,
        text="self._writable(name).zero_()",
        replacement="getattr(self, name).data.zero_()",
        why="reset_parameters before the backward makes the gradient of backend torch wrong",
        tests=STATE,
    ),
    Fault(
        "modules-traced-queue-is-the-buffer",
        FILE,
        text="rows = self.queue.clone() if torch.is_grad_enabled() or tracing() else self.queue",
        replacement="rows = self.queue",
        why="a step of two calls raises when compiled, and on a device",
        tests=STATE,
    ),
    Fault(
        "modules-evaluation-adds-keys",
        FILE,
        text="wanted = self.training and torch.is_grad_enabled() if",
        replacement="wanted = True if",
        why="keys seen in evaluation enter the queue",
        tests=QUEUE,
    ),
    Fault(
        "modules-keys-of-a-recomputation",
        FILE,
        text="            return False\n        if self.training and update_queue is None:",
        replacement="            return wanted\n        if self.training and update_queue is None:",
        why="a checkpoint that computes the loss again lets the keys enter before",
        tests=STATE,
    ),
    Fault(
        "modules-unfilled-rows-on-a-device",
        "cacr_kernels/losses.py",
        text="kind = ALL if valid is None else OTHER",
        replacement="kind = ALL",
        why="where the host does not know how full a queue is, zeros are negatives",
        tests=STATE,
    ),
    Fault(
        "modules-wrapped-keys",
        FILE,
        text='self._writable("incoming")[: keys.shape[0]] = state.unwrapped(keys)',
        replacement='self._writable("incoming")[: keys.shape[0]] = keys',
        why="torch.func.grad over the module leaves a wrapper in it, or fails",
        tests=STATE,
    ),
    Fault(
        "modules-queue-in-half-precision",
        FILE,
        text="        keys = keys.to(arithmetic_dtype(keys))\n",
        replacement="",
        why="keys of half types are normalised in their own precision",
        tests=(QUEUE, "tests/losses/test_modules.py"),
    ),
    Fault(
        "modules-normalises-not",
        FILE,
        text='cost: Cost = "rbf",\n        normalize: bool = True,',
        replacement='cost: Cost = "rbf",\n        normalize: bool = False,',
        why="CACRMomentumLoss() does not normalise by default",
        tests="tests/losses/test_modules.py",
    ),
    Fault(
        "modules-views-as-arguments",
        FILE,
        text="given: Any = views[0] if len(views) == 1 else views\n",
        replacement="given: Any = views[0] if len(views) == 1 else views[:2]\n",
        why="of three views given as arguments the third is forgotten",
        tests="tests/losses/test_modules.py",
    ),
)
