"""Reads what nvcc made: registers, memory and instructions of every kernel, and the occupancy they allow.

Needs NVIDIA's ``cuobjdump`` and ``nvdisasm``: from the toolkit, from the wheels ``nvidia-cuda-cuobjdump`` and
``nvidia-cuda-nvdisasm``, or from Triton's wheel.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "CHIPS",
    "Chip",
    "Kernel",
    "demangle",
    "find_tool",
    "instruction_counts",
    "occupancy",
    "read_kernels",
]


@dataclass(frozen=True)
class Chip:
    """What one multiprocessor has (CUDA programming guide, specifications by compute capability)."""

    warps: int
    blocks: int
    shared_bytes: int  # for all blocks together, 1 KiB of each block's for the system
    shared_bytes_block: int  # largest of one block
    registers: int = 65536
    registers_granularity: int = 256  # a warp's registers are handed out in these units


CHIPS = {
    "sm_80": Chip(warps=64, blocks=32, shared_bytes=164 * 1024, shared_bytes_block=163 * 1024),
    "sm_87": Chip(warps=48, blocks=16, shared_bytes=164 * 1024, shared_bytes_block=163 * 1024),
    "sm_90a": Chip(warps=64, blocks=32, shared_bytes=228 * 1024, shared_bytes_block=227 * 1024),
    "sm_120": Chip(warps=48, blocks=24, shared_bytes=100 * 1024, shared_bytes_block=99 * 1024),
}

_SYSTEM_SHARED = 1024  # of each block, on all of these chips

# What is counted in the machine code, by the opcode with its suffixes.
_INSTRUCTIONS = {
    "loads": r"LDG\.",
    "loads_16": r"LDG\..*\b128\b|LDGSTS\..*\b128\b",
    "async_copies": r"LDGSTS\.",
    "stores_16": r"STG\..*\b128\b",
    "tensor": r"(HMMA|IMMA|HGMMA|QMMA|QGMMA)\.",
    "atomics": r"(RED|ATOM|ATOMG|REDG)\.",
    "local": r"(LDL|STL)\b",
}


@dataclass(frozen=True)
class Kernel:
    """One kernel's machine code for one chip."""

    symbol: str  # mangled
    threads: int  # the largest block it may be launched with
    registers: int
    shared: int  # bytes, static
    stack: int  # bytes a thread; anything spilled is in it
    counts: dict[str, int]  # instructions, by the names of _INSTRUCTIONS


def find_tool(name: str) -> str | None:
    """The tool's path: on PATH, beside nvcc, in NVIDIA's wheels, in Triton's."""
    folders = [Path("/usr/local/cuda/bin")]
    if (nvcc := shutil.which("nvcc")) is not None:
        folders.insert(0, Path(nvcc).resolve().parent)
    for package, inside in (("nvidia", "cu*/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or []) if spec else []:
            folders += sorted(Path(location).glob(inside))
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))


def read_kernels(path: Path) -> list[tuple[str, Kernel]]:
    """(chip, kernel) of everything in a cubin, object file or library.

    Raises:
        RuntimeError: a tool is missing, or does not understand the file.
    """
    sass, resources = _cuobjdump("-sass", path), _cuobjdump("-res-usage", path)
    # A cubin is for one chip, which only its code names; files that hold several name it everywhere.
    match = re.search(r"code for (\w+)", sass)
    only = match[1] if match else ""
    threads = dict(_max_threads(_cuobjdump("-elf", path), only))
    counts = {(chip, symbol): instruction_counts(lines) for chip, symbol, lines in _functions(sass)}
    kernels = []
    chip, symbol = only, ""
    for line in resources.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            chip = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            symbol = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            if (chip, symbol) not in threads:
                continue  # a device function, not a kernel
            reserved = _SYSTEM_SHARED if int(re.sub(r"\D", "", chip)) >= 90 else 0
            kernels.append(
                (
                    chip,
                    Kernel(
                        symbol,
                        threads[chip, symbol],
                        registers,
                        max(shared - reserved, 0),
                        stack + local,
                        counts[chip, symbol],
                    ),
                )
            )
    return kernels


def _cuobjdump(option: str, path: Path) -> str:
    tools = {name: find_tool(name) for name in ("cuobjdump", "nvdisasm")}
    for name, tool in tools.items():
        if tool is None:
            raise RuntimeError(f"{name} is not installed: pip install nvidia-cuda-{name}")
    folder = str(Path(tools["nvdisasm"] or "").parent)
    result = subprocess.run(
        [tools["cuobjdump"] or "", option, str(path)],
        env={**os.environ, "PATH": folder + os.pathsep + os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"cuobjdump {option} {path}: {result.stderr.strip()}")
    return result.stdout


def _max_threads(elf: str, only: str) -> Iterator[tuple[tuple[str, str], int]]:
    """((chip, symbol), threads) of every kernel; CUDA's limit where the source names none."""
    chip, symbol, attribute = only, "", ""
    for line in elf.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            chip = match[1]
        elif match := re.match(r"\.nv\.info\.(\S+)\s*$", line):
            symbol = match[1]
            yield (chip, symbol), 1024
        elif line.startswith("."):
            symbol = ""
        elif match := re.match(r"\s*Attribute:\s+(\S+)", line):
            attribute = match[1]
        elif symbol and attribute == "EIATTR_MAX_THREADS" and (match := re.match(r"\s*Value:\s+(.*)", line)):
            x, y, z = (int(word, 16) for word in match[1].split())
            yield (chip, symbol), x * y * z


def _functions(sass: str) -> Iterator[tuple[str, str, list[str]]]:
    """(chip, symbol, instructions) of everything disassembled."""
    chip, symbol = "", ""
    lines: list[str] = []
    for line in sass.splitlines():
        if match := re.match(r"\s*code for (\w+)", line):
            if symbol:
                yield chip, symbol, lines
            chip, symbol, lines = match[1], "", []
        elif match := re.match(r"\s*Function : (\S+)", line):
            if symbol:
                yield chip, symbol, lines
            symbol, lines = match[1], []
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(match[1])
    if symbol:
        yield chip, symbol, lines


def instruction_counts(instructions: list[str]) -> dict[str, int]:
    """How many there are of each kind; an instruction may begin with its predicate, "@!P0 LDG.E.128 ..."."""
    opcodes = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text in instructions]
    counts = {kind: sum(bool(re.match(p, op)) for op in opcodes) for kind, p in _INSTRUCTIONS.items()}
    return {"all": len(opcodes), **counts}


def demangle(symbols: list[str]) -> dict[str, str]:
    """Symbol: the kernel's name with its template arguments, without parameters and our own namespaces."""
    tool = shutil.which("c++filt") or find_tool("cu++filt")
    if tool is None:
        raise RuntimeError("c++filt is not installed: it comes with binutils")
    result = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return {s: _short(name) for s, name in zip(symbols, result.stdout.splitlines(), strict=True)}


_TYPES = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32", "signed char": "int8"}


def _short(name: str) -> str:
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = name.replace("visionllm::cuda::", "").replace("visionllm::", "")
    depth = 0
    for i, letter in enumerate(name):  # the parameters begin at the first bracket outside template arguments
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    name = re.sub(r"\((?:bool|int|unsigned int|long)\)", "", name)  # casts of template arguments
    for type_name, short in _TYPES.items():
        name = re.sub(rf"\b{type_name}\b", short, name)
    return name


def occupancy(chip: Chip, threads: int, registers: int, shared: int) -> float:
    """Share of a multiprocessor's warps that can be resident; ``shared`` is static and dynamic together."""
    warps = -(-threads // 32)
    granularity = chip.registers_granularity
    warp_registers = -(-max(registers, 1) * 32 // granularity) * granularity
    # Warps live on one of four schedulers, each with a quarter of the registers.
    by_registers = chip.registers // 4 // warp_registers * 4 // warps
    by_shared = chip.shared_bytes // (-(-(shared + _SYSTEM_SHARED) // 128) * 128)
    if shared > chip.shared_bytes_block:
        return 0.0
    blocks = min(chip.blocks, chip.warps // warps, by_registers, by_shared)
    return blocks * warps / chip.warps
