"""The compiled operators on arrays of any library that speaks DLPack (NumPy, CuPy, JAX), without torch.

torch users take ``visionllm.ops``, which is differentiable.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from visionllm import _core

__all__ = ["ms_deform_attn"]


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
        output: [B, Q, H * D] of value's type, written to; a new NumPy array when None.
        threads: CPU threads at most; all that this process may use when None.
        stream: address of the CUDA stream to launch on; nothing else is synchronised.

    Returns:
        ``output``.

    Raises:
        ValueError: an array does not fit the contract; nothing is converted or copied.
        RuntimeError: this build has no kernel for the arrays' device.
    """
    if output is None:
        batch, _, heads, channels = value.shape
        output = np.empty((batch, sampling_locations.shape[1], heads * channels), np.dtype(value.dtype))
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    _core.ms_deform_attn(
        output,
        value,
        spatial_shapes,
        level_start_index,
        sampling_locations,
        attention_weights,
        threads=threads,
        stream=stream,
    )
    return output
