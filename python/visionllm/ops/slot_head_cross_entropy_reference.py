"""Cross-entropy of slots and its gradients in plain PyTorch: what the kernels are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from visionllm.ops import fallback
from visionllm.ops.slot_head import accumulator, check, exact_rows, inverse_norm, slot_logits

__all__ = [
    "slot_head_cross_entropy_backward_reference",
    "slot_head_cross_entropy_reference",
    "slot_head_cross_entropy_sum_reference",
]


def _ignored(target: Tensor, weight: Tensor | None) -> Tensor:
    """bool [B, G, S]"""
    ignored = torch.zeros_like(target, dtype=torch.bool) if target.is_floating_point() else target < 0
    return ignored if weight is None else ignored | (weight == 0)


def _target_exponents(target: Tensor, valid: Tensor | None, count: int, sigma: float, like: Tensor) -> Tensor:
    """Logarithms of the target's weights of ``count`` rows, not yet normalised: [B, G, S, V]."""
    index = torch.arange(count, device=target.device)
    if not target.is_floating_point():
        return torch.where(index == target[..., None], 0.0, float("-inf")).to(like.dtype)
    centre = target.to(like.dtype).clamp(0, count - 1)
    exponents = -((index - centre[..., None]) ** 2) / (2 * sigma**2)
    return exponents if valid is None else exponents.masked_fill(~valid[:, None, None], float("-inf"))


def slot_head_cross_entropy_reference(
    states: Tensor,
    rows: Tensor,
    target: Tensor,
    weight: Tensor | None,
    valid: Tensor | None,
    norm_weight: Tensor | None,
    epsilon: float,
    scale: float,
    sigma: float,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``slot_head_cross_entropy`` in plain PyTorch, differentiable by autograd.

    Returns:
        loss, logsumexp of the logits and logsumexp of the target's exponents, all [B, G, S].
    """
    check("slot_head_cross_entropy", states, rows, row_scale, valid, norm_weight, target, weight)
    logits = slot_logits(states, rows, row_scale, valid, norm_weight, epsilon, scale)
    logsumexp = logits.logsumexp(-1)
    exponents = _target_exponents(target, valid, rows.shape[1], sigma, logits)
    target_logsumexp = exponents.logsumexp(-1)
    wanted = (exponents - target_logsumexp[..., None]).exp()
    ignored = _ignored(target, weight)
    wanted = wanted.masked_fill(ignored[..., None], 0.0)
    loss = torch.where(wanted == 0, 0.0, wanted * (logsumexp[..., None] - logits)).sum(-1)
    if weight is not None:
        loss = loss * weight.to(loss.dtype)
    return loss.masked_fill(ignored, 0.0), logsumexp, target_logsumexp


def slot_head_cross_entropy_backward_reference(
    grad_loss: Tensor,
    states: Tensor,
    rows: Tensor,
    target: Tensor,
    weight: Tensor | None,
    valid: Tensor | None,
    norm_weight: Tensor | None,
    logsumexp: Tensor,
    target_logsumexp: Tensor,
    epsilon: float,
    scale: float,
    sigma: float,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of states, rows (empty for int8) and norm_weight (empty without one) in plain PyTorch."""
    operator = "slot_head_cross_entropy_backward"
    check(operator, states, rows, row_scale, valid, norm_weight, target, weight)
    for name, tensor in (
        ("grad_loss", grad_loss),
        ("logsumexp", logsumexp),
        ("target_logsumexp", target_logsumexp),
    ):
        fallback.check_shape(operator, name, tensor, "[B, G, S]", states.shape[:-1])
    dtype = accumulator(states)
    ignored = _ignored(target, weight)
    factor = grad_loss.to(dtype) if weight is None else grad_loss.to(dtype) * weight.to(dtype)
    # 0 times what an ignored state or a disallowed row holds would be NaN where that is not finite.
    x = states.to(dtype).masked_fill(ignored[..., None], 0.0)
    unit, inverse, normed = x, None, x
    if norm_weight is not None:
        inverse = inverse_norm(x, epsilon)
        unit = x * inverse
        normed = (unit * norm_weight.to(dtype)).to(states.dtype)
    logits = slot_logits(normed.to(states.dtype), rows, row_scale, valid, None, epsilon, scale)
    exponents = _target_exponents(target, valid, rows.shape[1], sigma, logits)
    wanted = (exponents - target_logsumexp.to(dtype)[..., None]).exp()
    grad = scale * factor[..., None] * ((logits - logsumexp.to(dtype)[..., None]).exp() - wanted)
    grad = grad.masked_fill(ignored[..., None], 0.0)
    used = exact_rows(rows, row_scale, dtype)
    if valid is not None:
        grad = grad.masked_fill(~valid[:, None, None], 0.0)
        used = used.expand(states.shape[0], -1, -1).masked_fill(~valid[..., None], 0.0)
    by_slot = grad.flatten(1, 2)  # [B, G * S, V]
    grad_normed = (by_slot @ used).view(states.shape)
    grad_rows = rows.new_empty(0)
    if row_scale is None:
        grad_rows = by_slot.transpose(1, 2) @ normed.to(dtype).flatten(1, 2)  # [B, V, C]
        if rows.shape[0] == 1:
            grad_rows = grad_rows.sum(0, keepdim=True)
    grad_states, grad_norm_weight = grad_normed, states.new_empty(0)
    if norm_weight is not None and inverse is not None:
        grad_norm_weight = (grad_normed * unit).sum((0, 1, 2)).to(norm_weight.dtype)
        grad_unit = grad_normed * norm_weight.to(dtype)
        grad_states = inverse * (grad_unit - unit * (grad_unit * unit).mean(-1, keepdim=True))
    return grad_states.to(states.dtype), grad_rows.to(rows.dtype), grad_norm_weight


def slot_head_cross_entropy_sum_reference(
    states: Tensor,
    rows: Tensor,
    target: Tensor,
    weight: Tensor | None,
    valid: Tensor | None,
    norm_weight: Tensor | None,
    epsilon: float,
    scale: float,
    sigma: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of the losses, and its gradients of states, rows and norm_weight, in plain PyTorch."""
    tensors = (states, rows, target, weight, valid, norm_weight)
    scalars = (epsilon, scale, sigma)
    loss, logsumexp, target_logsumexp = slot_head_cross_entropy_reference(*tensors, *scalars)
    grads = slot_head_cross_entropy_backward_reference(
        torch.ones_like(loss), *tensors, logsumexp, target_logsumexp, *scalars
    )
    return loss.sum(), *grads
