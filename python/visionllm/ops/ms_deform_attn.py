"""Multi-scale deformable attention as a torch operator (Zhu et al., "Deformable DETR", ICLR 2021, eq. 2).

    output[b, q, h] = sum over levels l and points p of attention[b, q, h, l, p] * bilinear(value_l[b, :, h], location[b, q, h, l, p])

The contract, with the meaning of the shape letters, is in ``cpp/include/visionllm/ms_deform_attn.h``. On the CPU the operator runs
the compiled kernels; on other devices, and in float64, the PyTorch reference below.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visionllm.ops import native

__all__ = ["SampleInputs", "ms_deform_attn", "ms_deform_attn_reference", "sample_inputs"]

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
        spatial_shapes: [L, 2] int64, height and width of each level, at least 1.
        level_start_index: [L] int64, the first pixel of each level in S.
        sampling_locations: [B, Q, H, L, P, 2] as (x, y); 0 and 1 are the image's outer edges. Computed with in float32.
        attention_weights: [B, Q, H, L, P], float32 or of value's type.

    Returns:
        [B, Q, H * D] of value's type. Corners outside the image count as zero; a point a pixel or more outside, or NaN,
        contributes nothing. Forward and backward are deterministic.

    Raises:
        ValueError: a shape, type or level does not fit; the message names it.
    """
    return torch.ops.visionllm.ms_deform_attn(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The formula in plain PyTorch, in the tensors' own precision, on any device; the arguments are ``ms_deform_attn``'s.

    Every other implementation is held against this one in float64. Gathers corner by corner, so it needs memory
    for [B, Q, H, L, P, D] values.
    """
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    height, width = spatial_shapes.to(value.device).unbind(-1)  # [L]
    size = torch.stack([width, height], -1)[:, None, :]  # [L, 1, 2] as (x, y)
    pixel = sampling_locations.to(dtype) * size - 0.5  # [B, Q, H, L, P, 2]
    valid = ((pixel > -1) & (pixel < size)).all(-1)  # [B, Q, H, L, P]
    pixel = torch.where(valid[..., None], pixel, torch.zeros_like(pixel))
    attention = torch.where(
        valid, attention_weights.to(dtype), torch.zeros((), dtype=dtype, device=value.device)
    )
    cell = pixel.detach().floor()
    fraction = pixel - cell
    cell = cell.long()

    by_head = value.to(dtype).transpose(1, 2).flatten(0, 1)  # [B * H, S, D]
    output = value.new_zeros((batch, queries, heads, channels), dtype=dtype)
    for dy in (0, 1):
        for dx in (0, 1):
            corner = cell + torch.tensor([dx, dy], device=value.device)
            inside = valid & ((corner >= 0) & (corner < size)).all(-1)
            x, y = (corner.clamp(min=0).minimum(size - 1)).unbind(-1)
            row = level_start_index.to(value.device)[:, None] + y * width[:, None] + x  # [B, Q, H, L, P]
            row = row.permute(0, 2, 1, 3, 4).reshape(batch * heads, -1, 1).expand(-1, -1, channels)
            sampled = by_head.gather(1, row).view(batch, heads, queries, -1, channels).transpose(1, 2)
            weight_x = fraction[..., 0] if dx else 1 - fraction[..., 0]
            weight_y = fraction[..., 1] if dy else 1 - fraction[..., 1]
            weight = (attention * weight_x * weight_y).flatten(3)[..., None]  # [B, Q, H, L * P, 1]
            inside = inside.flatten(3)[..., None]
            # Selected, not multiplied by zero: a NaN in a row that the formula does not name stays there.
            sampled = torch.where(inside, sampled, torch.zeros_like(sampled))
            output = output + (torch.where(inside, weight, torch.zeros_like(weight)) * sampled).sum(3)
    return output.flatten(2).to(value.dtype)


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
    """Random inputs like a detector's: each query looks around its own place, at most about ``offset`` pixels away.

    With ``encoder`` the queries are the pixels of all levels in order (``queries`` is ignored), each at its own centre;
    else they lie anywhere. Some locations fall outside the image in either case.
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


# ---- registration ----------------------------------------------------------------------------------------------------

_library = torch.library.Library("visionllm", "FRAGMENT")
_library.define(
    "ms_deform_attn(Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor sampling_locations, "
    "Tensor attention_weights) -> Tensor"
)
_library.define(
    "ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
    "Tensor sampling_locations, Tensor attention_weights) -> (Tensor, Tensor, Tensor)"
)


def _check_shapes(value: Tensor, sampling_locations: Tensor) -> None:
    """What must hold before shapes can be taken apart; the core checks everything else."""
    if value.dim() != 4:
        raise ValueError(f"ms_deform_attn: value must have shape [B, S, H, D], got {list(value.shape)}")
    if sampling_locations.dim() != 6:
        raise ValueError(
            "ms_deform_attn: sampling_locations must have shape [B, Q, H, L, P, 2], "
            f"got {list(sampling_locations.shape)}"
        )


def _kernel_arguments(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, ...]:
    """The tensors as the kernels want them: float32 locations, inner dimensions contiguous. Copies only what must be."""
    if attention_weights.dtype not in (torch.float32, value.dtype):
        attention_weights = attention_weights.float()
    return (
        value if value.stride(-1) == 1 else value.contiguous(),
        spatial_shapes.contiguous(),
        level_start_index.contiguous(),
        sampling_locations.float().contiguous(),
        attention_weights.contiguous(),
    )


def _forward_cpu(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    _check_shapes(value, sampling_locations)
    if value.dtype not in _KERNEL_DTYPES:
        return _forward_reference(
            value, spatial_shapes, level_start_index, sampling_locations, attention_weights
        )
    output = value.new_empty(value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])
    arguments = _kernel_arguments(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )
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
    _check_shapes(value, sampling_locations)
    if value.dtype not in _KERNEL_DTYPES:
        return _backward_reference(
            grad_output, value, spatial_shapes, level_start_index, sampling_locations, attention_weights
        )
    arguments = _kernel_arguments(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )
    contiguous = torch.contiguous_format
    grads = (
        torch.empty_like(value, memory_format=contiguous),
        torch.empty_like(arguments[3], memory_format=contiguous),
        torch.empty_like(arguments[4], memory_format=contiguous),
    )
    native.call("ms_deform_attn_backward", *grads, grad_output.contiguous(), *arguments)
    return grads[0], grads[1].to(sampling_locations.dtype), grads[2].to(attention_weights.dtype)


def _forward_reference(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    _check_shapes(value, sampling_locations)
    return ms_deform_attn_reference(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    ).contiguous()


def _backward_reference(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (value, sampling_locations, attention_weights)]
        output = ms_deform_attn_reference(leaves[0], spatial_shapes, level_start_index, leaves[1], leaves[2])
        grads = torch.autograd.grad(output, leaves, grad_output, materialize_grads=True)
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


for _key, _forward, _backward in (
    ("CPU", _forward_cpu, _backward_cpu),
    ("CompositeExplicitAutograd", _forward_reference, _backward_reference),
):
    _library.impl("ms_deform_attn", _forward, _key)
    _library.impl("ms_deform_attn_backward", _backward, _key)


@torch.library.register_fake("visionllm::ms_deform_attn", lib=_library)
def _forward_fake(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    _check_shapes(value, sampling_locations)
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
    value, locations, attention = torch.ops.visionllm.ms_deform_attn_backward(grad_output, *ctx.saved_tensors)
    return value, None, None, locations, attention


torch.library.register_autograd(
    "visionllm::ms_deform_attn", _autograd_backward, setup_context=_setup_context, lib=_library
)
