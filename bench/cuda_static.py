"""What can be known of the CUDA kernels without a GPU: registers, memory, occupancy and machine code by chip.

    python bench/cuda_static.py           compile what has changed and write the table (minutes)
    python bench/cuda_static.py cuda/slot_head.cu        look at some of the files only
    python bench/cuda_static.py --check   compile nothing; fail when the table is stale or a promise broken
    python bench/cuda_static.py --check --built DIR    also hold the object files of a CMake build against it

The table is docs/cuda_static.md, with every number in bench/results/cuda_static.json. It is what the compiler
made and what a multiprocessor has room for; it says nothing about speed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cuda_binary import CHIPS, Kernel, demangle, occupancy, read_kernels
from cuda_promises import promise_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "cuda_static.json"
TABLE = ROOT / "docs" / "cuda_static.md"
# As the CMake build has them.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden")
INCLUDES = ("cpp/include", "cuda")


def sources(root: Path = ROOT) -> list[str]:
    """The files that are compiled, relative to the root."""
    return sorted(str(path.relative_to(root)) for path in (root / "cuda").glob("*.cu"))


def included(source: str, root: Path = ROOT) -> list[str]:
    """The file and all of ours that it includes, directly or not; relative to the root, sorted."""
    found: set[str] = set()
    waiting = [source]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for include in re.findall(r'^\s*#\s*include\s+"([^"]+)"', (root / name).read_text(), re.M):
            for folder in (Path(name).parent, *map(Path, INCLUDES)):
                path = Path(os.path.normpath(folder / include))
                if (root / path).is_file():
                    if "emulation" not in path.parts:  # what stands in for CUDA is not compiled by nvcc
                        waiting.append(str(path))
                    break
    return sorted(found)


def digest(source: str, root: Path = ROOT) -> str:
    """Changes with whatever the machine code depends on, but the compiler; not with comments or layout."""
    value = hashlib.sha256(repr((FLAGS, sorted(CHIPS))).encode())
    for name in included(source, root):
        value.update(f"\n{name}\n{_code((root / name).read_text())}".encode())
    return value.hexdigest()[:16]


def _code(text: str) -> str:
    """The text without comments and with single spaces; no string literal of ours holds a comment sign."""
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    return " ".join(text.split())


def find_nvcc() -> str | None:
    return (
        os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    )


def nvcc_version(nvcc: str) -> str:
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"V(\d+\.\d+\.\d+)", output)
    return match[1] if match else "unknown"


def compile_source(nvcc: str, source: str, chip: str, folder: Path) -> tuple[Path, float, dict[str, int]]:
    """(cubin, processor seconds, bytes spilled by each mangled name)."""
    cubin = folder / f"{Path(source).stem}.{chip}.cubin"
    architecture = chip.removeprefix("sm_")
    command = [
        nvcc,
        *FLAGS,
        *(f"-I{ROOT / include}" for include in INCLUDES),
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
        "-cubin",
        "-Xptxas=-v",
        "-o",
        str(cubin),
        str(ROOT / source),
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if result.returncode != 0:
        raise RuntimeError(f"nvcc cannot compile {source} for {chip}:\n{result.stderr}")
    return cubin, seconds, spilled(result.stderr)


def spilled(ptxas: str) -> dict[str, int]:
    """Bytes of spill stores and loads by symbol, from what ``ptxas -v`` says."""
    spills: dict[str, int] = {}
    symbol = ""
    for line in ptxas.splitlines():
        if match := re.search(r"Function properties for (\S+)", line):
            symbol = match[1]
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills[symbol] = int(match[1]) + int(match[2])
    return spills


def describe(kernels: Iterable[tuple[str, Kernel]], spills: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Kernel name: {chip: its numbers}."""
    entries = list(kernels)
    names = demangle([kernel.symbol for _, kernel in entries])
    table: dict[str, dict[str, Any]] = {}
    for chip, kernel in entries:
        numbers = asdict(kernel)
        del numbers["symbol"]
        numbers["spills"] = spills.get(kernel.symbol, 0)
        table.setdefault(names[kernel.symbol], {})[chip] = numbers
    return dict(sorted(table.items()))


def build(chips: Iterable[str], everything: bool, only: Sequence[str] = ()) -> dict[str, Any]:
    """Compiles what has changed since the last table, one file for one chip at a time."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc is not installed (CUDACXX, PATH, /usr/local/cuda/bin)")
    version = nvcc_version(nvcc)
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() and not everything else {}
    known = old.get("files", {}) if old.get("nvcc") == version else {}
    files: dict[str, Any] = {}
    for source in sources():
        mark = digest(source)
        if only and source not in only:
            if source in known:
                files[source] = known[source]
            continue
        if known.get(source, {}).get("digest") == mark:
            files[source] = known[source]
            continue
        kernels: dict[str, dict[str, Any]] = {}
        seconds: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as folder:
            for chip in chips:
                cubin, seconds[chip], spills = compile_source(nvcc, source, chip, Path(folder))
                seconds[chip] = round(seconds[chip], 1)
                for name, entry in describe(read_kernels(cubin), spills).items():
                    kernels.setdefault(name, {}).update(entry)
                stacks = sum(entry[chip]["stack"] > 0 for entry in kernels.values())
                text = f"{seconds[chip]:.1f} s, {len(kernels)} kernels, {stacks} with a stack frame"
                print(f"{source} for {chip}: {text}", flush=True)
        files[source] = {"digest": mark, "seconds": seconds, "kernels": dict(sorted(kernels.items()))}
        # After each file: minutes of compiling are not lost when a later file does not compile.
        table = {"nvcc": version, "flags": list(FLAGS), "files": dict(sorted({**known, **files}.items()))}
        RESULTS.write_text(json.dumps(table, indent=1) + "\n")
    return {"nvcc": version, "flags": list(FLAGS), "files": files}


def problems_of(table: Mapping[str, Any], root: Path = ROOT) -> list[str]:
    """Why the table cannot stand: it is stale, or a kernel breaks its promise on some chip."""
    problems = []
    for source in sorted({*sources(root), *table["files"]}):
        entry = table["files"].get(source)
        if entry is None:
            problems.append(f"{source} is not in the table: run bench/cuda_static.py")
        elif not (root / source).exists():
            problems.append(f"{source} is in the table, but not in the tree: run bench/cuda_static.py")
        elif entry["digest"] != digest(source, root):
            problems.append(f"{source} or what it includes has changed: run bench/cuda_static.py")
    for source, name, chip, kernel in _rows(table):
        try:
            promise = promise_of(name)
        except LookupError as error:
            problems.append(f"{source}: {error}")
            continue
        broken = promise.broken_by(kernel["counts"], kernel["stack"])
        shared = kernel["shared"] + promise.dynamic_shared_of(name)
        if shared > CHIPS[chip].shared_bytes_block and not promise.adapts:
            broken.append("asks for more shared memory than a block can have")
        problems += [f"{source}: {name} for {chip} {what}" for what in broken]
    return sorted(set(problems))


def differences(table: Mapping[str, Any], built: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where kernels just built are worse than the table says, or not in it. ``built`` as by ``describe``."""
    known = {(name, chip): kernel for _, name, chip, kernel in _rows(table)}
    problems = []
    for name, chips in built.items():
        for chip, kernel in chips.items():
            listed = known.get((name, chip))
            if listed is None:
                problems.append(f"{name} for {chip} is not in the table")
                continue
            for number in ("stack", "threads", "registers", "shared"):
                # Another version of the compiler may use some registers more; it may not begin to spill.
                slack = 1.15 if number == "registers" else 1.0
                if kernel[number] > listed[number] * slack:
                    problems.append(
                        f"{name} for {chip} has {number} {kernel[number]}, the table says {listed[number]}"
                    )
    chips_built = {chip for chips in built.values() for chip in chips}
    problems += [f"{n} for {c} was not built" for n, c in known if c in chips_built and n not in built]
    return problems


def read_built(folder: Path) -> dict[str, dict[str, Any]]:
    """The kernels in a CMake build's object files."""
    objects = sorted(folder.rglob("visionllm_cuda.dir/**/*.o"))
    if not objects:
        raise RuntimeError(
            f"no object files of CUDA kernels under {folder}: was it built with VISIONLLM_CUDA=ON?"
        )
    return describe((kernel for path in objects for kernel in read_kernels(path)), {})


def _rows(table: Mapping[str, Any]) -> Iterable[tuple[str, str, str, dict[str, Any]]]:
    for source, entry in table["files"].items():
        for name, chips in entry["kernels"].items():
            for chip, kernel in chips.items():
                yield source, name, chip, kernel


def markdown(table: Mapping[str, Any]) -> str:
    """The table for readers: a line for each kernel, a column for each chip."""
    chips = list(CHIPS)
    lines = [
        "# CUDA kernels as compiled",
        "",
        f"Written by `python bench/cuda_static.py` with nvcc {table['nvcc']}; `make test` fails when it is",
        "stale, when a kernel spills registers, or when the machine code lacks what `bench/cuda_promises.py`",
        "says of it.",
        "",
        "Under each chip: registers a thread / share of a multiprocessor's warps that can be resident",
        "(theoretical occupancy, for the largest block and the dynamic shared memory shown). Shared memory:",
        "static + dynamic at most, bytes. *16 B*: 16-byte ones of all global loads and asynchronous copies;",
        "*MMA*: tensor-core instructions; both in the code for the first chip. No GPU is involved: these are",
        "facts about the machine code, not about speed.",
        "",
        "| file | digest | kernels | nvcc, processor seconds by chip |",
        "|---|---|---|---|",
    ]
    for source, entry in table["files"].items():
        seconds = ", ".join(f"{entry['seconds'].get(chip, 0):.0f}" for chip in chips)
        lines.append(f"| {source} | `{entry['digest']}` | {len(entry['kernels'])} | {seconds} |")
    total = [sum(entry["seconds"].get(chip, 0) for entry in table["files"].values()) for chip in chips]
    count = sum(len(entry["kernels"]) for entry in table["files"].values())
    lines.append(f"| all | | {count} | {', '.join(f'{seconds:.0f}' for seconds in total)} |")
    for source, entry in table["files"].items():
        lines += ["", f"## {source}", ""]
        lines.append(f"| kernel | threads | shared | stack, spills | 16 B | MMA | {' | '.join(chips)} |")
        lines.append("|---|---|---|---|---|---|" + "---|" * len(chips))
        lines += [_line(name, kernels, chips) for name, kernels in entry["kernels"].items()]
    return "\n".join(lines) + "\n"


def _line(name: str, kernels: Mapping[str, Any], chips: list[str]) -> str:
    dynamic = promise_of(name).dynamic_shared_of(name)
    first = next(iter(kernels.values()))
    counts = first["counts"]
    stack = max(kernel["stack"] for kernel in kernels.values())
    spills = max(kernel["spills"] for kernel in kernels.values())
    cells = []
    for chip in chips:
        if chip not in kernels:
            cells.append("")
            continue
        kernel = kernels[chip]
        shared = kernel["shared"] + min(dynamic, CHIPS[chip].shared_bytes_block - kernel["shared"])
        share = occupancy(CHIPS[chip], kernel["threads"], kernel["registers"], shared)
        cells.append(f"{kernel['registers']} / {share:.0%}")
    shared = max(kernel["shared"] for kernel in kernels.values())
    return (
        f"| `{name}` | {first['threads']} | {shared} + {dynamic} | {stack}, {spills} "
        f"| {counts['loads_16']} of {counts['loads'] + counts['async_copies']} | {counts['tensor']} "
        f"| {' | '.join(cells)} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="*", help="compile these, if they have changed; all by default")
    parser.add_argument(
        "--check", action="store_true", help="compile nothing; fail when the table cannot stand"
    )
    parser.add_argument(
        "--built", type=Path, help="with --check: a CMake build whose object files are compared"
    )
    parser.add_argument("--all", action="store_true", help="compile what has not changed, too")
    arguments = parser.parse_args()
    if not arguments.check:
        table = build(CHIPS, arguments.all, arguments.sources)
        RESULTS.write_text(json.dumps(table, indent=1) + "\n")
    table = json.loads(RESULTS.read_text())
    problems = problems_of(table)
    if arguments.built is not None:
        problems += differences(table, read_built(arguments.built))
    if not arguments.check and not any("entries for the kernel" in problem for problem in problems):
        TABLE.write_text(markdown(table))
    if arguments.check and not problems and TABLE.read_text() != markdown(table):
        problems.append(
            f"{TABLE.relative_to(ROOT)} does not show {RESULTS.relative_to(ROOT)}: run bench/cuda_static.py"
        )
    print("\n".join(problems) or f"{len(table['files'])} files: as promised")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
