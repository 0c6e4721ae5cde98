"""Multi-scale deformable attention as a torch operator (Zhu et al., "Deformable DETR", ICLR 2021, eq. 2).

    output[b, q, h] = sum over levels l and points p of
                      attention[b, q, h, l, p] * bilinear(value_l[b, :, h], location[b, q, h, l, p])

The contract, with the meaning of the shape letters, is in ``cpp/include/visionllm/ms_deform_attn.h``. On the
CPU, and on CUDA where the build has CUDA kernels, the operator runs the compiled kernels; on other devices
(with a warning), and in float64, the PyTorch reference in ``ms_deform_attn_reference.py``.
``ms_deform_attn_fused`` beside this file has the softmax and the locations inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import visionllm._core as _core
from visionllm.ops import fallback, native
from visionllm.ops.direct import past_dispatcher
from visionllm.ops.ms_deform_attn_reference import (
    ms_deform_attn_backward_reference,
    ms_deform_attn_reference,
)

__all__ = ["SampleInputs", "ms_deform_attn", "ms_deform_attn_reference", "sample_inputs"]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention; differentiable in value, locations and weights.

    Args:
        value: [B, S, H, D] float32, bfloat16 or float16 (float64 takes the slow reference).
        spatial_shapes: [L, 2] int64 (other integers are converted), height and width of each level, at
            least 1. Best on the CPU also where value is on a GPU: there it is checked, and lets the kernels
            give neighbouring queries to one block. On the GPU it is not checked: a level that does not lie
            within S contributes nothing.
        level_start_index: [L] int64 (other integers are converted), the first pixel of each level in S; on
            the device of spatial_shapes.
        sampling_locations: [B, Q, H, L, P, 2] as (x, y); 0 and 1 are the image's outer edges. Best in
            float32: lower precision is converted, but has lost fractions of a pixel already.
        attention_weights: [B, Q, H, L, P], best in float32 or value's type: others are converted.

    Returns:
        [B, Q, H * D] of value's type. Corners outside the image count as zero; a point a pixel or more
        outside, or NaN, contributes nothing. On the CPU, forward and backward are deterministic; on CUDA the
        forward is, and the backward while torch is asked for deterministic algorithms.

    On devices that the build has no kernels for, the PyTorch reference computes the result, many times
    slower, and the first call warns of it.

    Raises:
        ValueError: a shape, type or level does not fit; the message names it.
        RuntimeError: the backward on a device without kernels, while torch is asked for deterministic
            algorithms.
    """
    return _ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)


@dataclass(frozen=True)
class SampleInputs:
    """Arguments of ``ms_deform_attn`` in order; the tests, opcheck and the bench take theirs from here."""

    value: Tensor
    spatial_shapes: Tensor
    level_start_index: Tensor
    sampling_locations: Tensor
    attention_weights: Tensor

    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return (
            self.value,
            self.spatial_shapes,
            self.level_start_index,
            self.sampling_locations,
            self.attention_weights,
        )


def sample_inputs(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    levels: tuple[tuple[int, int], ...] = ((9, 13), (5, 7), (3, 4), (1, 1)),
    heads: int = 8,
    channels: int = 32,
    queries: int = 17,
    points: int = 4,
    offset: float = 4.0,
    encoder: bool = False,
    requires_grad: bool = False,
    seed: int = 0,
) -> SampleInputs:
    """Random inputs like a detector's: each query looks around its own place, at most ``offset`` pixels away.

    With ``encoder`` the queries are the pixels of all levels in order (``queries`` is ignored), each at its
    own centre; else they lie anywhere. Some locations fall outside the image in either case.
    """
    random = torch.Generator().manual_seed(seed)
    shapes = torch.tensor(levels, dtype=torch.int64).view(-1, 2)
    areas = shapes.prod(-1)
    starts = torch.cat([areas.new_zeros(1), areas.cumsum(0)[:-1]]) if len(levels) else areas
    real = torch.float64 if dtype == torch.float64 else torch.float32
    if encoder:
        centres = []
        for height, width in levels:
            y, x = torch.meshgrid(
                (torch.arange(height, dtype=real) + 0.5) / height,
                (torch.arange(width, dtype=real) + 0.5) / width,
                indexing="ij",
            )
            centres.append(torch.stack([x, y], -1).view(-1, 2))
        reference = torch.cat(centres).expand(batch, -1, 2)
    else:
        reference = torch.rand(batch, queries, 2, generator=random, dtype=real)
    count = reference.shape[1]
    away = torch.rand(batch, count, heads, len(levels), points, 2, generator=random, dtype=real) * 2 - 1
    locations = reference[:, :, None, None, None] + offset * away / shapes.flip(-1)[:, None]
    logits = torch.randn(batch, count, heads, len(levels) * points, generator=random, dtype=real)
    attention = logits.softmax(-1).view(batch, count, heads, len(levels), points).to(dtype)
    value = torch.randn(batch, int(areas.sum()), heads, channels, generator=random, dtype=real).to(dtype)
    value, locations, attention = (
        t.to(device).requires_grad_(requires_grad) for t in (value, locations, attention)
    )
    return SampleInputs(value, shapes.to(device), starts.to(device), locations, attention)


# ---- registration ---------------------------------------------------------------------------------------

_library = torch.library.Library("visionllm", "FRAGMENT")
_library.define(
    "ms_deform_attn(Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
    "Tensor sampling_locations, Tensor attention_weights) -> Tensor"
)
_library.define(
    "ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, "
    "Tensor level_start_index, Tensor sampling_locations, Tensor attention_weights) "
    "-> (Tensor, Tensor, Tensor)"
)


def _kernel_arguments(
    operator: str,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, ...]:
    """The tensors as the kernels want them; copies only what does not fit already.

    Checked here is what must hold before shapes can be taken apart, and the types of what is converted: the
    core checks everything else.
    """
    as_they_are = (
        value.is_cpu
        and value.dim() == 4
        and sampling_locations.dim() == 6
        and sampling_locations.dtype == torch.float32
        and attention_weights.dtype in (torch.float32, value.dtype)
        and spatial_shapes.dtype == level_start_index.dtype == torch.int64
    )
    if not as_they_are:
        fallback.check_rank(operator, "value", value, "[B, S, H, D]")
        fallback.check_rank(operator, "sampling_locations", sampling_locations, "[B, Q, H, L, P, 2]")
        fallback.check_real(operator, "sampling_locations", sampling_locations, value.device)
        fallback.check_real(operator, "attention_weights", attention_weights, value.device)
        fallback.check_integer(operator, "spatial_shapes", spatial_shapes, value.device)
        fallback.check_integer(operator, "level_start_index", level_start_index, value.device)
        sampling_locations = sampling_locations.float()
        if attention_weights.dtype not in (torch.float32, value.dtype):
            attention_weights = attention_weights.float()
        spatial_shapes, level_start_index = spatial_shapes.to(torch.int64), level_start_index.to(torch.int64)
    return (
        value if value.stride(-1) == 1 else value.contiguous(),
        spatial_shapes.contiguous(),
        level_start_index.contiguous(),
        sampling_locations.contiguous(),
        attention_weights.contiguous(),
    )


def _forward_cpu(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    if value.dtype == torch.float64:
        return ms_deform_attn_reference(
            value, spatial_shapes, level_start_index, sampling_locations, attention_weights
        )
    arguments = _kernel_arguments(
        "ms_deform_attn", value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )
    output = value.new_empty(value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])
    native.call("ms_deform_attn", output, *arguments)
    return output


def _backward_cpu(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    if value.dtype == torch.float64:
        return ms_deform_attn_backward_reference(
            grad_output, value, spatial_shapes, level_start_index, sampling_locations, attention_weights
        )
    arguments = _kernel_arguments(
        "ms_deform_attn_backward",
        value,
        spatial_shapes,
        level_start_index,
        sampling_locations,
        attention_weights,
    )
    contiguous = torch.contiguous_format
    grads = (
        torch.empty_like(value, memory_format=contiguous),
        torch.empty_like(arguments[3], memory_format=contiguous),
        torch.empty_like(arguments[4], memory_format=contiguous),
    )
    native.call("ms_deform_attn_backward", *grads, None, grad_output.contiguous(), *arguments, False)
    return grads[0], grads[1].to(sampling_locations.dtype), grads[2].to(attention_weights.dtype)


def _forward_cuda(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    # The same preparation; the core goes by the tensors' device.
    return _forward_cpu(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)


def _backward_cuda(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    if value.dtype == torch.float64:
        return ms_deform_attn_backward_reference(
            grad_output, value, spatial_shapes, level_start_index, sampling_locations, attention_weights
        )
    arguments = _kernel_arguments(
        "ms_deform_attn_backward",
        value,
        spatial_shapes,
        level_start_index,
        sampling_locations,
        attention_weights,
    )
    value, _, _, locations, weights = arguments
    deterministic = torch.are_deterministic_algorithms_enabled()
    workspace = backward_workspace(value, locations, deterministic)
    contiguous = torch.contiguous_format
    grads = tuple(torch.empty_like(t, memory_format=contiguous) for t in (value, locations, weights))
    native.call(
        "ms_deform_attn_backward", *grads, workspace, grad_output.contiguous(), *arguments, deterministic
    )
    return grads[0], grads[1].to(sampling_locations.dtype), grads[2].to(attention_weights.dtype)


def backward_workspace(value: Tensor, locations: Tensor, deterministic: bool) -> Tensor | None:
    """What the backward of value [B, S, H, D] and locations [B, Q, H, L, P, 2] sums in; None on the CPU."""
    size = _core.ms_deform_attn_backward_workspace_raw(
        native.raw(value), native.raw(locations), deterministic
    )
    return value.new_empty(size, dtype=torch.float32) if size else None


def _forward_elsewhere(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """On devices that this build has no kernels for."""
    output = ms_deform_attn_reference(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )
    fallback.warn_of_reference("ms_deform_attn", value.device.type)
    return output


for _key, _forward, _backward in (
    ("CPU", _forward_cpu, _backward_cpu),
    ("CompositeExplicitAutograd", _forward_elsewhere, ms_deform_attn_backward_reference),
):
    _library.impl("ms_deform_attn", _forward, _key)
    _library.impl("ms_deform_attn_backward", _backward, _key)
if native.has_cuda_kernels():
    _library.impl("ms_deform_attn", _forward_cuda, "CUDA")
    _library.impl("ms_deform_attn_backward", _backward_cuda, "CUDA")


@torch.library.register_fake("visionllm::ms_deform_attn", lib=_library)
def _forward_fake(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    fallback.check_rank("ms_deform_attn", "value", value, "[B, S, H, D]")
    fallback.check_rank("ms_deform_attn", "sampling_locations", sampling_locations, "[B, Q, H, L, P, 2]")
    return value.new_empty(value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])


@torch.library.register_fake("visionllm::ms_deform_attn_backward", lib=_library)
def _backward_fake(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    value, locations, attention = (
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (value, sampling_locations, attention_weights)
    )
    return value, locations, attention


def _setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd_backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, attention = _ms_deform_attn_backward(grad_output, *ctx.saved_tensors)
    return value, None, None, locations, attention


torch.library.register_autograd(
    "visionllm::ms_deform_attn", _autograd_backward, setup_context=_setup_context, lib=_library
)


def _no_second_derivative(ctx, *grads: Tensor) -> tuple[None, ...]:
    raise NotImplementedError("ms_deform_attn_backward: second derivatives are not implemented")


torch.library.register_autograd("visionllm::ms_deform_attn_backward", _no_second_derivative, lib=_library)

_ms_deform_attn_backward = past_dispatcher("ms_deform_attn_backward", _backward_cpu)
_ms_deform_attn = past_dispatcher("ms_deform_attn", _forward_cpu, _setup_context, _autograd_backward)
