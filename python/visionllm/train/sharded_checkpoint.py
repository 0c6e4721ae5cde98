"""Checkpoints of runs whose processes hold shares of the weights (parallel=fsdp): a folder a checkpoint.

    checkpoint-<step>/shard-00001-….safetensors …   by torch.distributed.checkpoint, at least one a process
    checkpoint-<step>/state.json                    the rest of the state, and every file's size and checksum

torch.distributed.checkpoint gives any number of processes its shares of what any other number wrote, and a
process that holds everything all of it. Its safetensors form is used: its own has pickles. Tensors have the
names of :mod:`visionllm.train.checkpoint`.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from visionllm.atomic_file import remove_leftovers, replacing_folder
from visionllm.train.checkpoint import CheckpointError
from visionllm.train.distributed import Processes
from visionllm.train.parallel import local

FORMAT = "visionllm sharded training checkpoint 1"
STATE = "state.json"
_NAME = re.compile(r"checkpoint-(\d{8})")
_CHUNK = 1 << 24  # bytes read at a time


def sharded_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoint folders in a folder, oldest first."""
    folder = Path(folder)
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(f for f in found if _NAME.fullmatch(f.name) and (f / STATE).is_file())


def write_shards(
    folder: str | Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    processes: Processes,
) -> Path:
    """Write ``checkpoint-<step>`` and delete all but the newest ``keep`` ones; every process calls it.

    A crash at any moment leaves the older checkpoints whole and never a broken one under a checkpoint's name;
    what it leaves of a new one is removed here. ``folder`` must be the same one for all processes.

    Raises:
        CheckpointError: on all processes, where one's values are not finite.
        OSError: on all processes, where one cannot write; the disk is full, among others.
    """
    folder = Path(folder)
    final = folder / f"checkpoint-{step:08d}"
    _agree(processes, lambda: _check_finite(tensors))
    with ExitStack() as stack:

        def begin() -> Path | None:
            if not processes.first:
                return None
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder / "checkpoint")
            return stack.enter_context(replacing_folder(final))

        place = _agree(processes, begin)[0]
        writer, _ = storage()
        _collective("save", tensors, storage_writer=writer(str(place), save_distributed=True))
        files = sorted(place.glob("*.safetensors"))
        sums: dict[str, list[int]] = {}
        for part in _agree(processes, lambda: _checksums(files[processes.rank :: processes.size])):
            sums |= part

        def finish() -> None:
            if processes.first:
                content = {"format": FORMAT, "files": sums, "state": dict(state)}
                (place / STATE).write_text(json.dumps(content))
            stack.close()  # the folder takes its place

        _agree(processes, finish)
    if processes.first:
        for old in sharded_checkpoints(folder)[:-keep]:
            if old != final:
                (old / STATE).unlink()  # from here on it is none
                shutil.rmtree(old)
    return final


def read_state(folder: str | Path, processes: Processes) -> dict[str, Any]:
    """The state of a checkpoint, all of whose files are checked; every process calls it.

    Raises:
        CheckpointError: on all processes, for a folder that is none, and for a file that is missing, cut
            short or changed.
    """
    folder = Path(folder)

    def check() -> dict[str, Any]:
        try:
            content = json.loads((folder / STATE).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} is not a readable checkpoint: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CheckpointError(f"{folder / STATE}: expected format {FORMAT!r}")
        expected = content["files"]
        found = {file.name for file in folder.glob("*.safetensors")}
        if found != expected.keys():
            differences = ", ".join(sorted(found ^ expected.keys())[:5])
            raise CheckpointError(f"{folder}: files that are missing or do not belong there: {differences}")
        mine = [folder / name for name in sorted(expected)[processes.rank :: processes.size]]
        for name, sums in _checksums(mine).items():
            if sums != expected[name]:
                raise CheckpointError(f"{folder / name} is damaged: expected other bytes")
        return content["state"]

    return _agree(processes, check)[processes.rank]


def stored_shapes(folder: str | Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Whole shapes and types of a checkpoint's tensors."""
    _, reader = storage()
    stored: dict[str, Any] = reader(str(folder)).read_metadata().state_dict_metadata
    return {name: (one.size, one.properties.dtype) for name, one in stored.items()}


def read_shards(folder: str | Path, into: Mapping[str, Tensor]) -> None:
    """Fill tensors, or this process's shares of them, by name; every process calls it.

    Raises:
        CheckpointError: the checkpoint lacks a tensor or has another shape of it.
    """
    found = stored_shapes(folder)
    problems = [f"missing {name}" for name in into if name not in found]
    problems += [
        f"{name} has shape {list(found[name][0])}, expected {list(value.shape)}"
        for name, value in into.items()
        if name in found and found[name][0] != value.shape
    ]
    if problems:
        raise CheckpointError(f"{folder} does not fit: " + "; ".join(problems[:20]))
    _, reader = storage()
    _collective("load", into, storage_reader=reader(str(folder)))


def storage() -> tuple[Any, Any]:
    """DCP's writer and reader of safetensors. Raises CheckpointError where torch has none."""
    try:
        from torch.distributed.checkpoint.hf_storage import (
            HuggingFaceStorageReader,
            HuggingFaceStorageWriter,
        )
    except ImportError as error:
        raise CheckpointError(
            f"sharded checkpoints need torch >= 2.9, whose torch.distributed.checkpoint has "
            f"HuggingFaceStorageWriter; got {torch.__version__}"
        ) from error
    return HuggingFaceStorageWriter, HuggingFaceStorageReader


def _collective(action: str, tensors: Mapping[str, Tensor], **storage: Any) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp  # takes a while
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process alone is meant
            getattr(dcp, action)(dict(tensors), no_dist=not dist.is_initialized(), **storage)
    except CheckpointException as error:  # raised on all processes, with the failures of each
        first = next(iter(error.failures.values()))[0]
        kind = OSError if action == "save" else CheckpointError
        raise kind(f"{type(first).__name__}: {first}") from error


def _agree(processes: Processes, action: Callable[[], Any]) -> list[Any]:
    """What every process's action returned; the first error of one is raised on all."""
    result, problem = None, cast(Exception | None, None)
    try:
        result = action()
    except CheckpointError as error:
        problem = error
    except OSError as error:
        problem = OSError(str(error))
    answers = processes.gather((result, problem))
    for _, found in answers:
        if found is not None:
            raise found
    return [one for one, _ in answers]


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(local(tensor)).all()):
            raise CheckpointError(f"not written: {name} has values that are not finite")


def _checksums(files: Sequence[Path]) -> dict[str, list[int]]:
    """Size in bytes and CRC-32 by file name."""
    sums = {}
    for file in files:
        size, crc = 0, 0
        with open(file, "rb") as source:
            while chunk := source.read(_CHUNK):
                size, crc = size + len(chunk), zlib.crc32(chunk, crc)
        sums[file.name] = [size, crc]
    return sums
