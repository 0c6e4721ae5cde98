"""Two threads directly behind one of torch's operators, whose OpenMP threads spin on for milliseconds.

    python bench/behind_torch.py [--repeats 21]

A kernel's helper sleeps until it is woken and then has to share its core with torch's spinning thread. Each
kernel is timed on one thread, on two call after call (torch's threads have gone to sleep), and on two
directly behind a linear layer of torch's; that layer itself stands beside them. Writes
``bench/results/behind_torch.json``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from harness import write_report
from two_processes import deformable

from visionllm.ops import lora_linear

ASLEEP = 0.1  # seconds after which torch's threads have stopped spinning


@dataclass(frozen=True)
class Row:
    """Median seconds of a call."""

    case: str
    one_thread: float
    in_a_row: float
    behind_torch: float


def linear(rows: int, torch_linear: bool) -> Callable[[], object]:
    x, weight = (torch.randn(n, 4096, dtype=torch.bfloat16) for n in (rows, 4096))
    return (lambda: F.linear(x, weight)) if torch_linear else (lambda: lora_linear(x, weight))


CASES: dict[str, Callable[[], object]] = {
    "lora_linear, 1 row": linear(1, False),
    "lora_linear, 64 rows": linear(64, False),
    "lora_linear, 500 rows": linear(500, False),
    "ms_deform_attn, decoder": deformable(300, False),
    "ms_deform_attn, encoder": deformable(0, True),
    "torch's linear, 64 rows": linear(64, True),
    "torch's linear, 500 rows": linear(500, True),
}


def median(call: Callable[[], object], repeats: int, before: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=21, help="of each call (default %(default)s)")
    repeats = parser.parse_args().repeats
    spin = linear(64, True)
    rows = []
    with torch.inference_mode():
        for case, call in CASES.items():
            torch.set_num_threads(1)
            one = median(call, repeats, lambda: None)
            torch.set_num_threads(2)
            time.sleep(ASLEEP)
            row = median(call, repeats, lambda: None)
            rows.append(Row(case, one, row, median(call, repeats, spin)))
            print(
                f"{case:<26} 1 thread {1e3 * one:7.2f} ms   2 in a row {1e3 * row:7.2f} ms   "
                f"2 behind torch {1e3 * rows[-1].behind_torch:7.2f} ms",
                flush=True,
            )
    print(f"written to {write_report('behind_torch', {'rows': [asdict(row) for row in rows]})}")


if __name__ == "__main__":
    main()
