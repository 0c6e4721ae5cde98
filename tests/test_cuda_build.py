"""The build with CUDA kernels, on machines without a GPU too.

bench/gpu_check.sh makes it, and runs here as far as it can. One chip is compiled, in minutes, and only
where there is nvcc.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cuda_static
import pytest

from visionllm import _core

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench" / "gpu_check.sh"
CHIP = "80"  # the kernels compile quickest for it
HAS_NVCC = cuda_static.find_nvcc() is not None
needs_nvcc = pytest.mark.skipif(not HAS_NVCC, reason="nvcc is not installed")
needs_no_gpu = pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU")


def environment(**changes: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHON": sys.executable, **changes}


def run(*command: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@dataclass(frozen=True)
class Build:
    folder: Path
    results: Path
    output: str

    def python(self, code: str) -> str:
        result = run(sys.executable, "-c", code, PYTHONPATH=str(self.folder / "python"))
        assert result.returncode == 0, result.stdout
        return result.stdout.strip()


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("gpu_check")
    options = dict(BUILD=str(folder / "build"), LIMIT="1500", JOBS="2")
    if HAS_NVCC:
        options["ARCHITECTURES"] = f"{CHIP}-real"
    result = run(SCRIPT, folder / "results", "build", **options)
    assert result.returncode == 0, result.stdout
    return Build(folder / "build", folder / "results", result.stdout)


def test_build_says_what_it_did(build: Build) -> None:
    assert "build: import ok" in build.output
    assert ("build: skipped: CUDA kernels" in build.output) == (not HAS_NVCC)
    assert (build.results / "summary.txt").read_text().count(" ok, ") == 3


def test_module_knows_what_it_is_built_for(build: Build) -> None:
    built = f"('sm_{CHIP}',)" if HAS_NVCC else "()"
    assert build.python("from visionllm import _core; print(_core.cuda_architectures)") == built


@needs_nvcc
@needs_no_gpu
def test_kernels_without_a_gpu_say_why_they_cannot_run(build: Build) -> None:
    problem = build.python("from visionllm import _core; print(_core.cuda_problem())")
    assert problem.startswith("CUDA: no usable driver or GPU: ")
    report = build.python("from visionllm import doctor; print(doctor.report())")
    assert f"built for sm_{CHIP}; not usable: {problem}" in report


@needs_nvcc
@pytest.mark.skipif(sys.platform != "linux", reason="reads the ELF file")
def test_extension_with_kernels_links_no_cuda_library(build: Build) -> None:
    """The runtime is inside, the driver is opened when it is first used: the CPU works on without either."""
    (module,) = (build.folder / "python" / "visionllm").glob("_core*.so")
    readelf = shutil.which("readelf")
    assert readelf, "binutils is not installed, though a compiler is"
    needed = [line for line in run(readelf, "--dynamic", module).stdout.splitlines() if "(NEEDED)" in line]
    assert needed and not [line for line in needed if "cuda" in line]


def test_module_computes_on_the_cpu(build: Build) -> None:
    code = (
        "from visionllm.ops.ms_deform_attn import *\n"
        "inputs = sample_inputs()\n"
        "output = ms_deform_attn(*inputs.args())\n"
        "print(float((output - ms_deform_attn_reference(*inputs.args())).abs().max()) < 1e-4)"
    )
    assert build.python(code) == "True"


@needs_nvcc
def test_kernels_are_as_the_table_says(build: Build) -> None:
    table = json.loads(cuda_static.RESULTS.read_text())
    built = cuda_static.read_built(build.folder)
    assert {chip for chips in built.values() for chip in chips} == {f"sm_{CHIP}"}
    assert cuda_static.differences(table, built) == []


@needs_no_gpu
def test_other_parts_run_as_far_as_they_can(build: Build, tmp_path: Path) -> None:
    result = run(SCRIPT, tmp_path, "tests", "sanitizer", "bench", BUILD=str(build.folder), QUICK="1")
    assert result.returncode == 0, result.stdout
    for line in (
        "tests: skipped: those on a device (no GPU)",
        "tests: pytest ok",
        "sanitizer: skipped: no kernels on a GPU here",
        "bench: skipped: no kernels on a GPU here",
    ):
        assert line in result.stdout
    assert " passed" in (tmp_path / "tests.log").read_text()


def test_part_without_a_build_is_a_failure(tmp_path: Path) -> None:
    result = run(SCRIPT, tmp_path / "results", "tests", BUILD=str(tmp_path / "none"))
    assert result.returncode == 1 and "there is no build in" in result.stdout


def test_failing_part_is_a_failure(tmp_path: Path) -> None:
    """The interpreter lacks everything: the build cannot succeed, and the exit code says so."""
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    result = run(
        SCRIPT,
        tmp_path / "results",
        "build",
        BUILD=str(tmp_path / "build"),
        PYTHON=str(python),
        LIMIT="100",
    )
    assert result.returncode == 1 and "build: configure FAILED" in result.stdout


def test_part_that_takes_too_long_is_a_failure(build: Build, tmp_path: Path) -> None:
    result = run(SCRIPT, tmp_path, "tests", BUILD=str(build.folder), LIMIT="1")
    assert result.returncode == 1 and "pytest FAILED: not finished after 1 s" in result.stdout


def test_unknown_part_is_a_mistake(tmp_path: Path) -> None:
    result = run(SCRIPT, tmp_path / "results", "everything", BUILD=str(tmp_path / "build"))
    assert result.returncode == 2 and "there is no part 'everything'" in result.stdout


def configure(folder: Path, *options: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return run("cmake", "-S", ROOT, "-B", folder, "-DVISIONLLM_INSTALL=OFF", *options, **changes)


def fake_gpus(folder: Path, capabilities: str) -> dict[str, str]:
    """An environment in which nvidia-smi reports these compute capabilities."""
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{capabilities}'\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{environment()['PATH']}"}


@needs_nvcc
def test_gpus_of_the_machine_are_what_is_built_for(tmp_path: Path) -> None:
    result = configure(tmp_path / "build", **fake_gpus(tmp_path / "bin", "9.0\\n8.6\\n9.0\\n7.5\\n"))
    assert result.returncode == 0, result.stdout
    assert "CUDA kernels: on, for sm_90a, sm_86, by nvcc" in result.stdout


def test_gpu_without_nvcc_is_built_for_the_cpu(tmp_path: Path) -> None:
    gpus = fake_gpus(tmp_path / "bin", "9.0\\n")
    result = configure(tmp_path / "build", **gpus, CUDACXX=str(tmp_path / "nvcc"))
    assert result.returncode == 0, result.stdout
    assert "this machine has a GPU but no working nvcc" in result.stdout


@needs_no_gpu
def test_without_a_gpu_no_time_is_spent_on_kernels(tmp_path: Path) -> None:
    result = configure(tmp_path / "build")
    assert result.returncode == 0, result.stdout
    assert "CUDA kernels: off, no NVIDIA GPU" in result.stdout


def test_kernels_asked_for_without_nvcc_are_an_error(tmp_path: Path) -> None:
    result = configure(tmp_path / "build", "-DVISIONLLM_CUDA=ON", CUDACXX=str(tmp_path / "nvcc"))
    assert result.returncode != 0 and "VISIONLLM_CUDA=ON needs nvcc 12" in result.stdout


@needs_nvcc
@pytest.mark.parametrize("architectures", ["75", "all", "sm_80", "90a-real;x"])
def test_wrong_architectures_are_an_error(tmp_path: Path, architectures: str) -> None:
    options = ("-DVISIONLLM_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
    result = configure(tmp_path / "build", *options)
    assert (
        result.returncode != 0 and "CMAKE_CUDA_ARCHITECTURES must be a list of 80 or newer" in result.stdout
    )


@pytest.mark.parametrize(
    "architecture, capability, fits",
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),  # machine code serves later chips of its major number
        ("sm_87", (8, 6), False),
        ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_90a", (10, 0), False),
        ("sm_120", (12, 1), True),
        ("sm_120", (10, 0), False),
        ("compute_90", (9, 0), True),  # the driver compiles it for anything newer
        ("compute_90", (12, 0), True),
        ("compute_90", (8, 9), False),
        ("compute_90a", (10, 0), False),  # but not this: it is for one chip
    ],
)
def test_which_gpus_a_build_serves(architecture: str, capability: tuple[int, int], fits: bool) -> None:
    assert _core.cuda_architecture_fits([architecture], *capability) == fits
    assert _core.cuda_architecture_fits(["sm_70", architecture], *capability) == fits
    assert not _core.cuda_architecture_fits([], *capability)


@pytest.mark.skipif(bool(_core.cuda_architectures), reason="this build has CUDA kernels")
def test_cpu_build_asked_for_cuda_says_what_to_build() -> None:
    """Tensors that say they are in CUDA memory; nothing reads them."""

    def raw(dtype: int, *shape: int) -> tuple:
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return 4096, dtype, 1, shape, strides

    with pytest.raises(RuntimeError, match=r"ms_deform_attn: .*no CUDA kernels.*-DVISIONLLM_CUDA=ON"):
        _core.ms_deform_attn_raw(
            raw(0, 1, 2, 8),
            raw(0, 1, 4, 1, 8),
            raw(3, 1, 2),
            raw(3, 1),
            raw(0, 1, 2, 1, 1, 1, 2),
            raw(0, 1, 2, 1, 1, 1),
        )
