"""Several processes with torch's engines: the same losses as one process, whole checkpoints, clean ends."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from parallel_runs import COMMON, build, run
from safetensors.torch import load_file

from visionllm.train import sharded_checkpoint
from visionllm.train.checkpoint import CheckpointError, read_checkpoint
from visionllm.train.command import _latest
from visionllm.train.config import ConfigError, TrainConfig, accumulation, load_config
from visionllm.train.distributed import Processes
from visionllm.train.parallel import checkpoint_blocks

HERE = Path(__file__).parent
ALONE = Processes(0, 1, torch.device("cpu"))
# Losses are written in six digits. Sums in another order; matching and top-k can then choose otherwise.
TOLERANCE = {"standin": 2e-5, "network": 1e-3}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The runs of two processes, started by torchrun."""
    folder = tmp_path_factory.mktemp("two")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, str(HERE / "parallel_runs.py"), str(folder)],
        env=environment(), capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same micro-batches in one process, accumulated."""
    folder = tmp_path_factory.mktemp("one")
    assert run(folder / "standin", "accumulate=2") == 0
    assert run(folder / "network", "accumulate=2", network=True) == 0
    return folder


def losses(folder, name="train", column="total"):
    with open(folder / f"{name}.csv", newline="") as file:
        return [float(row[column] or "nan") for row in csv.DictReader(file)]


def end_weights(folder):
    """Of the last checkpoint, whole, whichever kind it is."""
    newest = _latest(folder, needed=True)
    if newest.is_file():
        return read_checkpoint(newest)[0]
    shapes = sharded_checkpoint.stored_shapes(newest)
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    sharded_checkpoint.read_shards(newest, tensors)
    return tensors


def assert_close(left, right, tolerance):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        if tolerance and name.endswith(("conv.bias", "running_mean", "running_var", "batches_tracked")):
            # The norm takes the bias away: its gradient is noise, which Adam makes steps of. A process alone
            # counts micro-batches one after the other, several average what each counts.
            continue
        difference = (tensor.double() - right[name].double()).abs().max() if tensor.numel() else 0
        assert difference <= tolerance, f"{name} differs by up to {difference}"


@pytest.mark.parametrize("kind", ["flat", "ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(one, two, kind):
    assert np.allclose(losses(two / f"{kind}-network"), losses(one / "network"), rtol=TOLERANCE["network"])
    for column in ("gradient_norm", "lr", "metric/iou", "class"):
        found, expected = (losses(f, column=column) for f in (two / f"{kind}-network", one / "network"))
        assert np.allclose(found, expected, rtol=TOLERANCE["network"], equal_nan=True), column
    scores = [losses(f, "validation", "score") for f in (two / f"{kind}-network", one / "network")]
    assert np.allclose(*scores, rtol=TOLERANCE["network"])
    assert len(set(scores[0])) == len(scores[0])  # nothing of an earlier validation is kept
    # Batch normalisation sees its own micro-batch: two processes are as the first one with both of them.
    assert np.allclose(losses(two / kind), losses(two / "flat"), rtol=TOLERANCE["standin"])
    assert_close(end_weights(two / kind), end_weights(two / "flat"), 1e-5)
    assert_close(end_weights(two / f"{kind}-network"), end_weights(one / "network"), 1e-3)


@pytest.mark.parametrize("kind", ["flat", "ddp", "fsdp"])
def test_accumulating_equals_more_processes_and_one_big_batch(two, kind, tmp_path):
    expected = losses(two / "flat-accumulate")
    assert np.allclose(losses(two / f"{kind}-accumulate"), expected, rtol=TOLERANCE["standin"])
    if kind == "flat":
        whole = ["model.batch_norm=false", "model.dropout=0"]
        assert run(tmp_path / "parts", "accumulate=4", *whole) == 0
        assert run(tmp_path / "big", "model.pictures=16", *whole) == 0
        both = [losses(tmp_path / name) for name in ("parts", "big")]
        assert np.allclose(*both, rtol=TOLERANCE["standin"])
        assert_close(end_weights(tmp_path / "parts"), end_weights(tmp_path / "big"), 1e-5)


@pytest.mark.parametrize("kind", ["flat", "ddp", "fsdp"])
def test_a_step_that_is_bad_on_one_process_is_skipped_by_all(two, kind):
    found = losses(two / f"{kind}-bad")
    assert np.isnan(found[5]) and np.isfinite(np.delete(found, 5)).all()
    tensors = end_weights(two / f"{kind}-bad")
    assert tensors["optimizer.step.head.weight"] == 11
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert_close(tensors, end_weights(two / "flat-bad"), 1e-5)


def test_checkpointed_activations_change_nothing(two, tmp_path):
    assert losses(two / "fsdp-checkpointing") == losses(two / "fsdp-network")
    network, _, _ = build(TrainConfig(), ALONE, False)
    assert (
        checkpoint_blocks(network) == 1 + 2 + 2 + 1 + 16
    )  # of encoder, decoder, LLM, text encoder and backbone


def test_a_run_goes_on_with_other_numbers_of_processes(two):
    """Four steps of two processes, four of one, four of two."""
    assert np.allclose(losses(two / "resumed"), losses(two / "flat"), rtol=TOLERANCE["standin"])
    assert_close(end_weights(two / "resumed"), end_weights(two / "flat"), 1e-5)
    _, before, last = sharded_checkpoint.sharded_checkpoints(two / "resumed" / "checkpoints")
    assert sharded_checkpoint.read_state(before, ALONE)["processes"] == 1
    assert sharded_checkpoint.read_state(last, ALONE)["processes"] == 2
    exported = load_file(two / "resumed" / "model" / "model.safetensors")
    assert torch.equal(exported["conv.weight"], end_weights(two / "resumed")["average.conv.weight"])


@pytest.mark.parametrize("kinds", [("fsdp", "flat"), ("flat", "fsdp")])
def test_a_run_goes_on_with_another_engine(two, kinds, tmp_path):
    first, then = kinds
    stop = f"model.signal=[5,{int(signal.SIGTERM)}]"
    folder = tmp_path / "run"
    assert run(folder, f"parallel={first}", "accumulate=2", stop) == 130
    assert run(folder, "--resume", str(folder), f"parallel={then}", "model.signal=[-1]") == 0
    assert np.allclose(losses(folder), losses(two / "flat"), rtol=TOLERANCE["standin"])
    assert_close(end_weights(folder), end_weights(two / "flat"), 1e-5)


def test_frozen_weights_are_sharded_in_their_own_type(two):
    parts = [torch.load(two / f"shards-{rank}.pt") for rank in (0, 1)]
    assert parts[0]["blocks"] == 1 + 2 + 2
    for name, (_, whole, dtype) in parts[0]["held"].items():
        assert sum(part["held"][name][0] for part in parts) == whole, name
        frozen = ".backbone." in name or name.split(".")[-2] in "qkvo" and name.startswith("llm.layers")
        assert dtype == ("torch.bfloat16" if frozen and "lora" not in name else "torch.float32"), name
    held = [sum(own for own, _, _ in part["held"].values()) for part in parts]
    assert max(held) < 0.6 * sum(held)


def test_damaged_checkpoints_are_not_read(two, tmp_path):
    source = sharded_checkpoint.sharded_checkpoints(two / "fsdp" / "checkpoints")[-1]

    def damaged(change):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        change(folder, sorted(folder.glob("*.safetensors"))[0])
        return folder

    def flip(folder, file):
        content = bytearray(file.read_bytes())
        content[-5] ^= 4
        file.write_bytes(content)

    changes = {
        "damaged": flip,
        "expected other bytes": lambda folder, file: file.write_bytes(file.read_bytes()[:-4]),
        "missing or do not belong": lambda folder, file: file.unlink(),
        "expected format": lambda folder, file: (folder / "state.json").write_text("{}"),
        "not a readable": lambda folder, file: (folder / "state.json").write_text("{"),
    }
    assert sharded_checkpoint.read_state(source, ALONE)["step"] == 12
    for message, change in changes.items():
        with pytest.raises(CheckpointError, match=message):
            sharded_checkpoint.read_state(damaged(change), ALONE)
    with pytest.raises(CheckpointError, match="missing b; a has shape"):
        state = {"a": torch.zeros(2), "b": torch.zeros(1)}
        folder = sharded_checkpoint.write_shards(tmp_path, 3, {"a": torch.zeros(3)}, {}, 1, ALONE)
        sharded_checkpoint.read_shards(folder, state)


def test_a_half_written_folder_is_none_and_is_removed(two, tmp_path):
    write = sharded_checkpoint.write_shards
    write(tmp_path, 1, {"a": torch.ones(3)}, {"step": 1}, 2, ALONE)
    half = tmp_path / ".checkpoint-00000002.new"
    shutil.copytree(tmp_path / "checkpoint-00000001", half)
    (half / "state.json").unlink()
    shutil.copytree(half, tmp_path / "checkpoint-00000003")
    assert [f.name for f in sharded_checkpoint.sharded_checkpoints(tmp_path)] == ["checkpoint-00000001"]
    with pytest.raises(CheckpointError, match="not written: a has"):
        write(tmp_path, 2, {"a": torch.full((3,), torch.nan)}, {}, 1, ALONE)
    for step in (2, 2, 4):
        write(tmp_path, step, {"a": torch.ones(3) * step}, {"step": step}, 2, ALONE)
    names = [f.name for f in sharded_checkpoint.sharded_checkpoints(tmp_path)]
    assert names == ["checkpoint-00000002", "checkpoint-00000004"]
    assert not half.exists()
    content = json.loads((tmp_path / names[-1] / "state.json").read_text())
    assert content["state"] == {"step": 4}


def test_a_killed_process_ends_all_and_the_run_resumes_exactly(two, tmp_path):
    command = [sys.executable, str(HERE / "training_standin.py")]
    settings = [key for key in COMMON if not key.startswith("processes")]
    process = subprocess.Popen(
        [*command, *settings, "processes=2", "parallel=fsdp", "steps=12", f"output={tmp_path}",
         "model.delay=0.5"],
        env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    for _ in range(2400):
        if sharded_checkpoint.sharded_checkpoints(tmp_path / "checkpoints"):
            break
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode not in (0, 130)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert len(losses(tmp_path)) < 12
    resume = [*command, "--resume", str(tmp_path), "model.delay=0"]
    subprocess.run(resume, env=environment(), check=True, timeout=300)
    assert losses(tmp_path) == losses(two / "fsdp")
    assert_close(end_weights(tmp_path), end_weights(two / "fsdp"), 0)


def test_accumulation_follows_from_the_global_batch():
    config = load_config("tiny", overrides=["global_batch=64", "batch_size=4"])
    assert [accumulation(config, processes) for processes in (1, 2, 16)] == [16, 8, 1]
    with pytest.raises(ConfigError, match="multiple of 12"):
        accumulation(config, 3)
    with pytest.raises(ConfigError, match="give one of them"):
        load_config("tiny", overrides=["global_batch=64", "accumulate=2"])
    with pytest.raises(ConfigError, match="parallel must be one of flat, ddp, fsdp"):
        load_config("tiny", overrides=["parallel=fsdp2"])
