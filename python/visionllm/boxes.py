"""The objects found in one picture, best first: boxes, and the points of polygons and keypoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np


class Box(NamedTuple):
    """One object: ``xyxy`` in pixels, score in 0..1, class index and name."""

    xyxy: tuple[float, float, float, float]
    score: float
    label: int
    name: str


@dataclass(frozen=True, eq=False)
class Boxes:
    """n objects, best first.

    Attributes:
        xyxy: float32 ``[n, 4]``, x1, y1, x2, y2 in pixels of the picture.
        scores: float32 ``[n]``, descending.
        labels: int64 ``[n]``, positions in the result's ``classes``.
        names: the n class names.
        centers: float32 ``[n, 2]``, x, y in 0..1 of the picture: the points l_i that offsets count from.
        points: float32 ``[n, N, 2]``, x, y in pixels: a polygon's corners or the keypoints; None for boxes.
        visibility: float32 ``[n, N, 3]``, keypoints only: the probabilities of COCO's 0 (not in the
            picture), 1 (hidden) and 2 (visible).
        spread: float32 ``[n, N, 2]``, standard deviation of each coordinate in pixels, from the
            distribution over its location tokens; for boxes N = 2, the corners. None where the network
            does not say it.
    """

    xyxy: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: list[str]
    centers: np.ndarray
    points: np.ndarray | None = None
    visibility: np.ndarray | None = None
    spread: np.ndarray | None = None

    @classmethod
    def none(cls) -> Boxes:
        """No objects: what a result in words has."""
        floats = np.zeros(0, np.float32)
        return cls(floats.reshape(0, 4), floats, np.zeros(0, np.int64), [], floats.reshape(0, 2))

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Box]:
        return (self.box(index) for index in range(len(self)))

    def box(self, index: int) -> Box:
        """One of the objects."""
        x1, y1, x2, y2 = (float(value) for value in self.xyxy[index])
        return Box((x1, y1, x2, y2), float(self.scores[index]), int(self.labels[index]), self.names[index])

    def first(self, count: int) -> Boxes:
        """The ``count`` best objects."""
        return self.select(np.arange(min(count, len(self))))

    def select(self, index: np.ndarray) -> Boxes:
        """Some of the objects, by their positions (int ``[m]``) in ascending order."""
        columns = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "names"}
        chosen: dict[str, Any] = {
            name: None if values is None else values[index] for name, values in columns.items()
        }
        return replace(self, names=[self.names[place] for place in index], **chosen)

    def answer_points(self) -> np.ndarray:
        """float32 ``[n, 2 N]`` in pixels, as the instruction language has them: x1, y1, ..., xN, yN."""
        return self.xyxy if self.points is None else self.points.reshape(len(self), 2 * self.points.shape[1])

    def keypoints(self) -> np.ndarray | None:
        """float32 ``[n, N, 3]``: x, y in pixels and COCO's v (0, 1 or 2, the likeliest), 2 where unknown."""
        if self.points is None:
            return None
        flags = np.full(self.points.shape[:2], 2.0, np.float32)
        if self.visibility is not None:
            flags = self.visibility.argmax(axis=2).astype(np.float32)
        return np.concatenate([self.points, flags[..., None]], axis=2)
