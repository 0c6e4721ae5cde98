"""From the network's detections and texts, in shares of a picture, to results in its pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from visionllm.boxes import Boxes
from visionllm.instruction import MalformedAnswer, parse_answer, pixel_points
from visionllm.instruction.instruction import SET_TASKS
from visionllm.result import Result

if TYPE_CHECKING:
    from torch import Tensor

    from visionllm.instruction import Instruction
    from visionllm.request import Request

MAX_BOXES = 100  # candidates kept per picture, as the COCO metrics do
POINT_TASKS = ("segmentation", "keypoints")  # whose objects have points beside the box
_NO_WORDS = MalformedAnswer(0, "words", "the end of the answer")


def result_of(
    image: np.ndarray, asked: Request, threshold: float, parts: Sequence[Any] | None, text: str | None
) -> Result:
    """One picture's result from its Detections, one for each group of classes, or from its text."""
    if parts is None:
        text = (text or "").strip()
        error = None if text else _NO_WORDS
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


def result_of_answer(
    image: np.ndarray,
    instruction: Instruction,
    text: str,
    centers: np.ndarray | Sequence[Sequence[float]] | None = None,
) -> Result:
    """One picture's result from an answer in words: see `Result.from_answer`."""

    def result(boxes: Boxes, text: str | None = None, error: MalformedAnswer | None = None) -> Result:
        return Result(image, boxes, instruction.classes, (instruction,), 0.0, text=text, error=error)

    if instruction.task not in SET_TASKS:
        text = text.strip()
        return result(Boxes.none(), text, None if text else _NO_WORDS)
    answer = parse_answer(text, instruction)
    if isinstance(answer, MalformedAnswer):
        return result(Boxes.none(), error=answer)
    height, width = image.shape[:2]
    n = len(answer.labels)
    flat = pixel_points(instruction, answer.numbers, (width, height), centers)  # [n, 2N]
    points = flat.reshape(n, instruction.points, 2).astype(np.float32)
    xyxy = np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1)
    middles = (xyxy[:, :2] + xyxy[:, 2:]) / 2 if centers is None else np.asarray(centers, np.float32)
    boxes = Boxes(
        xyxy=xyxy,
        scores=np.ones(n, np.float32),
        labels=answer.labels,
        names=[instruction.classes[label] for label in answer.labels],
        centers=(middles.reshape(n, 2) / (width, height)).astype(np.float32),
        points=points if instruction.task in POINT_TASKS else None,
    )
    return result(boxes)


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
    points = column("points") if asked.task in POINT_TASKS else None  # [n, N, 2]
    spread, visibility = column("spread"), column("visibility")  # [n, 2N], [n, N, 3]
    return Boxes(
        xyxy=np.clip(boxes[order], 0, 1) * np.tile(size, 2),
        scores=scores[order],
        labels=kept,
        names=[asked.classes[label] for label in kept],
        centers=centers[order],
        points=None if points is None else np.clip(points[order], 0, 1) * size,
        visibility=None if visibility is None else visibility[order],
        spread=None if spread is None else spread[order].reshape(len(order), spread.shape[1] // 2, 2) * size,
    )


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
