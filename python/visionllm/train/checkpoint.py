"""Checkpoints: the whole state of a run in one safetensors file, written atomically and checked when read.

Tensors are named ``model.<name>``, ``average.<name>`` and ``optimizer.<slot>.<name>``; the rest of the state
is JSON in the file's metadata under ``state``. Every tensor and the metadata have checksums
(`visionllm.tensor_file`). There is no pickle in it. Random generators are not in it
either: they are seeded anew from (seed, step, rank) at every step.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionllm.atomic_file import remove_leftovers, replacing
from visionllm.tensor_file import TensorFile, is_finite, write_tensors

logger = logging.getLogger("visionllm.train")

FORMAT = "visionllm training checkpoint 2"
UNCHECKED = "visionllm training checkpoint 1"  # the same without checksums
_NAME = re.compile(r"checkpoint-(\d{8})\.safetensors")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or does not fit the run."""


def checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoint files in a folder, oldest first."""
    folder = Path(folder)
    return sorted(f for f in folder.iterdir() if _NAME.fullmatch(f.name)) if folder.is_dir() else []


def write_checkpoint(
    folder: str | Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int
) -> Path:
    """Write ``checkpoint-<step>.safetensors`` and delete all but the newest ``keep`` ones.

    A crash at any moment leaves the older checkpoints whole and never a broken one under a checkpoint's name;
    what it leaves of a new one is removed here. One process at a time may write to a folder.
    Raises CheckpointError naming the first tensor with a value that is not finite, and OSError where the disk
    is full, among others.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise CheckpointError(f"not written: {name} has values that are not finite")
    final = folder / f"checkpoint-{step:08d}.safetensors"
    metadata = {"format": FORMAT, "state": json.dumps(dict(state))}
    remove_leftovers(folder / "checkpoint")
    with replacing(final) as part:
        write_tensors(part, tensors, metadata)
    for old in checkpoints(folder)[:-keep]:
        if old != final:
            old.unlink()
    return final


def read_checkpoint(file: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint. Raises CheckpointError for a file that is none or was damaged."""
    try:
        with TensorFile(file, unchecked=True) as source:
            found = source.metadata.get("format")
            if found not in (FORMAT, UNCHECKED) or (found == FORMAT) != bool(source.checked):
                raise CheckpointError(f"{file}: expected format {FORMAT!r}, got {found!r}")
            if found == UNCHECKED:
                logger.warning("%s is from before checkpoints had checksums: damage would not be found", file)
            return {name: source.read(name) for name in source.shapes}, json.loads(source.metadata["state"])
    except (ValueError, KeyError, OSError) as error:
        older = [path.name for path in checkpoints(Path(file).parent) if path.name < Path(file).name]
        hint = f"; without it the run continues from {older[-1]}" if older else ""
        raise CheckpointError(f"{file} is not a readable checkpoint: {error}{hint}") from error


def network_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, shared ones once."""
    saved = network.state_dict().keys()
    tensors: dict[str, Tensor] = {name: value.data for name, value in network.named_parameters()}
    tensors.update({name: value for name, value in network.named_buffers() if name in saved})
    return tensors


def optimizer_tensors(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """State tensors of the optimiser as ``<slot>.<parameter name>``."""
    tensors = {}
    for name, parameter in network.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{slot}.{name}"] = torch.as_tensor(value)
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, network: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put the state of :func:`optimizer_tensors` into a new optimiser of the same network."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        slot, _, name = key.partition(".")
        by_name.setdefault(name, {})[slot] = value
    for name, parameter in network.named_parameters():
        slots = by_name.pop(name, None)
        if slots is None:
            continue
        for slot, value in slots.items():
            if value.shape == parameter.shape and value.dim() > 0:
                # empty_like keeps the parameter's strides, which fused optimisers rely on.
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value).detach()
            optimizer.state[parameter][slot] = value
    if by_name:
        raise CheckpointError(f"optimiser state of unknown parameters: {', '.join(sorted(by_name)[:10])}")


@torch.no_grad()
def load_tensors(into: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str) -> None:
    """Copy tensors in place; names and shapes must agree. Raises CheckpointError listing the differences."""
    problems = [f"missing {name}" for name in into if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in into]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(value.shape)}"
        for name, value in into.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if problems:
        raise CheckpointError(f"the {what} in the checkpoint does not fit: " + "; ".join(problems[:20]))
    for name, value in into.items():
        value.copy_(tensors[name])
