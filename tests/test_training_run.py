"""Whole runs with a small network: resuming, interruption, several processes, non-finite losses."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from visionllm.train.checkpoint import checkpoints, read_checkpoint

STANDIN = Path(__file__).parent / "training_standin.py"
COMMON = [
    "warmup=3",
    "log_every=5",
    "tensorboard=off",
    "validation.every=10",
    "checkpoint.minutes=0",
    "checkpoint.steps=4",
    "checkpoint.keep=3",
    "lr=0.01",
]


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(STANDIN), *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def run(*arguments, code=0):
    process = start(*arguments)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == code, errors
    return errors


def last(folder):
    return read_checkpoint(checkpoints(folder / "checkpoints")[-1])


def rows(folder, name="train"):
    with open(folder / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def wait_for_checkpoint(process, folder):
    for _ in range(1200):
        if checkpoints(folder / "checkpoints"):
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError("no checkpoint after 60 s")


def assert_same(left, right):
    assert left[0].keys() == right[0].keys()
    for name, tensor in left[0].items():
        difference = (tensor.double() - right[0][name].double()).abs().max() if tensor.numel() else 0
        assert torch.equal(tensor, right[0][name]), f"{name} differs by up to {difference}"
    assert left[1]["step"] == right[1]["step"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 30 steps in one process."""
    folder = tmp_path_factory.mktemp("whole")
    run(*COMMON, "processes=0", "steps=30", f"output={folder}")
    return folder


def test_a_run_leaves_its_files(whole):
    assert [int(row["step"]) for row in rows(whole)] == [5, 10, 15, 20, 25, 30]
    assert [int(row["step"]) for row in rows(whole, "validation")] == [10, 20, 30]
    row = rows(whole)[-1]
    for column in ("total", "box", "lr", "samples_per_s", "seconds_data", "seconds_backward", "metric/mean"):
        assert float(row[column]) == float(row[column])
    assert len(checkpoints(whole / "checkpoints")) == 3
    tensors, state = last(whole)
    assert state["step"] == 30
    assert float(rows(whole)[-1]["total"]) < float(rows(whole)[0]["total"])
    exported = load_file(whole / "model" / "model.safetensors")
    assert torch.equal(exported["conv.weight"], tensors["average.conv.weight"])
    assert not torch.equal(exported["conv.weight"], tensors["model.conv.weight"])
    assert torch.equal(tensors["model.frozen"], torch.ones(2))


def test_same_seed_same_weights(whole, tmp_path):
    run(*COMMON, "processes=0", "steps=30", f"output={tmp_path}", "workers=1")
    assert_same(last(whole), last(tmp_path))
    run(*COMMON, "processes=0", "steps=30", f"output={tmp_path / 'other'}", "seed=1")
    assert not torch.equal(last(whole)[0]["model.head.weight"], last(tmp_path / "other")[0]["model.head.weight"])


def test_a_killed_run_resumes_bit_for_bit(whole, tmp_path):
    process = start(*COMMON, "processes=0", "steps=30", f"output={tmp_path}", "model.delay=0.05")
    wait_for_checkpoint(process, tmp_path)
    process.kill()
    process.wait()
    done = last(tmp_path)[1]["step"]
    assert 0 < done < 30
    run("--resume", tmp_path, "model.delay=0")
    assert_same(last(whole), last(tmp_path))
    assert [row["step"] for row in rows(tmp_path)] == [row["step"] for row in rows(whole)]
    assert rows(tmp_path)[-1]["total"] == rows(whole)[-1]["total"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_resumes(whole, tmp_path, number):
    process = start(*COMMON, "processes=0", "steps=30", f"output={tmp_path}", "model.delay=0.05")
    wait_for_checkpoint(process, tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"resume with: visionllm train --resume {tmp_path}" in errors
    assert last(tmp_path)[1]["step"] < 30
    run("--resume", tmp_path, "model.delay=0")
    assert_same(last(whole), last(tmp_path))


def test_two_processes_survive_kill_and_interrupt(tmp_path):
    run(*COMMON, "--processes", "2", "steps=24", f"output={tmp_path / 'a'}")
    process = start(*COMMON, "--processes", "2", "steps=24", f"output={tmp_path / 'b'}", "model.delay=0.05")
    wait_for_checkpoint(process, tmp_path / "b")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert last(tmp_path / "b")[1]["step"] < 24
    process = start("--resume", tmp_path / "b", "model.delay=0.2")
    while "continuing from" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    run("--resume", tmp_path / "b", "model.delay=0")
    assert_same(last(tmp_path / "a"), last(tmp_path / "b"))


def test_training_processes_end_when_their_launcher_is_killed(tmp_path):
    process = start(*COMMON, "processes=2", "steps=100000", f"output={tmp_path}", "model.delay=0.05")
    wait_for_checkpoint(process, tmp_path)
    process.kill()
    process.wait()
    for _ in range(200):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("training processes are alive 20 s after their launcher was killed")


def test_a_failing_process_ends_the_run(tmp_path):
    errors = run(*COMMON, "processes=2", "steps=50", f"output={tmp_path}", "model.fail=6", code=1)
    assert "a batch that cannot be made" in errors
    assert last(tmp_path)[1]["step"] == 4


@pytest.mark.parametrize("processes", [0, 2])
def test_a_non_finite_step_is_skipped_everywhere(tmp_path, processes):
    errors = run(
        *COMMON,
        f"processes={processes}",
        "steps=8",
        f"output={tmp_path}",
        "model.bad=[2,5,6]",
        f"model.bad_rank={processes // 2}",
    )
    assert "step 3 skipped (1 in a row)" in errors
    assert "step 7 skipped (2 in a row)" in errors
    tensors, state = last(tmp_path)
    assert state["bad_steps"] == 0
    assert tensors["optimizer.step.head.weight"] == 5
    for name, tensor in tensors.items():
        assert torch.isfinite(tensor).all(), name


def test_non_finite_steps_in_a_row_stop_the_run(tmp_path):
    errors = run(
        *COMMON, "processes=0", "steps=50", "bad_steps=3", f"output={tmp_path}", "model.bad=[5,6,7,8,9]", code=1
    )
    assert "3 steps in a row" in errors
    tensors, state = last(tmp_path)
    assert state["step"] == 4
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_a_time_limited_run_ends_in_time_and_resumes(tmp_path):
    arguments = [*COMMON, "processes=0", "max_minutes=0.05", f"output={tmp_path}", "model.delay=0.02"]
    run(*arguments)
    state = last(tmp_path)[1]
    assert 3.0 <= state["clock"]["seconds"] < 4.0
    assert float(rows(tmp_path)[-1]["lr_factor"]) < 0.1
    steps = state["step"]
    run("--resume", tmp_path, "max_minutes=0.07")
    assert last(tmp_path)[1]["step"] > steps
    assert last(tmp_path)[1]["clock"]["seconds"] >= 0.07 * 60


def test_export_writes_the_averaged_weights(whole, tmp_path):
    run("--resume", whole, "--export", tmp_path / "weights")
    exported = load_file(tmp_path / "weights" / "model.safetensors")
    assert torch.equal(exported["head.weight"], last(whole)[0]["average.head.weight"])
