"""How torch tensors reach the compiled core: by address, without a copy and without linking libtorch."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

import visionllm._core as _core

__all__ = ["Argument", "RawTensor", "call", "has_cuda_kernels", "raw"]

RawTensor = tuple[int, int, int, tuple[int, ...], tuple[int, ...]]

# What operators take: tensors (None where one is optional), then numbers.
Argument = Tensor | int | float | bool | None

# Numbers of visionllm::DType and visionllm::Device (cpp/include/visionllm/tensor.h).
_DTYPE = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int64: 3,
    torch.int32: 4,
    torch.int8: 5,
    torch.uint8: 6,
    torch.bool: 6,
}
_DEVICE = {"cpu": 0, "cuda": 1}


def has_cuda_kernels() -> bool:
    """Whether this build has CUDA kernels at all; the first call says if they fit the GPU."""
    return bool(_core.cuda_architectures)


def raw(tensor: Tensor) -> RawTensor:
    """``(address, dtype, device, shape, strides in elements)``, as the core's ``*_raw`` functions take it.

    Raises:
        ValueError: the core knows no such element type or device.
    """
    dtype = _DTYPE.get(tensor.dtype)
    device = 0 if tensor.is_cpu else _DEVICE.get(tensor.device.type)
    if dtype is None or device is None:
        raise ValueError(
            "expected float32, bfloat16, float16, int64, int32, int8, uint8 or bool on cpu or cuda, got "
            f"{tensor.dtype} on {tensor.device.type}"
        )
    return tensor.data_ptr(), dtype, device, tensor.shape, tensor.stride()


def call(name: str, *arguments: Argument) -> None:
    """Run the core's operator ``name``: tensors (outputs first), then numbers, as its C++ header lists them.

    On the CPU it runs on as many threads as torch uses. On CUDA it is launched on the current stream of the
    tensors' GPU, whichever GPU is the current one.

    Args:
        arguments: all CUDA tensors lie on one GPU; int64 tensors on the CPU may stand among them where the
            operator's header says so. None is an absent tensor.

    Raises:
        ValueError: an argument does not fit the operator's contract.
        RuntimeError: this build or machine has no kernel for the tensors' device, or CUDA reports an error.
    """
    function = getattr(_core, name + "_raw")
    try:
        on_cpu = True
        values: list[RawTensor | int | float | bool | None] = []
        for argument in arguments:
            if not isinstance(argument, Tensor):
                values.append(argument)
            elif argument.is_cpu and (dtype := _DTYPE.get(argument.dtype)) is not None:  # as raw(), sooner
                values.append((argument.data_ptr(), dtype, 0, argument.shape, argument.stride()))
            else:
                on_cpu = False
                values.append(raw(argument))
        device = None if on_cpu else _cuda_device([a for a in arguments if isinstance(a, Tensor)])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    threads = torch.get_num_threads()
    if device is None:
        function(*values, threads=threads)
        return
    current = torch.cuda.current_device() == device.index
    with nullcontext() if current else torch.cuda.device(device):
        function(*values, threads=threads, stream=torch.cuda.current_stream(device).cuda_stream)


def _cuda_device(tensors: list[Tensor]) -> torch.device | None:
    """The GPU that all tensors of a call are on, or None when they are all on the CPU."""
    gpus = {t.device for t in tensors if t.device.type == "cuda"}
    if len(gpus) > 1:
        raise ValueError(f"expected tensors on one GPU, got {', '.join(sorted(map(str, gpus)))}")
    if not gpus:
        return None
    if any(t.device.type == "cpu" and t.dtype != torch.int64 for t in tensors):
        raise ValueError("expected all tensors on one device, got some on cpu and some on cuda")
    return gpus.pop()
