"""What is known of the CUDA kernels without a GPU: the committed table, and the tools that make it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import cuda_static
import pytest
from cuda_binary import CHIPS, demangle, find_tool, instruction_counts, occupancy, read_kernels
from cuda_promises import PROMISES, Promise, promise_of

TABLE = json.loads(cuda_static.RESULTS.read_text())
needs_nvcc = pytest.mark.skipif(cuda_static.find_nvcc() is None, reason="nvcc is not installed")


def test_table_is_fresh_and_no_kernel_breaks_its_promise() -> None:
    assert cuda_static.problems_of(TABLE) == []
    assert cuda_static.TABLE.read_text() == cuda_static.markdown(TABLE)


def test_every_kernel_is_compiled_for_every_chip() -> None:
    operators = set()
    for source, entry in TABLE["files"].items():
        for name, chips in entry["kernels"].items():
            assert set(chips) == set(CHIPS), f"{source}: {name}"
            operators.add(promise_of(name).operator)
    assert operators == {"ms_deform_attn", "lora_linear", "fusion_attention", "query_attention", "slot_head"}


def test_every_source_is_built() -> None:
    cmake = (cuda_static.ROOT / "CMakeLists.txt").read_text()
    assert [source for source in cuda_static.sources() if f"{source}\n" not in cmake.replace(")", "\n")] == []


def test_every_promise_is_somebodys() -> None:
    names = [name for entry in TABLE["files"].values() for name in entry["kernels"]]
    used = {promise_of(name) for name in names}
    assert [p.kernels for p in PROMISES if p not in used] == []


def test_stack_frames_are_excused_with_a_reason() -> None:
    assert [p.kernels for p in PROMISES if bool(p.stack_bytes) != bool(p.stack_reason)] == []


def spoilt(change) -> dict:
    """The table with one kernel's numbers for one chip changed."""
    table = copy.deepcopy(TABLE)
    for entry in table["files"].values():
        for name, chips in entry["kernels"].items():
            if not promise_of(name).stack_bytes and promise_of(name).loads_16:
                change(chips["sm_90a"])
                return table
    raise AssertionError("no kernel promises 16-byte loads")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda k: k.update(stack=16), "stack frame of 16 bytes"),
        (lambda k: k["counts"].update(local=3), "accessed in 3 places"),
        (lambda k: k["counts"].update(loads_16=0), "no 16-byte global load"),
        (lambda k: k.update(shared=228 * 1024), "more shared memory than a block can have"),
    ],
)
def test_broken_promise_is_named(change, message: str) -> None:
    problems = cuda_static.problems_of(spoilt(change))
    assert len(problems) == 1 and message in problems[0] and "for sm_90a" in problems[0]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in {
        "cuda/a.cu": '#include "a.h"\n#include "device/x.cuh"\n__global__ void k() {}\n',
        "cuda/a.h": '#include "visionllm/s.h"  // why\n',
        "cuda/device/x.cuh": '#ifdef E\n#include "emulation/platform.h"\n#else\n#include <vector>\n#endif\n',
        "cuda/emulation/platform.h": "int emulated;\n",
        "cpp/include/visionllm/s.h": "struct S {};\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_includes_are_followed_but_not_into_the_emulator(tree: Path) -> None:
    assert cuda_static.sources(tree) == ["cuda/a.cu"]
    assert cuda_static.included("cuda/a.cu", tree) == [
        "cpp/include/visionllm/s.h",
        "cuda/a.cu",
        "cuda/a.h",
        "cuda/device/x.cuh",
    ]


def test_digest_changes_with_code_alone(tree: Path) -> None:
    before = cuda_static.digest("cuda/a.cu", tree)
    source, header = tree / "cuda/a.cu", tree / "cpp/include/visionllm/s.h"
    source.write_text("// a comment\n" + source.read_text().replace("void k", "/* another */\n    void  k"))
    (tree / "cuda/emulation/platform.h").write_text("int other;\n")
    assert cuda_static.digest("cuda/a.cu", tree) == before
    header.write_text("struct S { int i; };\n")
    assert cuda_static.digest("cuda/a.cu", tree) != before


def test_stale_missing_and_removed_files_are_named(tree: Path) -> None:
    entry = {"digest": "0", "seconds": {}, "kernels": {}}
    table = {"files": {"cuda/a.cu": entry, "cuda/gone.cu": entry}}
    (tree / "cuda/new.cu").write_text("")
    text = "\n".join(cuda_static.problems_of(table, tree))
    assert "cuda/a.cu or what it includes has changed" in text
    assert "cuda/gone.cu is in the table, but not in the tree" in text
    assert "cuda/new.cu is not in the table" in text


@pytest.mark.parametrize(
    "chip, threads, registers, shared, share",
    [
        ("sm_80", 256, 32, 0, 1.0),
        ("sm_80", 256, 64, 0, 0.5),  # 4 blocks of 16384 registers
        ("sm_80", 256, 65, 0, 0.375),  # handed out by 256 a warp: 72 each, 28 warps
        ("sm_80", 32, 16, 0, 0.5),  # 32 blocks at most
        ("sm_87", 32, 16, 0, 1 / 3),  # 16 blocks of 48 warps
        ("sm_90a", 256, 32, 100 * 1024, 0.25),  # 2 blocks in 228 KiB
        ("sm_90a", 1024, 72, 0, 0.0),  # 32 warps of 2304 registers do not fit
        ("sm_120", 128, 32, 99 * 1024, 4 / 48),
        ("sm_120", 128, 32, 99 * 1024 + 1, 0.0),
    ],
)
def test_occupancy(chip: str, threads: int, registers: int, shared: int, share: float) -> None:
    assert occupancy(CHIPS[chip], threads, registers, shared) == pytest.approx(share)


def test_instructions_are_counted_by_their_opcode() -> None:
    counts = instruction_counts(
        [
            "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]",
            "@!P0 LDG.E R4, desc[UR4][R2.64]",
            "LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64]",
            "HMMA.16816.F32.BF16 R4, R8, R10, R4",
            "@P1 STL [R1], R4",
            "RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R5",
            "STG.E.128 desc[UR4][R2.64], R4",
            "EXIT",
        ]
    )
    assert counts == {
        "all": 8,
        "loads": 2,
        "loads_16": 2,
        "async_copies": 1,
        "stores_16": 1,
        "tensor": 1,
        "atomics": 1,
        "local": 1,
    }


SPILLING = """
__global__ void __launch_bounds__(1024, 2) spilling(float* x, int n) {
  float y[64];
  for (int i = 0; i < 64; ++i) y[i] = x[i * n];
  for (int k = 0; k < n; ++k)
    for (int i = 0; i < 64; ++i) y[i] = y[i] * y[(i + 17) % 64] + x[k];
  for (int i = 0; i < 64; ++i) x[i * n] = y[i];
}
namespace visionllm { namespace cuda { namespace {
template <typename T, int N> __global__ void __launch_bounds__(64) copy_kernel(const T* from, T* to) {
  __shared__ float4 part[N];
  part[threadIdx.x % N] = reinterpret_cast<const float4*>(from)[threadIdx.x];
  __syncthreads();
  reinterpret_cast<float4*>(to)[threadIdx.x] = part[(threadIdx.x + 1) % N];
}
template __global__ void copy_kernel<float, 8>(const float*, float*);
} } }
"""


@needs_nvcc
def test_compiled_kernels_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that spills is caught; sizes, names and instructions are those of the source."""
    for tool in ("cuobjdump", "nvdisasm"):
        assert find_tool(tool), f"{tool} is not installed: it is one of the package's test requirements"
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "bad.cu").write_text(SPILLING)
    monkeypatch.setattr(cuda_static, "ROOT", tmp_path)
    nvcc = cuda_static.find_nvcc()
    assert nvcc is not None
    cubin, seconds, spills = cuda_static.compile_source(nvcc, "cuda/bad.cu", "sm_90a", tmp_path)
    kernels = cuda_static.describe(read_kernels(cubin), spills)
    assert seconds > 0 and set(kernels) == {"copy_kernel<fp32, 8>", "spilling"}
    copying, bad = kernels["copy_kernel<fp32, 8>"]["sm_90a"], kernels["spilling"]["sm_90a"]
    assert (copying["threads"], copying["shared"], copying["stack"], copying["spills"]) == (64, 128, 0, 0)
    assert copying["counts"]["loads_16"] == 1 and copying["counts"]["stores_16"] == 1
    promise = Promise(".*", "copy", loads_16=True)
    assert promise.broken_by(copying["counts"], copying["stack"]) == []
    assert bad["spills"] > 0 and bad["stack"] > 0 and bad["registers"] <= 32
    assert len(promise.broken_by(bad["counts"], bad["stack"])) == 2


def test_differences_are_found_in_both_directions() -> None:
    source, name, chip, kernel = next(iter(cuda_static._rows(TABLE)))
    built: dict = {}
    for _, other, its_chip, numbers in cuda_static._rows(TABLE):
        if its_chip == chip:
            built.setdefault(other, {})[chip] = dict(numbers)
    assert cuda_static.differences(TABLE, built) == []
    built[name][chip]["stack"] = kernel["stack"] + 8
    built["new_kernel"] = {chip: kernel}
    removed = next(other for other in built if other not in (name, "new_kernel"))
    del built[removed]
    assert sorted(cuda_static.differences(TABLE, built)) == sorted(
        [
            f"{name} for {chip} has stack {kernel['stack'] + 8}, the table says {kernel['stack']}",
            f"new_kernel for {chip} is not in the table",
            f"{removed} for {chip} was not built",
        ]
    )


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="binutils is not installed")
def test_names_are_short() -> None:
    unnamed = "_GLOBAL__N__0a1b2c3d_4_a_cu_k"  # nvcc's name of a file's anonymous namespace
    symbol = f"_ZN9visionllm4cuda{len(unnamed)}{unnamed}6kernelI6__halfLi8ELb1EEEvPKT_"
    assert demangle([symbol])[symbol] == "kernel<fp16, 8, true>"
