"""The modules, above all the queue that one of them keeps: ``cacr_kernels/modules.py``."""

from __future__ import annotations

from ..fault import Fault

FILE = "cacr_kernels/modules.py"
QUEUE = "tests/losses/test_queue.py"

FAULTS = (
    Fault(
        "modules-newest-keys",
        FILE,
        text="fresh = self._pending.flatten(0, 1)[-self.queue_size :].to(self.queue)",
        replacement="fresh = self._pending.flatten(0, 1)[: self.queue_size].to(self.queue)",
        why="of a batch larger than the queue the oldest keys stay",
        tests=QUEUE,
    ),
    Fault(
        "modules-leaving-keys",
        FILE,
        text="kept = self.queue[leaving : self._held]",
        replacement="kept = self.queue[: self._held - leaving]",
        why="the newest keys leave the full queue instead of the oldest",
        tests=QUEUE,
    ),
    Fault(
        "modules-length-of-a-queue-that-fills",
        FILE,
        text="self._held = len(kept) + len(fresh)",
        replacement="self._held = self.queue_size",
        why="zeros that fill up the queue count as keys",
        tests=QUEUE,
    ),
    Fault(
        "modules-pending-keys-are-not-copied",
        FILE,
        text="self._pending = k.detach().clone()",
        replacement="self._pending = k.detach()",
        why="keys that the caller overwrites before the next call change the queue",
        tests=QUEUE,
    ),
    Fault(
        "modules-queue-in-place",
        FILE,
        text="self.queue = torch.cat([kept, fresh, self.queue[self._held :]])",
        replacement="self.queue.copy_(torch.cat([kept, fresh, self.queue[self._held :]]))",
        why="a pending backward reads a queue that has been overwritten",
        tests=QUEUE,
    ),
    Fault(
        "modules-evaluation-adds-keys",
        FILE,
        text="if self.training:\n            self._pending",
        replacement="if True:\n            self._pending",
        why="keys seen in evaluation enter the queue",
        tests=QUEUE,
    ),
    Fault(
        "modules-keys-pending-at-loading",
        FILE,
        text="if self._pending is not None:\n            self._enqueue()\n        if self.dim is None:",
        replacement="if self.dim is None:",
        why="keys of the call before load_state_dict enter the queue of the checkpoint",
        tests=QUEUE,
    ),
    Fault(
        "modules-keys-pending-at-saving",
        FILE,
        text="if self._pending is not None:\n            self._enqueue()\n        super()._save_to_state_dict",
        replacement="super()._save_to_state_dict",
        why="a checkpoint lacks the keys of the last call",
        tests=QUEUE,
    ),
    Fault(
        "modules-held-after-loading",
        FILE,
        text="self._held = int(self.queue_length)",
        replacement="self._held = self.queue_size",
        why="a checkpoint of a queue that is half full loads its zeros as keys",
        tests=QUEUE,
    ),
    Fault(
        "modules-queue-in-half-precision",
        FILE,
        text="l2_normalize(x.to(arithmetic_dtype(x)), dim=-1)",
        replacement="l2_normalize(x, dim=-1)",
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
        text="functional.cacr_loss(views[0] if len(views) == 1 else views,",
        replacement="functional.cacr_loss(views[0] if len(views) == 1 else views[:2],",
        why="of three views given as arguments the third is forgotten",
        tests="tests/losses/test_modules.py",
    ),
)
