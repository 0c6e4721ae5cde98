"""The compiled operators on arrays of any library that speaks DLPack: NumPy, CuPy, JAX. Needs no torch.

torch users take ``visionllm.ops``, which is differentiable.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from visionllm import _core

__all__ = ["ms_deform_attn", "ms_deform_attn_backward", "ms_deform_attn_backward_workspace"]

_CPU = 1  # kDLCPU of DLPack's DLDeviceType


def ms_deform_attn(
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Any,
    attention_weights: Any,
    *,
    output: Any = None,
    threads: int | None = None,
    stream: int = 0,
) -> Any:
    """Multi-scale deformable attention; the contract is in ``cpp/include/visionllm/ms_deform_attn.h``.

    Args:
        value: [B, S, H, D] float32 or float16 (bfloat16 where the library has it); D contiguous.
        spatial_shapes: [L, 2] int64, height and width of each level, at least 1.
        level_start_index: [L] int64, the first pixel of each level in S.
        sampling_locations: [B, Q, H, L, P, 2] float32 as (x, y); 0 and 1 are the image's outer edges.
        attention_weights: [B, Q, H, L, P] float32 or of value's type.
        output: [B, Q, H * D] of value's type, written to; a new NumPy array when None. Has to be given where
            NumPy has no such array: for value outside CPU memory or in bfloat16.
        threads: CPU threads at most; all that this process may use when None.
        stream: address of the CUDA stream to launch on; nothing else is synchronised.

    Returns:
        ``output``.

    Raises:
        ValueError: an array does not fit the contract; nothing is converted or copied.
        RuntimeError: this build has no kernel for the arrays' device.
    """
    operator = "ms_deform_attn"
    if output is None:
        like = _view(operator, "value", value, _VALUE, result="output")
        queries = _view(operator, "sampling_locations", sampling_locations, _LOCATIONS, "output").shape[1]
        batch, _, heads, channels = like.shape
        output = np.empty((batch, queries, heads * channels), like.dtype)
    _run(
        operator,
        {"output": output},
        {
            "value": value,
            "spatial_shapes": spatial_shapes,
            "level_start_index": level_start_index,
            "sampling_locations": sampling_locations,
            "attention_weights": attention_weights,
        },
        threads,
        stream,
    )
    return output


def ms_deform_attn_backward(
    grad_output: Any,
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Any,
    attention_weights: Any,
    *,
    grad_value: Any = None,
    grad_sampling_locations: Any = None,
    grad_attention_weights: Any = None,
    workspace: Any = None,
    deterministic: bool = False,
    threads: int | None = None,
    stream: int = 0,
) -> tuple[Any, Any, Any]:
    """Gradients of a scalar loss by ``ms_deform_attn``'s value, locations and weights.

    Args:
        grad_output: [B, Q, H * D] of value's type: the loss's gradient by the output; H * D contiguous.
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights: the forward's.
        grad_value: [B, S, H, D] of value's type, contiguous; overwritten.
        grad_sampling_locations: [B, Q, H, L, P, 2] float32, contiguous; overwritten.
        grad_attention_weights: [B, Q, H, L, P] of the weights' type, contiguous; overwritten.
            Each of the three is a new NumPy array when None, and has to be given where ``output`` of
            ``ms_deform_attn`` has to be.
        workspace: [n] float32, contiguous and aligned to 16 bytes, which arrays in CUDA memory need; n as
            ``ms_deform_attn_backward_workspace`` says. Overwritten.
        deterministic: in CUDA memory, add up in a fixed order; slower. In CPU memory it is always so.
        threads, stream: as in ``ms_deform_attn``.

    Returns:
        ``(grad_value, grad_sampling_locations, grad_attention_weights)``.

    Raises:
        ValueError, RuntimeError: as ``ms_deform_attn``.
    """
    operator = "ms_deform_attn_backward"

    def empty_like(name: str, array: Any, contract: _Contract) -> np.ndarray:
        view = _view(operator, name, array, contract, result="grad_" + name)
        return np.empty(view.shape, view.dtype)

    if grad_value is None:
        grad_value = empty_like("value", value, _VALUE)
    if grad_sampling_locations is None:
        grad_sampling_locations = empty_like("sampling_locations", sampling_locations, _LOCATIONS)
    if grad_attention_weights is None:
        grad_attention_weights = empty_like("attention_weights", attention_weights, _WEIGHTS)
    _run(
        operator,
        {
            "grad_value": grad_value,
            "grad_sampling_locations": grad_sampling_locations,
            "grad_attention_weights": grad_attention_weights,
            "workspace": workspace,
        },
        {
            "grad_output": grad_output,
            "value": value,
            "spatial_shapes": spatial_shapes,
            "level_start_index": level_start_index,
            "sampling_locations": sampling_locations,
            "attention_weights": attention_weights,
        },
        threads,
        stream,
        deterministic,
    )
    return grad_value, grad_sampling_locations, grad_attention_weights


def ms_deform_attn_backward_workspace(
    value: Any, sampling_locations: Any, *, deterministic: bool = False
) -> int:
    """Numbers in ``ms_deform_attn_backward``'s workspace in CUDA memory; 0: it may be None.

    Args:
        value: [B, S, H, D]; only shape and type matter.
        sampling_locations: [B, Q, H, L, P, 2]; only the shape matters.
        deterministic: as in ``ms_deform_attn_backward``.
    """
    operator = "ms_deform_attn_backward_workspace"
    for name, array in (("value", value), ("sampling_locations", sampling_locations)):
        _check_exportable(operator, name, array)
    return _core.ms_deform_attn_backward_workspace(value, sampling_locations, deterministic)


def _run(
    operator: str,
    outputs: dict[str, Any],
    inputs: dict[str, Any],
    threads: int | None,
    stream: int,
    *numbers: bool,
) -> None:
    """The core's operator on the arrays, outputs first, and numbers."""
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        getattr(_core, operator)(
            *outputs.values(), *inputs.values(), *numbers, threads=threads, stream=stream
        )
    except TypeError:  # the bindings do not say which argument they cannot take
        for name, array in (outputs | inputs).items():
            if array is not None or name != "workspace":
                _check_exportable(operator, name, array)
        for name, array in outputs.items():
            if isinstance(array, np.ndarray) and not array.flags.writeable:
                raise ValueError(f"{operator}: {name} must be writable, got a read-only array") from None
        raise


def _check_exportable(operator: str, name: str, array: Any) -> None:
    """Refuses what DLPack cannot hand over, and says why."""
    if not (hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")):
        raise ValueError(f"{operator}: {name} must be an array that speaks DLPack, got {_kind(array)}")
    if isinstance(array, np.ndarray):  # not by its __dlpack__, which may refuse read-only memory
        if array.dtype.kind not in "biufc":
            raise ValueError(f"{operator}: {name} must be an array of numbers, got {array.dtype}")
        return
    try:
        array.__dlpack__()
    except Exception as error:  # each library has errors of its own
        raise ValueError(
            f"{operator}: {name} must be an array that DLPack can hand over, got {_kind(array)}: {error}"
        ) from error


def _kind(array: Any) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}".removeprefix("builtins.")


@dataclass(frozen=True)
class _Contract:
    """What an input must be before an output of its shape and type can be made."""

    letters: str  # "[B, S, H, D]"
    types: tuple[str, ...]  # NumPy's names
    expected: str  # the core's words for them


_VALUE = _Contract("[B, S, H, D]", ("float32", "float16"), "float32, bfloat16 or float16")
_LOCATIONS = _Contract("[B, Q, H, L, P, 2]", ("float32",), "float32")
_WEIGHTS = _Contract("[B, Q, H, L, P]", ("float32", "float16"), "float32 or of value's type")


def _view(operator: str, name: str, array: Any, contract: _Contract, result: str) -> np.ndarray:
    """The array as NumPy's, without a copy, to read from it what shape and type ``result`` gets."""
    _check_exportable(operator, name, array)
    view = array
    if not isinstance(array, np.ndarray):
        device = array.__dlpack_device__()
        if device[0] != _CPU:
            raise ValueError(
                f"{operator}: {result} must be given where {name} is not in CPU memory, got None with {name} "
                f"on DLPack device {tuple(map(int, device))}"
            )
        try:
            view = np.from_dlpack(array)
        except Exception as error:  # NumPy's own has changed between its versions
            raise ValueError(
                f"{operator}: {result} must be given where NumPy has no type like {name}'s, got None with "
                f"{_kind(array)}: {error}"
            ) from error
    if view.ndim != contract.letters.count(",") + 1:
        raise ValueError(f"{operator}: {name} must have shape {contract.letters}, got {list(view.shape)}")
    if view.dtype.name not in contract.types:
        raise ValueError(f"{operator}: {name} must be {contract.expected}, got {view.dtype.name}")
    return view
