"""One picture with its objects, as every data source hands it over: before any instruction is attached."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

CAPTION_LENGTHS = ("short", "long", "detailed")
QUESTION_KINDS = ("count", "colour", "position", "yes_no", "comparison")


@dataclass(frozen=True)
class Expression:
    """A referring expression ("the dog left of the red circle").

    Attributes:
        text: the expression.
        objects: positions in `Sample.names` of what it refers to; empty: nothing in the picture fits.
    """

    text: str
    objects: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A question about a picture.

    Attributes:
        text: the question.
        answer: the right answer.
        kind: one of `QUESTION_KINDS` where the questions are generated; a data set's own kinds otherwise.
    """

    text: str
    answer: str
    kind: str = ""


@dataclass
class Sample:
    """A picture and what is in it.

    Attributes:
        image: uint8 RGB ``[H, W, 3]``.
        boxes: float32 ``[n, 4]``, ``x1, y1, x2, y2`` in pixels.
        names: the n objects' class names.
        area: float32 ``[n]``, mask areas in square pixels (COCO's ``area``).
        iscrowd: bool ``[n]``; crowds are never training targets and are ignored by the metrics.
        masks: None, or n entries: COCO RLE dicts or polygons, as the source has them.
        image_id: the source's own identifier.
        vocabulary: every name that this source annotates exhaustively. A name outside it may be in the
            picture without a box, so it must never be listed as an absent class.
        outlines: None, or n entries: float32 ``[P, 2]``, the boundary of the object's largest part in pixels,
            closed from the last point to the first, or None where the object has none
            (`visionllm.data.polygons.outline_of`).
        keypoints: None, or n entries: name to ``(x, y, v)``, x and y in pixels and v as in COCO: 0 not
            labelled (x = y = 0), 1 labelled but hidden, 2 visible.
        expressions: what can be said about single objects.
        captions: references by length, one of `CAPTION_LENGTHS`.
        questions: questions with their answers.
    """

    image: np.ndarray
    boxes: np.ndarray
    names: list[str]
    area: np.ndarray
    iscrowd: np.ndarray
    image_id: int | str
    vocabulary: tuple[str, ...]
    masks: list[Any] | None = None
    outlines: list[np.ndarray | None] | None = None
    keypoints: list[dict[str, tuple[float, float, int]]] | None = None
    expressions: list[Expression] = field(default_factory=list)
    captions: dict[str, list[str]] = field(default_factory=dict)
    questions: list[Question] = field(default_factory=list)
