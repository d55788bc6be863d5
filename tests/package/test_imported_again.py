"""The package imported: what it brings along, and again in the same process, as autoreload, Spyder and Gradio do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from cacr_kernels.operators.registry import constant_while_compiling

AGAIN = """
import importlib, sys
import torch
import cacr_kernels

LOSSES = {
    "cacr_loss": lambda z: (z,),
    "cacr_queue_loss": lambda z: (z, z.detach().flip(1), z[0].detach()),
    "cacr_momentum_loss": lambda z: (z, z[0].detach()),
    "supervised_cacr_loss": lambda z: (z[0], torch.arange(6) % 3),
}

def computed(package):
    found = []
    for loss, arguments in LOSSES.items():
        for name, reason in package.available_backends().items():
            z = torch.arange(48.0).reshape(2, 6, 4).sin().requires_grad_()
            if reason is None:
                getattr(package, loss)(*arguments(z), backend=name, normalize=True).backward()
                found.append(z.grad)
    return torch.stack(found)

expected, old = computed(cacr_kernels), cacr_kernels
names = set(dir(torch.ops.cacr_kernels))
for _ in range(2):
    for name in [name for name in sys.modules if name.partition(".")[0] == "cacr_kernels"]:
        del sys.modules[name]
    import cacr_kernels
    assert cacr_kernels is not old
    assert torch.equal(computed(cacr_kernels), expected)
    assert torch.equal(computed(old), expected)  # what was made before works on
for name in ("operators.registry", "operators.detached_keys", "operators.state", "backends.table"):
    importlib.reload(importlib.import_module(f"cacr_kernels.{name}"))
    assert torch.equal(computed(cacr_kernels), expected)
assert set(dir(torch.ops.cacr_kernels)) >= names
"""


WITHOUT_DYNAMO = """
import sys
import torch

before = {name for name in ("torch._dynamo", "triton", "sympy") if name in sys.modules}
import cacr_kernels

cacr_kernels.cacr_loss(torch.ones(2, 3, 4, requires_grad=True)).backward()
assert {name for name in ("torch._dynamo", "triton", "sympy") if name in sys.modules} <= before
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_imported_again_after_its_modules_were_purged() -> None:
    """Operators are declared anew, those of compiled libraries included; modules of the first import work on."""
    run(AGAIN)


@pytest.mark.exhaustive
def test_a_compiler_is_imported_by_those_who_compile() -> None:
    """Dynamo takes as long to import as torch itself; and what stands in for its decorator does the same."""
    run(WITHOUT_DYNAMO)

    def function() -> int:
        return 1

    def other() -> int:
        return 1

    torch.compiler.assume_constant_result(function)
    assert vars(constant_while_compiling(other)) == vars(function) != {}
