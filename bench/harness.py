"""What all benches share: fair timing of several implementations, limits of the machine, results as JSON.

Implementations take turns, so that a disturbance of the machine meets all of them; before each call the
caches are filled with other data; the median counts.

On CUDA a call is timed twice, by events on the device: as it is, and as the replay of a CUDA graph of it,
which leaves out what the host does. Both begin with a cold L2 cache.

    add_device_option(parser)                   # --device cpu|cuda
    device = require_device(parser.parse_args().device)
    limits = measure_limits(device, torch.bfloat16)
    rows = compare("case", {"visionllm": f, "sdpa": g}, Work(bytes, flops), limits, repeats, device)
    print_rows(rows); write_results(results_name("op", device), rows, {str(device): limits}, device)
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from visionllm import _core
from visionllm.model_folder import DEFAULT_MODEL

# VISIONLLM_RESULTS sends a machine's results elsewhere: bench/gpu_check.sh does.
RESULTS = Path(os.environ.get("VISIONLLM_RESULTS") or Path(__file__).parent / "results")

# Larger than the last-level cache of the machines this is meant for: CPUs, and GPUs (an H100's L2 has 50 MB).
_CACHE_BYTES = 64 << 20
_CUDA_CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class Work:
    """What a computation cannot do without."""

    bytes: int  # each input read once, each output written once
    flops: int


@dataclass(frozen=True)
class Limits:
    """What this machine reaches in the simplest programs of that kind, with the threads in use."""

    bytes_per_second: float  # filling and copying of arrays beyond the caches, bytes read plus bytes written
    flops_per_second: float  # a matrix product, by the vendor's library

    def seconds(self, work: Work) -> float:
        return max(work.bytes / self.bytes_per_second, work.flops / self.flops_per_second)


@dataclass(frozen=True)
class Row:
    """One implementation of one case. Rates and shares are those of the graph's replay where there is one."""

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
    device: str = "cpu"
    graph_seconds: float | None = (
        None  # median of a CUDA graph's replays; None: not on CUDA, or see graph_problem
    )
    graph_problem: str = ""  # why it cannot be captured
    graph_speedup: dict[str, float] | None = None  # of replays, over the peers that have one
    share_of_bandwidth: float | None = None  # of the measured copy's
    share_of_gemm: float | None = None  # of the measured matrix product's


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default %(default)s)")


def require_device(name: str) -> torch.device:
    """The device, or the end of the program, which says that it skipped: no GPU is no failure of a bench."""
    if name == "cuda":
        if not torch.cuda.is_available():
            sys.exit(_skipped("torch finds no CUDA device"))
        if problem := _core.cuda_problem():
            sys.exit(_skipped(problem))
    return torch.device(name)


def _skipped(why: str) -> int:
    print(f"skipped: {why}")
    return 0


def results_name(operator: str, device: torch.device) -> str:
    """On CUDA the GPU's name is part of it: "lora_linear_nvidia_h100_80gb_hbm3"."""
    if device.type != "cuda":
        return operator
    return f"{operator}_{torch.cuda.get_device_name(device).lower().replace(' ', '_').replace('-', '_')}"


def measure_limits(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Limits:
    """Copy and matrix product of random ``dtype``; float32 on CUDA without TF32."""
    if torch.device(device).type == "cuda":
        return _measure_cuda_limits(torch.device(device), dtype)
    copies = torch.empty(2, _CACHE_BYTES, dtype=torch.uint8)
    copy = min(_time(lambda: copies[0].copy_(copies[1])) for _ in range(4))
    n = 1024
    a, b = (torch.rand(n, n).to(dtype) for _ in range(2))
    product = min(_time(lambda: a @ b) for _ in range(4))
    return Limits(2 * _CACHE_BYTES / copy, 2 * n**3 / product)


def _measure_cuda_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    size = 1 << 30
    target, source = torch.empty(2, size, dtype=torch.uint8, device=device)
    copy = statistics.median(_time_cuda({"": lambda: target.copy_(source)}, {"": 10}, device)[""])
    n = 8192 if dtype != torch.float32 else 4096
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = statistics.median(_time_cuda({"": lambda: a @ b}, {"": 10}, device)[""])
    return Limits(2 * size / copy, 2 * n**3 / product)


def compare(
    case: str,
    implementations: Mapping[str, Callable[[], object]],
    work: Work,
    limits: Limits,
    repeats: Mapping[str, int],
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Times every implementation ``repeats`` times after one call that does not count."""
    if torch.device(device).type == "cuda":
        return _compare_cuda(case, implementations, work, limits, repeats, torch.device(device))
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
            speedup=_speedups(name, medians),
        )
        for name in implementations
    ]


def _speedups(name: str, seconds: Mapping[str, float]) -> dict[str, float]:
    return {peer: seconds[peer] / seconds[name] for peer in seconds if peer != name}


def _compare_cuda(
    case: str,
    implementations: Mapping[str, Callable[[], object]],
    work: Work,
    limits: Limits,
    repeats: Mapping[str, int],
    device: torch.device,
) -> list[Row]:
    times = _time_cuda(implementations, repeats, device)
    graphs: dict[str, Callable[[], object]] = {}
    problems: dict[str, str] = {}
    for name, function in implementations.items():
        try:
            graphs[name] = _capture(function, device)
        except Exception as error:  # whatever it does that a graph cannot hold: synchronise, copy to the host
            problems[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            torch.cuda.synchronize(device)
    replays = _time_cuda(graphs, repeats, device) if graphs else {}
    medians = {name: statistics.median(t) for name, t in times.items()}
    graph_medians = {name: statistics.median(t) for name, t in replays.items()}
    rows = []
    for name in implementations:
        best = graph_medians.get(name, medians[name])
        rows.append(
            Row(
                case=case,
                implementation=name,
                threads=torch.get_num_threads(),
                seconds=medians[name],
                fastest=min(times[name]),
                slowest=max(times[name]),
                repeats=len(times[name]),
                gigabytes_per_second=work.bytes / best / 1e9,
                gigaflops_per_second=work.flops / best / 1e9,
                share_of_limit=limits.seconds(work) / best,
                speedup=_speedups(name, medians),
                device=torch.cuda.get_device_name(device),
                graph_seconds=graph_medians.get(name),
                graph_problem=problems.get(name, ""),
                graph_speedup=_speedups(name, graph_medians) if name in graph_medians else None,
                share_of_bandwidth=work.bytes / best / limits.bytes_per_second,
                share_of_gemm=work.flops / best / limits.flops_per_second,
            )
        )
    del graphs
    gc.collect()  # a graph keeps its memory until it is gone
    return rows


def _capture(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A CUDA graph of one call. Its outputs live in the graph's own memory, at the same place each replay."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):  # whatever is made at the first calls: handles, workspaces, compiled code
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def _time_cuda(
    implementations: Mapping[str, Callable[[], object]], repeats: Mapping[str, int], device: torch.device
) -> dict[str, list[float]]:
    """Seconds on the device. The filling before each call empties L2, and lets the host run ahead."""
    flush = torch.empty(_CUDA_CACHE_BYTES, dtype=torch.uint8, device=device)
    for function in implementations.values():
        for _ in range(3):
            function()
    torch.cuda.synchronize(device)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in implementations}
    for turn in range(max(repeats[name] for name in implementations)):
        for name, function in implementations.items():
            if turn < repeats[name]:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.fill_(turn % 256)
                start.record()
                function()
                end.record()
                events[name].append((start, end))
    torch.cuda.synchronize(device)
    return {name: [s.elapsed_time(e) / 1e3 for s, e in pairs] for name, pairs in events.items()}


def print_rows(rows: list[Row]) -> None:
    for row in rows:
        if row.device != "cpu":
            _print_cuda_row(row)
            continue
        speedup = ", ".join(f"{ratio:.1f} x {peer}" for peer, ratio in row.speedup.items())
        print(
            f"{row.case:<28} {row.threads} thr  {row.implementation:<13} {row.seconds * 1e3:9.3f} ms"
            f" ({row.fastest * 1e3:.3f} .. {row.slowest * 1e3:.3f})  {row.gigabytes_per_second:6.2f} GB/s"
            f" {row.gigaflops_per_second:7.1f} GFLOP/s  {row.share_of_limit:6.1%} of limit  {speedup}",
            flush=True,
        )


def _print_cuda_row(row: Row) -> None:
    graph = "       --" if row.graph_seconds is None else f"{row.graph_seconds * 1e6:9.1f}"
    ratios = row.speedup if row.graph_speedup is None else row.speedup | row.graph_speedup
    speedup = ", ".join(f"{ratio:.2f} x {peer}" for peer, ratio in ratios.items())
    print(
        f"{row.case:<34} {row.implementation:<16} {row.seconds * 1e6:9.1f} us, graph {graph} us"
        f" {row.gigabytes_per_second:7.1f} GB/s ({row.share_of_bandwidth or 0:4.0%})"
        f" {row.gigaflops_per_second / 1e3:7.2f} TFLOP/s ({row.share_of_gemm or 0:4.0%})  {speedup}",
        flush=True,
    )


def write_results(
    name: str,
    rows: list[Row],
    limits: Mapping[int, Limits] | Mapping[str, Limits],
    device: torch.device | str = "cpu",
) -> Path:
    """Writes ``<name>.json`` in RESULTS with the machine, the versions and the commit.

    ``limits`` by number of threads, or by any other name ("bfloat16").
    """
    rates = {f"{k} threads" if isinstance(k, int) else k: asdict(limit) for k, limit in limits.items()}
    return write_report(name, {"limits": rates, "rows": [asdict(row) for row in rows]}, device)


def report_of(bench: str, model: str) -> str:
    """The report's name: the bench's for the default model, else with the model's behind it."""
    name = Path(model).name
    return bench if name == DEFAULT_MODEL else f"{bench}_{name}"


def write_report(name: str, content: Mapping[str, object], device: torch.device | str = "cpu") -> Path:
    """Writes the content to ``<name>.json`` in RESULTS, after what it was measured on."""
    RESULTS.mkdir(exist_ok=True, parents=True)
    path = RESULTS / f"{name}.json"
    report = {
        "machine": {
            "cpu": _cpu_name(),
            "cores": torch.multiprocessing.cpu_count(),
            "instruction_set": _core.active_isa(),
            **(_gpu(torch.device(device)) if torch.device(device).type == "cuda" else {}),
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


def _gpu(device: torch.device) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    except OSError:
        driver = "unknown"
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        "driver": driver,
        "cuda": torch.version.cuda,
        "kernels_built_for": list(_core.cuda_architectures),
        "triton": _version("triton"),
    }


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
    """Where the tree is a copy without its history, VISIONLLM_COMMIT may say what it is a copy of."""
    if given := os.environ.get("VISIONLLM_COMMIT"):
        return given
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"
