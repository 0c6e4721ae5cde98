"""What all benches share: fair timing of several implementations, limits of the machine, results as JSON.

Implementations take turns, so that a disturbance of the machine meets all of them; before each call the
caches are filled with other data; the median counts.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from visionllm import _core

RESULTS = Path(__file__).parent / "results"

# Larger than the last-level cache of the machines this is meant for.
_CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class Work:
    """What a computation cannot do without."""

    bytes: int  # each input read once, each output written once
    flops: int


@dataclass(frozen=True)
class Limits:
    """What this machine reaches in the simplest programs of that kind, with the threads in use."""

    bytes_per_second: float  # filling and copying of arrays beyond the caches
    flops_per_second: float  # a matrix product in float32

    def seconds(self, work: Work) -> float:
        return max(work.bytes / self.bytes_per_second, work.flops / self.flops_per_second)


@dataclass(frozen=True)
class Row:
    """One implementation of one case."""

    case: str
    implementation: str
    threads: int
    seconds: float  # median
    fastest: float
    slowest: float
    repeats: int
    gigabytes_per_second: float
    gigaflops_per_second: float
    share_of_limit: float  # limit / time
    speedup: dict[str, float]  # time of each peer / own time


def measure_limits() -> Limits:
    copies = torch.empty(2, _CACHE_BYTES, dtype=torch.uint8)
    copy = min(_time(lambda: copies[0].copy_(copies[1])) for _ in range(4))
    n = 1024
    a, b = torch.rand(n, n), torch.rand(n, n)
    product = min(_time(lambda: a @ b) for _ in range(4))
    return Limits(2 * _CACHE_BYTES / copy, 2 * n**3 / product)


def compare(
    case: str,
    implementations: Mapping[str, Callable[[], object]],
    work: Work,
    limits: Limits,
    repeats: Mapping[str, int],
) -> list[Row]:
    """Times every implementation ``repeats`` times after one call that does not count."""
    flush = torch.empty(_CACHE_BYTES, dtype=torch.uint8)
    times: dict[str, list[float]] = {name: [] for name in implementations}
    for function in implementations.values():
        function()
    for turn in range(max(repeats.values())):
        for name, function in implementations.items():
            if turn < repeats[name]:
                flush.fill_(turn % 256)
                times[name].append(_time(function))
    medians = {name: statistics.median(t) for name, t in times.items()}
    return [
        Row(
            case=case,
            implementation=name,
            threads=torch.get_num_threads(),
            seconds=medians[name],
            fastest=min(times[name]),
            slowest=max(times[name]),
            repeats=len(times[name]),
            gigabytes_per_second=work.bytes / medians[name] / 1e9,
            gigaflops_per_second=work.flops / medians[name] / 1e9,
            share_of_limit=limits.seconds(work) / medians[name],
            speedup={peer: medians[peer] / medians[name] for peer in implementations if peer != name},
        )
        for name in implementations
    ]


def print_rows(rows: list[Row]) -> None:
    for row in rows:
        speedup = ", ".join(f"{ratio:.1f} x {peer}" for peer, ratio in row.speedup.items())
        print(
            f"{row.case:<28} {row.threads} thr  {row.implementation:<13} {row.seconds * 1e3:9.3f} ms"
            f" ({row.fastest * 1e3:.3f} .. {row.slowest * 1e3:.3f})  {row.gigabytes_per_second:6.2f} GB/s"
            f" {row.gigaflops_per_second:7.1f} GFLOP/s  {row.share_of_limit:6.1%} of limit  {speedup}",
            flush=True,
        )


def write_results(name: str, rows: list[Row], limits: Mapping[int, Limits]) -> Path:
    """Writes ``bench/results/<name>.json`` with the machine, the versions and the commit."""
    rates = {f"{threads} threads": asdict(limit) for threads, limit in limits.items()}
    return write_report(name, {"limits": rates, "rows": [asdict(row) for row in rows]})


def write_report(name: str, content: Mapping[str, object]) -> Path:
    """Writes the content to ``bench/results/<name>.json``, after what it was measured on."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    report = {
        "machine": {
            "cpu": _cpu_name(),
            "cores": torch.multiprocessing.cpu_count(),
            "instruction_set": _core.active_isa(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": _version("transformers"),
            "visionllm": str(_core.version),
        },
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **content,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def _time(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
