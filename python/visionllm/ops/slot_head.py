"""The head that reads slots, as two torch operators: prediction, and cross-entropy for training.

    normed    = states / sqrt(mean(states^2) + epsilon) * norm_weight          without norm_weight: states
    logits    = scale * normed @ rows^T                                        only over this kind's rows
    predict:  argmax, its probability, logsumexp, expectation near the argmax
    training: cross-entropy against a row, or against a Gaussian over the rows

The contract, with the meaning of the shape letters, is in ``cpp/include/visionllm/slot_head.h``. On CUDA the
compiled kernels run, which never write the logits; on the CPU, on other devices and in float64 the PyTorch
reference below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from visionllm import _core
from visionllm.ops import fallback, native

__all__ = [
    "SampleInputs",
    "SlotPrediction",
    "sample_inputs",
    "slot_head_cross_entropy",
    "slot_head_cross_entropy_reference",
    "slot_head_predict",
    "slot_head_predict_reference",
]

# What the kernels take (cpp/include/visionllm/slot_head.h).
MAX_ROWS, MAX_WINDOW, CHANNEL_MULTIPLE = 65536, 31, 8
_PREDICT, _CROSS_ENTROPY, _BACKWARD = 0, 1, 2

# Slots whose logits' gradient the backward holds at a time; 0: as many as take 2²⁵ elements.
SLOTS_AT_ONCE = 0


class SlotPrediction(NamedTuple):
    """What slots say; "slots" stands for the states' shape without C: [B, G] or [B, G, S].

    Attributes:
        best: int64 [slots], the row with the highest logit, the first of equals; −1 where no row is allowed
            or the logits are not finite.
        probability: [slots], softmax over the allowed rows at ``best``; NaN where ``best`` is −1.
        logsumexp: [slots], of the logits; −inf where no row is allowed.
        expectation: [slots] or None, mean of (row − offset) within the window around ``best``.
        probabilities: [slots, V] or None, of every row; 0 where it is not allowed, all
            NaN where ``best`` is −1.
    """

    best: Tensor
    probability: Tensor
    logsumexp: Tensor
    expectation: Tensor | None
    probabilities: Tensor | None


def slot_head_predict(
    states: Tensor,
    rows: Tensor,
    *,
    valid: Tensor | None = None,
    norm_weight: Tensor | None = None,
    epsilon: float = 1e-5,
    scale: float = 1.0,
    window: int | None = None,
    offset: float = 0.0,
    probabilities: bool = False,
) -> SlotPrediction:
    """Which row each slot takes; not differentiable.

    Args:
        states: [B, G, C] or [B, G, S, C] float32, bfloat16 or float16 (float64 takes the reference): S slots
            of one kind in each of G groups. ``states[:, :, 1:]`` of a larger tensor needs no copy.
        rows: [V, C] or [1, V, C] for all pictures, or [B, V, C]; converted to the states' type.
        valid: bool [B, V], rows that slots of a picture may take; None: all. What disallowed rows hold, NaN
            too, is not used.
        norm_weight: [C] of the RMS norm before the product; None: no norm.
        epsilon: of the norm.
        scale: factor on the logits.
        window: also give the expectation within this many rows on each side of the best (0: the best alone).
        offset: subtracted from row numbers in the expectation.
        probabilities: also give the probability of every row.

    Returns:
        ``SlotPrediction``, numbers in float32 (float64 for float64 states).

    Raises:
        ValueError: a shape or type does not fit; the message names it.
    """
    if window is not None and window < 0:
        raise ValueError(f"slot_head_predict: window must be at least 0, got {window}")
    by_group, rows, norm_weight = _operands("slot_head_predict", states, rows, norm_weight)
    outputs = torch.ops.visionllm.slot_head_predict(
        by_group.detach(),
        rows.detach(),
        valid,
        None if norm_weight is None else norm_weight.detach(),
        epsilon,
        scale,
        -1 if window is None else window,
        offset,
        probabilities,
    )
    if states.dim() == 3:
        outputs = tuple(t.squeeze(2) if t.dim() > 2 else t for t in outputs)
    best, probability, logsumexp, expectation, every = outputs
    return SlotPrediction(
        best,
        probability,
        logsumexp,
        None if window is None else expectation,
        every if probabilities else None,
    )


def slot_head_cross_entropy(
    states: Tensor,
    rows: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    valid: Tensor | None = None,
    norm_weight: Tensor | None = None,
    epsilon: float = 1e-5,
    scale: float = 1.0,
    sigma: float | None = None,
) -> Tensor:
    """Cross-entropy of each slot; differentiable in states, rows and norm_weight.

    Args:
        states, rows, valid, norm_weight, epsilon, scale: as for ``slot_head_predict``.
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
    by_group, rows, norm_weight = _operands(operator, states, rows, norm_weight)
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
    )
    return loss.view(target.shape)


def _operands(
    operator: str, states: Tensor, rows: Tensor, norm_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """states [B, G, S, C], rows [1 or B, V, C] and norm_weight, all of the states' type."""
    if states.dim() not in (3, 4):
        raise ValueError(
            f"{operator}: states must have shape [B, G, C] or [B, G, S, C], got {list(states.shape)}"
        )
    fallback.check_real(operator, "states", states, states.device)
    if rows.dim() not in (2, 3):
        raise ValueError(
            f"{operator}: rows must have shape [V, C], [1, V, C] or [B, V, C], got {list(rows.shape)}"
        )
    fallback.check_real(operator, "rows", rows, states.device)
    rows = rows if rows.dim() == 3 else rows[None]
    return (
        states if states.dim() == 4 else states[:, :, None],
        rows.to(states.dtype),
        None if norm_weight is None else norm_weight.to(states.dtype),
    )


# ---- reference ------------------------------------------------------------------------------------------


def _check(
    operator: str,
    states: Tensor,
    rows: Tensor,
    valid: Tensor | None,
    norm_weight: Tensor | None,
    target: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:
    """What reference and kernels ask for alike, as the core says it."""
    fallback.check_rank(operator, "states", states, "[B, G, S, C]")
    fallback.check_rank(operator, "rows", rows, "[R, V, C]")
    batch, groups, slots, channels = states.shape
    fallback.check_real(operator, "states", states, states.device)
    fallback.check_real(operator, "rows", rows, states.device)
    if rows.shape[0] not in (1, batch) or rows.shape[1] < 1 or rows.shape[2] != channels:
        raise ValueError(
            f"{operator}: rows must have shape [1 or B, V, C] = [1 or {batch}, 1 or more, {channels}], got "
            f"{list(rows.shape)}"
        )
    if valid is not None:
        fallback.check_shape(operator, "valid", valid, "[B, V]", (batch, rows.shape[1]))
        if valid.dtype != torch.bool:
            raise ValueError(f"{operator}: valid must be bool, got {fallback.type_name(valid)}")
    if norm_weight is not None:
        fallback.check_shape(operator, "norm_weight", norm_weight, "[C]", (channels,))
        fallback.check_real(operator, "norm_weight", norm_weight, states.device)
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None:
            fallback.check_shape(operator, name, tensor, "[B, G, S]", (batch, groups, slots))
    if target is not None and not target.is_floating_point():
        fallback.check_integer(operator, "target", target, states.device)


def _accumulator(states: Tensor) -> torch.dtype:
    return torch.float64 if states.dtype == torch.float64 else torch.float32


def _inverse_norm(x: Tensor, epsilon: float) -> Tensor:
    """[..., C] → [..., 1]"""
    return (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()


def _normed(states: Tensor, norm_weight: Tensor | None, epsilon: float) -> Tensor:
    """RMS norm, rounded to the states' type."""
    if norm_weight is None:
        return states
    x = states.to(_accumulator(states))
    return (x * _inverse_norm(x, epsilon) * norm_weight.to(x.dtype)).to(states.dtype)


def _logits(
    states: Tensor,
    rows: Tensor,
    valid: Tensor | None,
    norm_weight: Tensor | None,
    epsilon: float,
    scale: float,
) -> Tensor:
    """[B, G, S, V], −inf where a row is not allowed."""
    dtype = _accumulator(states)
    normed = _normed(states, norm_weight, epsilon).to(dtype)
    logits = normed.flatten(1, 2) @ rows.to(dtype).transpose(1, 2) * scale
    logits = logits.view(*states.shape[:-1], rows.shape[1])
    return logits if valid is None else logits.masked_fill(~valid[:, None, None], float("-inf"))


def slot_head_predict_reference(
    states: Tensor,
    rows: Tensor,
    valid: Tensor | None,
    norm_weight: Tensor | None,
    epsilon: float,
    scale: float,
    window: int,
    offset: float,
    probabilities: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``slot_head_predict`` in plain PyTorch: states [B, G, S, C], rows [1 or B, V, C].

    Returns:
        best, probability, logsumexp, and expectation (window −1: empty) and probabilities (or empty).
    """
    _check("slot_head_predict", states, rows, valid, norm_weight)
    logits = _logits(states, rows, valid, norm_weight, epsilon, scale)
    logsumexp = logits.logsumexp(-1)
    best = logits.argmax(-1)
    highest = logits.gather(-1, best[..., None])  # [B, G, S, 1]
    probability = (highest[..., 0] - logsumexp).exp()
    finite = logsumexp.isfinite()
    expectation = logits.new_empty(logits.shape[:-1] if window >= 0 else (0,))
    if window >= 0:
        around = best[..., None] + torch.arange(-window, window + 1, device=states.device)
        inside = (around >= 0) & (around < rows.shape[1])
        near = logits.gather(-1, around.clamp(0, rows.shape[1] - 1)).masked_fill(~inside, float("-inf"))
        expectation = (near.softmax(-1) * (around - offset)).sum(-1).where(finite, float("nan"))
    every = logits.new_empty(0)
    if probabilities:
        every = (logits - logsumexp[..., None]).exp().where(finite[..., None], float("nan"))
    return best.where(finite, -1), probability, logsumexp, expectation, every


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
) -> tuple[Tensor, Tensor, Tensor]:
    """``slot_head_cross_entropy`` in plain PyTorch, differentiable by autograd.

    Returns:
        loss, logsumexp of the logits and logsumexp of the target's exponents, all [B, G, S].
    """
    _check("slot_head_cross_entropy", states, rows, valid, norm_weight, target, weight)
    logits = _logits(states, rows, valid, norm_weight, epsilon, scale)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of states, rows and norm_weight (empty without one) in plain PyTorch."""
    operator = "slot_head_cross_entropy_backward"
    _check(operator, states, rows, valid, norm_weight, target, weight)
    for name, tensor in (
        ("grad_loss", grad_loss),
        ("logsumexp", logsumexp),
        ("target_logsumexp", target_logsumexp),
    ):
        fallback.check_shape(operator, name, tensor, "[B, G, S]", states.shape[:-1])
    dtype = _accumulator(states)
    ignored = _ignored(target, weight)
    factor = grad_loss.to(dtype) if weight is None else grad_loss.to(dtype) * weight.to(dtype)
    # 0 times what an ignored state or a disallowed row holds would be NaN where that is not finite.
    x = states.to(dtype).masked_fill(ignored[..., None], 0.0)
    unit, inverse, normed = x, None, x
    if norm_weight is not None:
        inverse = _inverse_norm(x, epsilon)
        unit = x * inverse
        normed = (unit * norm_weight.to(dtype)).to(states.dtype)
    logits = _logits(normed.to(states.dtype), rows, valid, None, epsilon, scale)
    exponents = _target_exponents(target, valid, rows.shape[1], sigma, logits)
    wanted = (exponents - target_logsumexp.to(dtype)[..., None]).exp()
    grad = scale * factor[..., None] * ((logits - logsumexp.to(dtype)[..., None]).exp() - wanted)
    grad = grad.masked_fill(ignored[..., None], 0.0)
    used = rows.to(dtype)
    if valid is not None:
        grad = grad.masked_fill(~valid[:, None, None], 0.0)
        used = used.expand(states.shape[0], -1, -1).masked_fill(~valid[..., None], 0.0)
    by_slot = grad.flatten(1, 2)  # [B, G * S, V]
    grad_normed = (by_slot @ used).view(states.shape)
    grad_rows = by_slot.transpose(1, 2) @ normed.to(dtype).flatten(1, 2)  # [B, V, C]
    if rows.shape[0] == 1:
        grad_rows = grad_rows.sum(0, keepdim=True)
    grad_states, grad_norm_weight = grad_normed, states.new_empty(0)
    if norm_weight is not None and inverse is not None:
        grad_norm_weight = (grad_normed * unit).sum((0, 1, 2)).to(norm_weight.dtype)
        grad_unit = grad_normed * norm_weight.to(dtype)
        grad_states = inverse * (grad_unit - unit * (grad_unit * unit).mean(-1, keepdim=True))
    return grad_states.to(states.dtype), grad_rows.to(rows.dtype), grad_norm_weight


# ---- sample inputs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleInputs:
    """Arguments of both operators; the tests, opcheck and the bench take theirs from here."""

    states: Tensor
    rows: Tensor
    valid: Tensor | None
    norm_weight: Tensor | None
    target: Tensor
    weight: Tensor | None
    epsilon: float
    scale: float
    sigma: float  # 0: the target is a row
    window: int
    offset: float

    def predict_args(self, probabilities: bool = True) -> tuple:
        return (
            self.states,
            self.rows,
            self.valid,
            self.norm_weight,
            self.epsilon,
            self.scale,
            self.window,
            self.offset,
            probabilities,
        )

    def cross_entropy_args(self) -> tuple:
        return (
            self.states,
            self.rows,
            self.target,
            self.weight,
            self.valid,
            self.norm_weight,
            self.epsilon,
            self.scale,
            self.sigma,
        )

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.states, self.rows, self.norm_weight) if t is not None]


def sample_inputs(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    groups: int = 7,
    slots: int = 1,
    rows: int = 21,
    channels: int = 40,
    shared: bool = False,
    masked: bool = True,
    normed: bool = True,
    located: bool = False,
    weighted: bool = True,
    window: int = 6,
    requires_grad: bool = False,
    seed: int = 0,
) -> SampleInputs:
    """Random slots: of classes (a row is wanted, some slots ignored), or ``located`` (a place among rows).

    Args:
        rows: V. With ``masked``, each picture allows some of them, always the last: "no object".
        shared: one set of rows for all pictures.
    """
    random = torch.Generator().manual_seed(seed)
    real = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=real)

    states = normal(batch, groups, slots, channels).to(dtype)
    table = normal(1 if shared else batch, rows, channels).to(dtype)
    norm_weight = (1 + 0.3 * normal(channels)).to(dtype) if normed else None
    valid = None
    if masked:
        valid = torch.rand(batch, rows, generator=random) < 0.7
        valid[:, -1:] = True
    shape = (batch, groups, slots)
    if located:
        # Some beyond both ends.
        target = torch.rand(shape, generator=random, dtype=real) * (rows + 4) - 2.5
    else:
        target = torch.randint(0, rows, shape, generator=random)
        if valid is not None:  # a row that is not allowed would cost +inf
            allowed = valid[torch.arange(batch)[:, None, None], target]
            target = torch.where(allowed, target, rows - 1)
        target[torch.rand(shape, generator=random) < 0.2] = -1
    weight = None
    if weighted:
        weight = torch.rand(shape, generator=random, dtype=real) + 0.1
        weight[torch.rand(shape, generator=random) < 0.1] = 0.0
    return SampleInputs(
        states=states.to(device).requires_grad_(requires_grad),
        rows=table.to(device).requires_grad_(requires_grad),
        valid=None if valid is None else valid.to(device),
        norm_weight=None if norm_weight is None else norm_weight.to(device).requires_grad_(requires_grad),
        target=target.to(device),
        weight=None if weight is None else weight.to(device),
        epsilon=1e-5,
        scale=2 * channels**-0.5,
        sigma=1.5 if located else 0.0,
        window=window,
        offset=(rows - 1) / 2,
    )


# ---- kernels --------------------------------------------------------------------------------------------


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor if the kernels can copy it in pieces of 16 bytes, else a contiguous copy."""
    size = tensor.element_size()
    steps = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    fits = tensor.data_ptr() % 16 == 0 and all(n <= 1 or step * size % 16 == 0 for n, step in steps)
    fits = fits and (tensor.stride(-1) == 1 or tensor.shape[-1] == 1)
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def _workspace(
    call: int, states: Tensor, rows: Tensor, valid: Tensor | None, normed: bool, window: int
) -> Tensor:
    size = _core.slot_head_workspace_bytes(
        call,
        *states.shape,
        rows.shape[1],
        states.element_size(),
        rows.shape[0] == 1,
        valid is not None,
        normed,
        window,
        SLOTS_AT_ONCE,
    )
    return torch.empty(-(-size // 4), dtype=torch.float32, device=states.device)


def _predict_cuda(
    states: Tensor,
    rows: Tensor,
    valid: Tensor | None,
    norm_weight: Tensor | None,
    epsilon: float,
    scale: float,
    window: int,
    offset: float,
    probabilities: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if states.dtype == torch.float64 or window > MAX_WINDOW:
        return slot_head_predict_reference(
            states, rows, valid, norm_weight, epsilon, scale, window, offset, probabilities
        )
    outputs = _predict_outputs(states, rows, window, probabilities)
    states, rows = _aligned(states), _aligned(rows)
    native.call(
        "slot_head_predict",
        *outputs[:3],
        outputs[3] if window >= 0 else None,
        outputs[4] if probabilities else None,
        _workspace(_PREDICT, states, rows, valid, norm_weight is not None, window),
        states,
        rows,
        None if valid is None else valid.contiguous(),
        None if norm_weight is None else _aligned(norm_weight),
        epsilon,
        scale,
        max(window, 0),
        offset,
    )
    return outputs


def _target_and_weight(target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    kind = torch.float32 if target.is_floating_point() else torch.int64
    return target.to(kind).contiguous(), None if weight is None else weight.float().contiguous()


def _cross_entropy_cuda(
    states: Tensor,
    rows: Tensor,
    target: Tensor,
    weight: Tensor | None,
    valid: Tensor | None,
    norm_weight: Tensor | None,
    epsilon: float,
    scale: float,
    sigma: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if states.dtype == torch.float64:
        return slot_head_cross_entropy_reference(
            states, rows, target, weight, valid, norm_weight, epsilon, scale, sigma
        )
    outputs = _cross_entropy_outputs(states)
    states, rows = _aligned(states), _aligned(rows)
    native.call(
        "slot_head_cross_entropy",
        *outputs,
        _workspace(_CROSS_ENTROPY, states, rows, valid, norm_weight is not None, -1),
        states,
        rows,
        *_target_and_weight(target, weight),
        None if valid is None else valid.contiguous(),
        None if norm_weight is None else _aligned(norm_weight),
        epsilon,
        scale,
        sigma,
    )
    return outputs


def _cross_entropy_backward_cuda(
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
) -> tuple[Tensor, Tensor, Tensor]:
    if states.dtype == torch.float64:
        return slot_head_cross_entropy_backward_reference(
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
        )
    grads = _gradients(states, rows, norm_weight)
    states, rows = _aligned(states), _aligned(rows)
    native.call(
        "slot_head_cross_entropy_backward",
        *grads[:2],
        None if norm_weight is None else grads[2],
        _workspace(_BACKWARD, states, rows, valid, norm_weight is not None, -1),
        grad_loss.float().contiguous(),
        states,
        rows,
        *_target_and_weight(target, weight),
        None if valid is None else valid.contiguous(),
        None if norm_weight is None else _aligned(norm_weight),
        logsumexp.contiguous(),
        target_logsumexp.contiguous(),
        epsilon,
        scale,
        sigma,
        SLOTS_AT_ONCE,
    )
    return grads


# ---- registration ---------------------------------------------------------------------------------------

_library = torch.library.Library("visionllm", "FRAGMENT")
_library.define(
    "slot_head_predict(Tensor states, Tensor rows, Tensor? valid, Tensor? norm_weight, float epsilon, "
    "float scale, int window, float offset, bool probabilities) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "slot_head_cross_entropy(Tensor states, Tensor rows, Tensor target, Tensor? weight, Tensor? valid, "
    "Tensor? norm_weight, float epsilon, float scale, float sigma) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "slot_head_cross_entropy_backward(Tensor grad_loss, Tensor states, Tensor rows, Tensor target, "
    "Tensor? weight, Tensor? valid, Tensor? norm_weight, Tensor logsumexp, Tensor target_logsumexp, "
    "float epsilon, float scale, float sigma) -> (Tensor, Tensor, Tensor)"
)


def _elsewhere(operator: str, reference):
    """The reference for devices that this build has no kernels for, with a warning."""

    def call(*arguments):
        outputs = reference(*arguments)
        fallback.warn_of_reference(operator, arguments[0].device.type)
        return outputs

    return call


for _name, _reference, _kernel in (
    ("slot_head_predict", slot_head_predict_reference, _predict_cuda),
    ("slot_head_cross_entropy", slot_head_cross_entropy_reference, _cross_entropy_cuda),
    (
        "slot_head_cross_entropy_backward",
        slot_head_cross_entropy_backward_reference,
        _cross_entropy_backward_cuda,
    ),
):
    _library.impl(_name, _reference, "CPU")
    _library.impl(_name, _elsewhere(_name, _reference), "CompositeExplicitAutograd")
    if native.has_cuda_kernels():
        _library.impl(_name, _kernel, "CUDA")


def _predict_outputs(
    states: Tensor, rows: Tensor, window: int, probabilities: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    slots, dtype = states.shape[:-1], _accumulator(states)
    return (
        states.new_empty(slots, dtype=torch.int64),
        states.new_empty(slots, dtype=dtype),
        states.new_empty(slots, dtype=dtype),
        states.new_empty(slots if window >= 0 else (0,), dtype=dtype),
        states.new_empty((*slots, rows.shape[1]) if probabilities else (0,), dtype=dtype),
    )


def _cross_entropy_outputs(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = states.new_empty(states.shape[:-1], dtype=_accumulator(states))
    return loss, torch.empty_like(loss), torch.empty_like(loss)


def _gradients(states: Tensor, rows: Tensor, norm_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return (
        states.new_empty(states.shape),
        rows.new_empty(rows.shape),
        states.new_empty(0) if norm_weight is None else norm_weight.new_empty(norm_weight.shape),
    )


@torch.library.register_fake("visionllm::slot_head_predict", lib=_library)
def _predict_fake(states, rows, valid, norm_weight, epsilon, scale, window, offset, probabilities):
    _check("slot_head_predict", states, rows, valid, norm_weight)
    return _predict_outputs(states, rows, window, probabilities)


@torch.library.register_fake("visionllm::slot_head_cross_entropy", lib=_library)
def _cross_entropy_fake(states, rows, target, weight, valid, norm_weight, epsilon, scale, sigma):
    _check("slot_head_cross_entropy", states, rows, valid, norm_weight, target, weight)
    return _cross_entropy_outputs(states)


@torch.library.register_fake("visionllm::slot_head_cross_entropy_backward", lib=_library)
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
):
    return _gradients(states, rows, norm_weight)


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    states, rows, target, weight, valid, norm_weight, *scalars = inputs
    _, logsumexp, target_logsumexp = output
    ctx.mark_non_differentiable(logsumexp, target_logsumexp)
    ctx.save_for_backward(states, rows, target, weight, valid, norm_weight, logsumexp, target_logsumexp)
    ctx.scalars = scalars


def _autograd_backward(ctx, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad_states, grad_rows, grad_norm_weight = torch.ops.visionllm.slot_head_cross_entropy_backward(
        grad_loss, *ctx.saved_tensors, *ctx.scalars
    )
    normed = ctx.saved_tensors[5] is not None
    return grad_states, grad_rows, None, None, None, grad_norm_weight if normed else None, None, None, None


torch.library.register_autograd(
    "visionllm::slot_head_cross_entropy", _autograd_backward, setup_context=_setup_context, lib=_library
)


def _no_second_derivative(ctx, *grads: Tensor) -> tuple[None, ...]:
    raise NotImplementedError("slot_head_cross_entropy_backward: second derivatives are not implemented")


torch.library.register_autograd(
    "visionllm::slot_head_cross_entropy_backward", _no_second_derivative, lib=_library
)
