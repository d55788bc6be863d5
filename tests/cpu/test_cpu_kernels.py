"""The compiled CPU kernels: instruction sets, threads, workspace, floating-point mode."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn.functional import normalize

from cacr_kernels import cacr_loss, supervised_cacr_loss
from cacr_kernels.backends import library
from cacr_kernels.operators.registry import operator
from tests.building import ROOT, kept, locked

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


PAGES = """
import resource, torch
from cacr_kernels.backends import library
torch.set_num_threads({threads})
views = torch.randn(2, 512, 128)
def call():
    return torch.ops.cacr_kernels.cacr_cpu(views, None, 1.0, 2.0, 1.0, 1.0, 0, False, 1.0, True, True, False)
for _ in range(3):
    found = call()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    found = call()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted as Linux counts them")
@pytest.mark.parametrize("threads", [1, 2])
def test_memory_is_kept_between_calls(threads: int) -> None:
    """Where malloc returns all of it to the system at once, only results need new pages: 128 of 4 KiB here."""
    found = float(run_python(PAGES.format(threads=threads), MALLOC_MMAP_THRESHOLD_="32768", MALLOC_ARENA_MAX="1"))
    assert found < 200


# ---- kernels of one instruction set against those of another ---------------------------------------------------------
BUILD = ROOT / "build" / "cpu_kernels"
PLACES = ("csrc/cpu", "csrc/common", "tests/cpp")


@cache
def setup_script() -> dict[str, Any]:
    with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, CACR_BUILD_CPU="0"):
        return runpy.run_path(str(ROOT / "setup.py"))


class Builder:
    """Compiles kernels, and what compares them, as setup.py does, but faster."""

    def __init__(self, kind: str, *extra: str) -> None:
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("needs the compiler g++")
        flags = [flag for flag in setup_script()["FLAGS"] if flag not in ("-O3", "-Wall", "-Wextra")]
        self.kind, self.command = kind, [compiler, *flags, "-w", *extra]

    def compile(self, source: str, name: str, *flags: str) -> Path:
        return kept(BUILD / self.kind / f"{name}.o", [*self.command, *flags, "-c", source], PLACES)

    def kernels(self, isa: str, flags: list[str]) -> Path:
        (source,) = {o.source for o in native_objects() if o.name == "kernels_portable"}
        return self.compile(source, f"kernels_{isa}", f"-DCACR_ISA={isa}", *flags)

    def check(
        self,
        candidate: str,
        kernels: list[Path],
        *arguments: str,
        source: str = "tests/cpp/check_kernels.cpp",
        float64_of: str | None = None,
    ) -> str:
        """Builds the comparison of ``candidate`` with the portable kernels, runs it, and returns what it prints."""
        names = [f"-DCANDIDATE={candidate}", f"-DFLOAT64_OF={float64_of or candidate}"]
        objects = [self.compile(source, f"check_{candidate}", *names), *kernels]
        program = BUILD / self.kind / f"check_{candidate}"
        with locked(program):
            run(*self.command, *map(str, objects), "-o", str(program))
            return run(str(program), *arguments)


def native_objects() -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        found: list[Any] = setup_script()["cpu_library"]().objects
    return found


def shipped(isa: str) -> Path:
    """The kernels in the library that is here, compiled again only if a source has changed since."""
    directory = ROOT / setup_script()["BUILD"] / "cacr_kernels._C_cpu"
    target = directory / f"kernels_{isa}.o"
    ninja = shutil.which("ninja") or shutil.which("ninja", path=Path(sys.executable).parent)
    if ninja is None or not (directory / "build.ninja").exists():
        return Builder("shipped", "-O2").kernels(isa, setup_script()["ISAS"][isa])
    with locked(directory / "build.ninja"):
        run(ninja, "-C", str(ROOT), "-f", str(directory / "build.ninja"), str(target.relative_to(ROOT)))
    return target


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout


def processor_has(*features: str) -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and set(features) <= set(cpuinfo.read_text().split())


AVX2, AVX512 = ("avx2", "fma", "f16c"), ("avx512f", "avx512bw", "avx512dq", "avx512vl")
AVX512_BF16, AMX = (*AVX512, "avx512_bf16"), (*AVX512, "amx_bf16", "amx_tile")
OPTIONAL = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "amx": AMX}


@pytest.mark.exhaustive
@pytest.mark.parametrize("isa", list(OPTIONAL))
def test_kernels(isa: str) -> None:
    """All shapes, against the portable kernels. The set in use here meets every test of the losses, too."""
    if not processor_has(*OPTIONAL[isa]) or isa not in library.compiled_isas():
        assert library.active_isa() != isa
        return
    float64_of = "avx512" if isa in ("amx", "avx512_bf16") else isa  # those have kernels of float32 alone
    kernels = [shipped(name) for name in dict.fromkeys((isa, float64_of, "portable"))]
    said = Builder("fast", "-O2").check(isa, kernels, float64_of=float64_of)
    assert " 0 failures" in said


@pytest.mark.parametrize("width", [16, 32, 64])
def test_exponential(width: int) -> None:
    """2^x within the errors that ``vec.h`` states, and 0 below its range."""
    builder, source = Builder("exp2", "-O1"), "tests/cpp/check_exp2.cpp"
    program = BUILD / "exp2" / f"check_exp2_{width}"
    command = [*builder.command, "-DCACR_ISA=tested", f"-DCACR_VECTOR_BYTES={width}", *lowered(), source]
    errors, flushed = run(str(kept(program, command, ("csrc/cpu/kernels", source)))).splitlines()
    float32, float64 = map(float, errors.split())
    assert float32 < 0.9, errors
    assert float64 < 1.4, errors
    assert flushed == "0 0 0 1"


def lowered() -> list[str]:
    return ["-mavx2", "-mfma"] if processor_has("avx2", "fma") else []


@pytest.mark.exhaustive
def test_wide_kernels() -> None:
    """Vectors of 64 bytes lowered to what the processor has: the source for AVX-512 is tested without AVX-512."""
    builder = Builder("fast", "-O2")
    wide = builder.kernels("wide", ["-O1", "-DCACR_VECTOR_BYTES=64", *lowered()])
    assert " 0 failures" in builder.check("wide", [wide, shipped("portable")], "few")  # minutes less than all shapes


@pytest.mark.exhaustive
def test_sanitizers(tmp_path: Path) -> None:
    """Tails, masks and padding of both vector widths under the address and undefined-behaviour sanitizers."""
    builder = Builder("sanitized", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    half = builder.kernels("half", ["-DCACR_VECTOR_BYTES=32", *lowered()])
    portable = builder.kernels("portable", setup_script()["ISAS"]["portable"])
    assert " 0 failures" in builder.check("half", [half, portable], source="tests/cpp/sanitized.cpp")


@pytest.mark.exhaustive
def test_fewer_threads_than_asked() -> None:
    """A workspace of 256 KiB, so that few of 64 threads fit: what they write under the address sanitizer."""
    sanitizers = "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
    builder = Builder("small workspace", *sanitizers, "-DCACR_HAVE_PORTABLE", f"-DCACR_WORKSPACE_BYTES={1 << 18}")
    sources = [*sorted((ROOT / "csrc/cpu/planner").glob("*.cpp")), ROOT / "tests/cpp/sanitized_planner.cpp"]
    objects = [builder.compile(str(source.relative_to(ROOT)), source.stem) for source in sources]
    objects.append(Builder("sanitized", *sanitizers).kernels("portable", setup_script()["ISAS"]["portable"]))
    program = BUILD / "small workspace" / "planner"
    with locked(program):
        run(*builder.command, *map(str, objects), "-pthread", "-o", str(program))
        assert " 0 failures" in run(str(program))


# ---- choice of the instruction set -----------------------------------------------------------------------------------
LOSS = """
import torch, cacr_kernels
from cacr_kernels.backends import library
torch.manual_seed(0)
z = torch.nn.functional.normalize(torch.randn(2, 157, 33), dim=-1).requires_grad_()
loss = cacr_kernels.cacr_loss(z, backend="cpu")
loss.backward()
print(library.active_isa(), loss.item(), z.grad.square().sum().item())
"""


@pytest.mark.skipif("CACR_CPU_ISA" in os.environ, reason="needs a processor's own instruction set")
def test_every_instruction_set_gives_the_same_loss(capsys: pytest.CaptureFixture[str]) -> None:
    assert "portable" in library.compiled_isas()
    supported = {"portable"}
    supported |= {"avx2"} if processor_has(*AVX2) else set()
    supported |= {"avx512"} if processor_has(*AVX512) else set()
    supported |= {"avx512_bf16"} if processor_has(*AVX512_BF16) else set()
    supported |= {"amx"} if processor_has(*AMX) else set()
    only_if_asked = set() if processor_has("AuthenticAMD") else {"avx512_bf16"}
    default = next(isa for isa in library.compiled_isas() if isa in supported - only_if_asked)
    with torch.random.fork_rng():
        exec(LOSS)
    found = {default: capsys.readouterr().out.split()}
    for isa in supported & set(library.compiled_isas()) - {default}:
        found[isa] = run_python(LOSS, CACR_CPU_ISA=isa).split()
    expected = [float(x) for x in found["portable"][1:]]
    for isa, (name, *numbers) in found.items():
        assert name == isa
        assert list(map(float, numbers)) == pytest.approx(expected, rel=2e-6)


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
for n in (1, 5):
    torch.set_num_threads(n)
    before = len(os.listdir("/proc/self/task"))
    cacr_kernels.cacr_loss(torch.randn(2, 1024, 64), normalize=True, backend="cpu")
    print(len(os.listdir("/proc/self/task")) - before)
"""
    if Path("/proc/self/task").exists():
        assert run_python(code).split() == ["0", "4"]


# ---- memory, size, floating-point mode -------------------------------------------------------------------------------
# Each call in a fork of its own of one process, as the peak never falls; a fork has no threads but its own.
PEAK = """
import os, resource, torch, cacr_kernels
torch.set_num_threads(64)
def small():
    z = torch.randn(2, 64, 8, requires_grad=True)
    cacr_kernels.cacr_loss(z, normalize=True, backend="cpu").backward()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for setup, call in {pairs}:
    if not (child := os.fork()):
        names = globals().copy()
        small()
        exec(setup, names)
        before = peak()
        exec(call, names)
        print(peak() - before, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
TAU = "tau = torch.tensor([-1.0], dtype=torch.float64)"


class Room(NamedTuple):
    """``call`` needs at most ``most`` bytes beside 256 MiB of workspace, and 16 MiB of stacks of 64 threads."""

    setup: str
    call: str
    most: int


def detached_keys(n: int, m: int, dim: int, outputs: int) -> Room:
    """The answers, 3 doubles per query among them."""
    setup = f"q, k = torch.randn(1, {n}, {dim}), torch.randn(1, {m}, {dim}); {TAU}"
    call = """
op = torch.ops.cacr_kernels.detached_keys_cpu
op(q, k, None, None, tau, [0], [0], [0], False, False, False, False, True, True)
"""
    return Room(setup, call, outputs + 3 * 8 * n)


ROOMS = {
    # V B D floats are 4 MiB. The gradient, its product with the incoming one, and the packed panels: 3 of them; the row
    # statistics (5 doubles per query) are 0.6 MiB; 64 threads touch about 0.25 MiB of stack and allocator each. An
    # N x M array would be another 256 MiB in float32.
    "the fused loss": Room(
        "z = torch.nn.functional.normalize(torch.randn(2, 8192, 64), dim=-1).requires_grad_()",
        'cacr_kernels.cacr_loss(z, backend="cpu").backward()',
        4 * 2 * 8192 * 64 * 4,
    ),
    # With 64 threads a private key gradient each would be 64 * 400 000 * 16 floats = 1.5 GiB. (N + M) D padded to the
    # panel of at most 32 floats: gradient, its padded copy, packed panels and the gradient that autograd hands on, each
    # at most 400 000 * 32 * 4 = 49 MiB; norms and column sums below 10 MiB.
    "many keys": Room(
        f"q, k = torch.randn(1, 64, 8, requires_grad=True), torch.randn(1, 400_000, 8, requires_grad=True); {TAU}",
        """
value, lse, _ = torch.ops.cacr_kernels.contrast_cpu(q, k, None, None, tau, [0], [0], [0], False, False, None, False)
(value.sum() + lse.sum()).backward()
""",
        4 * 49 * MIB + 10 * MIB,
    ),
    # Many detached keys, which the 64 threads share out: no packed copy of them, no states beyond the workspace.
    "many detached keys": detached_keys(64, 400_000, 64, 0),
    # Both means [N, D] are the answer.
    "many queries of detached keys": detached_keys(200_000, 640, 64, 2 * 200_000 * 64 * 4),
    # Rows that are longer than the caches: 64 blocks of 256 queries would be 64 * 256 * 3 * 16384 floats = 3 GiB.
    "long rows of detached keys": detached_keys(2048, 2048, 16_384, 2 * 2048 * 16_384 * 4),
}


def test_out_of_memory_says_how_much_was_asked_for() -> None:
    """Results of 128 TiB, which no process can have."""
    q, tau, pairs = torch.zeros(1, 1 << 24, 1), torch.ones(1, dtype=torch.float64), [0] * (1 << 20)
    with pytest.raises(MemoryError, match=f"out of memory: tried to allocate {1 << 47} bytes"):
        operator("contrast_cpu")(q, None, None, None, tau, [0], pairs, pairs, False, False, None, False)


@pytest.mark.exhaustive
def test_workspace() -> None:
    """The bytes by which the peak resident memory grows."""
    pairs = [(room.setup, room.call) for room in ROOMS.values()]
    found = dict(zip(ROOMS, map(int, run_python(PEAK.format(pairs=pairs)).split()), strict=True))
    beyond = {name: kib for name, kib in found.items() if kib * 1024 > ROOMS[name].most + 256 * MIB + 16 * MIB}
    assert not beyond


def test_more_than_2_31_pairs() -> None:
    """N M = 2.2e9: offsets are 64-bit. Some rows, the last among them, against plain PyTorch."""
    n, dim = 46_901, 1
    q, k = unit(1, n, dim + 1)[..., :dim].contiguous(), unit(1, n, dim + 1, seed=1)[..., :dim].contiguous()
    assert n * n > 2**31
    ids = torch.arange(n, dtype=torch.int32)
    tau = torch.tensor([-1.5], dtype=torch.float64)
    value, lse, _ = operator("contrast_cpu")(q, k, ids, ids, tau, [2], [0], [0], False, False, None, False)
    for i in (0, 1, n // 2, n - 2, n - 1):
        cost = (q[0, i].double() - k[0].double()).square().sum(-1)
        cost = torch.cat([cost[:i], cost[i + 1 :]])
        logit = -1.5 * cost
        torch.testing.assert_close(lse[0, 0, i], logit.logsumexp(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(value[0, 0, i], (logit.softmax(0) * cost).sum(), rtol=1e-5, atol=1e-6)


def test_floating_point_mode_is_left_alone() -> None:
    """No flush of subnormal numbers to zero, as -ffast-math would switch on for the process."""
    cacr_loss(torch.randn(2, 300, 64, requires_grad=True), normalize=True, backend="cpu").backward()
    assert torch.full((64,), 1e-45).mul(1.0).ne(0).all()
    assert torch.full((64,), 2e-38).div(4).ne(0).all()
    assert 5e-324 * 1.0 != 0.0
