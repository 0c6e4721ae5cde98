"""What the benches report, on the CPU and, with stand-ins for the device's clock, on CUDA."""

from __future__ import annotations

import json
from pathlib import Path

import harness
import operator_bench
import pytest
import torch
from harness import Limits, Row, Work
from operator_bench import Measurement

LIMITS = Limits(bytes_per_second=1e9, flops_per_second=1e12)
WORK = Work(bytes=1000, flops=10**6)  # limits: 1 us by both


def test_cpu_implementations_take_turns() -> None:
    calls: list[str] = []
    forms = {name: (lambda name=name: calls.append(name)) for name in ("ours", "peer")}
    rows = harness.compare("case", forms, WORK, LIMITS, {"ours": 3, "peer": 2})
    assert calls == ["ours", "peer"] + ["ours", "peer"] * 2 + ["ours"]
    assert [(r.implementation, r.repeats, r.device, r.graph_seconds) for r in rows] == [
        ("ours", 3, "cpu", None),
        ("peer", 2, "cpu", None),
    ]
    for row in rows:
        assert row.fastest <= row.seconds <= row.slowest
        assert row.share_of_limit == pytest.approx(1e-6 / row.seconds)
    assert rows[0].speedup == {"peer": rows[1].seconds / rows[0].seconds}


@pytest.fixture
def cuda_rows(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Ours: 6 us as a call, 2 us as a graph; one peer takes twice that, another cannot be captured."""
    calls = {"ours": 6e-6, "peer": 12e-6, "host": 60e-6}
    replays = {"ours": 2e-6, "peer": 4e-6}

    def time_cuda(implementations, repeats, device):
        table = calls if "host" in implementations else replays
        return {name: [table[name] * f for f in (1.0, 0.5, 3.0)] for name in implementations}

    def capture(function, device):
        if function() == "host":
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        return function

    monkeypatch.setattr(harness, "_time_cuda", time_cuda)
    monkeypatch.setattr(harness, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    forms = {name: (lambda name=name: name) for name in calls}
    return harness.compare("case", forms, WORK, LIMITS, dict.fromkeys(calls, 3), "cuda")


def test_cuda_rates_are_the_graphs(cuda_rows: list[Row]) -> None:
    ours, peer, host = cuda_rows
    assert (ours.seconds, ours.graph_seconds, ours.fastest, ours.slowest) == (6e-6, 2e-6, 3e-6, 18e-6)
    assert ours.gigabytes_per_second == pytest.approx(0.5) and ours.gigaflops_per_second == pytest.approx(500)
    assert ours.share_of_bandwidth == ours.share_of_gemm == ours.share_of_limit == pytest.approx(0.5)
    assert ours.speedup == {"peer": 2.0, "host": 10.0} and ours.graph_speedup == {"peer": 2.0}
    assert peer.graph_seconds == 4e-6 and ours.device == "NVIDIA H100 80GB HBM3"
    assert host.graph_seconds is None and host.graph_speedup is None
    assert host.graph_problem == "RuntimeError: operation not permitted when stream is capturing"
    assert host.share_of_bandwidth == pytest.approx(1e-6 / 60e-6)


def test_cuda_rows_are_printed(cuda_rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    harness.print_rows(cuda_rows)
    ours, _, host = capsys.readouterr().out.splitlines()
    assert "6.0 us, graph       2.0 us" in ours and "2.00 x peer, 10.00 x host" in ours
    assert "graph        -- us" in host


def test_results_say_what_they_were_measured_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("VISIONLLM_COMMIT", "abc")
    rows = harness.compare("case", {"ours": lambda: None}, WORK, LIMITS, {"ours": 1})
    for limits, key in (({2: LIMITS}, "2 threads"), ({"bfloat16": LIMITS}, "bfloat16")):
        report = json.loads(harness.write_results("op", rows, limits).read_text())
        assert report["limits"] == {key: {"bytes_per_second": 1e9, "flops_per_second": 1e12}}
    assert report["commit"] == "abc" and report["rows"][0]["case"] == "case"
    assert report["machine"]["instruction_set"] and report["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    "arguments, types, files",
    [
        ([], ["float32", "bfloat16"], ["op_1_threads", "op_2_threads"]),
        (["--types", "float16", "--threads", "1", "--name", "other"], ["float16"], ["other_1_threads"]),
    ],
)
def test_operator_bench_goes_through_threads_and_measurements(
    arguments: list[str],
    types: list[str],
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    limits = {torch.float32: LIMITS, torch.bfloat16: Limits(2e9, 1e12), torch.float16: Limits(3e9, 1e12)}
    monkeypatch.setattr(operator_bench, "measure_limits", lambda _, dtype: limits[dtype])
    options = operator_bench.operator_parser("what it is", "op", ["small"], "calls").parse_args(arguments)
    cpu = torch.device("cpu")
    chosen = operator_bench.chosen_types(options, cpu)
    assert [operator_bench.type_name(dtype) for dtype in chosen] == types

    def measurement(dtype: torch.dtype) -> Measurement:
        def run(limit: Limits) -> list[Row]:
            assert limit is limits[dtype]
            return harness.compare(f"case {dtype}", {"ours": lambda: None}, WORK, limit, {"ours": 1})

        return Measurement(dtype, run)

    threads = torch.get_num_threads()
    try:
        operator_bench.run_measurements(options, cpu, [measurement(dtype) for dtype in chosen])
    finally:
        torch.set_num_threads(threads)
    assert sorted(path.stem for path in tmp_path.iterdir()) == files
    for number, file in enumerate(files, 1):
        report = json.loads((tmp_path / f"{file}.json").read_text())
        assert list(report["limits"]) == types
        assert [row["case"] for row in report["rows"]] == [f"case torch.{name}" for name in types]
        assert {row["threads"] for row in report["rows"]} == {number}
    assert capsys.readouterr().out.count("written to") == len(files)


def test_timed_calls_give_what_is_asked() -> None:
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    assert not operator_bench.without_grad(x.square)().requires_grad
    (grad,) = operator_bench.with_backward(x.square, [x], torch.ones(2))()
    assert grad.tolist() == [2.0, -4.0]
    assert operator_bench.relative_error(x + 0.5, x) == 0.25
    assert operator_bench.reason(ValueError("one\ntwo")) == "ValueError: one"
    assert operator_bench.reason(ValueError()) == "ValueError: "


def test_results_are_named_after_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert harness.results_name("op", torch.device("cpu")) == "op"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    assert harness.results_name("op", torch.device("cuda")) == "op_nvidia_h100_80gb_hbm3"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_bench_without_a_gpu_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.require_device("cpu") == torch.device("cpu")
    with pytest.raises(SystemExit) as end:
        harness.require_device("cuda")
    assert end.value.code == 0
    assert capsys.readouterr().out == "skipped: torch finds no CUDA device\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_clock_of_the_device() -> None:
    """A copy of 256 MB takes longer than one of 1 MB, and neither is timed to nothing; a synchronising call
    cannot be captured."""
    device = torch.device("cuda")
    large, small = (torch.empty(n << 20, dtype=torch.uint8, device=device) for n in (256, 1))
    forms = {"large": lambda: large.clone(), "small": lambda: small.clone(), "host": lambda: small[0].item()}
    rows = harness.compare("copy", forms, WORK, LIMITS, dict.fromkeys(forms, 5), device)
    assert rows[0].seconds > rows[1].seconds > 0
    assert rows[0].graph_seconds is not None and rows[1].graph_seconds is not None
    assert rows[0].graph_seconds > rows[1].graph_seconds > 0
    assert rows[2].graph_seconds is None and rows[2].graph_problem
    limits = harness.measure_limits(device, torch.bfloat16)
    assert limits.bytes_per_second > 1e10 and limits.flops_per_second > 1e12
