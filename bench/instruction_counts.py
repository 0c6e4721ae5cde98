"""How many instructions each operator executes for one fixed input: a number that no other load disturbs.

    python bench/instruction_counts.py [--cases lora_linear ...] [--isas avx2 scalar]     count and write
    python bench/instruction_counts.py --check                                            count and compare

Builds ``bench/instruction_driver`` and runs each of its cases under valgrind (``--tool=callgrind``), which
counts the operator's call and nothing else. Valgrind executes AVX2 but no AVX-512, whose kernels are the same
sources. docs/instruction_counts.md says when the numbers may change. Writes
``bench/results/instruction_counts.json``; with some of the cases or sets, the others keep their numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DRIVER = ROOT / "bench" / "instruction_driver"
NAME = "instruction_counts"
ISAS = ("scalar", "avx2")

# Another run of the same binary differs by less than 0.1 % (where memory lies, what the C library's own
# dispatch chooses); a change of the hot loops that is worth looking at shows as more than this.
TOLERANCE = 0.02

Counts = dict[str, dict[str, int]]  # by case and instruction set


@dataclass(frozen=True)
class Case:
    """What the driver says of a case: ``instruction_counts / units`` compares operators and sizes."""

    name: str
    unit: str
    units: float


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def find_cmake() -> str | None:
    return shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def missing_tool() -> str | None:
    """The first program that is needed and not installed."""
    if shutil.which("valgrind") is None:
        return "valgrind"
    if find_cmake() is None:
        return "cmake"
    return None


def build(folder: Path) -> Path:
    """Compiles the driver and the library as they are in the tree.

    Raises:
        RuntimeError: it does not compile; the compiler's words are in the message.
    """
    cmake = find_cmake()
    assert cmake is not None
    for command in (
        (cmake, "-S", DRIVER, "-B", folder),
        (cmake, "--build", folder, "--target", "instruction_driver", "--parallel", "2"),
    ):
        result = run(*command)
        if result.returncode != 0:
            raise RuntimeError(f"{NAME}: the driver does not build:\n{result.stdout}{result.stderr}")
    return folder / "instruction_driver"


def list_cases(driver: Path) -> list[Case]:
    lines = run(driver).stdout.splitlines()
    fields = [line.split("\t") for line in lines]
    return [Case(name, unit, float(units)) for name, unit, units in fields]


def count(driver: Path, case: str, isa: str) -> int | None:
    """Instructions of the case's call; None where the operator has no CPU kernel.

    Raises:
        RuntimeError: valgrind or the case fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = run(
            "valgrind",
            "--tool=callgrind",
            "--toggle-collect=run_case",
            f"--callgrind-out-file={folder}/out",
            driver,
            case,
            isa,
        )
    if result.returncode == 3 and "no CPU kernel" in result.stderr:
        return None
    collected = re.search(r"Collected\s*:\s*(\d+)", result.stderr)
    if result.returncode != 0 or collected is None:
        raise RuntimeError(f"{NAME}: {case} on {isa} gave {result.returncode}:\n{result.stderr}")
    return int(collected[1])


def count_all(driver: Path, cases: Iterable[Case], isas: Iterable[str]) -> Counts:
    counts: Counts = {}
    for case in cases:
        for isa in isas:
            number = count(driver, case.name, isa)
            if number is None:
                print(f"{case.name:<44} {isa:<7} no CPU kernel", flush=True)
                continue
            counts.setdefault(case.name, {})[isa] = number
            each = number / case.units
            print(f"{case.name:<44} {isa:<7} {number:>12}  {each:8.3f} per {case.unit}", flush=True)
    return counts


def differences(before: Counts, now: Counts) -> list[str]:
    """What is more than TOLERANCE away from the committed numbers, in words; fewer instructions count too."""
    problems = []
    for case, by_isa in now.items():
        for isa, number in by_isa.items():
            old = before.get(case, {}).get(isa)
            if old is None:
                problems.append(f"{case} on {isa}: {number} instructions, and none recorded")
            elif abs(number / old - 1) > TOLERANCE:
                problems.append(f"{case} on {isa}: {number} instructions, {number / old - 1:+.1%} of {old}")
    return problems


def compiler_of(folder: Path) -> str:
    cache = (folder / "CMakeCache.txt").read_text()
    found = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.*)$", cache, re.MULTILINE)
    return run(found[1], "--version").stdout.split("\n")[0] if found else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", help="those whose names begin so (default: all)")
    parser.add_argument("--isas", nargs="+", choices=ISAS, default=list(ISAS))
    parser.add_argument(
        "--check", action="store_true", help="compare with the recorded numbers, change nothing"
    )
    parser.add_argument("--build", type=Path, default=ROOT / "build" / NAME, help="(default %(default)s)")
    options = parser.parse_args()
    if tool := missing_tool():
        raise SystemExit(f"{NAME}: {tool} is not installed")
    driver = build(options.build)
    cases = list_cases(driver)
    if options.cases:
        cases = [case for case in cases if case.name.startswith(tuple(options.cases))]
    now = count_all(driver, cases, options.isas)

    from harness import RESULTS, write_report  # imports torch

    path = RESULTS / f"{NAME}.json"
    recorded = json.loads(path.read_text()) if path.exists() else {"counts": {}}
    if options.check:
        problems = differences(recorded["counts"], now)
        compiler = compiler_of(options.build)
        if problems and compiler != recorded.get("compiler"):
            print(f"recorded with {recorded.get('compiler')}, counted with {compiler}: numbers may differ")
        raise SystemExit("\n".join(problems))
    counts: Counts = {
        case: {**recorded["counts"].get(case, {}), **now.get(case, {})}
        for case in sorted({*recorded["counts"], *now})
    }
    content = {
        "compiler": compiler_of(options.build),
        "valgrind": run("valgrind", "--version").stdout.strip(),
        "counts": counts,
    }
    print(f"written to {write_report(NAME, content)}")


if __name__ == "__main__":
    main()
