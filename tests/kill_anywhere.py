"""kill -9 at random points of training runs, resumed each time: the weights are those of a run left alone.

    python tests/kill_anywhere.py --kills 50

Half of the kills come after a random time, half at a random operation on files (a write, fsync, rename, ...),
where a kill could do harm. After each, every file under a checkpoint's name must read whole, and ``model/``
must be one that was exported. Runs are those of training_standin.py, forked from this process, which has
imported everything: an attempt takes a fraction of a second.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from training_standin import main as train

import visionllm.atomic_file
import visionllm.tensor_file
from visionllm.tensor_file import TensorFile
from visionllm.train.checkpoint import checkpoints, read_checkpoint

SETTINGS = [
    *("warmup=3", "log_every=5", "tensorboard=off", "validation.every=6", "lr=0.01"),
    *("checkpoint.minutes=0", "checkpoint.steps=2", "checkpoint.keep=2", "processes=0"),
]
ATTEMPT = 0.25  # of a whole run: the longest that one is let go on


def watched(count: Callable[[], None]) -> None:
    """From now on, ``count`` is called before every operation on files that a run's own code asks for."""

    def before(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            count()
            return operation(*arguments, **options)

        return run

    for owner, names in (
        (os, ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "open")),
        (visionllm.tensor_file, ("_write",)),
        (visionllm.atomic_file, ("_exchange",)),
        (Path, ("rename", "unlink", "mkdir", "write_bytes")),
    ):
        for name in names:
            setattr(owner, name, before(getattr(owner, name)))


def run(folder: Path, resume: bool, steps: int, errors: Path, at_operation: int = 0) -> int:
    """Starts a run in a process of its own; its number. ``at_operation``: at which it kills itself."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with open(errors, "ab") as file:
            os.dup2(file.fileno(), 2)
        counted = [0]

        def count() -> None:
            counted[0] += 1
            if counted[0] == at_operation:
                os.kill(os.getpid(), signal.SIGKILL)

        watched(count)
        goal = ["--resume", str(folder)] if resume else [*SETTINGS, f"steps={steps}", f"output={folder}"]
        code = train(goal)
        (folder / "operations").write_text(str(counted[0]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(process: int, seconds: float | None = None) -> bool:
    """Whether the process ended well; it is killed after ``seconds``. Raises RuntimeError when it failed."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while deadline is not None and time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            break
        time.sleep(0.0005)
    else:
        if deadline is not None:
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status != 0:
        raise RuntimeError(f"a run failed with status {status}")
    return True


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint and of ``model/``."""
    tensors, _ = read_checkpoint(checkpoints(folder / "checkpoints")[-1])
    with TensorFile(folder / "model" / "model.safetensors") as file:
        return tensors | {f"exported {name}": file.read(name) for name in file.shapes}


def check_left(folder: Path) -> str:
    """Raises for a file that a kill left broken under its name; says what the kill came into."""
    for file in checkpoints(folder / "checkpoints"):
        read_checkpoint(file)
    if (folder / "model").exists():
        with TensorFile(folder / "model" / "model.safetensors") as file:
            for name in file.shapes:
                file.read(name)
    names = [path.name for path in (*folder.glob(".*"), *folder.glob("checkpoints/.*"))]
    for start, what in ((".checkpoint", "a checkpoint"), (".model", "an export"), (".train", "a log")):
        if any(name.startswith(start) for name in names):
            return what
    return "a step" if checkpoints(folder / "checkpoints") else "the start"


def kill_anywhere(folder: Path, kills: int, seed: int, steps: int) -> collections.Counter[str]:
    """Kills so often, over as many runs as it takes. What the kills came into.

    Raises:
        AssertionError: a run that was killed and resumed has other weights.
        CheckpointError, ValueError: a kill left something broken.
        RuntimeError: a run could not be resumed.
    """
    torch.set_num_threads(1)
    generator = random.Random(seed)
    errors = folder / "errors.txt"
    # Here, so that processes have all modules already when they are forked.
    train([*SETTINGS, "steps=2", f"output={folder / 'first'}"])
    started = time.monotonic()
    wait(run(folder / "whole", False, steps, errors))
    seconds = time.monotonic() - started
    operations = int((folder / "whole" / "operations").read_text())
    expected = weights_of(folder / "whole")
    came_into: collections.Counter[str] = collections.Counter()
    runs = 0
    while came_into.total() < kills:
        place, resume, finished = folder / "killed", False, False
        shutil.rmtree(place, ignore_errors=True)
        while not finished:
            if came_into.total() >= kills:
                finished = wait(run(place, resume, steps, errors))
                assert finished
            elif generator.random() < 0.5:
                finished = wait(run(place, resume, steps, errors), generator.uniform(0, ATTEMPT * seconds))
            else:
                at = generator.randint(1, int(ATTEMPT * operations))
                finished = wait(run(place, resume, steps, errors, at))
            resume = bool(checkpoints(place / "checkpoints"))
            if not finished:
                came_into[check_left(place)] += 1
                if not resume:  # no checkpoint yet: the run begins anew
                    shutil.rmtree(place, ignore_errors=True)
        found = weights_of(place)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), f"{name} differs after kills"
        left = [path.name for path in (*place.glob(".*"), *place.glob("checkpoints/.*"))]
        assert not left, left
        runs += 1
    print(
        f"{came_into.total()} kills in {runs} runs of {operations} operations on files, "
        f"{time.monotonic() - started:.0f} s: "
        + ", ".join(f"{count} in {what}" for what, count in came_into.most_common())
        + "; all weights, averages, optimiser states and exports bit-equal"
    )
    return came_into


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            kill_anywhere(Path(folder), options.kills, options.seed, options.steps)
        except BaseException:
            errors = Path(folder) / "errors.txt"
            print(errors.read_text()[-5000:] if errors.exists() else "", file=sys.stderr)
            raise


if __name__ == "__main__":
    main()
