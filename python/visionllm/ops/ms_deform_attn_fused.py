"""Multi-scale deformable attention with the softmax and the sampling locations inside, as a torch operator.

    attention[b, q, h] = softmax over l and p of logits[b, q, h, l, p]
    location           = reference + offset / (width, height)       reference points (x, y)
                       = centre + offset / P * size / 2             reference boxes (x, y, w, h)

and then ``ms_deform_attn``: all that stands between the projections of a Deformable-DETR layer. In the
kernels, on the CPU and on CUDA, neither the weights nor the locations go through memory. In float64, and on
other devices, they are computed first and handed to ``ms_deform_attn``. The contract is in
``cpp/include/visionllm/ms_deform_attn.h``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visionllm.ops import fallback, native
from visionllm.ops.direct import past_dispatcher
from visionllm.ops.ms_deform_attn import backward_workspace
from visionllm.ops.ms_deform_attn import sample_inputs as plain_sample_inputs
from visionllm.ops.ms_deform_attn_reference import ms_deform_attn_reference

__all__ = ["FusedInputs", "ms_deform_attn_fused", "ms_deform_attn_fused_reference", "sample_inputs"]


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Softmax, locations and multi-scale deformable attention; differentiable in all but the levels.

    Args:
        value, spatial_shapes, level_start_index: as in ``ms_deform_attn``.
        reference_points: [B, Q, L, 2] as (x, y) or [B, Q, L, 4] as (centre x, centre y, width, height), in
            0..1; may be expanded along L. Converted to float32.
        sampling_offsets: [B, Q, H, L, P, 2]: with points in pixels of their level, with boxes in halves of
            the box's size over P. Converted to float32.
        attention_logits: [B, Q, H, L, P], best in float32 or value's type: others are converted.

    Returns:
        [B, Q, H * D] of value's type. A point a pixel or more outside, or NaN, contributes nothing, but has
        its share in the softmax.

    Raises:
        ValueError: a shape, type or level does not fit; the message names it.
        RuntimeError: as ``ms_deform_attn``.
    """
    return _ms_deform_attn_fused(
        value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits
    )


def ms_deform_attn_fused_reference(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """The formula in plain PyTorch, in the tensors' own precision, on any device."""
    _check("ms_deform_attn_fused", value, reference_points, sampling_offsets, attention_logits)
    locations, attention = _points(spatial_shapes, reference_points, sampling_offsets, attention_logits)
    return ms_deform_attn_reference(value, spatial_shapes, level_start_index, locations, attention)


def _check(
    operator: str, value: Tensor, reference_points: Tensor, sampling_offsets: Tensor, attention_logits: Tensor
) -> None:
    """What must hold before shapes can be taken apart and types converted."""
    fallback.check_rank(operator, "value", value, "[B, S, H, D]")
    fallback.check_rank(operator, "sampling_offsets", sampling_offsets, "[B, Q, H, L, P, 2]")
    fallback.check_rank(operator, "reference_points", reference_points, "[B, Q, L, 2 or 4]")
    for name, tensor in (
        ("reference_points", reference_points),
        ("sampling_offsets", sampling_offsets),
        ("attention_logits", attention_logits),
    ):
        fallback.check_real(operator, name, tensor, value.device)
    batch, _, heads, _ = value.shape
    _, queries, _, levels, points, _ = sampling_offsets.shape
    fallback.check_shape(
        operator,
        "sampling_offsets",
        sampling_offsets,
        "[B, Q, H, L, P, 2]",
        (batch, queries, heads, levels, points, 2),
    )
    fallback.check_shape(
        operator,
        "attention_logits",
        attention_logits,
        "[B, Q, H, L, P]",
        (batch, queries, heads, levels, points),
    )
    size = 4 if reference_points.shape[3] == 4 else 2
    fallback.check_shape(
        operator, "reference_points", reference_points, "[B, Q, L, 2 or 4]", (batch, queries, levels, size)
    )


def _slopes(spatial_shapes: Tensor, reference_points: Tensor, sampling_offsets: Tensor) -> Tensor:
    """d location / d offset, which broadcasts to [B, Q, H, L, P, 2]."""
    if reference_points.shape[-1] == 4:
        return reference_points[:, :, None, :, None, 2:] * (0.5 / max(sampling_offsets.shape[4], 1))
    size = spatial_shapes.to(sampling_offsets.device).flip(-1)[:, None]  # [L, 1, 2] as (width, height)
    return size.to(sampling_offsets.dtype).reciprocal()


def _points(
    spatial_shapes: Tensor, reference_points: Tensor, sampling_offsets: Tensor, attention_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Locations [B, Q, H, L, P, 2] and weights [B, Q, H, L, P], both in the more precise of the types."""
    slopes = _slopes(spatial_shapes, reference_points, sampling_offsets)
    locations = reference_points[:, :, None, :, None, :2] + sampling_offsets * slopes
    dtype = torch.promote_types(attention_logits.dtype, sampling_offsets.dtype)
    attention = attention_logits.to(dtype).flatten(3).softmax(-1).view(attention_logits.shape)
    return locations, attention


@dataclass(frozen=True)
class FusedInputs:
    """Arguments of ``ms_deform_attn_fused`` in order."""

    value: Tensor
    spatial_shapes: Tensor
    level_start_index: Tensor
    reference_points: Tensor
    sampling_offsets: Tensor
    attention_logits: Tensor

    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return (
            self.value,
            self.spatial_shapes,
            self.level_start_index,
            self.reference_points,
            self.sampling_offsets,
            self.attention_logits,
        )


def sample_inputs(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    boxes: bool = False,
    requires_grad: bool = False,
    seed: int = 0,
    **options: object,
) -> FusedInputs:
    """Random inputs like a detector's, with points or ``boxes``; more options as for ``ms_deform_attn``."""
    plain = plain_sample_inputs("cpu", dtype, seed=seed, **options)  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(seed + 1)
    batch, queries, heads, levels, points, _ = plain.sampling_locations.shape
    real = plain.sampling_locations.dtype
    away = 8 * torch.rand(batch, queries, heads, levels, points, 2, generator=random, dtype=real) - 4
    if points:
        reference = plain.sampling_locations.mean((2, 4))  # [B, Q, L, 2]
    else:
        reference = torch.rand(batch, queries, levels, 2, generator=random, dtype=real)
    if boxes:
        size = 0.05 + 0.3 * torch.rand(batch, queries, levels, 2, generator=random, dtype=real)
        reference = torch.cat([reference, size], -1)
    logits = torch.randn(batch, queries, heads, levels, points, generator=random, dtype=real).to(dtype)
    leaves = [t.to(device).requires_grad_(requires_grad) for t in (plain.value, reference, away, logits)]
    return FusedInputs(
        leaves[0], plain.spatial_shapes.to(device), plain.level_start_index.to(device), *leaves[1:]
    )


# ---- registration ---------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor reference_points, "
    "Tensor sampling_offsets, Tensor attention_logits"
)
_library = torch.library.Library("visionllm", "FRAGMENT")
_library.define(f"ms_deform_attn_fused({_ARGUMENTS}) -> Tensor")
# Without reference_gradient, the second result is empty.
_library.define(
    f"ms_deform_attn_fused_backward(Tensor grad_output, {_ARGUMENTS}, bool reference_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _forward_composed(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Where there is no kernel: by ``ms_deform_attn``."""
    _check("ms_deform_attn_fused", value, reference_points, sampling_offsets, attention_logits)
    offsets, reference = _precise(value, sampling_offsets), _precise(value, reference_points)
    locations, attention = _points(spatial_shapes, reference, offsets, attention_logits)
    return torch.ops.visionllm.ms_deform_attn(value, spatial_shapes, level_start_index, locations, attention)


def _precise(value: Tensor, tensor: Tensor) -> Tensor:
    """What places points: float32, or float64 beside values in float64."""
    return tensor.to(torch.promote_types(value.dtype, torch.float32))


def _backward_composed(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    reference_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check("ms_deform_attn_fused_backward", value, reference_points, sampling_offsets, attention_logits)
    offsets, reference = _precise(value, sampling_offsets), _precise(value, reference_points)
    locations, attention = _points(spatial_shapes, reference, offsets, attention_logits)
    grad_value, grad_locations, grad_attention = torch.ops.visionllm.ms_deform_attn_backward(
        grad_output, value, spatial_shapes, level_start_index, locations, attention
    )
    attention, grad_attention = attention.flatten(3), grad_attention.flatten(3)
    expectation = (attention * grad_attention).sum(-1, keepdim=True)
    grad_logits = (attention * (grad_attention - expectation)).view(attention_logits.shape)
    # Selected: where an offset or box is not finite, its point has no gradient.
    still = grad_locations == 0
    slopes = _slopes(spatial_shapes, reference, offsets)
    grad_offsets = torch.where(still, 0.0, grad_locations * slopes)
    grad_reference = reference.new_empty(0)
    if reference_gradient:
        grad_reference = grad_locations.sum((2, 4))
        if reference.shape[-1] == 4:
            by_size = torch.where(still, 0.0, grad_locations * offsets * (0.5 / max(offsets.shape[4], 1)))
            grad_reference = torch.cat([grad_reference, by_size.sum((2, 4))], -1)
    return (
        grad_value,
        grad_reference.to(reference_points.dtype),
        grad_offsets.to(sampling_offsets.dtype),
        grad_logits.to(attention_logits.dtype),
    )


def _kernel_arguments(
    operator: str,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors as the kernels want them; copies only what does not fit already.

    The core checks all arguments; here what must hold before they can be taken apart, and what is converted.
    """
    as_they_are = (
        value.is_cpu
        and value.dim() == reference_points.dim() == 4
        and sampling_offsets.dim() == 6
        and sampling_offsets.dtype == reference_points.dtype == torch.float32
        and attention_logits.dtype in (torch.float32, value.dtype)
        and spatial_shapes.dtype == level_start_index.dtype == torch.int64
    )
    if not as_they_are:
        _check(operator, value, reference_points, sampling_offsets, attention_logits)
        fallback.check_integer(operator, "spatial_shapes", spatial_shapes, value.device)
        fallback.check_integer(operator, "level_start_index", level_start_index, value.device)
        if attention_logits.dtype not in (torch.float32, value.dtype):
            attention_logits = attention_logits.float()
        sampling_offsets, reference_points = sampling_offsets.float(), reference_points.float()
        spatial_shapes, level_start_index = spatial_shapes.to(torch.int64), level_start_index.to(torch.int64)
    return (
        value if value.stride(-1) == 1 else value.contiguous(),
        spatial_shapes.contiguous(),
        level_start_index.contiguous(),
        reference_points if reference_points.stride(-1) == 1 else reference_points.contiguous(),
        sampling_offsets.contiguous(),
        attention_logits.contiguous(),
    )


def _forward_kernel(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    args = (value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits)
    if value.dtype == torch.float64:
        return _forward_composed(*args)
    arguments = _kernel_arguments("ms_deform_attn_fused", *args)
    output = value.new_empty(value.shape[0], sampling_offsets.shape[1], value.shape[2] * value.shape[3])
    native.call("ms_deform_attn_fused", output, *arguments)
    return output


def _backward_kernel(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    reference_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = (value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits)
    if value.dtype == torch.float64:
        return _backward_composed(grad_output, *args, reference_gradient)
    arguments = _kernel_arguments("ms_deform_attn_fused_backward", *args)
    values, _, _, reference, offsets, logits = arguments
    deterministic = torch.are_deterministic_algorithms_enabled()
    workspace = backward_workspace(values, offsets, deterministic)
    grad_value, grad_reference, grad_offsets, grad_logits = (
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (values, reference if reference_gradient else reference.new_empty(0), offsets, logits)
    )
    native.call(
        "ms_deform_attn_fused_backward",
        grad_value,
        grad_reference if reference_gradient else None,
        grad_offsets,
        grad_logits,
        workspace,
        grad_output.contiguous(),
        *arguments,
        deterministic,
    )
    return (
        grad_value,
        grad_reference.to(reference_points.dtype),
        grad_offsets.to(sampling_offsets.dtype),
        grad_logits.to(attention_logits.dtype),
    )


for _name, _composed, _kernel in (
    ("ms_deform_attn_fused", _forward_composed, _forward_kernel),
    ("ms_deform_attn_fused_backward", _backward_composed, _backward_kernel),
):
    _library.impl(_name, _composed, "CompositeExplicitAutograd")
    _library.impl(_name, _kernel, "CPU")  # the core goes by the tensors' device
    if native.has_cuda_kernels():
        _library.impl(_name, _kernel, "CUDA")


@torch.library.register_fake("visionllm::ms_deform_attn_fused", lib=_library)
def _forward_fake(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    fallback.check_rank("ms_deform_attn_fused", "value", value, "[B, S, H, D]")
    fallback.check_rank("ms_deform_attn_fused", "sampling_offsets", sampling_offsets, "[B, Q, H, L, P, 2]")
    return value.new_empty(value.shape[0], sampling_offsets.shape[1], value.shape[2] * value.shape[3])


@torch.library.register_fake("visionllm::ms_deform_attn_fused_backward", lib=_library)
def _backward_fake(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    reference_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_value, grad_reference, grad_offsets, grad_logits = (
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (value, reference_points, sampling_offsets, attention_logits)
    )
    if not reference_gradient:
        grad_reference = reference_points.new_empty(0)
    return grad_value, grad_reference, grad_offsets, grad_logits


def _setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd_backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    wanted = bool(ctx.needs_input_grad[3])
    value, reference, offsets, logits = _ms_deform_attn_fused_backward(
        grad_output, *ctx.saved_tensors, wanted
    )
    return value, None, None, reference if wanted else None, offsets, logits


torch.library.register_autograd(
    "visionllm::ms_deform_attn_fused", _autograd_backward, setup_context=_setup_context, lib=_library
)


def _no_second_derivative(ctx, *grads: Tensor) -> tuple[None, ...]:
    raise NotImplementedError("ms_deform_attn_fused_backward: second derivatives are not implemented")


torch.library.register_autograd(
    "visionllm::ms_deform_attn_fused_backward", _no_second_derivative, lib=_library
)

_ms_deform_attn_fused_backward = past_dispatcher("ms_deform_attn_fused_backward", _backward_kernel)
_ms_deform_attn_fused = past_dispatcher(
    "ms_deform_attn_fused", _forward_kernel, _setup_context, _autograd_backward
)
