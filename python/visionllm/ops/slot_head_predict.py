"""Which row each slot takes.

logits as in ``slot_head.py``;  argmax, its probability, logsumexp, expectation near the argmax
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from visionllm.ops.direct import past_dispatcher
from visionllm.ops.slot_head import (
    PREDICT,
    accumulator,
    aligned,
    check,
    library,
    operands,
    register,
    run_kernel,
    sample_inputs,
    slot_logits,
    workspace,
)

__all__ = ["SlotPrediction", "sample_inputs", "slot_head_predict", "slot_head_predict_reference"]

MAX_WINDOW = 31  # of the CUDA kernels


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
    row_scale: Tensor | None = None,
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
        rows: [V, C] or [1, V, C] for all pictures, or [B, V, C]; converted to the states' type, or int8 with
            ``row_scale``.
        row_scale: float32, rows' shape without C: row v is ``row_scale[v] * rows[v]``. With int8 rows, and
            only with them; these have CPU kernels and no CUDA kernels.
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
    by_group, rows, row_scale, norm_weight = operands(
        "slot_head_predict", states, rows, row_scale, valid, norm_weight
    )
    outputs = _slot_head_predict(
        by_group.detach(),
        rows.detach(),
        valid,
        None if norm_weight is None else norm_weight.detach(),
        epsilon,
        scale,
        -1 if window is None else window,
        offset,
        probabilities,
        row_scale,
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


# ---- reference ------------------------------------------------------------------------------------------


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
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``slot_head_predict`` in plain PyTorch: states [B, G, S, C], rows [1 or B, V, C].

    Returns:
        best, probability, logsumexp, and expectation (window −1: empty) and probabilities (or empty).
    """
    check("slot_head_predict", states, rows, row_scale, valid, norm_weight)
    logits = slot_logits(states, rows, row_scale, valid, norm_weight, epsilon, scale)
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


# ---- kernels --------------------------------------------------------------------------------------------


def _predict(
    on_cuda: bool,
    states: Tensor,
    rows: Tensor,
    valid: Tensor | None,
    norm_weight: Tensor | None,
    epsilon: float,
    scale: float,
    window: int,
    offset: float,
    probabilities: bool,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if states.dtype == torch.float64 or (on_cuda and window > MAX_WINDOW):
        return slot_head_predict_reference(
            states, rows, valid, norm_weight, epsilon, scale, window, offset, probabilities, row_scale
        )
    outputs = _predict_outputs(states, rows, window, probabilities)
    states, rows = aligned(states, on_cuda), aligned(rows, on_cuda)
    normed = norm_weight is not None
    run_kernel(
        "slot_head_predict",
        (*outputs[:3], outputs[3] if window >= 0 else None, outputs[4] if probabilities else None),
        workspace(PREDICT, states, rows, valid, normed, window) if on_cuda else None,
        (),
        states,
        rows,
        row_scale,
        (
            None if valid is None else valid.contiguous(),
            None if norm_weight is None else aligned(norm_weight, on_cuda),
            epsilon,
            scale,
            max(window, 0),
            offset,
        ),
    )
    return outputs


def _predict_cuda(*arguments) -> tuple[Tensor, ...]:
    return _predict(True, *arguments)


def _predict_cpu(*arguments) -> tuple[Tensor, ...]:
    return _predict(False, *arguments)


# ---- registration ---------------------------------------------------------------------------------------


library.define(
    "slot_head_predict(Tensor states, Tensor rows, Tensor? valid, Tensor? norm_weight, float epsilon, "
    "float scale, int window, float offset, bool probabilities, Tensor? row_scale=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


register("slot_head_predict", slot_head_predict_reference, _predict_cpu, _predict_cuda)


def _predict_outputs(
    states: Tensor, rows: Tensor, window: int, probabilities: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    slots, dtype = states.shape[:-1], accumulator(states)
    return (
        states.new_empty(slots, dtype=torch.int64),
        states.new_empty(slots, dtype=dtype),
        states.new_empty(slots, dtype=dtype),
        states.new_empty(slots if window >= 0 else (0,), dtype=dtype),
        states.new_empty((*slots, rows.shape[1]) if probabilities else (0,), dtype=dtype),
    )


@torch.library.register_fake("visionllm::slot_head_predict", lib=library)
def _predict_fake(
    states, rows, valid, norm_weight, epsilon, scale, window, offset, probabilities, row_scale=None
):
    check("slot_head_predict", states, rows, row_scale, valid, norm_weight)
    return _predict_outputs(states, rows, window, probabilities)


_slot_head_predict = past_dispatcher("slot_head_predict", _predict_cpu)
