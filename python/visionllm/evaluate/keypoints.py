"""Which named points of objects an evaluation of keypoints asks for, and the ground truth of these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def common_names(annotations: Iterable[dict[str, Any]]) -> tuple[str, ...]:
    """The points that every object with points has, in the first one's order.

    Args:
        annotations: of `SampleSet.content`: their ``named_keypoints`` are name to x, y, v.

    Raises:
        ValueError: no object has points, or there is no point that all of them have.
    """
    points = [entry["named_keypoints"] for entry in annotations if entry.get("named_keypoints")]
    if not points:
        raise ValueError("keypoints: expected objects with named points, got none that has any")
    names = tuple(name for name in points[0] if all(name in others for others in points))
    if not names:
        raise ValueError("keypoints: no point is named in all objects; say which ones to ask for")
    return names


def with_points(annotations: Iterable[dict[str, Any]], names: Sequence[str]) -> set[int]:
    """The categories of the objects in which one of these points is labelled.

    Raises:
        ValueError: there is no such object.
    """
    found = {
        entry["category_id"]
        for entry in annotations
        if any(entry.get("named_keypoints", {}).get(name, (0, 0, 0))[2] for name in names)
    }
    if not found:
        raise ValueError(f"keypoints: no object has one of the points {', '.join(map(repr, names))}")
    return found


def flat_keypoints(annotation: dict[str, Any], names: Sequence[str]) -> list[float]:
    """x1, y1, v1, ... in the order of the names; 0, 0, 0 for a point that the object lacks."""
    points = annotation.get("named_keypoints", {})
    return [float(value) for name in names for value in points.get(name, (0, 0, 0))]
