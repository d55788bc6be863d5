"""The compiled CPU kernels: instruction sets, threads, workspace, floating-point mode."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn.functional import normalize

from cacr_kernels import cacr_loss, supervised_cacr_loss
from cacr_kernels.backends import library
from cacr_kernels.operators.registry import operator

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    z = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return normalize(z, dim=-1).to(dtype)


def run_python(code: str, **environment: str) -> str:
    """What ``code`` prints in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- kernels of one instruction set against those of another ---------------------------------------------------------
class Builder:
    """Compiles csrc/cpu/kernels/kernels.cpp as setup.py does, but faster."""

    def __init__(self, directory: Path, *extra: str) -> None:
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("needs the compiler g++")
        with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, CACR_BUILD_CPU="0"):
            script = runpy.run_path(str(ROOT / "setup.py"))
        self.isas: dict[str, list[str]] = script["ISAS"]
        flags = [flag for flag in script["FLAGS"] if flag not in ("-O3", "-Wall", "-Wextra")]
        self.command, self.directory = [compiler, *flags, "-w", *(extra or ["-O2"])], directory

    def compile(self, source: str | Path, name: str, *flags: str) -> str:
        target = self.directory / f"{name}.o"
        if not target.exists():
            self.run(*self.command, *flags, "-c", str(ROOT / source), "-o", str(target))
        return str(target)

    def kernels(self, isa: str, flags: list[str]) -> str:
        return self.compile("csrc/cpu/kernels/kernels.cpp", f"kernels_{isa}", f"-DCACR_ISA={isa}", *flags)

    def check(self, isa: str, flags: list[str], source: str | Path = "tests/cpp/check_kernels.cpp") -> str:
        """Builds the comparison of ``isa`` with the portable kernels, runs it, and returns what it prints."""
        objects = [self.compile(source, f"check_{isa}", f"-DCANDIDATE={isa}"), self.kernels(isa, flags)]
        objects.append(self.kernels("portable", self.isas["portable"]))
        program = self.directory / f"check_{isa}"
        self.run(*self.command, *objects, "-o", str(program))
        return self.run(str(program))

    @staticmethod
    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
        return done.stdout


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("kernels"))


def processor_has(*features: str) -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and set(features) <= set(cpuinfo.read_text().split())


def test_avx2_kernels(builder: Builder) -> None:
    if not processor_has("avx2", "fma", "f16c"):
        assert library.active_isa() != "avx2"
        return
    assert " 0 failures" in builder.check("avx2", builder.isas["avx2"])


def test_avx512_kernels(builder: Builder) -> None:
    if not processor_has("avx512f", "avx512bw", "avx512dq", "avx512vl"):
        pytest.skip("needs an AVX-512 processor")
    assert " 0 failures" in builder.check("avx512", builder.isas["avx512"])


def test_wide_kernels(builder: Builder) -> None:
    """Vectors of 64 bytes lowered to what the processor has: the source for AVX-512 is tested without AVX-512."""
    lowered = ["-mavx2", "-mfma"] if processor_has("avx2", "fma") else []
    assert " 0 failures" in builder.check("wide", ["-O1", "-DCACR_VECTOR_BYTES=64", *lowered])


def test_sanitizers(tmp_path: Path) -> None:
    """Tails, masks and padding of both vector widths under the address and undefined-behaviour sanitizers."""
    source = tmp_path / "sanitized.cpp"
    source.write_text(f"""
#define main check_every_shape
#include "{ROOT / "tests/cpp/check_kernels.cpp"}"
#undef main
int main() {{
  int failures = 0;
  for (int n : {{1, 5, 37}})
    for (int d : {{1, 17, 64}})
      failures += !cacr::self_check_passes(cacr::CANDIDATE::kernels_float, cacr::portable::kernels_float, n, d) +
                  !cacr::self_check_passes(cacr::CANDIDATE::kernels_double, cacr::portable::kernels_double, n, d);
  for (int n : {{193, 200}})  // more than one block of rows: the symmetric sweeps have tiles off the diagonal
    failures += !cacr::self_check_passes(cacr::CANDIDATE::kernels_float, cacr::portable::kernels_float, n, 17);
  std::printf("20 checks, %d failures\\n", failures);
  return failures != 0;
}}
""")
    builder = Builder(tmp_path, "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    lowered = ["-mavx2", "-mfma"] if processor_has("avx2", "fma") else []
    assert " 0 failures" in builder.check("half", ["-DCACR_VECTOR_BYTES=32", *lowered], source)


# ---- choice of the instruction set -----------------------------------------------------------------------------------
LOSS = """
import torch, cacr_kernels
from cacr_kernels.backends import library
torch.manual_seed(0)
z = torch.nn.functional.normalize(torch.randn(2, 157, 33), dim=-1).requires_grad_()
print(library.active_isa(), end=" ")
loss = cacr_kernels.cacr_loss(z, backend="cpu")
loss.backward()
print(loss.item(), z.grad.square().sum().item())
"""


def test_every_instruction_set_gives_the_same_loss() -> None:
    assert "portable" in library.compiled_isas()
    expected = run_python(LOSS, CACR_CPU_ISA="portable").split()
    assert expected[0] == "portable"
    supported = {"portable"}
    supported |= {"avx2"} if processor_has("avx2", "fma", "f16c") else set()
    supported |= {"avx512"} if processor_has("avx512f", "avx512bw", "avx512dq", "avx512vl") else set()
    for isa in supported & set(library.compiled_isas()):
        name, *numbers = run_python(LOSS, CACR_CPU_ISA=isa).split()
        assert name == isa
        assert list(map(float, numbers)) == pytest.approx(list(map(float, expected[1:])), rel=2e-6)
    assert run_python(LOSS).split()[0] == next(isa for isa in library.compiled_isas() if isa in supported)


def test_unknown_instruction_set_is_refused() -> None:
    code = """
import torch, cacr_kernels
reason = cacr_kernels.available_backends()["cpu"]
assert "CACR_CPU_ISA=vax" in reason and "portable" in reason, reason
try:
    cacr_kernels.cacr_loss(torch.eye(4).repeat(2, 1, 1), backend="cpu")
except ValueError as error:
    assert reason in str(error), error
    print("refused")
"""
    assert run_python(code, CACR_CPU_ISA="vax") == "refused"


# ---- threads ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything() -> list[Tensor]:
    """Losses and gradients that take all paths: one sweep, rbf, two softmaxes, unpadded and padded features."""
    found = []
    for dim, options in ((64, {}), (33, {"pairing": "pooled"}), (64, {"cost": "rbf"}), (16, {"reduction": "none"})):
        z, tau = unit(3, 131, dim).requires_grad_(), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        loss = cacr_loss(z, tau_pos=tau, tau_neg=tau, backend="cpu", **options).mean()
        found += [loss.detach(), *grad(loss, (z, tau))]
    z, labels = unit(397, 17).requires_grad_(), torch.arange(397) % 10
    loss = supervised_cacr_loss(z, labels, backend="cpu")
    return [*found, loss.detach(), *grad(loss, z)]


@pytest.mark.parametrize("n", [1, 2, 64])
def test_same_bits_for_the_same_threads(threads: Any, n: int) -> None:
    threads(n)
    first = everything()
    for _ in range(4):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True))


def test_any_number_of_threads_agrees(threads: Any) -> None:
    results = []
    for n in (1, 2, 64):
        threads(n)
        results.append(everything())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a - b).abs().max() <= 3e-6 * max(1e-3, a.abs().max())


def test_concurrent_calls(threads: Any) -> None:
    """The library has no state: calls from several Python threads at once give the bits of calls one by one."""
    threads(1)
    expected = everything()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: threads(1) or everything(), range(8)):
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_honours_set_num_threads() -> None:
    """One thread stays one: the process starts none for a loss that would be worth several."""
    code = """
import os, torch, cacr_kernels
torch.set_num_threads({n})
before = len(os.listdir("/proc/self/task"))
cacr_kernels.cacr_loss(torch.randn(2, 1024, 64), normalize=True, backend="cpu")
print(len(os.listdir("/proc/self/task")) - before)
"""
    if not Path("/proc/self/task").exists():
        code = "print({n} - 1)"
    assert run_python(code.format(n=1)) == "0"
    assert int(run_python(code.format(n=5))) == 4


# ---- memory, size, floating-point mode -------------------------------------------------------------------------------
PEAK = """
import resource, torch, cacr_kernels
torch.set_num_threads(64)
def small():
    z = torch.randn(2, 64, 8, requires_grad=True)
    cacr_kernels.cacr_loss(z, normalize=True, backend="cpu").backward()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small()
{setup}
before = peak()
{call}
print(peak() - before)
"""


def grown(setup: str, call: str) -> int:
    """Bytes by which the peak resident memory grows in ``call``."""
    return int(run_python(PEAK.format(setup=setup, call=call))) * 1024


def test_workspace_of_cacr_loss() -> None:
    """Beside 256 MiB of workspace: gradient, packed norms and panels, and threads' stacks.

    V B D floats are 4 MiB. The gradient, its product with the incoming one, and the packed panels: 3 of them; the row
    statistics (5 doubles per query) are 0.6 MiB; 64 threads touch about 0.25 MiB of stack and allocator each, 16 MiB.
    An N x M array would be another 256 MiB in float32.
    """
    setup = "z = torch.nn.functional.normalize(torch.randn(2, 8192, 64), dim=-1).requires_grad_()"
    inputs = 2 * 8192 * 64 * 4
    assert grown(setup, 'cacr_kernels.cacr_loss(z, backend="cpu").backward()') <= 256 * MIB + 4 * inputs + 16 * MIB


def test_workspace_of_many_keys() -> None:
    """With 64 threads a private key gradient each would be 64 * 400 000 * 16 floats = 1.5 GiB.

    Beside 256 MiB: (N + M) D padded to the panel of at most 32 floats: gradient, its padded copy, packed panels and the
    gradient that autograd hands on, each at most 400 000 * 32 * 4 = 49 MiB; norms and column sums below 10 MiB.
    """
    setup = """
q, k = torch.randn(1, 64, 8, requires_grad=True), torch.randn(1, 400_000, 8, requires_grad=True)
tau = torch.tensor([-1.0], dtype=torch.float64)
"""
    call = """
value, lse, _ = torch.ops.cacr_kernels.contrast_cpu(q, k, None, None, tau, [0], [0], [0], False, False)
(value.sum() + lse.sum()).backward()
"""
    assert grown(setup, call) <= 256 * MIB + 4 * 49 * MIB + 10 * MIB + 16 * MIB


DETACHED_KEYS = """
op = torch.ops.cacr_kernels.detached_keys_cpu
op(q, k, None, None, tau, [0], [0], [0], False, False, False, True, True)
"""


@pytest.mark.parametrize(
    ("n", "m", "dim", "outputs"),
    [
        # many keys, which the 64 threads share out: no packed copy of them, no states beyond the workspace
        (64, 400_000, 64, 0),
        # many queries: both means [N, D] are the answer
        (200_000, 640, 64, 2 * 200_000 * 64 * 4),
        # rows that are longer than the caches: 64 blocks of 256 queries would be 64 * 256 * 3 * 16384 floats = 3 GiB
        (2048, 2048, 16_384, 2 * 2048 * 16_384 * 4),
    ],
)
def test_workspace_of_detached_keys(n: int, m: int, dim: int, outputs: int) -> None:
    """Beside 256 MiB: the answers, 3 doubles per query among them, and 16 MiB of threads' stacks."""
    setup = f"""
q, k = torch.randn(1, {n}, {dim}), torch.randn(1, {m}, {dim})
tau = torch.tensor([-1.0], dtype=torch.float64)
"""
    assert grown(setup, DETACHED_KEYS) <= 256 * MIB + outputs + 3 * 8 * n + 16 * MIB


def test_more_than_2_31_pairs() -> None:
    """N M = 2.2e9: offsets are 64-bit. Some rows, the last among them, against plain PyTorch."""
    n, dim = 46_901, 1
    q, k = unit(1, n, dim + 1)[..., :dim].contiguous(), unit(1, n, dim + 1, seed=1)[..., :dim].contiguous()
    assert n * n > 2**31
    ids = torch.arange(n, dtype=torch.int32)
    tau = torch.tensor([-1.5], dtype=torch.float64)
    value, lse, _ = operator("contrast_cpu")(q, k, ids, ids, tau, [2], [0], [0], False, False)
    for i in (0, 1, n // 2, n - 2, n - 1):
        cost = (q[0, i].double() - k[0].double()).square().sum(-1)
        cost = torch.cat([cost[:i], cost[i + 1 :]])
        logit = -1.5 * cost
        torch.testing.assert_close(lse[0, 0, i], logit.logsumexp(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(value[0, 0, i], (logit.softmax(0) * cost).sum(), rtol=1e-5, atol=1e-6)


def test_floating_point_mode_is_left_alone() -> None:
    """No flush of subnormal numbers to zero, as -ffast-math would switch on for the process."""
    code = """
import torch, cacr_kernels
z = torch.randn(2, 300, 64, requires_grad=True)
cacr_kernels.cacr_loss(z, normalize=True, backend="cpu").backward()
tiny = torch.full((64,), 1e-45)
print(5e-324 * 1.0 != 0.0, bool((tiny * 1.0 != 0).all()), bool((torch.full((64,), 2e-38) / 4 != 0).all()))
"""
    assert run_python(code) == "True True True"
