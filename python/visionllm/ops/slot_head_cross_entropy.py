"""Cross-entropy of slots over the rows that their kind may take, for training.

logits as in ``slot_head.py``;  loss = cross-entropy against a row, or against a Gaussian over the rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from visionllm.ops import fallback, native
from visionllm.ops.direct import past_dispatcher
from visionllm.ops.slot_head import (
    BACKWARD,
    CROSS_ENTROPY,
    accumulator,
    aligned,
    check,
    library,
    operands,
    register,
    run_kernel,
    sample_inputs,
    workspace,
)
from visionllm.ops.slot_head_cross_entropy_reference import (
    slot_head_cross_entropy_backward_reference,
    slot_head_cross_entropy_reference,
    slot_head_cross_entropy_sum_reference,
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
    reduction: str = "none",
) -> Tensor:
    """Cross-entropy of each slot; differentiable in states, norm_weight and rows that are not int8.

    Args:
        states, rows, row_scale, valid, norm_weight, epsilon, scale: as for ``slot_head_predict``.
        target: either int64, the wanted row (negative: the slot is ignored), or floating point, the centre
            in rows of a Gaussian over the allowed rows, moved into [0, V − 1]. Shape of states without C.
        weight: float32, factor on each slot's loss; 0: the slot is ignored. Shape of target; None: 1.
        sigma: standard deviation of the Gaussian in rows; for floating-point targets, and only for them.
        reduction: "none", or "sum" over all slots, which costs a quarter less on the CPU where there are
            gradients: they are made with it, from the same logits. A mean is a sum with weights.

    Returns:
        float32, target's shape, or a scalar. An ignored slot's loss is 0 and it adds to no gradient, whatever
        its state holds. A wanted row that is not allowed costs +inf; one beyond the rows, or a centre that is
        NaN, gives NaN.

    Raises:
        ValueError: a shape or type does not fit; the message names it.
    """
    operator = "slot_head_cross_entropy"
    if target.is_floating_point() != (sigma is not None):
        raise ValueError(
            f"{operator}: sigma must be given for floating-point targets and for no others, got {sigma} with "
            f"{fallback.type_name(target)}"
        )
    if reduction not in ("none", "sum"):
        raise ValueError(f"{operator}: reduction must be none or sum, got {reduction!r}")
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
    arguments = (
        by_group,
        rows,
        target.detach().reshape(slots),
        None if weight is None else weight.detach().reshape(slots),
        valid,
        norm_weight,
        epsilon,
        scale,
        0.0 if sigma is None else sigma,
    )
    leaves = [t for t in (by_group, rows, norm_weight) if t is not None]
    if reduction == "sum" and row_scale is None and torch.is_grad_enabled():
        if any(leaf.requires_grad for leaf in leaves):
            return _slot_head_cross_entropy_sum(*arguments)[0]
    loss = _slot_head_cross_entropy(*arguments, row_scale)[0]
    return loss.sum() if reduction == "sum" else loss.view(target.shape)


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


def _cross_entropy_sum_cpu(
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
    if states.dtype == torch.float64:
        return slot_head_cross_entropy_sum_reference(
            states, rows, target, weight, valid, norm_weight, epsilon, scale, sigma
        )
    losses, grads = _cross_entropy_outputs(states), _gradients(states, rows, norm_weight)
    native.call(
        "slot_head_cross_entropy_sum",
        *losses,
        *grads[:2],
        None if norm_weight is None else grads[2],
        aligned(states, False),
        aligned(rows, False),
        *_target_and_weight(target, weight),
        None if valid is None else valid.contiguous(),
        None if norm_weight is None else aligned(norm_weight, False),
        epsilon,
        scale,
        sigma,
        SLOTS_AT_ONCE,
    )
    return losses[0].sum(), *grads


def _cross_entropy_sum_cuda(*arguments) -> tuple[Tensor, ...]:
    """One after the other: there is no kernel that does both."""
    tensors, scalars = arguments[:6], arguments[6:]
    loss, *saved = _cross_entropy_cuda(*arguments)
    grads = _cross_entropy_backward_cuda(torch.ones_like(loss), *tensors, *saved, *scalars)
    return loss.sum(), *grads


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
library.define(
    "slot_head_cross_entropy_sum(Tensor states, Tensor rows, Tensor target, Tensor? weight, Tensor? valid, "
    "Tensor? norm_weight, float epsilon, float scale, float sigma) -> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "slot_head_cross_entropy_sum_backward(Tensor grad_loss, Tensor states, Tensor rows, Tensor? norm_weight, "
    "Tensor grad_states, Tensor grad_rows, Tensor grad_norm_weight) -> (Tensor, Tensor, Tensor)"
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


register(
    "slot_head_cross_entropy_sum",
    slot_head_cross_entropy_sum_reference,
    _cross_entropy_sum_cpu,
    _cross_entropy_sum_cuda,
)


def _scaled(
    grad_loss: Tensor, states: Tensor, rows: Tensor, norm_weight: Tensor | None, *gradients: Tensor
) -> tuple[Tensor, ...]:
    """States, rows and norm_weight are there for autograd alone, so that a second derivative is refused."""
    return tuple(gradient * grad_loss.to(gradient.dtype) for gradient in gradients)


library.impl("slot_head_cross_entropy_sum_backward", _scaled, "CompositeExplicitAutograd")


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
    grad_states, grad_rows, grad_norm_weight = _slot_head_cross_entropy_backward(
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


@torch.library.register_fake("visionllm::slot_head_cross_entropy_sum", lib=library)
def _cross_entropy_sum_fake(states, rows, target, weight, valid, norm_weight, epsilon, scale, sigma):
    check("slot_head_cross_entropy_sum", states, rows, None, valid, norm_weight, target, weight)
    return states.new_empty((), dtype=accumulator(states)), *_gradients(states, rows, norm_weight)


@torch.library.register_fake("visionllm::slot_head_cross_entropy_sum_backward", lib=library)
def _cross_entropy_sum_backward_fake(grad_loss, states, rows, norm_weight, *gradients):
    return tuple(torch.empty_like(gradient) for gradient in gradients)


def _setup_sum_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(inputs[0], inputs[1], inputs[5], *output[1:])


def _sum_autograd_backward(ctx, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    states, rows, norm_weight = _slot_head_cross_entropy_sum_backward(grad_loss, *ctx.saved_tensors)
    normed = ctx.saved_tensors[2] is not None
    return states, rows, None, None, None, norm_weight if normed else None, None, None, None


torch.library.register_autograd(
    "visionllm::slot_head_cross_entropy_sum",
    _sum_autograd_backward,
    setup_context=_setup_sum_context,
    lib=library,
)
torch.library.register_autograd(
    "visionllm::slot_head_cross_entropy_sum_backward", _no_second_derivative, lib=library
)

_slot_head_cross_entropy_backward = past_dispatcher(
    "slot_head_cross_entropy_backward", _cross_entropy_backward_cpu
)
_slot_head_cross_entropy = past_dispatcher(
    "slot_head_cross_entropy", _cross_entropy_cpu, _setup_context, _autograd_backward
)
_slot_head_cross_entropy_sum_backward = past_dispatcher("slot_head_cross_entropy_sum_backward", _scaled)
_slot_head_cross_entropy_sum = past_dispatcher(
    "slot_head_cross_entropy_sum", _cross_entropy_sum_cpu, _setup_sum_context, _sum_autograd_backward
)
