"""Builds the compiled libraries; everything declarative is in ``pyproject.toml``.

A library is a list of objects, each with flags of its own, because one kernel source is compiled once per instruction
set. setuptools knows one set of flags per extension, so ``NativeBuild`` writes a ninja file: parallel, incremental down
to the headers, and recompiled whenever a flag or the compiler changes. The libraries use PyTorch's stable ABI and no
Python symbol, so one wheel serves every torch >= 2.10 and Python >= 3.10.

The CUDA library is built where there is nvcc (``NVCC``, ``CUDA_HOME`` or ``PATH``) and a CUDA build of torch, but not
in an isolated build, whose torch is not the user's.

Environment: ``CACR_BUILD_CPU=0`` leaves out the CPU library, ``CACR_BUILD_CUDA=0`` that for CUDA; with 1 it is built
wherever there is nvcc. ``CACR_CPU_ISAS="avx2 avx512"`` compiles the CPU kernels for these instruction sets and the
portable one instead of for all. ``CACR_CUDA_ARCHS="80 90"`` compiles for these compute capabilities, and PTX of the
newest, instead of for all; without it ``TORCH_CUDA_ARCH_LIST`` counts. ``CXX``, ``CXXFLAGS``, ``LDFLAGS``, ``MAX_JOBS``
as usual.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import NamedTuple

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # older ones do not know the license of pyproject.toml
    sys.exit(f"setuptools >= 77 is needed, found {setuptools.__version__}: pip install 'setuptools>=77'")

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

BUILD = Path("build", f"native-{sysconfig.get_platform()}")  # not build_temp, which editable installs throw away

GENERAL = [
    *("-O3", "-std=c++20", "-DNDEBUG", "-fPIC", "-pthread", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    *("-Wall", "-Wextra", "-Werror=return-type"),
]
# Behind the user's flags: with -ffast-math or -Ofast in CXXFLAGS results would be wrong. The order suits clang, which
# warns of a flag that takes back an earlier one.
IEEE = [
    *("-fno-fast-math", "-fno-finite-math-only", "-fno-associative-math", "-fno-reciprocal-math", "-fsigned-zeros"),
    *("-fno-trapping-math", "-fno-math-errno", "-ffp-contract=fast"),
]
OLD_LINUX = ["-include", "csrc/common/glibc_2_28.h"]
FLAGS = [*GENERAL, *OLD_LINUX, *IEEE]
# At the link they would set flush-to-zero in every process that loads the library; -Ofast there gives way to -O only.
IEEE_LINK = ["-O3", "-fno-fast-math", "-fno-unsafe-math-optimizations"]
INEXACT_NVCC = r"use_fast_math|ftz.?t|prec-(div|sqrt).?f|fast-math|unsafe-math|finite-math-only|Ofast(?!-compile)"

# Instruction sets of the CPU kernels, each a superset of the one before: name -> flags. The objects are linked in this
# order, baseline first. The linker keeps the first copy of a function that several objects emit, so no copy compiled
# for a newer instruction set can ever be called by code chosen for an older one.
ISAS = {"portable": ["-DCACR_VECTOR_BYTES=16"]}
if platform.machine().lower() in ("x86_64", "amd64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    ISAS["avx2"] = ["-DCACR_VECTOR_BYTES=32", *avx2]
    ISAS["avx512"] = ["-DCACR_VECTOR_BYTES=64", *avx2, *avx512]
    ISAS["avx512_bf16"] = [*ISAS["avx512"], "-DCACR_BF16_TILES", "-DCACR_BF16_PAIRS", "-mavx512bf16"]
    ISAS["amx"] = [*ISAS["avx512"], "-DCACR_BF16_TILES", "-mamx-tile", "-mamx-bf16"]
# What not every compiler and assembler knows: GCC 10, Clang 9 and binutils 2.34; GCC 11, Clang 12 and binutils 2.35.
NEW_INSTRUCTIONS = {
    "avx512_bf16": "__m512 f(__m512 x, __m512bh y) { return _mm512_dpbf16_ps(x, y, y); }",
    "amx": "void f() { _tile_dpbf16ps(0, 1, 2); }",
}


# The newest symbols of system libraries that the tag manylinux_2_28 of a wheel allows (PEP 600).
MANYLINUX = "manylinux_2_28"
NEWEST_SYMBOLS = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}

# Compute capabilities of the CUDA library; what an nvcc does not know is left out.
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
WITHOUT_CUDA = "CACR_BUILD_CUDA=0 installs without the CUDA kernels"
NVCC_FLAGS = [
    *("-O3", "-std=c++20", "-DNDEBUG", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden"),
    *("-Xcompiler=-Wall", "--threads=1"),
]


class Object(NamedTuple):
    """One source compiled once, by nvcc if it is a .cu."""

    name: str
    source: str
    flags: list[str]
    torch: bool = False  # includes torch's headers


class NativeLibrary(Extension):
    """A shared object linked from ``objects`` in their order."""

    def __init__(self, name: str, objects: list[Object], link_flags: list[str]) -> None:
        super().__init__(name, sorted({o.source for o in objects}), py_limited_api=True)
        self.objects = objects
        self.link_flags = link_flags


def cpu_isas() -> dict[str, list[str]]:
    """The instruction sets to compile for, with their flags."""
    asked = os.environ.get("CACR_CPU_ISAS", "").replace(",", " ").split() or list(ISAS)
    if unknown := set(asked) - set(ISAS):
        raise ExecError(f"CACR_CPU_ISAS must name instruction sets of {', '.join(ISAS)}, got {', '.join(unknown)}")
    wanted = {"portable", *asked}
    if wanted & set(NEW_INSTRUCTIONS):
        wanted.add("avx512")  # has their kernels for float64
    known = {isa: flags for isa, flags in ISAS.items() if isa in wanted and compiles(isa)}
    if "CACR_CPU_ISAS" in os.environ and (left := set(asked) - set(known)):
        raise ExecError(f"CACR_CPU_ISAS={' '.join(asked)}: the compiler does not know {', '.join(sorted(left))}")
    return known


def compiles(isa: str) -> bool:
    """Whether compiler and assembler know an instruction set."""
    if isa not in NEW_INSTRUCTIONS:
        return True
    program, flags = f"#include <immintrin.h>\n{NEW_INSTRUCTIONS[isa]}\n", ISAS[isa]
    command = [*(find_compiler() or ["c++"]), *flags, "-x", "c++", "-c", "-o", os.devnull, "-"]
    try:
        return subprocess.run(command, input=program, text=True, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def cpu_library() -> NativeLibrary:
    """``cacr_kernels/_C_cpu``: torch-free but for the binding, the kernels once per instruction set."""
    stable_abi = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
    isas = cpu_isas()
    compiled = [f"-DCACR_HAVE_{isa.upper()}" for isa in isas]
    kernels, binding = "csrc/cpu/kernels/kernels.cpp", "csrc/cpu/binding.cpp"
    planner = sorted(path.as_posix() for path in Path("csrc/cpu/planner").glob("*.cpp"))
    objects = [
        Object("binding", binding, stable_abi, torch=True),
        *(Object(Path(source).stem, source, compiled) for source in planner),
        *(Object(f"kernels_{isa}", kernels, [f"-DCACR_ISA={isa}", *flags]) for isa, flags in isas.items()),
    ]
    return NativeLibrary("cacr_kernels._C_cpu", objects, ["-ltorch_cpu"])


def cuda_library(nvcc: Path) -> NativeLibrary:
    """``cacr_kernels/_C_cuda``: the binding, and the kernels once per arithmetic; the CUDA runtime inside."""
    stable_abi = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
    home = cuda_root(nvcc)
    headers = ["-isystem", str(home / "include")]
    instances = sorted(path.as_posix() for path in Path("csrc/cuda/instances").glob("*.cu"))
    objects = [
        Object("binding", "csrc/cuda/binding.cpp", [*stable_abi, *headers], torch=True),
        *(Object(Path(source).stem, source, cuda_targets(nvcc)) for source in instances),
    ]
    runtime = next((str(p) for p in home.glob("lib*/libcudart_static.a")), "-lcudart_static")
    link = [runtime, "-ltorch_cpu", "-ldl", "-lrt", "-Wl,--exclude-libs,ALL"]
    return NativeLibrary("cacr_kernels._C_cuda", objects, link)


def cuda_root(nvcc: Path) -> Path:
    """The toolkit of ``nvcc``, which may be a script that calls the real one."""
    said = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=True)
    return Path(re.findall(r"^#\$ TOP=(.*)$", said.stderr, re.MULTILINE)[0]).resolve()


def arch_number(arch: str) -> int:
    """The number of a compute capability, of which ``90a`` and the like are variants."""
    return int(re.sub(r"\D", "", arch) or 0)


def torch_cuda_arch_list() -> list[str]:
    """Compute capabilities from TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX"); those below 8.0 are left out."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    found = [entry.removesuffix("+PTX") for entry in given.replace(";", " ").replace(",", " ").split()]
    if not all(re.fullmatch(r"\d+\.\d[af]?", entry) for entry in found):
        raise ExecError(
            f'TORCH_CUDA_ARCH_LIST must be numbers like "8.0;9.0+PTX", got {given!r}; or set CACR_CUDA_ARCHS'
        )
    found = [entry.replace(".", "") for entry in found]
    usable = [arch for arch in found if arch_number(arch) >= 80]
    if found and not usable:
        raise ExecError(f"the CUDA kernels need compute capability 8.0, TORCH_CUDA_ARCH_LIST={given!r}; {WITHOUT_CUDA}")
    return usable


def cuda_targets(nvcc: Path) -> list[str]:
    """The flags that name what to compile for."""
    asked = os.environ.get("CACR_CUDA_ARCHS", "").replace(";", " ").split() or torch_cuda_arch_list()
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    archs = sorted(asked or [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known], key=arch_number)
    if not archs or not all(re.fullmatch(r"\d+[af]?", arch) for arch in archs):
        raise ExecError(f'CACR_CUDA_ARCHS must name compute capabilities like "80 90", got {" ".join(asked)!r}')
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def find_nvcc() -> Path | None:
    """The compiler of CUDA, from NVCC, CUDA_HOME, CUDA_PATH or PATH; ``None`` if there is none."""
    homes = [Path(os.environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    given = [Path(os.environ["NVCC"])] if "NVCC" in os.environ else []
    found = [Path(path) for path in [shutil.which("nvcc")] if path]
    return next((path.resolve() for path in (*given, *homes, *found) if path.exists()), None)


def check_nvcc_flags() -> None:
    """Refuses inexact arithmetic that nvcc would take from the environment, behind all that a command line says."""
    for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        if found := re.search(rf"\S*({INEXACT_NVCC})\S*", os.environ.get(name, "")):
            raise ExecError(f"the CUDA kernels need exact arithmetic: take {found[0]} out of {name}; {WITHOUT_CUDA}")


def say_if_newer_than_torch(nvcc: Path, root: Path) -> None:
    """Warns of an nvcc whose CUDA is newer than that of torch: then the driver may be too old for the kernels."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    of_nvcc = re.search(r"release (\d+)\.\d+", said)
    of_torch = re.search(r"^cuda\b.*'(\d+)\.\d+'", (root / "version.py").read_text(encoding="utf-8"), re.MULTILINE)
    if of_nvcc and of_torch and int(of_nvcc[1]) > int(of_torch[1]):
        warnings.warn(
            f"the CUDA kernels are compiled by CUDA {of_nvcc[1]}, torch is for CUDA {of_torch[1]}: they bring "
            f"their own runtime, and the driver has to know CUDA {of_nvcc[1]}; CUDA_HOME names another toolkit; "
            f"{WITHOUT_CUDA}",
            stacklevel=2,
        )


def torch_has_cuda(root: Path) -> bool:
    """Whether the torch in ``root`` is a CUDA build, and the one that the kernels will run with."""
    if not (root / "lib" / "libtorch_cuda.so").exists():
        return False
    # Named by pip, build and uv: environments that they make for one build, with the newest torch of the registry.
    if isolated := re.search(r"[\\/]((pip-)?build-env-|builds-v\d)", str(root)):
        warnings.warn(
            "the CUDA kernels are left out, since an isolated build does not see the torch they will run with; "
            "pip install --no-build-isolation, or CACR_BUILD_CUDA=1, compiles them",
            stacklevel=2,
        )
    return not isolated


def torch_root() -> Path:
    """Where torch's headers and libraries lie, found without the seconds that importing it takes."""
    spec = importlib.util.find_spec("torch")
    version = importlib.metadata.version("torch") if spec else "none"
    if spec is None or spec.origin is None or tuple(map(int, re.findall(r"\d+", version)[:2])) < (2, 10):
        raise ExecError(
            f"compiling cacr_kernels needs torch >= 2.10, found {version}; install it, or choose the pure Python "
            "package with CACR_BUILD_CPU=0"
        )
    return Path(spec.origin).parent


def find_compiler() -> list[str] | None:
    """The command of a C++ compiler with GCC's interface, or ``None``; an explicit ``CXX`` is taken at its word."""
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    found = None if os.name == "nt" else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def libraries() -> list[NativeLibrary]:
    """The libraries that this machine can build and the environment asks for."""
    cpu, cuda = os.environ.get("CACR_BUILD_CPU") != "0", os.environ.get("CACR_BUILD_CUDA", "")
    if not cpu and cuda != "1":
        return []
    if find_compiler() is None:
        warnings.warn("no C++ compiler (GCC or Clang) found: cacr_kernels is installed as pure Python", stacklevel=2)
        return []
    found = [cpu_library()] if cpu else []
    nvcc = find_nvcc() if cuda != "0" else None
    if cuda == "1" and nvcc is None:
        raise ExecError("CACR_BUILD_CUDA=1 needs nvcc, found none; put it on PATH or set CUDA_HOME")
    if nvcc is not None and (cuda == "1" or torch_has_cuda(torch_root())):
        check_nvcc_flags()
        try:
            say_if_newer_than_torch(nvcc, torch_root())
            found.append(cuda_library(nvcc))
        except (IndexError, OSError, subprocess.CalledProcessError) as error:
            raise ExecError(f"{nvcc} does not work: {error!r}; {WITHOUT_CUDA}") from error
    return found


def ninja_path(path: str | Path) -> str:
    """``path`` as ninja wants it in a build statement."""
    return re.sub(r"([$: ])", r"$\1", str(path))


def ninja_command(*arguments: str) -> str:
    """``arguments`` as ninja wants them in a command."""
    return shlex.join(arguments).replace("$", "$$")


class NativeBuild(build_ext):
    """Builds ``NativeLibrary`` extensions with ninja."""

    def get_ext_filename(self, fullname: str) -> str:
        """The name ``cacr_kernels/backends/library.py`` looks for, on every platform."""
        return fullname.replace(".", "/") + ".abi3.so"

    def build_extension(self, ext: Extension) -> None:
        """Compile and link ``ext``; sources keep relative names, so that no local path ends up in the library."""
        assert isinstance(ext, NativeLibrary)
        ninja = shutil.which("ninja") or shutil.which("ninja", path=Path(sys.executable).parent)
        if ninja is None:
            raise ExecError("building cacr_kernels needs ninja: pip install ninja")
        directory = BUILD / ext.name
        directory.mkdir(parents=True, exist_ok=True)
        library = directory / "library.so"
        (directory / "build.ninja").write_text(self.ninja_file(ext, directory, library), encoding="utf-8")
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        if subprocess.run([ninja, "-f", str(directory / "build.ninja"), *jobs], check=False).returncode:
            without = WITHOUT_CUDA if ext.name.endswith("cuda") else "CACR_BUILD_CPU=0 installs without the CPU kernels"
            raise ExecError(f"compiling {ext.name} failed (the compiler's messages are above); {without}")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, target)

    @staticmethod
    def ninja_file(ext: NativeLibrary, directory: Path, library: Path) -> str:
        """The text of the ninja file that builds ``library``."""
        compiler = find_compiler()
        assert compiler is not None
        torch = torch_root()  # loaded before the library is: no rpath
        common = [*GENERAL, *OLD_LINUX, *shlex.split(os.environ.get("CXXFLAGS", "")), *IEEE]
        link = [f"-L{torch / 'lib'}", *ext.link_flags, *shlex.split(os.environ.get("LDFLAGS", "")), *IEEE_LINK]
        shared = ["-dynamiclib"] if sys.platform == "darwin" else ["-shared", "-pthread", "-Wl,--no-undefined"]
        lines = [
            f"builddir = {ninja_path(directory)}",
            "rule compile",
            f"  command = {ninja_command(*compiler)} $flags -MD -MF $out.d -c $in -o $out",
            "  deps = gcc",
            "  depfile = $out.d",
            "rule compile_cuda",
            f"  command = {ninja_command(str(find_nvcc()))} $flags -MD -MF $out.d -c $in -o $out",
            "  deps = gcc",
            "  depfile = $out.d",
            "rule link",
            f"  command = {ninja_command(*compiler, *shared)} $in -o $out {ninja_command(*link)}",
        ]
        for o in ext.objects:
            is_cuda = o.source.endswith(".cu")
            rule = "compile_cuda" if is_cuda else "compile"
            lines.append(f"build {ninja_path(directory / o.name)}.o: {rule} {ninja_path(o.source)}")
            headers = ["-isystem", str(torch / "include"), f"-ffile-prefix-map={torch}=torch"] if o.torch else []
            lines.append(f"  flags = {ninja_command(*(NVCC_FLAGS if is_cuda else common), *o.flags, *headers)}")
        inputs = " ".join(f"{ninja_path(directory / o.name)}.o" for o in ext.objects)
        return "\n".join([*lines, f"build {ninja_path(library)}: link {inputs}", ""])


def newest_symbols(library: Path) -> dict[str, tuple[int, ...]]:
    """The newest version of each set of symbols that ``library`` asks of the system; ``OSError`` without readelf."""
    command = ["readelf", "--wide", "--version-info", str(library)]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    newest: dict[str, tuple[int, ...]] = {}
    for name, numbers in re.findall(r"Name: ([A-Z]+)_([0-9.]+)", said):
        newest[name] = max(newest.get(name, ()), tuple(map(int, numbers.split("."))))
    return newest


class Wheel(bdist_wheel):
    """Tags a wheel of Linux ``manylinux_2_28`` where its libraries load there, else for the system that made it."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform."""
        python, abi, system = super().get_tag()
        built = list(BUILD.glob("*/library.so"))
        if not system.startswith("linux_") or not built:
            return python, abi, system
        try:
            asked = [versions for path in built for versions in newest_symbols(path).items()]
        except OSError:
            return python, abi, system
        old = bool(asked) and all(version <= NEWEST_SYMBOLS.get(name, ()) for name, version in asked)
        return python, abi, system.replace("linux", MANYLINUX, 1) if old else system


# Free-threaded builds of Python have no stable ABI of their own; the wheel is then tagged for that Python alone.
abi3 = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp310"}}
setup(ext_modules=libraries(), cmdclass={"build_ext": NativeBuild, "bdist_wheel": Wheel}, options=abi3)
