"""From the network's detections and texts, in shares of a picture, to results in its pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from visionllm.boxes import Boxes
from visionllm.instruction import MalformedAnswer
from visionllm.result import Result

if TYPE_CHECKING:
    from torch import Tensor

    from visionllm.request import Request

MAX_BOXES = 100  # candidates kept per picture, as the COCO metrics do


def result_of(
    image: np.ndarray, asked: Request, threshold: float, parts: Sequence[Any] | None, text: str | None
) -> Result:
    """One picture's result from its Detections, one for each group of classes, or from its text."""
    if parts is None:
        text = (text or "").strip()
        error = None if text else MalformedAnswer(0, "words", "the end of the answer")
        return Result(image, Boxes.none(), (), asked.instructions, threshold, text=text, error=error)
    absent = [part.absent for part in parts if getattr(part, "absent", None) is not None]
    return Result(
        image,
        _merge(parts, asked, image.shape[1], image.shape[0]),
        asked.classes,
        asked.instructions,
        threshold,
        absent=np.concatenate([_array(one) for one in absent]) if absent else None,
    )


def _merge(parts: Sequence[Any], asked: Request, width: int, height: int) -> Boxes:
    """The groups' Detections of one picture as the best 100 objects in its pixels."""
    offset, labels = 0, []
    for part, group in zip(parts, asked.instructions, strict=True):
        labels.append(part.labels.cpu().numpy() + offset)
        offset += len(group.classes)

    def column(name: str) -> np.ndarray | None:
        values = [_array(value) for part in parts if (value := getattr(part, name, None)) is not None]
        return np.concatenate(values) if len(values) == len(parts) else None

    scores, boxes, centers = column("scores"), column("boxes"), column("centers")
    assert scores is not None and boxes is not None and centers is not None
    order = np.argsort(-scores, kind="stable")[:MAX_BOXES]
    kept = np.concatenate(labels)[order].astype(np.int64)  # [n]
    size = np.array([width, height], np.float32)
    points = column("points") if asked.task in ("segmentation", "keypoints") else None  # [n, N, 2]
    spread, visibility = column("spread"), column("visibility")  # [n, 2N], [n, N, 3]
    return Boxes(
        xyxy=np.clip(boxes[order], 0, 1) * np.tile(size, 2),
        scores=scores[order],
        labels=kept,
        names=[asked.classes[label] for label in kept],
        centers=centers[order],
        points=None if points is None else np.clip(points[order], 0, 1) * size,
        visibility=None if visibility is None else visibility[order],
        spread=None if spread is None else spread[order].reshape(len(order), -1, 2) * size,
    )


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
