"""The PyTorch reference of a linear layer with low-rank adapters, and the check of its arguments.

The contract, with the meaning of the shape letters, is in ``cpp/include/visionllm/lora_linear.h``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from visionllm.ops import fallback

__all__ = ["lora_linear_backward_reference", "lora_linear_reference"]

MAX_RANK = 128


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scale: Tensor | None = None,
    adapter_index: Tensor | None = None,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The operator in plain PyTorch on any device: y [T, N], and s [T, R] in float32 or wider.

    Takes the arguments of the C++ header, in its order. The base is multiplied in x's precision, the adapters
    in float32 or wider. Every other implementation is held against this one in float64. Each adapter is
    applied to all rows, so that memory and time grow with their number.

    Raises:
        ValueError: a shape or type does not fit, with the compiled operator's message.
    """
    check_arguments("lora_linear", x, weight, weight_scale, bias, lora_a, lora_b, scale, adapter_index)
    output = functional.linear(x, _base(x, weight, weight_scale), bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    if lora_a is None or lora_b is None:
        return output, x.new_zeros((x.shape[0], 0), dtype=wide)
    low_rank = x.new_zeros((x.shape[0], lora_a.shape[1]), dtype=wide)
    term = torch.zeros_like(output, dtype=wide)
    for adapter, factor, chosen in _adapters(lora_a, scale, adapter_index, scaling):
        mine = functional.linear(x.to(wide), lora_a[adapter].to(wide)) * factor
        # Selected, not multiplied by zero: NaN in an adapter stays with the rows that take it.
        low_rank = torch.where(chosen, mine, low_rank)
        term = torch.where(chosen, functional.linear(mine, lora_b[adapter].to(wide)), term)
    return (output + term).to(x.dtype), low_rank


def lora_linear_backward_reference(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: Tensor | None,
    adapter_index: Tensor | None,
    low_rank: Tensor,
    scaling: float,
    needs_x: bool,
    needs_a: bool,
    needs_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, A and B in plain PyTorch; an empty tensor for each that is not needed.

    Raises:
        ValueError: as ``lora_linear_reference``.
    """
    operator = "lora_linear_backward"
    check_arguments(operator, x, weight, weight_scale, None, lora_a, lora_b, scale, adapter_index)
    shape = (x.shape[0], weight.shape[0])
    fallback.check_shape(operator, "grad_output", grad_output, "[T, N]", shape)
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_x, grad_a, grad_b = (x.new_empty(0) for _ in range(3))
    if needs_x:
        grad_x = (grad_output @ _base(x, weight, weight_scale)).to(wide)
    if lora_a is None or lora_b is None:
        return grad_x.to(x.dtype), grad_a, grad_b
    grad, inputs = grad_output.to(wide), x.to(wide)
    term = torch.zeros_like(inputs)
    grads_a, grads_b = [], []
    for adapter, factor, chosen in _adapters(lora_a, scale, adapter_index, scaling):
        mine = torch.where(chosen, grad, 0.0)
        grad_low_rank = mine @ lora_b[adapter].to(wide) * factor  # [T, R]
        # A NaN in one adapter's B must not reach the rows of the others.
        grad_low_rank = torch.where(chosen, grad_low_rank, 0.0)
        if needs_x:
            term = torch.where(chosen, grad_low_rank @ lora_a[adapter].to(wide), term)
        grads_a.append(grad_low_rank.T @ torch.where(chosen, inputs, 0.0))
        grads_b.append(mine.T @ torch.where(chosen, low_rank.to(wide), 0.0))
    if needs_x:
        grad_x = grad_x + term
    if needs_a:
        grad_a = torch.stack(grads_a).to(lora_a.dtype)
    if needs_b:
        grad_b = torch.stack(grads_b).to(lora_b.dtype)
    return grad_x.to(x.dtype), grad_a, grad_b


def _base(x: Tensor, weight: Tensor, weight_scale: Tensor | None) -> Tensor:
    """W in x's type."""
    if weight_scale is None:
        return weight
    wide = torch.promote_types(x.dtype, torch.float32)
    return (weight.to(wide) * weight_scale.to(wide)[:, None]).to(x.dtype)


def _adapters(
    lora_a: Tensor, scale: Tensor | None, adapter_index: Tensor | None, scaling: float
) -> list[tuple[int, Tensor | float, Tensor]]:
    """Number, whole factor, and which rows take it [T, 1], of each adapter."""
    everywhere = torch.ones((1, 1), dtype=torch.bool, device=lora_a.device)
    count = lora_a.shape[0] if adapter_index is not None else min(lora_a.shape[0], 1)
    return [
        (
            adapter,
            scaling if scale is None else scaling * scale[adapter],
            everywhere if adapter_index is None else (adapter_index == adapter)[:, None],
        )
        for adapter in range(count)
    ]


def check_arguments(
    operator: str,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: Tensor | None,
    adapter_index: Tensor | None,
) -> None:
    """What ``cpp/lora_linear.cpp`` checks for the kernels, with the same words."""
    fallback.check_rank(operator, "x", x, "[T, K]")
    fallback.check_rank(operator, "weight", weight, "[N, K]")
    if not x.is_floating_point():
        raise ValueError(f"{operator}: x must be float32, bfloat16 or float16, got {fallback.type_name(x)}")
    fallback.check_shape(operator, "weight", weight, "[N, K]", (weight.shape[0], x.shape[1]))
    outputs, inputs = weight.shape
    if weight.dtype == torch.int8:
        if weight_scale is None:
            raise ValueError(f"{operator}: weight_scale must be given with an int8 weight, got none")
        fallback.check_shape(operator, "weight_scale", weight_scale, "[N]", (outputs,))
    elif weight_scale is not None:
        raise ValueError(
            f"{operator}: weight_scale must be absent unless weight is int8, got weight of type "
            f"{fallback.type_name(weight)}"
        )
    else:
        _check_type(operator, "weight", weight, x.dtype)
    if bias is not None:
        fallback.check_shape(operator, "bias", bias, "[N]", (outputs,))
        _check_type(operator, "bias", bias, x.dtype)
    if (lora_a is None) != (lora_b is None):
        raise ValueError(f"{operator}: lora_a and lora_b must be given together, got one of them")
    if lora_a is None or lora_b is None:
        for name, tensor in (("scale", scale), ("adapter_index", adapter_index)):
            if tensor is not None:
                raise ValueError(
                    f"{operator}: {name} must be absent without adapters, got {list(tensor.shape)}"
                )
    else:
        fallback.check_rank(operator, "lora_a", lora_a, "[E, R, K]")
        adapters, rank, _ = lora_a.shape
        fallback.check_shape(operator, "lora_a", lora_a, "[E, R, K]", (adapters, rank, inputs))
        fallback.check_shape(operator, "lora_b", lora_b, "[E, N, R]", (adapters, outputs, rank))
        _check_type(operator, "lora_a", lora_a, x.dtype)
        _check_type(operator, "lora_b", lora_b, x.dtype)
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"{operator}: the rank R must be 1 to {MAX_RANK}, got {rank}")
        if scale is not None:
            fallback.check_shape(operator, "scale", scale, "[E]", (adapters,))
        if adapter_index is not None:
            fallback.check_shape(operator, "adapter_index", adapter_index, "[T]", (x.shape[0],))
            _check_type(operator, "adapter_index", adapter_index, torch.int64)
        elif adapters == 0:
            raise ValueError(
                f"{operator}: lora_a must have at least one adapter without adapter_index, got none"
            )
    for name, other in (
        ("weight", weight),
        ("weight_scale", weight_scale),
        ("bias", bias),
        ("lora_a", lora_a),
        ("lora_b", lora_b),
        ("scale", scale),
        ("adapter_index", adapter_index),
    ):
        if other is not None and other.device != x.device:
            raise ValueError(f"{operator}: {name} must be on x's device {x.device}, got {other.device}")


def _check_type(operator: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        expected = str(dtype).removeprefix("torch.")
        raise ValueError(f"{operator}: {name} must be {expected}, got {fallback.type_name(tensor)}")
