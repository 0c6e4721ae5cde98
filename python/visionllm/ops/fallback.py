"""What every operator's PyTorch reference needs where it stands in for a kernel: float64, other devices.

Arguments are checked as ``cpp/<op>.cpp`` checks them for the kernels, with the same messages (operator,
argument, expected, got); nobody is left to wonder why another device is slow; determinism is not promised
where there is none.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "alert_not_deterministic",
    "check_integer",
    "check_levels",
    "check_rank",
    "check_real",
    "check_shape",
    "warn_of_reference",
]


def type_name(tensor: Tensor) -> str:
    """``float32`` for ``torch.float32``: the core's way to write it."""
    return str(tensor.dtype).removeprefix("torch.")


def check_rank(operator: str, name: str, tensor: Tensor, letters: str) -> None:
    """As many dimensions as ``letters`` names: "[B, S, H, D]"."""
    if tensor.dim() != letters.count(",") + 1:
        raise ValueError(f"{operator}: {name} must have shape {letters}, got {list(tensor.shape)}")


def check_shape(operator: str, name: str, tensor: Tensor, letters: str, shape: Sequence[int]) -> None:
    """Exactly this shape, which ``letters`` names."""
    if list(tensor.shape) != list(shape):
        raise ValueError(
            f"{operator}: {name} must have shape {letters} = {list(shape)}, got {list(tensor.shape)}"
        )


def check_real(operator: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """A floating-point type, whichever: the reference computes in all of them."""
    if not tensor.is_floating_point():
        raise ValueError(f"{operator}: {name} must be floating point, got {type_name(tensor)}")
    if tensor.device != device:
        raise ValueError(f"{operator}: {name} must be on value's device {device}, got {tensor.device}")


def check_integer(operator: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """An integer type, whichever: conversion to int64 loses nothing. On the CPU is as good as with value."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{operator}: {name} must be int64, got {type_name(tensor)}")
    if tensor.device.type != "cpu" and tensor.device != device:
        raise ValueError(f"{operator}: {name} must be on value's device {device}, got {tensor.device}")


def check_levels(operator: str, spatial_shapes: Tensor, level_start_index: Tensor, pixels: int) -> None:
    """Every level [h, w] has pixels, all of them among value's. Waits for a device other than the CPU."""
    rows = zip(spatial_shapes.tolist(), level_start_index.tolist(), strict=True)
    for level, ((height, width), first) in enumerate(rows):
        if height < 1 or width < 1 or first < 0 or height * width > pixels - first:
            raise ValueError(
                f"{operator}: level {level} must be at least 1 x 1 and lie within value's S = {pixels} "
                f"pixels, got height {height}, width {width}, level_start_index {first}"
            )


@functools.cache
def warn_of_reference(operator: str, device_type: str) -> None:
    """Warns when an operator first runs on a kind of device that it has no kernel for; then never again."""
    remedy = "; -DVISIONLLM_CUDA=ON builds them (docs/cuda.md)" if device_type == "cuda" else ""
    warnings.warn(
        f"{operator}: {device_type.upper()} kernels are not part of this build; the PyTorch reference is "
        f"used for tensors on {device_type}, which takes much more time and memory than a kernel{remedy}",
        stacklevel=2,
    )


def alert_not_deterministic(operator: str, device: torch.device) -> None:
    """As torch's own operators without a deterministic form: an error, or a warning if that was asked for."""
    if device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        f"{operator}: expected a CPU tensor while torch.use_deterministic_algorithms(True) is set, got one "
        f"on {device}, where this build adds up in no fixed order"
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)
