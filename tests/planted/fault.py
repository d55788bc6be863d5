"""What a fault is."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Fault(NamedTuple):
    """One slip: ``text`` in ``file`` becomes ``replacement``.

    Attributes:
        id: unique; begins with the layer, which is the file of the catalogue.
        file: relative to the root of the repository.
        text: stands exactly once in the file, unless ``occurrence`` says which one is meant.
        replacement: what stands there instead; it has to compile.
        why: in one line, what goes wrong for a user.
        tests: arguments of pytest, those of the tests that should notice; several runs as a tuple. A run whose
            arguments contain "interpreted" is in Triton's interpreter, one of ``tests/device/test_gpu*`` with
            the GPUs of ``tests/fake_cuda``, for which the Python that plants needs a CUDA build of torch.
        occurrence: index of the occurrence, where the text has to stand more than once.
        foreign: written by somebody who had not seen the tests.
        equivalent: a proof that nobody can notice; such a fault is neither planted nor counted.
    """

    id: str
    file: str
    text: str
    replacement: str
    why: str
    tests: str | tuple[str, ...]
    occurrence: int | None = None
    foreign: bool = False
    equivalent: str = ""

    @property
    def layer(self) -> str:
        """The file of the catalogue that it stands in."""
        return self.id.partition("-")[0]

    @property
    def runs(self) -> tuple[str, ...]:
        """Arguments of pytest, run by run."""
        return (self.tests,) if isinstance(self.tests, str) else self.tests

    def apply(self, source: str) -> str:
        """The faulty source; ``ValueError`` if the text does not stand where it should."""
        parts, at = source.split(self.text), self.occurrence or 0
        count = len(parts) - 1
        if (self.occurrence is None and count != 1) or at >= count:
            asked = "once" if self.occurrence is None else f"{at + 1} times"
            raise ValueError(f"{self.id}: the text stands {count} times in {self.file}, not {asked}")
        return self.text.join(parts[: at + 1]) + self.replacement + self.text.join(parts[at + 1 :])
