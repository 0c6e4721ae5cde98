"""What one call of an operator costs before any arithmetic: ms_deform_attn of no queries, in microseconds.

    python bench/binding_cost.py [--library build/in-place/libvisionllm.a] [--repeats 100]

nanobind's binding, as torch's path takes it (addresses, shapes and strides) and with DLPack arrays;
pybind11's of the same function (bench/binding_twin/twin.cpp, compiled here in half a minute against the
library that `make core` leaves behind; skipped where pybind11, a compiler or that library is missing); and
what stands above it: gathering the addresses, the package's function, which goes past torch's dispatcher
where it can, the registered torch operator, and both in the autograd graph.
Writes ``bench/results/binding_cost.json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import statistics
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from harness import write_report

from visionllm import _core
from visionllm.ops import ms_deform_attn, native
from visionllm.ops.ms_deform_attn import sample_inputs

ROOT = Path(__file__).resolve().parent.parent
CALLS = 100  # in a row, per measurement: less than a time slice of the system


def build_twin(library: Path, folder: Path) -> ModuleType | str:
    """The pybind11 module, or why there is none."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    if compiler is None:
        return "no C++ compiler found"
    if not library.is_file():
        return f"no library at {library}: `make core` builds it"
    import pybind11

    file = folder / f"twin{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"], str(ROOT / "cpp" / "include")]
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden"]
    command += [f"-I{path}" for path in includes]
    command += [str(ROOT / "bench" / "binding_twin" / "twin.cpp"), str(library), "-pthread", "-ldl"]
    done = subprocess.run([*command, "-o", str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"binding_cost: the twin does not compile:\n{done.stderr}")
    spec = importlib.util.spec_from_file_location("twin", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seconds_per_call(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        function()
    return (time.perf_counter() - start) / CALLS


def ways(twin: ModuleType | None) -> dict[str, Callable[[], object]]:
    inputs = sample_inputs(batch=1, queries=0)
    tensors = inputs.args()
    value, locations = tensors[0], tensors[3]
    output = value.new_empty(value.shape[0], 0, value.shape[2] * value.shape[3])
    arguments = (output, *tensors)
    raw = [native.raw(t) for t in arguments]
    arrays = [t.numpy() for t in arguments]
    leaf = value.clone().requires_grad_()
    registered = torch.ops.visionllm.ms_deform_attn

    def raw_core() -> None:
        _core.ms_deform_attn_raw(*raw, threads=1)

    found: dict[str, Callable[[], object]] = {"nanobind, addresses": raw_core}
    if twin is not None:
        found["pybind11, addresses"] = lambda: twin.ms_deform_attn(*raw, 1)
    found |= {
        "nanobind, DLPack arrays": lambda: _core.ms_deform_attn(*arrays, threads=1),
        "addresses of torch tensors, and nanobind": lambda: native.call("ms_deform_attn", *arguments),
        "visionllm.ops": lambda: ms_deform_attn(*tensors),
        "torch operator": lambda: registered(*tensors),
        "visionllm.ops, with autograd": lambda: ms_deform_attn(leaf, *tensors[1:]),
        "torch operator, with autograd": lambda: registered(leaf, *tensors[1:]),
    }
    assert locations.shape[1] == 0
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", type=Path, default=ROOT / "build" / "in-place" / "libvisionllm.a")
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        twin = build_twin(options.library, Path(folder))
        if isinstance(twin, str):
            print(f"skipped pybind11: {twin}")
        functions = ways(None if isinstance(twin, str) else twin)
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(options.repeats):  # in turn, so that a disturbance meets all
            for name, function in functions.items():
                times[name].append(seconds_per_call(function))
    rows = []
    for name, values in times.items():
        rows.append(dict(way=name, seconds=statistics.median(values), fastest=min(values)))
        print(f"{name:<42} {1e6 * statistics.median(values):7.2f} us (fastest {1e6 * min(values):.2f})")
    content = {"operator": "ms_deform_attn", "calls": CALLS, "repeats": options.repeats, "rows": rows}
    print(f"written to {write_report('binding_cost', content)}")


if __name__ == "__main__":
    main()
