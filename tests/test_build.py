"""The build: the installed C++ library in another project, the extension's links, forced instruction sets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from visionllm import _core, doctor

ROOT = Path(__file__).resolve().parents[1]
CONSUMER = ROOT / "tests" / "cmake_consumer"


def run(*command: str | Path, **environment: str) -> str:
    """The command's output; fails with all of it when the exit code is not 0."""
    result = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{' '.join(map(str, command))} gave {result.returncode}:\n{result.stdout}"
    return result.stdout


def build_consumer(folder: Path, *options: str) -> Path:
    """Builds and installs the library in a folder, then the consumer against what was installed."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert cmake, "cmake is not installed: it is one of the package's test requirements"
    prefix = folder / "prefix"
    run(cmake, "-S", ROOT, "-B", folder / "library", f"-DCMAKE_INSTALL_PREFIX={prefix}", *options)
    run(cmake, "--build", folder / "library", "--parallel", "2")
    run(cmake, "--install", folder / "library")
    assert not list(prefix.rglob("*_core*")), "the C++ installation must not hold the Python extension"
    run(cmake, "-S", CONSUMER, "-B", folder / "consumer", f"-DCMAKE_PREFIX_PATH={prefix}", *options)
    run(cmake, "--build", folder / "consumer")
    return folder / "consumer" / "consumer"


def test_installed_library_in_another_project(tmp_path: Path) -> None:
    output = run(build_consumer(tmp_path))
    assert output.splitlines() == [f"{isa}: ok" for isa in _core.available_isas()]
    _assert_kernels_share_no_code(tmp_path / "library")


def _assert_kernels_share_no_code(build: Path) -> None:
    """An inline function compiled for AVX-512 that others may be linked to would crash older machines."""
    nm = shutil.which("nm")
    assert nm, "binutils is not installed, though a compiler is"
    for isa in _core.built_isas():
        objects = list((build / "CMakeFiles" / f"visionllm_{isa}.dir").rglob("*.o"))
        assert objects, f"no kernels of {isa} in {build}"
        # Mangled names: a demangled function template has its return type before its namespace.
        own = f"_ZN9visionllm3cpu{len(isa)}{isa}"
        for line in run(nm, "--defined-only", "--extern-only", *objects).splitlines():
            symbol = line.split(maxsplit=2)
            if len(symbol) == 3:
                assert symbol[2].startswith(own), f"{isa} kernels define {symbol[2]}"


def test_neon_cross_compiled(tmp_path: Path) -> None:
    """The same sources for AArch64; run where an emulator is installed."""
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("g++-aarch64-linux-gnu is not installed")
    program = build_consumer(tmp_path, f"-DCMAKE_TOOLCHAIN_FILE={CONSUMER / 'aarch64.cmake'}")
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if qemu is not None:
        output = run(qemu, "-L", "/usr/aarch64-linux-gnu", program)
        assert output.splitlines() == ["scalar: ok", "neon: ok"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the ELF file")
def test_extension_does_not_link_torch_or_python() -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("binutils is not installed")
    needed = [line for line in run(readelf, "--dynamic", _core.__file__).splitlines() if "(NEEDED)" in line]
    assert needed, "readelf shows no linked libraries"
    for name in ("torch", "c10", "libpython", "gomp", "cuda"):
        assert not [line for line in needed if name in line], f"the extension links {name}"


@pytest.mark.parametrize("name", _core.available_isas())
def test_environment_forces_an_instruction_set(name: str) -> None:
    code = "from visionllm import _core; print(_core.active_isa())"
    assert run(sys.executable, "-c", code, VISIONLLM_ISA=name).strip() == name


@pytest.mark.parametrize("name", ["sse9", "neon", "avx512", "avx512_bf16"])
def test_instruction_set_that_the_machine_lacks_is_an_error(name: str) -> None:
    if name in _core.available_isas():
        pytest.skip(f"this machine has {name}")
    code = (
        "import numpy as np; from visionllm import _core, arrays\n"
        "try: arrays.ms_deform_attn(np.zeros((1, 1, 1, 4), 'f'), np.ones((1, 2), 'l'), np.zeros(1, 'l'),\n"
        "    np.zeros((1, 1, 1, 1, 1, 2), 'f'), np.ones((1, 1, 1, 1, 1), 'f'))\n"
        "except RuntimeError as error: print(error)"
    )
    output = run(sys.executable, "-c", code, VISIONLLM_ISA=name)
    reason = "this machine lacks" if name in _core.built_isas() else "this build does not have"
    assert output.startswith(
        f"VISIONLLM_ISA asks for instruction set '{name}', which {reason}; it can use: scalar"
    )


def test_refused_instruction_set_changes_nothing() -> None:
    before = _core.active_isa()
    with pytest.raises(RuntimeError, match="set_isa asks for instruction set 'mmx'"):
        _core.set_isa("mmx")
    assert _core.active_isa() == before


def test_doctor_tells_what_is_in_use() -> None:
    lines = dict(line.split(maxsplit=1) for line in doctor.report().splitlines())
    assert lines["visionllm"] and lines["python"].startswith(".".join(map(str, sys.version_info[:2])))
    report = doctor.report()
    for isa in _core.built_isas():
        assert isa in report
    assert f"{_core.active_isa()} (the best of this machine" in report or "VISIONLLM_ISA" in os.environ
    assert "default model" in report and "CUDA kernels" in report


def test_doctor_reports_a_wrong_instruction_set_instead_of_failing() -> None:
    code = "from visionllm import doctor; print(doctor.report())"
    output = run(sys.executable, "-c", code, VISIONLLM_ISA="mmx")
    assert "VISIONLLM_ISA asks for instruction set 'mmx', which this build does not have" in output
