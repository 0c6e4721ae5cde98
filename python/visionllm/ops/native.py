"""How torch tensors reach the compiled core: by address, without a copy and without linking libtorch."""

from __future__ import annotations

import torch
from torch import Tensor

from visionllm import _core

__all__ = ["RawTensor", "call", "raw"]

RawTensor = tuple[int, int, int, tuple[int, ...], tuple[int, ...]]

# Numbers of visionllm::DType and visionllm::Device (cpp/include/visionllm/tensor.h).
_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int64: 3}
_DEVICE = {"cpu": 0}


def raw(tensor: Tensor) -> RawTensor:
    """``(address, dtype, device, shape, strides in elements)``, as the core's ``*_raw`` functions take it.

    Raises:
        ValueError: the core knows no such element type or device.
    """
    dtype = _DTYPE.get(tensor.dtype)
    device = _DEVICE.get(tensor.device.type)
    if dtype is None or device is None:
        raise ValueError(
            f"expected float32, bfloat16, float16 or int64 on cpu, got {tensor.dtype} on {tensor.device.type}"
        )
    return tensor.data_ptr(), dtype, device, tensor.shape, tensor.stride()


def call(name: str, *tensors: Tensor) -> None:
    """Run the core's operator ``name`` on tensors (outputs first), on as many threads as torch uses."""
    function = getattr(_core, name + "_raw")
    try:
        arguments = [raw(tensor) for tensor in tensors]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    function(*arguments, threads=torch.get_num_threads())
