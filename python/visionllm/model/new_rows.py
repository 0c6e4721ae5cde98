"""What an LLM that was trained elsewhere reads for the first time, at the scale of what it knows.

Class tokens, the format's tokens and image tokens are drawn for embeddings of standard deviation 0.5, the
default model's. Published embeddings are smaller (SmolLM2-135M's: 0.10 around their mean): a row of 0.5 among
them would drown what the blocks add to it.

    row = mean of the published rows + (their standard deviation / 0.5) · drawn row

so that a new row is at first like any other (Hewitt, "Initializing New Word Embeddings for Pretrained
Language Models", 2021); what is added to such rows, W_q e_i and the like, shrinks by the same factor.
Published rows stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from visionllm.model.slots import SlotHead, SlotQueries

DRAWN_STD = 0.5
QUIET = 0.01  # of a head's rows as they are drawn
ROWS_AT_ONCE = 4096  # in fp32: LLaMA's 32000 × 4096 would be half a gigabyte


@torch.no_grad()
def fit_new_rows(published: Tensor, class_tokens: nn.Embedding, slot_queries: SlotQueries) -> float:
    """Once, after the published rows are there and before anything is trained.

    Args:
        published: embeddings [V, C] of any floating-point type.

    Returns:
        the factor.

    Raises:
        ValueError: the rows are of another width, not finite, or all the same.
    """
    dim = class_tokens.weight.shape[1]
    if published.ndim != 2 or published.shape[1] != dim or len(published) == 0:
        raise ValueError(f"fit_new_rows: published must be [V, {dim}], got {list(published.shape)}")
    total, squares = torch.zeros(dim, dtype=torch.float64), 0.0
    for rows in published.split(ROWS_AT_ONCE):
        rows = rows.float().cpu()
        total += rows.sum(0, dtype=torch.float64)
        squares += float(rows.square().sum(dtype=torch.float64))
    mean = total / len(published)
    std = (squares / published.numel() - float(mean.square().mean())) ** 0.5
    if not std > 0 or std == float("inf"):
        raise ValueError(
            f"fit_new_rows: published must be finite and vary, got a standard deviation of {std}"
        )
    factor = std / DRAWN_STD
    for embedding in (class_tokens, slot_queries.format, slot_queries.axis):
        weight = embedding.weight
        weight.mul_(factor).add_(mean.to(weight))
    for linear in (
        slot_queries.place,
        slot_queries.point_name,
        slot_queries.feature,
        slot_queries.position,
        slot_queries.objectness,
    ):
        linear.weight.mul_(factor)
        if linear.bias is not None:
            linear.bias.mul_(factor)
    return factor


@torch.no_grad()
def start_slot_head(head: SlotHead) -> None:
    """Has the slots' head say next to nothing at first, whatever the published states' scale is.

    Not nothing at all: then no gradient would reach the adapters in the first step.
    """
    head.class_query.weight.mul_(QUIET)
    head.locations.mul_(QUIET)
