"""Named points of a scene's objects: corners and tips of shapes; extreme points and centre of anything."""

from __future__ import annotations

import math

import numpy as np

from visionllm.data.scenes.compose import Canvas, Posed
from visionllm.data.scenes.shapes import POINTS, TURNS_INTO_ITSELF, shape_points

ANY_POINTS = ("topmost point", "rightmost point", "bottommost point", "leftmost point", "centre")
INWARD = 0.12  # of the way to the centre: where it is looked up whether a point is hidden

Keypoints = dict[str, tuple[float, float, int]]  # name: x, y in pixels; 0 outside, 1 hidden, 2 visible


def point_names(name: str) -> tuple[str, ...]:
    """The points that every object of a class has."""
    return POINTS.get(name.partition(" ")[2], ()) + ANY_POINTS


def keypoints_of(canvas: Canvas, boxes: np.ndarray) -> list[Keypoints]:
    """The named points of every painted object.

    A shape's own points are where it was drawn, whatever is in front of it: visibility is 2, or 1 where
    another object is painted over the point, or 0 beyond the picture (x and y are 0 then).
    The extreme points and the centre are those of the visible pixels and of their box.

    Args:
        boxes: float32 [n, 4] of the painted objects.
    """
    return [_own_points(canvas, k) | _extreme_points(canvas, k, box) for k, box in enumerate(boxes)]


def _own_points(canvas: Canvas, k: int) -> Keypoints:
    shape = str(canvas.kept[k]).partition(" ")[2]
    if shape not in POINTS:
        return {}
    posed = canvas.posed[k]
    places = shape_points(shape) * max(posed.picture)  # [n, 2]
    if posed.mirror and shape in TURNS_INTO_ITSELF:
        places = places * (-1, 1)  # mirroring such a shape changes nothing but which point is which
    points = posed.points(places)
    return {
        name: _visible(canvas, k, points[i], posed)
        for name, i in zip(POINTS[shape], _order(shape, points, posed.angle), strict=True)
    }


def _order(shape: str, points: np.ndarray, angle: float) -> list[int]:
    """Which point has each of the shape's names."""
    count = len(points)
    if shape == "crescent":
        return np.argsort(points[:, 1], kind="stable").tolist()
    if shape not in TURNS_INTO_ITSELF:
        return list(range(count))
    steps = round(angle / (2 * math.pi / count))
    return [(j - steps) % count for j in range(count)]


def _visible(canvas: Canvas, k: int, point: np.ndarray, posed: Posed) -> tuple[float, float, int]:
    x, y = float(point[0]), float(point[1])
    if not (0 <= x <= canvas.size and 0 <= y <= canvas.size):
        return 0.0, 0.0, 0
    inner = (point + INWARD * (posed.centre - point)).astype(int).clip(0, canvas.size - 1)
    owner = int(canvas.owner[inner[1], inner[0]])
    return x, y, 2 if owner in (k, -1) else 1


def _extreme_points(canvas: Canvas, k: int, box: np.ndarray) -> Keypoints:
    x1, y1, x2, y2 = (int(v) for v in box)
    mask = canvas.owner[y1:y2, x1:x2] == k

    def middle(line: np.ndarray) -> float:
        set_pixels = np.flatnonzero(line)
        return float(set_pixels[(len(set_pixels) - 1) // 2]) + 0.5

    points = (
        (x1 + middle(mask[0]), y1),
        (x2, y1 + middle(mask[:, -1])),
        (x1 + middle(mask[-1]), y2),
        (x1, y1 + middle(mask[:, 0])),
        ((x1 + x2) / 2, (y1 + y2) / 2),
    )
    return {name: (float(x), float(y), 2) for name, (x, y) in zip(ANY_POINTS, points, strict=True)}
