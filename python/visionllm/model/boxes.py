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


def distinct(boxes: Tensor, scores: Tensor, most: int, same: float) -> tuple[Tensor, Tensor]:
    """The best boxes of which none repeats a better one, and which of them tells of each box.

    Args:
        boxes: [n, 4] cxcywh; scores: [n].
        most: how many to choose; same: IoU from which on a box repeats another.

    Returns:
        int64 [m ≤ most], the chosen ones, best first, and int64 [n], for every box the position in them of
        the first that it is or repeats, or −1.
    """
    corners = cxcywh_to_xyxy(boxes.float())
    repeats = (overlap(corners[:, None], corners[None])[0] >= same).cpu()
    chosen, which = list[int](), torch.full((len(boxes),), -1)
    for i in scores.argsort(descending=True, stable=True).tolist():
        if len(chosen) == most:
            break
        if which[i] < 0:
            which[(which < 0) & repeats[i]] = len(chosen)
            which[i] = len(chosen)  # boxes without extent do not overlap themselves
            chosen.append(i)
    return torch.tensor(chosen, dtype=torch.int64, device=boxes.device), which.to(boxes.device)


# From where to where a box says again what a better one of its class says (IoU), and lies within another
# (share of its area) that is larger (ratio of areas) and about as sure (ratio of scores).
REPEATED, WITHIN, LARGER, AS_SURE = (0.6, 0.8), (0.8, 0.95), (1.0, 1.25), (0.8, 0.9)


def doubtful_lowered(
    boxes: Tensor, scores: Tensor, labels: Tensor, repeat_factor: float, part_factor: float
) -> tuple[Tensor, Tensor]:
    """Scores and their order after what speaks against boxes beside others of their class.

    Queries do not always agree on which of them tells of an object, and some tell of its part. A box that
    overlaps a better one of its class almost entirely is most often the same object, but may be one behind
    it: its score is lowered, no further for further ones, and the box stays. Of two that are about equally
    sure, one within the other, the larger one is most often the whole object: the other's score is lowered.
    There are no steps: boxes rounded differently score alike.

    Args:
        boxes: [n, 4], corners.
        scores: [n], descending.
        labels: int64 [n].
        repeat_factor, part_factor: what is left of such a score at least, 0 to 1; 1: all of it.

    Returns:
        Scores [n], descending, and int64 [n], where each of them stood.
    """
    if repeat_factor == part_factor == 1:
        return scores, torch.arange(len(scores), device=scores.device)
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    common = (high - low).clamp(min=0).prod(-1)  # [n, n]
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1)
    same = (labels[:, None] == labels[None]).to(scores.dtype)
    again = _ramp(common / (area[:, None] + area[None] - common).clamp(min=1e-9), REPEATED) * same
    own = area[:, None].clamp(min=1e-9)
    within = _ramp(common / own, WITHIN) * _ramp(area[None] / own, LARGER) * same
    part = within * (1 - again) * _ramp(scores[None] / scores[:, None].clamp(min=1e-9), AS_SURE)
    nothing = scores.new_zeros(len(scores), 1)
    repeated = torch.cat([nothing, again.tril(-1)], 1).amax(1)
    partial = torch.cat([nothing, part], 1).amax(1)
    lowered = scores * (1 - (1 - repeat_factor) * repeated) * (1 - (1 - part_factor) * partial)
    return lowered.sort(descending=True, stable=True)


def _ramp(x: Tensor, between: tuple[float, float]) -> Tensor:
    """0 up to the first value, 1 from the second one on, straight in between."""
    return ((x - between[0]) / (between[1] - between[0])).clamp(0, 1)


def inverse_sigmoid(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    """log(x / (1 − x)) with x kept epsilon away from 0 and 1."""
    x = x.clamp(epsilon, 1 - epsilon)
    return torch.log(x / (1 - x))
