"""The package as installed: without its compiled extension, as a command, and the examples in its docstrings."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import platform
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
from packaging.requirements import Requirement

import cacr_kernels

ROOT = Path(cacr_kernels.__file__).parents[1]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    result = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result


SCRIPT = """
import json, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import cacr_kernels as ck
    imported = len(caught)
    torch.manual_seed(0)
    z, labels = torch.randn(2, 5, 3, requires_grad=True), torch.tensor([0, 1, 0, 1, 2])
    losses = [ck.cacr_loss(z)]
    first = len(caught)
    losses += [ck.cacr_loss(z, pairing="pooled", cost="rbf"), ck.CACRLoss()(z), ck.cacr_loss(z, backend="torch")]
    losses += [ck.cacr_queue_loss(z, z, z[0]), ck.cacr_momentum_loss(z, z[0], normalize=True)]
    losses += [ck.supervised_cacr_loss(z[0], labels), ck.SupervisedCACRLoss()(z[0], labels)]
    sum(losses).backward()
    named = ck.cacr_loss(z), ck.cacr_loss(z, backend="torch"), ck.cacr_loss(z, backend="reference")
refusals = []
for call in (lambda: ck.cacr_loss(z, backend="cpu"), lambda: ck.CACRLoss(backend="cpu")(z)):
    try:
        call()
    except ValueError as error:
        refusals.append(str(error))
print(json.dumps({
    "imported": imported, "first": first, "count": len(caught), "finite": bool(z.grad.isfinite().all()),
    "named": [x.item() for x in named], "backends": ck.available_backends(), "refusals": refusals,
    "warnings": [[w.category.__name__, str(w.message), w.filename] for w in caught],
}))
"""


def test_pure_python_package(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    found = json.loads(python(str(script), CACR_DISABLE_EXTENSION="1").stdout)
    assert found["imported"] == 0
    assert found["first"] == found["count"] == 1
    category, message, filename = found["warnings"][0]
    assert category == "RuntimeWarning"
    assert "PyTorch" in message
    assert "CACR_DISABLE_EXTENSION" in message
    assert Path(filename) == script  # the line of the user, not one of the package
    assert found["finite"]
    assert found["named"][0] == found["named"][1] == pytest.approx(found["named"][2], rel=1e-5)
    assert found["backends"]["torch"] is None
    assert "CACR_DISABLE_EXTENSION" in found["backends"]["cpu"]
    assert len(found["refusals"]) == 2
    for refusal in found["refusals"]:
        assert "backend='cpu'" in refusal
        assert "CACR_DISABLE_EXTENSION" in refusal


@pytest.mark.exhaustive
def test_nothing_is_said_that_was_not_asked_for() -> None:
    """No warning at import, nor by a backend that was named."""
    code = "import torch, cacr_kernels as c; c.cacr_loss(torch.randn(2, 4, 3), backend='torch')"
    for disabled in ("0", "1"):
        result = python("-W", "error", "-c", code, CACR_DISABLE_EXTENSION=disabled)
        assert result.stdout == result.stderr == ""


@pytest.mark.exhaustive
@pytest.mark.parametrize("disabled", ["0", "1"])
def test_command_with_json(disabled: str) -> None:
    data = json.loads(python("-m", "cacr_kernels", "--json", CACR_DISABLE_EXTENSION=disabled).stdout)
    assert data["cacr_kernels"] == cacr_kernels.__version__
    expected = cacr_kernels.available_backends()
    assert data["backends"].keys() == expected.keys()
    assert (data["cpu_library"]["error"] is None) == (data["backends"]["cpu"] is None)
    if disabled == "1":
        assert "CACR_DISABLE_EXTENSION" in data["backends"]["cpu"]
        assert "CACR_DISABLE_EXTENSION" in data["cpu_library"]["error"]
        assert data["cpu_library"]["active_isa"] is None
    else:
        assert data["backends"] == expected


def test_command() -> None:
    text = python("-m", "cacr_kernels").stdout
    assert cacr_kernels.__version__ in text
    for name, reason in cacr_kernels.available_backends().items():
        line = next(line for line in text.splitlines() if line.startswith(f'backend "{name}"'))
        assert (reason or "can run") in line


def test_command_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        importlib.import_module("cacr_kernels.__main__").main(["--yaml"])
    assert caught.value.code == 2
    assert "--yaml" in capsys.readouterr().err


WITH_EXAMPLES = ["", ".chunked", ".functional", ".modules", ".types", ".weights", ".backends.table"]


@pytest.mark.parametrize("name", [*WITH_EXAMPLES, ".integrations.cacr_ssl"])
def test_examples_of_the_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"cacr_kernels{name}"))
    assert result.failed == 0
    assert result.attempted > 0


SECTIONS = ("Args:", "Returns:", "Raises:", "Example:", "::\n")
OF_SOME = {  # what is no function of arguments
    "CACRParts": ("Example:",),
    "CACRWeights": ("Example:",),
    "available_backends": ("Returns:", "Example:"),
}
PUBLISHED = [".our_loss1", ".our_loss2", ".cacr_rbfloss", ".cacr_euclideanloss", ".moco_losses"]


@pytest.mark.parametrize("name", [*(name for name in cacr_kernels.__all__ if not name.startswith("__")), *PUBLISHED])
def test_sections_of_the_docstrings(name: str) -> None:
    """Formula, shapes of tensors, what is returned and refused, an example."""
    where = importlib.import_module("cacr_kernels.integrations.cacr_ssl") if name[0] == "." else cacr_kernels
    text = getattr(where, name.removeprefix(".")).__doc__
    assert [section for section in OF_SOME.get(name, SECTIONS) if section not in text] == []
    assert name in OF_SOME or re.search(r"\[(B|N|V|M|K|Q), [^\]]*[BDK.]\]", text)


# ---- setup.py with tools that only say what they were asked ----------------------------------------------------------
def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


NVCC = """case $1 in
--dryrun) echo '#$ TOP=/usr' >&2 ;;
--list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n' ;;
esac"""


@pytest.fixture
def setup_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setenv("CACR_BUILD_CPU", "0")
    for name in ("CACR_CPU_ISAS", "CACR_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, CACR_BUILD_CUDA="0"):
        return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs a library for x86-64")
def test_instruction_sets(setup_py, monkeypatch):
    """The portable one always, in the order in which they are linked."""
    objects = [o.name for o in setup_py["cpu_library"]().objects if o.name.startswith("kernels_")]
    assert {"kernels_portable", "kernels_avx2", "kernels_avx512"} <= set(objects)
    monkeypatch.setenv("CACR_CPU_ISAS", "avx512,avx2")
    fewer = setup_py["cpu_library"]().objects
    assert [o.name for o in fewer if o.name.startswith("kernels_")] == objects[:3]
    compiled = next(o.flags for o in fewer if o.name == "isa")
    assert compiled == ["-DCACR_HAVE_PORTABLE", "-DCACR_HAVE_AVX2", "-DCACR_HAVE_AVX512"]
    if "kernels_amx" in objects:
        monkeypatch.setenv("CACR_CPU_ISAS", "amx")
        named = [o.name for o in setup_py["cpu_library"]().objects]
        assert [name for name in named if "kernels_" in name] == ["kernels_portable", "kernels_avx512", "kernels_amx"]
    monkeypatch.setenv("CACR_CPU_ISAS", "avx2 vax")
    with pytest.raises(Exception, match=r"instruction sets of portable, avx2.*got vax"):
        setup_py["cpu_library"]()


@pytest.mark.parametrize(
    ("asked", "archs", "ptx"),
    [("90 80", "80 90", "90"), ("100;90a;80", "80 90a 100", "100"), (None, "80 90", "90")],
)
def test_architectures(setup_py, tmp_path, monkeypatch, asked, archs, ptx):
    """In order, so that the PTX is that of the newest; by default those that nvcc knows."""
    if asked is not None:
        monkeypatch.setenv("CACR_CUDA_ARCHS", asked)
    flags = setup_py["cuda_targets"](script(tmp_path / "nvcc", NVCC))
    machine_code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs.split()]
    assert flags == [*machine_code, f"-gencode=arch=compute_{ptx},code=compute_{ptx}"]


@pytest.mark.parametrize(
    ("asked", "archs", "ptx"),
    [
        ("7.5;9.0a+PTX;8.0", "80 90a", "90a"),
        ("8.6 8.9", "86 89", "89"),
        ("8.0,9.0", "80 90", "90"),
        ("", "80 90", "90"),
    ],
)
def test_architectures_of_torch(setup_py, tmp_path, monkeypatch, asked, archs, ptx):
    """What users of PyTorch's own extensions set; our variable comes first."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    flags = setup_py["cuda_targets"](script(tmp_path / "nvcc", NVCC))
    machine_code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs.split()]
    assert flags == [*machine_code, f"-gencode=arch=compute_{ptx},code=compute_{ptx}"]
    monkeypatch.setenv("CACR_CUDA_ARCHS", "100")
    assert "-gencode=arch=compute_100,code=sm_100" in setup_py["cuda_targets"](script(tmp_path / "nvcc", NVCC))


@pytest.mark.parametrize(
    ("asked", "said"), [("Hopper", "numbers like"), ("7.0;7.5+PTX", "need compute capability 8.0")]
)
def test_architectures_of_torch_that_are_none(setup_py, tmp_path, monkeypatch, asked, said):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(Exception, match=rf"{said}.*{re.escape(asked)}"):
        setup_py["cuda_targets"](script(tmp_path / "nvcc", NVCC))


@pytest.mark.parametrize("asked", ["8.0", "sm_80", "native"])
def test_architectures_that_are_none(setup_py, tmp_path, monkeypatch, asked):
    monkeypatch.setenv("CACR_CUDA_ARCHS", asked)
    with pytest.raises(Exception, match=f"CACR_CUDA_ARCHS must name .*{asked}"):
        setup_py["cuda_targets"](script(tmp_path / "nvcc", NVCC))


def tag(setup_py, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Path | str | None) -> str:
    """The platform of a wheel that holds ``library``: a file, or what readelf says of it."""
    monkeypatch.chdir(tmp_path)
    wheel = setup_py["Wheel"]
    if library is not None:
        folder = tmp_path / setup_py["BUILD"] / "cacr_kernels._C_cpu"
        folder.mkdir(parents=True)
        (folder / "library.so").write_bytes(library.read_bytes() if isinstance(library, Path) else b"")
    if isinstance(library, str):
        script(tmp_path / "readelf", f"echo '{library}'")
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with mock.patch.object(wheel.__base__, "get_tag", return_value=("cp310", "abi3", "linux_x86_64")):
        return wheel.get_tag(object.__new__(wheel))[2]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Name: GLIBC_2.28  Name: GLIBC_2.2.5  Name: GLIBCXX_3.4.24  Name: CXXABI_1.3", "manylinux_2_28_x86_64"),
        ("Name: GLIBC_2.29  Name: GLIBCXX_3.4.24", "linux_x86_64"),
        ("Name: GLIBC_2.28  Name: GLIBCXX_3.4.26", "linux_x86_64"),
        ("Name: GLIBC_2.28  Name: UNKNOWN_1.0", "linux_x86_64"),
        ("", "linux_x86_64"),
        (None, "linux_x86_64"),
    ],
)
def test_tag_of_a_wheel(setup_py, tmp_path, monkeypatch, said, expected):
    """By the newest symbol that a library asks for; no library, no claim."""
    assert tag(setup_py, tmp_path, monkeypatch, said) == expected


COMPILED = Path(cacr_kernels.__file__).parent / "_C_cpu.abi3.so"


@pytest.mark.skipif(
    sys.platform != "linux" or not COMPILED.exists() or "clang" in os.environ.get("CXX", ""),
    reason="no library that GCC compiled for Linux",
)
def test_tag_of_this_library(setup_py, tmp_path, monkeypatch):
    """It loads on systems of 2018."""
    assert tag(setup_py, tmp_path, monkeypatch, COMPILED) == "manylinux_2_28_x86_64"


def build(tmp_path: Path, nvcc: str, **environment: str) -> tuple[str, str]:
    """What a build says when it fails, and what ninja, which does, was called with."""
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    script(tmp_path / "nvcc", nvcc)
    script(tmp_path / "ninja", f"echo $@ > {tmp_path}/asked; exit 1")
    asked = {"CACR_BUILD_CPU": "0", "CACR_BUILD_CUDA": "1", "NVCC": str(tmp_path / "nvcc"), "CXX": "c++"}
    env = os.environ | asked | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | environment
    command = [sys.executable, str(ROOT / "setup.py"), "build_ext", "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    return done.stdout + done.stderr, (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""


def test_failing_nvcc_says_how_to_do_without(tmp_path: Path) -> None:
    said, asked = build(tmp_path, NVCC, MAX_JOBS="3")
    assert "compiling cacr_kernels._C_cuda failed" in said
    assert "CACR_BUILD_CUDA=0 installs without the CUDA kernels" in said
    assert asked.split()[-2:] == ["-j", "3"]
    ninja = (tmp_path / asked.split()[1]).read_text()
    assert "--threads=1" in ninja  # of nvcc: nothing but MAX_JOBS decides how much runs at once


def test_broken_nvcc_says_how_to_do_without(tmp_path: Path) -> None:
    said, asked = build(tmp_path, "exit 7")
    assert "nvcc does not work" in said
    assert "CACR_BUILD_CUDA=0 installs without the CUDA kernels" in said
    assert asked == ""


def test_old_setuptools_is_refused_in_one_line() -> None:
    with mock.patch("setuptools.__version__", "65.5.0"), pytest.raises(SystemExit) as refused:
        runpy.run_path(str(ROOT / "setup.py"))
    assert refused.value.code == "setuptools >= 77 is needed, found 65.5.0: pip install 'setuptools>=77'"


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that is all of PATH, and nothing in the environment that names a tool."""
    for name in ("CXX", "NVCC", "CUDA_HOME", "CUDA_PATH", "CACR_BUILD_CPU", "CACR_BUILD_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_without_a_compiler_the_package_is_pure_python(setup_py, bare_machine) -> None:
    with pytest.warns(UserWarning, match=r"^no C\+\+ compiler \(GCC or Clang\) found: .* pure Python$"):
        assert setup_py["libraries"]() == []


def test_without_nvcc_there_are_no_cuda_kernels(setup_py, bare_machine, monkeypatch) -> None:
    """Nothing is said, unless they were asked for."""
    script(bare_machine / "c++", "exit 0")
    assert [library.name for library in setup_py["libraries"]()] == ["cacr_kernels._C_cpu"]
    monkeypatch.setenv("CACR_BUILD_CUDA", "1")
    with pytest.raises(Exception, match=r"^CACR_BUILD_CUDA=1 needs nvcc, found none; .* CUDA_HOME$"):
        setup_py["libraries"]()


def test_without_ninja(setup_py, monkeypatch, tmp_path) -> None:
    with (
        mock.patch("shutil.which", return_value=None),
        pytest.raises(Exception, match=r"needs ninja: pip install ninja$"),
    ):
        setup_py["NativeBuild"].build_extension(mock.Mock(), setup_py["cpu_library"]())


@pytest.mark.parametrize("version", ["2.9.1", None])
def test_without_a_torch_to_compile_against(setup_py, version) -> None:
    found = mock.patch("importlib.util.find_spec", return_value=version and mock.Mock())
    refused = pytest.raises(Exception, match=rf"needs torch >= 2.10, found {version or 'none'}; .*CACR_BUILD_CPU=0$")
    with found, mock.patch("importlib.metadata.version", return_value=version), refused:
        setup_py["torch_root"]()


@pytest.mark.parametrize(
    ("of_nvcc", "of_torch", "said"),
    [("13.0", "'12.6'", True), ("12.4", "'12.6'", False), ("12.4", "'13.0'", False), ("13.0", "None", False)],
)
def test_an_nvcc_of_another_cuda(setup_py, tmp_path, of_nvcc, of_torch, said) -> None:
    """The runtime is in the library: only a driver that is too old could refuse it."""
    (tmp_path / "version.py").write_text(f"debug = False\ncuda: Optional[str] = {of_torch}\nhip = None\n")
    nvcc = script(tmp_path / "nvcc", f"echo 'Cuda compilation tools, release {of_nvcc}, V{of_nvcc}.76'")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        setup_py["say_if_newer_than_torch"](nvcc, tmp_path)
    assert ["the driver has to know CUDA 13" in str(warning.message) for warning in found] == [True] * said


@pytest.mark.parametrize("extra", ["triton", "integrations", "docs", "test", "dev"])
def test_extras(extra: str) -> None:
    assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)


def test_torch_of_containers_meets_the_requirement() -> None:
    """A build like 2.10.0a0+… comes before 2.10; pip must not install another torch over it."""
    required = re.findall(r'"(torch>=[^"]*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert len(required) == 2  # to build, and to run
    for requirement in map(Requirement, required):
        admitted = [
            v for v in ("2.9.1", "2.10.0a0+b4e4ee81d3.nv25.12", "2.10.0", "2.14.1+cu130") if v in requirement.specifier
        ]
        assert admitted == ["2.10.0a0+b4e4ee81d3.nv25.12", "2.10.0", "2.14.1+cu130"]


INEXACT = ["-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-ffinite-math-only", "-fassociative-math"]


@pytest.mark.parametrize("flag", INEXACT)
def test_fast_math_of_the_user_is_undone(setup_py, monkeypatch, flag):
    """Where kernels are compiled, and where a link would make every process that loads them flush to zero."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CXXFLAGS", flag)
    monkeypatch.setenv("LDFLAGS", flag)
    text = setup_py["NativeBuild"].ninja_file(setup_py["cpu_library"](), Path("build"), Path("build/library.so"))
    commands = [shlex.split(line.split("=", 1)[1]) for line in text.splitlines() if "-fno-fast-math" in line]
    assert len(commands) == text.count(": compile ") + 1
    for command in commands:
        linked = "-shared" in command
        given = ["c++", *command[command.index(flag) :]]  # what stands behind the user's flag decides
        if linked:
            drawn = subprocess.run(
                [*given, "-shared", "-###", "x.o"], capture_output=True, text=True, check=False
            ).stderr
            assert "x.o" in drawn
            assert "crtfastmath" not in drawn
        else:
            given = [word for word in given if not word.startswith("-m")]
            macros = subprocess.check_output([*given, "-dM", "-E", "-x", "c++", os.devnull], text=True)
            assert not set(INEXACT_MACROS) & set(macros.split())
            assert "__FINITE_MATH_ONLY__ 0" in macros


INEXACT_MACROS = ("__FAST_MATH__", "__ASSOCIATIVE_MATH__", "__RECIPROCAL_MATH__", "__NO_SIGNED_ZEROS__")


@pytest.mark.parametrize(
    ("source", "flag"),
    [
        ("csrc/cpu/kernels/kernels.cpp", "-ffast-math"),
        ("csrc/cpu/planner/isa.cpp", "-Ofast"),
        ("csrc/cuda/call.h", "-ffinite-math-only"),
    ],
)
def test_inexact_arithmetic_does_not_compile(source: str, flag: str) -> None:
    defined = ["-DCACR_ISA=portable", "-DCACR_VECTOR_BYTES=16", "-Wfatal-errors"]
    command = ["c++", "-std=c++20", *defined, flag, "-E", "-x", "c++", str(ROOT / source), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "cacr_kernels needs IEEE arithmetic" in done.stderr


@pytest.mark.parametrize("flag", ["--use_fast_math", "-ftz=true", "--prec-div=false", "-Xcompiler=-ffast-math"])
@pytest.mark.parametrize("name", ["NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS"])
def test_inexact_arithmetic_of_nvcc_is_refused(tmp_path, name, flag):
    said, asked = build(tmp_path, NVCC, **{name: f"-allow-unsupported-compiler {flag}"})
    assert f"take {flag} out of {name}" in said
    assert asked == ""


@pytest.mark.parametrize(
    ("place", "compiled"),
    [
        ("venv/lib/site-packages", True),
        ("pip-build-env-1x2/overlay/lib/site-packages", False),
        ("build-env-1x2/lib/site-packages", False),
        ("uv/builds-v0/.tmp1x2/lib/site-packages", False),
    ],
)
def test_isolated_build_compiles_no_cuda_kernels(setup_py, tmp_path, place, compiled):
    """Its torch is the newest of the registry, not the one that the kernels will run with."""
    library = tmp_path / place / "torch" / "lib" / "libtorch_cuda.so"
    library.parent.mkdir(parents=True)
    library.touch()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert setup_py["torch_has_cuda"](library.parents[1]) == compiled
    assert len(said) == (not compiled)
    assert compiled or "pip install --no-build-isolation, or CACR_BUILD_CUDA=1" in str(said[0].message)


def test_missing_cuda_library_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """By all that its making takes: what was missing when the package was installed is not known any more."""
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("pathlib.Path.exists", lambda self: False)
    error = importlib.import_module("cacr_kernels.backends.library")._load_cuda().error
    for needed in ("nvcc", "--no-build-isolation", "CACR_BUILD_CUDA"):
        assert needed in error


def test_everything_public_is_there_and_documented() -> None:
    for name in cacr_kernels.__all__:
        value = getattr(cacr_kernels, name)
        assert name.startswith("__") or value.__doc__, name
    losses = {"cacr_loss", "cacr_queue_loss", "cacr_momentum_loss", "supervised_cacr_loss"}
    others = {"CACRParts", "available_backends"}
    modules = {"CACRLoss", "CACRQueueLoss", "CACRMomentumLoss", "SupervisedCACRLoss"}
    assert losses | others | modules <= set(cacr_kernels.__all__)
