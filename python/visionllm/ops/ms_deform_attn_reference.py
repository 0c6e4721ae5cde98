"""The PyTorch reference of multi-scale deformable attention, forward and backward.

The contract, with the meaning of the shape letters, is in ``cpp/include/visionllm/ms_deform_attn.h``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from visionllm.ops import fallback

__all__ = ["ms_deform_attn_backward_reference", "ms_deform_attn_reference"]


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The formula in plain PyTorch, in the tensors' own precision, on any device.

    Every other implementation is held against this one in float64. Gathers corner by corner, so it needs
    memory for [B, Q, H, L, P, D] values.

    Raises:
        ValueError: a shape, type or level does not fit, with the compiled operator's message.
    """
    _check_reference_arguments(
        "ms_deform_attn", value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    by_head = value.to(dtype).transpose(1, 2).flatten(0, 1)  # [B * H, S, D]
    attention = attention_weights.to(dtype).flatten(3)  # [B, Q, H, L * P]
    output = value.new_zeros((batch, queries, heads, channels), dtype=dtype)
    for corner in _corners(spatial_shapes, level_start_index, sampling_locations.to(dtype)):
        # Selected, not multiplied by zero: NaN in a row or weight that is not named stays there.
        weight = torch.where(corner.inside, attention * corner.weight_x * corner.weight_y, 0.0)
        output = output + (weight[..., None] * _gather_rows(by_head, corner)).sum(3)
    return output.flatten(2).to(value.dtype).contiguous()


def _check_reference_arguments(
    operator: str,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> None:
    """What ``cpp/ms_deform_attn.cpp`` checks for the kernels."""
    fallback.check_rank(operator, "value", value, "[B, S, H, D]")
    fallback.check_rank(operator, "sampling_locations", sampling_locations, "[B, Q, H, L, P, 2]")
    batch, pixels, heads, _ = value.shape
    _, queries, _, levels, points, _ = sampling_locations.shape
    for name, tensor, letters, shape in (
        (
            "sampling_locations",
            sampling_locations,
            "[B, Q, H, L, P, 2]",
            (batch, queries, heads, levels, points, 2),
        ),
        ("attention_weights", attention_weights, "[B, Q, H, L, P]", (batch, queries, heads, levels, points)),
        ("spatial_shapes", spatial_shapes, "[L, 2]", (levels, 2)),
        ("level_start_index", level_start_index, "[L]", (levels,)),
    ):
        fallback.check_shape(operator, name, tensor, letters, shape)
    fallback.check_real(operator, "value", value, value.device)
    fallback.check_real(operator, "sampling_locations", sampling_locations, value.device)
    fallback.check_real(operator, "attention_weights", attention_weights, value.device)
    fallback.check_integer(operator, "spatial_shapes", spatial_shapes, value.device)
    fallback.check_integer(operator, "level_start_index", level_start_index, value.device)
    fallback.check_levels(operator, spatial_shapes, level_start_index, pixels)


@dataclass(frozen=True)
class _Corner:
    """One of the four pixels around each point; all tensors [B, Q, H, L * P]."""

    row: Tensor  # row number in S; any row inside where the corner is outside
    inside: Tensor  # bool
    weight_x: Tensor  # bilinear weight in x and in y
    weight_y: Tensor
    slope_x: Tensor  # derivatives of the two weights by the location
    slope_y: Tensor


def _corners(
    spatial_shapes: Tensor, level_start_index: Tensor, sampling_locations: Tensor
) -> Iterator[_Corner]:
    device = sampling_locations.device
    height, width = spatial_shapes.to(device).unbind(-1)  # [L]
    size = torch.stack([width, height], -1)[:, None, :]  # [L, 1, 2] as (x, y)
    pixel = sampling_locations * size - 0.5  # [B, Q, H, L, P, 2]
    valid = ((pixel > -1) & (pixel < size)).all(-1)  # [B, Q, H, L, P]
    pixel = torch.where(valid[..., None], pixel, 0.0)
    cell = pixel.detach().floor()
    fraction_x, fraction_y = (pixel - cell).unbind(-1)
    for dy in (0, 1):
        for dx in (0, 1):
            corner = cell.long() + torch.tensor([dx, dy], device=device)
            inside = valid & ((corner >= 0) & (corner < size)).all(-1)
            x, y = corner.clamp(min=0).minimum(size - 1).unbind(-1)
            row = level_start_index.to(device)[:, None] + y * width[:, None] + x
            slope_x = (2 * dx - 1) * width[:, None].expand_as(fraction_x)
            slope_y = (2 * dy - 1) * height[:, None].expand_as(fraction_y)
            weight_x = fraction_x if dx else 1 - fraction_x
            weight_y = fraction_y if dy else 1 - fraction_y
            yield _Corner(*(t.flatten(3) for t in (row, inside, weight_x, weight_y, slope_x, slope_y)))


def _rows_by_head(corner: _Corner, channels: int) -> Tensor:
    """The row numbers as an index of [B * H, S, D]: [B * H, Q * L * P, D]."""
    batch, queries, heads, samples = corner.row.shape
    row = corner.row.transpose(1, 2).reshape(batch * heads, queries * samples, 1)
    return row.expand(-1, -1, channels)


def _gather_rows(by_head: Tensor, corner: _Corner) -> Tensor:
    """Values [B * H, S, D] at the corner, zero where it is outside: [B, Q, H, L * P, D]."""
    batch, queries, heads, samples = corner.row.shape
    channels = by_head.shape[-1]
    rows = by_head.gather(1, _rows_by_head(corner, channels))
    rows = rows.view(batch, heads, queries, samples, channels).transpose(1, 2)
    return torch.where(corner.inside[..., None], rows, 0.0)


def ms_deform_attn_backward_reference(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights in plain PyTorch, in the tensors' own precision.

    Raises:
        ValueError: as ``ms_deform_attn_reference``.
        RuntimeError: torch is asked for deterministic algorithms, and the tensors are not on the CPU, where
            pixels that several points share are added up in no fixed order.
    """
    operator = "ms_deform_attn_backward"
    fallback.alert_not_deterministic(operator, value.device)
    _check_reference_arguments(
        operator, value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )
    batch, pixels, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    fallback.check_shape(
        operator, "grad_output", grad_output, "[B, Q, H * D]", (batch, queries, heads * channels)
    )
    fallback.check_real(operator, "grad_output", grad_output, value.device)
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    grad = grad_output.to(dtype).reshape(batch, queries, heads, 1, channels)
    by_head = value.to(dtype).transpose(1, 2).flatten(0, 1)  # [B * H, S, D]
    attention = attention_weights.to(dtype).flatten(3)  # [B, Q, H, L * P]
    grad_by_head = torch.zeros_like(by_head)
    grad_attention = torch.zeros_like(attention)
    grad_x, grad_y = torch.zeros_like(attention), torch.zeros_like(attention)
    for corner in _corners(spatial_shapes, level_start_index, sampling_locations.to(dtype)):
        dot = torch.where(corner.inside, (grad * _gather_rows(by_head, corner)).sum(-1), 0.0)
        weight = torch.where(corner.inside, attention * corner.weight_x * corner.weight_y, 0.0)
        grad_attention += corner.weight_x * corner.weight_y * dot
        grad_x += torch.where(corner.inside, attention * corner.slope_x * corner.weight_y, 0.0) * dot
        grad_y += torch.where(corner.inside, attention * corner.slope_y * corner.weight_x, 0.0) * dot
        scattered = torch.where(corner.inside[..., None], weight[..., None] * grad, 0.0)
        scattered = scattered.transpose(1, 2).reshape(batch * heads, -1 if scattered.numel() else 0, channels)
        grad_by_head.scatter_add_(1, _rows_by_head(corner, channels), scattered)
    grad_value = grad_by_head.view(batch, heads, pixels, channels).transpose(1, 2)
    grad_locations = torch.stack([grad_x, grad_y], -1).view(sampling_locations.shape)
    return (
        grad_value.to(value.dtype).contiguous(),
        grad_locations.to(sampling_locations.dtype),
        grad_attention.view(attention_weights.shape).to(attention_weights.dtype),
    )
