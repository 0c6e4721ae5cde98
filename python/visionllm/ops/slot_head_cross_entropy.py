"""Cross-entropy of slots over the rows that their kind may take, for training.

logits as in ``slot_head.py``;  loss = cross-entropy against a row, or against a Gaussian over the rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from visionllm.ops import fallback
from visionllm.ops.slot_head import (
    BACKWARD,
    CROSS_ENTROPY,
    accumulator,
    aligned,
    check,
    exact_rows,
    inverse_norm,
    library,
    operands,
    register,
    run_kernel,
    sample_inputs,
    slot_logits,
    workspace,
)

__all__ = ["sample_inputs", "slot_head_cross_entropy", "slot_head_cross_entropy_reference"]

# Slots whose logits' gradient the backward holds at a time; 0: as many as take 2²⁵ elements.
SLOTS_AT_ONCE = 0


def slot_head_cross_entropy(
    states: Tensor,
    rows: Tensor,
    target: Tensor,
    *,
    row_scale: Tensor | None = None,
    weight: Tensor | None = None,
    valid: Tensor | None = None,
    norm_weight: Tensor | None = None,
    epsilon: float = 1e-5,
    scale: float = 1.0,
    sigma: float | None = None,
) -> Tensor:
    """Cross-entropy of each slot; differentiable in states, norm_weight and rows that are not int8.

    Args:
        states, rows, row_scale, valid, norm_weight, epsilon, scale: as for ``slot_head_predict``.
        target: either int64, the wanted row (negative: the slot is ignored), or floating point, the centre
            in rows of a Gaussian over the allowed rows, moved into [0, V − 1]. Shape of states without C.
        weight: float32, factor on each slot's loss; 0: the slot is ignored. Shape of target; None: 1.
        sigma: standard deviation of the Gaussian in rows; for floating-point targets, and only for them.

    Returns:
        float32, target's shape. An ignored slot's loss is 0 and it adds to no gradient, whatever its state
        holds. A wanted row that is not allowed costs +inf; one beyond the rows, or a centre that is NaN,
        gives NaN.

    Raises:
        ValueError: a shape or type does not fit; the message names it.
    """
    operator = "slot_head_cross_entropy"
    if target.is_floating_point() != (sigma is not None):
        raise ValueError(
            f"{operator}: sigma must be given for floating-point targets and for no others, got {sigma} with "
            f"{fallback.type_name(target)}"
        )
    if sigma is not None and not sigma > 0:
        raise ValueError(f"{operator}: sigma must be above 0, got {sigma}")
    by_group, rows, row_scale, norm_weight = operands(operator, states, rows, row_scale, valid, norm_weight)
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.shape != states.shape[:-1]:
            raise ValueError(
                f"{operator}: {name} must have the states' shape without C = {list(states.shape[:-1])}, got "
                f"{list(tensor.shape)}"
            )
    slots = by_group.shape[:-1]
    loss, _, _ = torch.ops.visionllm.slot_head_cross_entropy(
        by_group,
        rows,
        target.detach().reshape(slots),
        None if weight is None else weight.detach().reshape(slots),
        valid,
        norm_weight,
        epsilon,
        scale,
        0.0 if sigma is None else sigma,
        row_scale,
    )
    return loss.view(target.shape)


# ---- reference ------------------------------------------------------------------------------------------


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


# ---- kernels --------------------------------------------------------------------------------------------


def _target_and_weight(target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    kind = torch.float32 if target.is_floating_point() else torch.int64
    return target.to(kind).contiguous(), None if weight is None else weight.float().contiguous()


def _cross_entropy(
    on_cuda: bool,
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
    if states.dtype == torch.float64:
        return slot_head_cross_entropy_reference(
            states, rows, target, weight, valid, norm_weight, epsilon, scale, sigma, row_scale
        )
    outputs = _cross_entropy_outputs(states)
    states, rows = aligned(states, on_cuda), aligned(rows, on_cuda)
    normed = norm_weight is not None
    run_kernel(
        "slot_head_cross_entropy",
        outputs,
        workspace(CROSS_ENTROPY, states, rows, valid, normed, -1) if on_cuda else None,
        (),
        states,
        rows,
        row_scale,
        (
            *_target_and_weight(target, weight),
            None if valid is None else valid.contiguous(),
            None if norm_weight is None else aligned(norm_weight, on_cuda),
            epsilon,
            scale,
            sigma,
        ),
    )
    return outputs


def _cross_entropy_backward(
    on_cuda: bool,
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
    scalars = (epsilon, scale, sigma)
    if states.dtype == torch.float64:
        operands = (states, rows, target, weight, valid, norm_weight, logsumexp, target_logsumexp)
        return slot_head_cross_entropy_backward_reference(grad_loss, *operands, *scalars, row_scale)
    grads = _gradients(states, rows, norm_weight)
    states, rows = aligned(states, on_cuda), aligned(rows, on_cuda)
    normed = norm_weight is not None
    run_kernel(
        "slot_head_cross_entropy_backward",
        (
            grads[0],
            *((grads[1],) if row_scale is None else ()),
            grads[2] if normed else None,
        ),
        workspace(BACKWARD, states, rows, valid, normed, -1, SLOTS_AT_ONCE) if on_cuda else None,
        (grad_loss.float().contiguous(),),
        states,
        rows,
        row_scale,
        (
            *_target_and_weight(target, weight),
            None if valid is None else valid.contiguous(),
            None if norm_weight is None else aligned(norm_weight, on_cuda),
            logsumexp.contiguous(),
            target_logsumexp.contiguous(),
            *scalars,
            SLOTS_AT_ONCE,
        ),
    )
    return grads


def _cross_entropy_cuda(*arguments) -> tuple[Tensor, ...]:
    return _cross_entropy(True, *arguments)


def _cross_entropy_cpu(*arguments) -> tuple[Tensor, ...]:
    return _cross_entropy(False, *arguments)


def _cross_entropy_backward_cuda(*arguments) -> tuple[Tensor, ...]:
    return _cross_entropy_backward(True, *arguments)


def _cross_entropy_backward_cpu(*arguments) -> tuple[Tensor, ...]:
    return _cross_entropy_backward(False, *arguments)


# ---- registration ---------------------------------------------------------------------------------------


library.define(
    "slot_head_cross_entropy(Tensor states, Tensor rows, Tensor target, Tensor? weight, Tensor? valid, "
    "Tensor? norm_weight, float epsilon, float scale, float sigma, Tensor? row_scale=None) "
    "-> (Tensor, Tensor, Tensor)"
)
library.define(
    "slot_head_cross_entropy_backward(Tensor grad_loss, Tensor states, Tensor rows, Tensor target, "
    "Tensor? weight, Tensor? valid, Tensor? norm_weight, Tensor logsumexp, Tensor target_logsumexp, "
    "float epsilon, float scale, float sigma, Tensor? row_scale=None) -> (Tensor, Tensor, Tensor)"
)
register(
    "slot_head_cross_entropy", slot_head_cross_entropy_reference, _cross_entropy_cpu, _cross_entropy_cuda
)
register(
    "slot_head_cross_entropy_backward",
    slot_head_cross_entropy_backward_reference,
    _cross_entropy_backward_cpu,
    _cross_entropy_backward_cuda,
)


def _cross_entropy_outputs(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = states.new_empty(states.shape[:-1], dtype=accumulator(states))
    return loss, torch.empty_like(loss), torch.empty_like(loss)


def _gradients(states: Tensor, rows: Tensor, norm_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return (
        states.new_empty(states.shape),
        rows.new_empty(0 if rows.dtype == torch.int8 else rows.shape),
        states.new_empty(0) if norm_weight is None else norm_weight.new_empty(norm_weight.shape),
    )


@torch.library.register_fake("visionllm::slot_head_cross_entropy", lib=library)
def _cross_entropy_fake(
    states, rows, target, weight, valid, norm_weight, epsilon, scale, sigma, row_scale=None
):
    check("slot_head_cross_entropy", states, rows, row_scale, valid, norm_weight, target, weight)
    return _cross_entropy_outputs(states)


@torch.library.register_fake("visionllm::slot_head_cross_entropy_backward", lib=library)
def _cross_entropy_backward_fake(
    grad_loss,
    states,
    rows,
    target,
    weight,
    valid,
    norm_weight,
    logsumexp,
    target_logsumexp,
    epsilon,
    scale,
    sigma,
    row_scale=None,
):
    return _gradients(states, rows, norm_weight)


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, epsilon, scale, sigma, row_scale = inputs  # tensors: states to norm_weight
    _, logsumexp, target_logsumexp = output
    ctx.mark_non_differentiable(logsumexp, target_logsumexp)
    ctx.save_for_backward(*tensors, logsumexp, target_logsumexp, row_scale)
    ctx.scalars = epsilon, scale, sigma


def _autograd_backward(ctx, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *saved, row_scale = ctx.saved_tensors
    grad_states, grad_rows, grad_norm_weight = torch.ops.visionllm.slot_head_cross_entropy_backward(
        grad_loss, *saved, *ctx.scalars, row_scale
    )
    rows = grad_rows if row_scale is None else None
    norm_weight = None if saved[5] is None else grad_norm_weight
    return grad_states, rows, None, None, None, norm_weight, None, None, None, None


torch.library.register_autograd(
    "visionllm::slot_head_cross_entropy", _autograd_backward, setup_context=_setup_context, lib=library
)


def _no_second_derivative(ctx, *grads: Tensor) -> tuple[None, ...]:
    raise NotImplementedError("slot_head_cross_entropy_backward: second derivatives are not implemented")


torch.library.register_autograd(
    "visionllm::slot_head_cross_entropy_backward", _no_second_derivative, lib=library
)
