"""Where a model's folder is, and the device and memory that it is loaded into."""

from __future__ import annotations

import os
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
import torch

DEFAULT_MODEL = "tiny"


@cache
def keep_freed_memory() -> None:
    """Makes glibc keep what a prediction frees for the next one.

    It gives blocks above 128 KiB back to the kernel until a larger one was freed, and then keeps blocks up to
    that size (mallopt(3), M_MMAP_THRESHOLD; at most 32 MiB). Without this, a picture met 2900 fresh pages,
    which took 12 of 89 ms. Elsewhere it does nothing. The block is never written to, so it costs no memory.
    """
    np.empty(31 << 20, np.uint8)


def model_folder(model: str | os.PathLike[str] = DEFAULT_MODEL) -> Path:
    """The folder that `load` reads; raises FileNotFoundError as it does."""
    name = os.fspath(model)
    weights = Path(str(resources.files("visionllm"))) / "weights"
    is_bare_name = isinstance(model, str) and name == Path(name).name
    if is_bare_name and (weights / name / "model.safetensors").is_file():
        return weights / name
    if Path(model).is_dir():
        return Path(model)
    packaged = sorted(entry.parent.name for entry in weights.glob("*/tokenizer.model"))  # not adapters
    raise FileNotFoundError(
        f"{name}: expected a model folder or the name of packaged weights. In this installation: "
        f"{', '.join(packaged) or 'none'} (looked in {weights}). "
        "Install a release of visionllm, which carries the weights, or train a model with "
        "`visionllm train` and give its folder."
    )


def checked_device(device: str | None) -> torch.device:
    """The device of that name; None: a GPU if torch has one, else the CPU.

    Raises:
        ValueError: torch knows no such name, or finds no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu, cuda, cuda:1, ..., got {device!r}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {device!r}, but torch finds {torch.cuda.device_count()} CUDA devices")
    return found
