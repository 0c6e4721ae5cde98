"""Two processes side by side on the same two cores: does either keep the other from working?

    python bench/two_processes.py [--cases torch_softmax] [--seconds 3]

Each case is run with one and with two threads, by one process and then by two at the same time, all bound to
the same two cores. ``together`` is what both get done in a second, over what one gets done there alone with
as many threads: 2 at best with one thread, 1 with two, where all cores are busy in either case; far below 1
where processes wait for each other's threads.

``torch_softmax`` stands beside this package's operators: it runs on torch's OpenMP threads. Writes
``bench/results/two_processes.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from harness import write_report

from visionllm.ops import ms_deform_attn_fused
from visionllm.ops.ms_deform_attn_fused import sample_inputs

PAPER = ((100, 167), (50, 84), (25, 42), (13, 21))
CORES = 2


@dataclass(frozen=True)
class Run:
    """What one process did."""

    calls: int
    calls_per_second: float
    median: float  # seconds of a call
    slowest: float


@dataclass(frozen=True)
class Row:
    case: str
    threads: int
    processes: int
    runs: list[Run]
    together: float  # calls per second of all, over those of one process alone


def deformable(queries: int, encoder: bool) -> Callable[[], object]:
    inputs = sample_inputs(batch=1, levels=PAPER, queries=queries, encoder=encoder)
    return lambda: ms_deform_attn_fused(*inputs.args())


def softmax() -> Callable[[], object]:
    """About as long as the decoder's attention."""
    x = torch.rand(2000, 500)
    return lambda: x.softmax(-1)


CASES: dict[str, Callable[[], Callable[[], object]]] = {
    "ms_deform_attn_decoder": lambda: deformable(300, False),
    "ms_deform_attn_encoder": lambda: deformable(0, True),
    "torch_softmax": softmax,
}


def work(case: str, threads: int, seconds: float) -> None:
    """A process of its own: says that it is ready, waits for a line, works and prints a Run."""
    torch.set_num_threads(threads)
    call = CASES[case]()
    with torch.no_grad():
        for _ in range(3):
            call()
        print("ready", flush=True)
        sys.stdin.readline()
        times = []
        end = time.perf_counter() + seconds
        start = time.perf_counter()
        while start < end:
            call()
            now = time.perf_counter()
            times.append(now - start)
            start = now
    run = Run(len(times), len(times) / sum(times), statistics.median(times), max(times))
    print(json.dumps(asdict(run)), flush=True)


def side_by_side(case: str, threads: int, processes: int, seconds: float) -> list[Run]:
    command = [sys.executable, __file__, "--worker", case, str(threads), str(seconds)]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            if worker.stdout.readline() != "ready\n":
                raise SystemExit(f"two_processes: a worker of {case} did not start")
        outputs = []
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        for worker in workers:
            outputs.append(worker.communicate()[0])
    finally:
        for worker in workers:
            worker.kill()
    return [Run(**json.loads(output)) for output in outputs]


def measure(case: str, seconds: float) -> list[Row]:
    rows = []
    for threads in (1, 2):
        alone = side_by_side(case, threads, 1, seconds)
        both = side_by_side(case, threads, 2, seconds)
        total = sum(run.calls_per_second for run in both)
        rows += [
            Row(case, threads, 1, alone, 1.0),
            Row(case, threads, 2, both, total / alone[0].calls_per_second),
        ]
    return rows


def print_rows(rows: list[Row]) -> None:
    for row in rows:
        rate = sum(run.calls_per_second for run in row.runs)
        median = max(run.median for run in row.runs)
        slowest = max(run.slowest for run in row.runs)
        print(
            f"{row.case:<24} {row.threads} thr x {row.processes} proc  {rate:9.1f} calls/s together"
            f"  {row.together:5.2f} x alone  median {median * 1e3:8.3f} ms  slowest {slowest * 1e3:8.1f} ms",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run (default %(default)s)")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        case, threads, seconds = options.worker
        work(case, int(threads), float(seconds))
        return
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    if len(cores) < CORES:
        raise SystemExit(f"two_processes: expected {CORES} cores to share, got {len(cores)}")
    os.sched_setaffinity(0, cores)  # the workers inherit it
    rows = []
    for case in options.cases:
        new = measure(case, options.seconds)
        print_rows(new)
        rows += new
    print(f"written to {write_report('two_processes', {'rows': [asdict(row) for row in rows]})}")


if __name__ == "__main__":
    main()
