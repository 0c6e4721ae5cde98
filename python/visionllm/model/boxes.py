"""Box arithmetic on tensors: formats and overlaps. Coordinates are shares of the picture."""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """[..., 4] centre and size → corners."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (Rezatofighi et al., 1902.09630) of broadcastable corner boxes [..., 4]."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    area_a = (a[..., 2:] - a[..., :2]).clamp(min=0).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1)
    union = area_a + area_b - intersection
    iou = intersection / union.clamp(min=1e-9)
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    hull = (high - low).clamp(min=0).prod(-1)
    return iou, iou - (hull - union) / hull.clamp(min=1e-9)


# IoU from which a box of a class begins to repeat a better one, and from which it wholly does.
REPEATING_FROM, REPEATED_FROM = 0.6, 0.8
REPEATED_FACTOR = 0.5  # of its score


def repeats_lowered(boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and their order after a box that says again what a better one has said counts half.

    Queries do not always agree on which of them tells of an object. A box that overlaps a better one of its
    class almost entirely is most often the same object, but may be a second one behind it: its score is
    lowered, by up to a half and by no more for further ones, and the box stays.

    Args:
        boxes: [n, 4], corners.
        scores: [n], descending.
        labels: int64 [n].

    Returns:
        Scores [n], descending, and int64 [n], where each of them stood.
    """
    repeats = overlap(boxes[:, None], boxes[None])[0] * (labels[:, None] == labels[None])
    most = torch.cat([repeats.new_zeros(len(boxes), 1), repeats.tril(-1)], 1).amax(1)
    share = ((most - REPEATING_FROM) / (REPEATED_FROM - REPEATING_FROM)).clamp(0, 1)
    return (scores * (1 - (1 - REPEATED_FACTOR) * share)).sort(descending=True, stable=True)


def inverse_sigmoid(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    """log(x / (1 − x)) with x kept epsilon away from 0 and 1."""
    x = x.clamp(epsilon, 1 - epsilon)
    return torch.log(x / (1 - x))
