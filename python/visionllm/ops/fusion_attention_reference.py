"""The PyTorch reference of language fusion, forward and backward, and the check of its arguments.

The contract, with the meaning of the shape letters, is in ``cpp/include/visionllm/fusion_attention.h``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionllm.ops import fallback

__all__ = ["fusion_attention_backward_reference", "fusion_attention_reference"]


def fusion_attention_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    gate: Tensor,
    epsilon: float = 1e-5,
) -> Tensor:
    """The formula in plain PyTorch, in the tensors' own precision, on any device.

    Every other implementation is held against this one in float64. Needs memory for [B, H, N, T] scores.

    Raises:
        ValueError: a shape or type does not fit, with the compiled operator's message.
    """
    vectors = dict(
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        query_bias=query_bias,
        output_bias=output_bias,
        gate=gate,
    )
    matrices = dict(query_weight=query_weight, output_weight=output_weight)
    _check_arguments("fusion_attention", x, key, value, mask, vectors, matrices)
    normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, epsilon)
    query = F.linear(normed, query_weight, query_bias).view(x.shape[:2] + key.shape[2:])
    attended = _attend(query, key, value, mask)[1]
    return (x + gate * F.linear(attended.flatten(2), output_weight, output_bias)).contiguous()


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [B, H, N, T], which are 0 where there is no text, and what they gather [B, N, H, D]."""
    keep = mask.bool()
    # Selected, not multiplied by zero: NaN where there is no text stays there.
    key = key.masked_fill(~keep[..., None, None], 0.0)
    value = value.masked_fill(~keep[..., None, None], 0.0)
    scores = torch.einsum("bnhd,bthd->bhnt", query * query.shape[-1] ** -0.5, key)
    keep = keep[:, None, None]
    # The least finite number, not -inf, whose softmax over nothing else is NaN.
    weights = scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~keep, 0.0)
    return weights, torch.einsum("bhnt,bthd->bnhd", weights, value)


def _check_arguments(
    operator: str,
    x: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    vectors: dict[str, Tensor],
    matrices: dict[str, Tensor],
) -> None:
    """What ``cpp/fusion_attention.cpp`` checks for the kernels, their limits apart."""
    fallback.check_rank(operator, "x", x, "[B, N, C]")
    fallback.check_rank(operator, "key", key, "[B, T, H, D]")
    if not x.is_floating_point():
        raise ValueError(
            f"{operator}: x must be float32, bfloat16 or float16, got {str(x.dtype).removeprefix('torch.')}"
        )
    batch, _, channels = x.shape
    _, tokens, heads, width = key.shape
    if heads * width != channels:
        raise ValueError(
            f"{operator}: key must have H * D = C = {channels} channels, got {heads} heads of {width}"
        )
    keys = (batch, tokens, heads, width)
    fallback.check_shape(operator, "key", key, "[B, T, H, D]", keys)
    fallback.check_shape(operator, "value", value, "[B, T, H, D]", keys)
    fallback.check_shape(operator, "mask", mask, "[B, T]", keys[:2])
    for name, tensor in vectors.items():
        fallback.check_shape(operator, name, tensor, "[C]", (channels,))
    for name, tensor in matrices.items():
        fallback.check_shape(operator, name, tensor, "[C, C]", (channels, channels))
    for name, tensor in (dict(key=key, value=value) | vectors | matrices).items():
        if tensor.dtype != x.dtype:
            raise ValueError(
                f"{operator}: {name} must be {str(x.dtype).removeprefix('torch.')}, got "
                f"{str(tensor.dtype).removeprefix('torch.')}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{operator}: {name} must be on x's device {x.device}, got {tensor.device}")
    if mask.dtype not in (torch.bool, torch.uint8):
        raise ValueError(
            f"{operator}: mask must be uint8 or boolean, got {str(mask.dtype).removeprefix('torch.')}"
        )
    if mask.device != x.device:
        raise ValueError(f"{operator}: mask must be on x's device {x.device}, got {mask.device}")


def fusion_attention_backward_reference(
    grad_output: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    gate: Tensor,
    epsilon: float = 1e-5,
) -> tuple[Tensor, ...]:
    """Gradients of all tensors but the mask, in order, in plain PyTorch and the tensors' own precision.

    Raises:
        ValueError: as ``fusion_attention_reference``.
    """
    vectors = dict(
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        query_bias=query_bias,
        output_bias=output_bias,
        gate=gate,
    )
    matrices = dict(query_weight=query_weight, output_weight=output_weight)
    operator = "fusion_attention_backward"
    _check_arguments(operator, x, key, value, mask, vectors, matrices)
    fallback.check_shape(operator, "grad_output", grad_output, "[B, N, C]", x.shape)
    scale = key.shape[-1] ** -0.5
    centred = x - x.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    unit = centred * inverse  # [B, N, C], mean 0 and variance 1
    normed = unit * norm_weight + norm_bias
    query = F.linear(normed, query_weight, query_bias).view(x.shape[:2] + key.shape[2:])
    weights, attended = _attend(query, key, value, mask)
    flat = attended.flatten(2)  # [B, N, C]
    grad_gate = (grad_output * F.linear(flat, output_weight, output_bias)).sum((0, 1))
    gated = grad_output * gate
    grad_output_weight = torch.einsum("bni,bnj->ij", gated, flat)
    grad_attended = (gated @ output_weight).view(attended.shape)

    keep = mask.bool()[..., None, None]
    kept_key, kept_value = key.masked_fill(~keep, 0.0), value.masked_fill(~keep, 0.0)
    grad_value = torch.einsum("bhnt,bnhd->bthd", weights, grad_attended)
    grad_weights = torch.einsum("bnhd,bthd->bhnt", grad_attended, kept_value)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    grad_key = torch.einsum("bhnt,bnhd->bthd", grad_scores, query) * scale
    grad_query = (torch.einsum("bhnt,bthd->bnhd", grad_scores, kept_key) * scale).flatten(2)

    grad_normed = grad_query @ query_weight
    grad_unit = grad_normed * norm_weight
    grad_centred = (
        grad_unit - grad_unit.mean(-1, keepdim=True) - unit * (grad_unit * unit).mean(-1, keepdim=True)
    )
    grads = (
        grad_output + grad_centred * inverse,
        (grad_normed * unit).sum((0, 1)),
        grad_normed.sum((0, 1)),
        torch.einsum("bni,bnj->ij", grad_query, normed),
        grad_query.sum((0, 1)),
        grad_key,
        grad_value,
        grad_output_weight,
        gated.sum((0, 1)),
        grad_gate,
    )
    return tuple(grad.contiguous() for grad in grads)
