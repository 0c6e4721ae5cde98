"""What the benches of operators share: options, the calls that are timed, and the loop over cases.

parser = operator_parser(__doc__, "fusion_attention", cases=CASES, repeats="(default 30)")
options = parser.parse_args()
device = require_device(options.device)
run_measurements(options, device, [Measurement(dtype, run) ...])
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from harness import Limits, Row, add_device_option, measure_limits, print_rows, results_name, write_results
from torch import Tensor

TYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Measurement:
    """One case in one element type: some rows of the results."""

    limits_of: torch.dtype  # of whose matrix product
    run: Callable[[Limits], list[Row]]


def operator_parser(
    description: str | None, name: str, cases: Iterable[str], repeats: str
) -> argparse.ArgumentParser:
    """--device, --cases, --types, --threads, --repeats and --name; ``repeats`` is the help of its option.

    Where they are not given, cases, types and repeats are None: they depend on the device.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_device_option(parser)
    parser.add_argument(
        "--cases", nargs="+", choices=list(cases), help="(default: those that take no minutes)"
    )
    parser.add_argument(
        "--types", nargs="+", choices=TYPES, help="(default: bfloat16, on the CPU float32 and bfloat16)"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="on the CPU (default 1 2)")
    parser.add_argument("--repeats", type=int, help=repeats)
    parser.add_argument("--name", default=name, help="how the file in bench/results begins")
    return parser


def chosen_types(options: argparse.Namespace, device: torch.device) -> list[torch.dtype]:
    names = options.types or (["bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"])
    return [getattr(torch, name) for name in names]


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run_measurements(
    options: argparse.Namespace,
    device: torch.device,
    measurements: Sequence[Measurement],
    limits_name: Callable[[torch.dtype], str] = type_name,
) -> None:
    """All in turn, on the CPU with each number of threads; the file is written anew after each.

    The results are ``<options.name>_<n>_threads.json`` or ``<options.name>_<GPU>.json``; ``limits_name`` is
    how a type's limits are called there.
    """
    on_cpu = device.type == "cpu"
    types = dict.fromkeys(measurement.limits_of for measurement in measurements)
    for threads in options.threads if on_cpu else (torch.get_num_threads(),):
        torch.set_num_threads(threads)
        file = results_name(options.name, device) + (f"_{threads}_threads" if on_cpu else "")
        limits = {dtype: measure_limits(device, dtype) for dtype in types}
        named = {limits_name(dtype): limit for dtype, limit in limits.items()}
        rows: list[Row] = []
        for measurement in measurements:
            new = measurement.run(limits[measurement.limits_of])
            print_rows(new)
            rows += new
            path = write_results(file, rows, named, device)
            gc.collect()
        print(f"written to {path}")


def without_grad(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def with_backward(
    call: Callable[[], Tensor], leaves: Sequence[Tensor], grad_output: Tensor
) -> Callable[[], object]:
    """The call and the gradients of the leaves."""
    return lambda: torch.autograd.grad(call(), leaves, grad_output)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number expected."""
    expected = expected.detach().float()
    return float((got.detach().float() - expected).abs().max() / expected.abs().max())


def reason(problem: Exception) -> str:
    """Why a peer is left out, in a line."""
    lines = str(problem).splitlines()
    return f"{type(problem).__name__}: {lines[0] if lines else ''}"
