"""Whole runs with a small network: resuming, interruption, several processes, non-finite losses."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_standin import main

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


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Runs in this process take as many threads as those in processes of their own: sums depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def run(*arguments):
    """A run in this process; its exit code."""
    torch.set_num_threads(1)
    return main([str(argument) for argument in (*arguments, "processes=0")])


def start(*arguments):
    """A run in processes of its own, in a process group that can be killed."""
    return subprocess.Popen(
        [sys.executable, str(STANDIN), *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(process, code=0):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return errors


def last(folder):
    return read_checkpoint(checkpoints(folder / "checkpoints")[-1])


def rows(folder, name="train"):
    with open(folder / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def wait_for_checkpoint(process, folder):
    for _ in range(2400):
        if checkpoints(folder / "checkpoints"):
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError("no checkpoint after 120 s")


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
    assert run(*COMMON, "steps=30", f"output={folder}") == 0
    return folder


def test_a_run_leaves_its_files(whole):
    assert [int(row["step"]) for row in rows(whole)] == [5, 10, 15, 20, 25, 30]
    assert [int(row["step"]) for row in rows(whole, "validation")] == [10, 20, 30]
    for column in ("total", "box", "lr", "samples_per_s", "seconds_data", "seconds_backward", "metric/mean"):
        assert all(abs(float(row[column])) < 1e9 for row in rows(whole))
    assert len(checkpoints(whole / "checkpoints")) == 3
    tensors, state = last(whole)
    assert state["step"] == 30
    assert float(rows(whole)[-1]["total"]) < float(rows(whole)[0]["total"])
    exported = load_file(whole / "model" / "model.safetensors")
    assert torch.equal(exported["conv.weight"], tensors["average.conv.weight"])
    assert not torch.equal(exported["conv.weight"], tensors["model.conv.weight"])
    assert torch.equal(tensors["model.frozen"], torch.ones(2))


def test_the_seed_decides_everything(whole, tmp_path):
    assert run(*COMMON, "steps=30", f"output={tmp_path / 'same'}", "workers=1") == 0
    assert_same(last(whole), last(tmp_path / "same"))
    assert run(*COMMON, "steps=30", f"output={tmp_path / 'other'}", "seed=1") == 0
    other = last(tmp_path / "other")[0]["model.head.weight"]
    assert not torch.equal(last(whole)[0]["model.head.weight"], other)


def test_a_killed_run_resumes_bit_for_bit(whole, tmp_path):
    process = start(*COMMON, "processes=0", "steps=30", f"output={tmp_path}", "model.delay=0.05")
    wait_for_checkpoint(process, tmp_path)
    process.kill()
    process.communicate()
    assert 0 < last(tmp_path)[1]["step"] < 30
    assert run("--resume", tmp_path, "model.delay=0") == 0
    assert_same(last(whole), last(tmp_path))
    assert [row["step"] for row in rows(tmp_path)] == [row["step"] for row in rows(whole)]
    assert rows(tmp_path)[-1]["total"] == rows(whole)[-1]["total"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_resumes(whole, tmp_path, number, caplog):
    caplog.set_level("INFO", "visionllm.train")
    handler = signal.getsignal(number)
    code = run(*COMMON, "steps=30", f"output={tmp_path}", f"model.signal=[13,{int(number)}]")
    assert code == 130
    assert signal.getsignal(number) is handler
    assert f"resume with: visionllm train --resume {tmp_path}" in caplog.text
    assert last(tmp_path)[1]["step"] == 14
    assert run("--resume", tmp_path) == 0
    assert_same(last(whole), last(tmp_path))


def test_two_processes_survive_kill_and_interrupt(tmp_path):
    finish(start(*COMMON, "--processes", "2", "steps=24", f"output={tmp_path / 'a'}"))
    process = start(*COMMON, "--processes", "2", "steps=24", f"output={tmp_path / 'b'}", "model.delay=0.05")
    wait_for_checkpoint(process, tmp_path / "b")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert last(tmp_path / "b")[1]["step"] < 24
    process = start("--resume", tmp_path / "b", "model.delay=0.2")
    while "continuing from" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    finish(process, 130)
    finish(start("--resume", tmp_path / "b", "model.delay=0"))
    assert_same(last(tmp_path / "a"), last(tmp_path / "b"))


def test_two_processes_average_their_gradients(tmp_path):
    """Two processes with the batches of ranks 0 and 1 must not train like one process with rank 0's alone."""
    finish(
        start(
            *COMMON,
            "processes=2",
            "steps=8",
            f"output={tmp_path / 'two'}",
            "model.bad=[5]",
            "model.bad_rank=1",
        )
    )
    two = last(tmp_path / "two")
    # Rank 1's bad step is skipped by both.
    assert two[0]["optimizer.step.head.weight"] == 7
    assert run(*COMMON, "steps=8", f"output={tmp_path / 'one'}", "model.bad=[5]") == 0
    one = last(tmp_path / "one")
    assert not torch.equal(one[0]["model.head.weight"], two[0]["model.head.weight"])
    for name, tensor in two[0].items():
        assert torch.isfinite(tensor).all(), name


def test_training_processes_end_when_their_launcher_is_killed(tmp_path):
    process = start(*COMMON, "processes=2", "steps=100000", f"output={tmp_path}", "model.delay=0.05")
    wait_for_checkpoint(process, tmp_path)
    process.kill()
    process.wait()
    for _ in range(600):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("training processes are alive 60 s after their launcher was killed")


def test_a_failing_process_ends_the_run(tmp_path):
    errors = finish(start(*COMMON, "processes=2", "steps=50", f"output={tmp_path}", "model.fail=6"), 1)
    assert "a batch that cannot be made" in errors
    assert last(tmp_path)[1]["step"] == 4


def test_non_finite_steps_are_skipped(tmp_path, caplog):
    assert run(*COMMON, "steps=8", f"output={tmp_path}", "model.bad=[2,5,6]") == 0
    assert "step 3 skipped (1 in a row)" in caplog.text
    assert "step 7 skipped (2 in a row)" in caplog.text
    tensors, state = last(tmp_path)
    assert state["bad_steps"] == 0
    assert tensors["optimizer.step.head.weight"] == 5
    for name, tensor in tensors.items():
        assert torch.isfinite(tensor).all(), name


def test_non_finite_steps_in_a_row_stop_the_run(tmp_path, capsys):
    assert run(*COMMON, "steps=50", "bad_steps=3", f"output={tmp_path}", "model.bad=[5,6,7,8,9]") == 1
    assert "3 steps in a row" in capsys.readouterr().err
    tensors, state = last(tmp_path)
    assert state["step"] == 4
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_a_time_limited_run_ends_in_time_and_resumes(tmp_path):
    assert run(*COMMON, "max_minutes=0.03", f"output={tmp_path}", "model.delay=0.01") == 0
    state = last(tmp_path)[1]
    # The lap that crosses the limit is the last one.
    assert 1.8 <= state["clock"]["seconds"] < 1.8 + 2 * max(state["clock"]["laps"]["step"])
    assert float(rows(tmp_path)[-1]["lr_factor"]) < 0.1
    assert run("--resume", tmp_path, "max_minutes=0.04") == 0
    assert last(tmp_path)[1]["step"] > state["step"]
    assert last(tmp_path)[1]["clock"]["seconds"] >= 2.4


def test_export_writes_the_averaged_weights(whole, tmp_path):
    assert run("--resume", whole, "--export", tmp_path / "weights") == 0
    exported = load_file(tmp_path / "weights" / "model.safetensors")
    assert torch.equal(exported["head.weight"], last(whole)[0]["average.head.weight"])


def test_an_export_that_was_killed_half_way_is_recovered(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "model").rename(
        folder / ".model.old"
    )  # the old one was moved away, the new one not yet put there
    (folder / ".train-0123.csv").write_text("step,to")
    assert run("--resume", folder) == 0
    assert (folder / "model" / "model.safetensors").is_file()
    assert sorted(entry.name for entry in folder.iterdir() if entry.name.startswith(".")) == []


@pytest.fixture
def room_again():
    """For what is written after a run that ended with a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_was_full_for_a_while(whole, tmp_path, room_again, caplog):
    """From step 11 to 22: checkpoints 12, 16 and 20 and the model of step 20 cannot be written."""
    assert run(*COMMON, "steps=30", f"output={tmp_path}", "model.full=[11,22]") == 0
    assert_same(last(whole), last(tmp_path))
    for words in ("step 12: checkpoint not written, the older one stays", "step 20: model not written"):
        assert words in caplog.text
    exported = (load_file(folder / "model" / "model.safetensors") for folder in (whole, tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(*(x.values() for x in exported), strict=True))
    steps = [int(row["step"]) for row in rows(tmp_path)]
    assert steps[:2] == [5, 10] and steps[-1] == 30, "a row is there whole or not at all"


def test_a_disk_that_stays_full(whole, tmp_path, room_again, capsys):
    assert run(*COMMON, "steps=30", f"output={tmp_path}", "model.full=[11]") == 1
    room_again()
    assert "File too large" in capsys.readouterr().err
    kept = [read_checkpoint(file)[1]["step"] for file in checkpoints(tmp_path / "checkpoints")]
    assert kept == [4, 8]
    assert (tmp_path / "model" / "model.safetensors").is_file(), "of step 10"
    assert run("--resume", tmp_path, "model.full=[]") == 0
    assert_same(last(whole), last(tmp_path))


def test_tensorboard_gets_the_rows(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(*COMMON, "steps=10", f"output={tmp_path}", "tensorboard=on") == 0
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("train/total")]
    assert written == [(int(r["step"]), pytest.approx(float(r["total"]), rel=1e-4)) for r in rows(tmp_path)]
    assert [event.step for event in events.Scalars("validation/mean")] == [10]
