"""Bipartite matching of predictions to objects (Carion et al., 2005.12872), and the proposals of each object.

A cost that is not finite counts as very high. It is no error here: what gave it makes the loss not finite
too, and that is what the training loop looks at.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from visionllm.model.boxes import cxcywh_to_xyxy, overlap

# Deformable DETR's matching costs.
CLASS_COST, L1_COST, GIOU_COST = 2.0, 5.0, 2.0
PROPOSALS_PER_OBJECT = 4
NO_COST = 1e6  # stands for a cost that is not finite


def pair_costs(boxes: Tensor, objectness: Tensor, targets: Tensor) -> Tensor:
    """Cost of pairing every prediction with every object, without its class.

    Args:
        boxes: [B, Q, 4] cxcywh; objectness: [B, Q] logits; targets: [B, N, 4] cxcywh.

    Returns:
        [B, Q, N].
    """
    p = objectness.sigmoid()
    focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
    l1 = torch.cdist(boxes, targets, p=1)
    _, giou = overlap(cxcywh_to_xyxy(boxes)[:, :, None], cxcywh_to_xyxy(targets)[:, None])
    return CLASS_COST * focal[..., None] + L1_COST * l1 - GIOU_COST * giou


def match(cost: Tensor, valid: Tensor) -> Tensor:
    """Least-cost one-to-one assignment.

    Args:
        cost: [B, Q, N]; valid: bool [B, N], which objects exist.

    Returns:
        int64 [B, Q], the object of every prediction, −1 for none.
    """
    result = torch.full(cost.shape[:2], -1, dtype=torch.int64)
    counts = valid.sum(1).tolist()
    # Objects are padded at the end, so the first `count` columns are the ones that exist.
    for b, (rows, count) in enumerate(zip(cost.detach().float().cpu().numpy(), counts, strict=True)):
        if count:
            finite = np.nan_to_num(rows[:, :count], nan=NO_COST, posinf=NO_COST, neginf=NO_COST)
            predictions, objects = linear_sum_assignment(finite)
            result[b, predictions] = torch.from_numpy(objects)
    return result.to(cost.device)


def match_proposals(
    boxes: Tensor, objectness: Tensor, centres: Tensor, targets: Tensor, valid: Tensor
) -> Tensor:
    """Every object takes its few cheapest positions, inner ones first; one that two take keeps the cheaper.

    Args:
        boxes, objectness: [B, S, 4], [B, S]; centres: [S, 2] of the positions.
        targets, valid: [B, N, 4], [B, N].

    Returns:
        int64 [B, S], the object of every position, −1 for none.
    """
    if targets.shape[1] == 0:
        return torch.full(objectness.shape, -1, dtype=torch.int64, device=objectness.device)
    cost = pair_costs(boxes, objectness, targets)  # [B, S, N]
    distance = (centres[None, :, None] - targets[:, None, :, :2]).abs()
    outside = (distance > targets[:, None, :, 2:] / 2).any(-1)
    cost = cost + 100.0 * outside
    cost = cost.masked_fill(~valid[:, None], float("inf"))
    chosen = cost.topk(min(PROPOSALS_PER_OBJECT, cost.shape[1]), dim=1, largest=False).indices
    taken = torch.full_like(cost, float("inf")).scatter(1, chosen, cost.gather(1, chosen))
    least, owner = taken.min(-1)
    return torch.where(least.isfinite(), owner, -1)
