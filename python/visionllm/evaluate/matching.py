"""Which detection finds which object: the greedy matching of the COCO metrics at one IoU threshold."""

from __future__ import annotations

import numpy as np

IOU_FOUND = 0.5  # from this overlap on a box counts as being on an object


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of all pairs: xyxy ``[n, 4]`` and ``[m, 4]`` to ``[n, m]``; empty boxes: 0."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(axis=2)
    areas = [np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - common
    return np.divide(common, union, out=np.zeros_like(union), where=union > 0)


def match_greedily(iou: np.ndarray, allowed: np.ndarray, threshold: float = IOU_FOUND) -> np.ndarray:
    """Every detection, best first, takes the object it overlaps most among those still free.

    Args:
        iou: ``[n, m]``, detections in descending order of their scores.
        allowed: bool ``[n, m]``, which pairs may match (equal classes, for instance).
        threshold: the least IoU of a match.

    Returns:
        int64 ``[n]``: each detection's object, -1 for none.
    """
    matched = np.full(len(iou), -1, np.int64)
    free = np.ones(iou.shape[1], bool)
    for detection, (overlaps, possible) in enumerate(zip(iou, allowed, strict=True)):
        candidates = np.where(possible & free, overlaps, -1.0)
        if candidates.size and candidates.max() >= threshold:
            matched[detection] = candidates.argmax()
            free[matched[detection]] = False
    return matched
