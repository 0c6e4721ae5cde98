"""Checkpoint files: whole or absent, finite, checked when read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from visionllm.train.checkpoint import (
    CheckpointError,
    checkpoints,
    load_tensors,
    read_checkpoint,
    write_checkpoint,
)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_round_trip(tmp_path):
    tensors = {"model.a": torch.randn(3, 2).t(), "model.b": torch.arange(4), "model.empty": torch.zeros(0, 3)}
    state = {"step": 7, "clock": {"seconds": 0.1 + 0.2}, "config": {"lr": 1e-3, "init": None}}
    file = write_checkpoint(tmp_path, 7, tensors, state, keep=2)
    back, back_state = read_checkpoint(file)
    assert back_state == state
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor)


def test_only_the_newest_stay(tmp_path):
    (tmp_path / "checkpoint-notes.txt").touch()
    for step in (5, 10, 100, 15):
        write_checkpoint(tmp_path, step, {"a": torch.ones(1)}, {"step": step}, keep=2)
    assert [file.name[11:19] for file in checkpoints(tmp_path)] == ["00000015", "00000100"]
    assert (tmp_path / "checkpoint-notes.txt").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_refused(tmp_path, value):
    write_checkpoint(tmp_path, 1, {"model.a": torch.ones(3)}, {}, keep=1)
    with pytest.raises(CheckpointError, match=r"model\.a"):
        write_checkpoint(tmp_path, 2, {"model.a": torch.tensor([1.0, value])}, {}, keep=1)
    assert names(tmp_path) == ["checkpoint-00000001.safetensors"]


def test_a_failure_while_writing_leaves_the_old_ones(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1, {"a": torch.ones(3)}, {"step": 1}, keep=1)

    def full(*arguments):
        raise OSError("no space left on device")

    for function in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(OSError, match="no space"):
                write_checkpoint(tmp_path, 2, {"a": torch.zeros(3)}, {"step": 2}, keep=1)
        assert names(tmp_path) == ["checkpoint-00000001.safetensors"]
    assert read_checkpoint(checkpoints(tmp_path)[-1])[1] == {"step": 1}


def test_data_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    write_checkpoint(tmp_path, 2, {"a": torch.zeros(3)}, {}, keep=1)
    assert calls == ["fsync", "replace", "fsync"]


def test_a_process_killed_while_writing_leaves_what_the_next_write_removes(tmp_path):
    """The kill comes while tensors are being written: the program writes again and again."""
    program = (
        "import sys, torch\nfrom visionllm.train.checkpoint import write_checkpoint\n"
        "tensors = {'a': torch.zeros(4_000_000)}\nfor step in range(1, 100_000):\n"
        "    write_checkpoint(sys.argv[1], step, tensors, {'step': step}, keep=2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    try:
        deadline = time.monotonic() + 120
        while not (checkpoints(tmp_path) and any(name.startswith(".") for name in names(tmp_path))):
            assert process.poll() is None and time.monotonic() < deadline
    finally:
        process.kill()
        process.wait()
    step = read_checkpoint(checkpoints(tmp_path)[-1])[1]["step"]
    final = write_checkpoint(tmp_path, step + 1, {"a": torch.zeros(3)}, {}, keep=1)
    assert names(tmp_path) == [final.name]


def test_what_a_killed_process_left_is_removed(tmp_path):
    write_checkpoint(tmp_path, 1, {"a": torch.zeros(3)}, {}, keep=2)
    (tmp_path / ".checkpoint-00000002-5e1f").mkdir()
    (tmp_path / ".checkpoint-00000002-5e1f" / ".tmp").write_bytes(b"half")
    (tmp_path / ".checkpoint-00000002.safetensors.4711").write_bytes(b"half")
    (tmp_path / ".notes").touch()
    write_checkpoint(tmp_path, 3, {"a": torch.zeros(3)}, {}, keep=2)
    kept = [".notes", "checkpoint-00000001.safetensors", "checkpoint-00000003.safetensors"]
    assert names(tmp_path) == kept


def test_other_files_are_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="expected format"):
        read_checkpoint(tmp_path / "weights.safetensors")
    file = write_checkpoint(tmp_path, 1, {"a": torch.ones(1000)}, {}, keep=1)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        read_checkpoint(file)


@pytest.fixture
def written(tmp_path):
    """Two checkpoints; the newer one is to be spoilt."""
    tensors = {f"model.{name}": torch.randn(40, 30) for name in "abc"} | {
        "optimizer.step.a": torch.tensor(3.0)
    }
    write_checkpoint(tmp_path, 3, tensors, {"step": 3}, keep=2)
    return write_checkpoint(tmp_path, 7, tensors, {"step": 7, "clock": {"seconds": 1.5}}, keep=2)


def test_a_flipped_bit_is_found_anywhere(written):
    data = written.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for place in [*range(0, 8 * header, 37), *range(8 * header, 8 * len(data), 4001)]:
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        written.write_bytes(damaged)
        with pytest.raises(CheckpointError) as raised:
            read_checkpoint(written)
        assert "checkpoint-00000007.safetensors" in str(raised.value)
    written.write_bytes(data)
    assert read_checkpoint(written)[1]["step"] == 7


def test_the_damaged_tensor_and_the_older_checkpoint_are_named(written):
    data = bytearray(written.read_bytes())
    data[-10] ^= 8  # behind it comes the step, of 4 bytes
    written.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.c: damaged.* continues from checkpoint-00000003"):
        read_checkpoint(written)


def test_checkpoints_without_checksums_are_read_with_a_warning(tmp_path, caplog):
    metadata = {"format": "visionllm training checkpoint 1", "state": '{"step": 2}'}
    save_file({"model.a": torch.ones(3)}, tmp_path / "checkpoint-00000002.safetensors", metadata)
    tensors, state = read_checkpoint(tmp_path / "checkpoint-00000002.safetensors")
    assert state == {"step": 2} and torch.equal(tensors["model.a"], torch.ones(3))
    assert "from before checkpoints had checksums" in caplog.text
    metadata["format"] = "visionllm training checkpoint 2"
    save_file({"model.a": torch.ones(3)}, tmp_path / "checkpoint-00000002.safetensors", metadata)
    with pytest.raises(CheckpointError, match="expected format"):
        read_checkpoint(tmp_path / "checkpoint-00000002.safetensors")


@contextmanager
def room(size):
    """The kernel refuses what makes a file larger than so many bytes, as on a full disk."""
    resource = pytest.importorskip("resource")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    write_checkpoint(tmp_path, 1, {"model.a": torch.ones(3)}, {"step": 1}, keep=1)
    with room(100_000), pytest.raises(OSError, match="too large"):
        write_checkpoint(tmp_path, 2, {"model.a": torch.ones(100_000)}, {"step": 2}, keep=1)
    assert names(tmp_path) == ["checkpoint-00000001.safetensors"]
    assert read_checkpoint(checkpoints(tmp_path)[-1])[1] == {"step": 1}


def test_differences_are_listed():
    into = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}
    with pytest.raises(CheckpointError) as raised:
        load_tensors(into, {"a": torch.ones(2), "b": torch.ones(4), "d": torch.ones(1)}, "network")
    for words in ("missing c", "unexpected d", "b has shape [4], expected [3]"):
        assert words in str(raised.value)
    assert not into["a"].any()
