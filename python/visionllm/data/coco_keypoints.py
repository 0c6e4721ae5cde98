"""Keypoints of objects as COCO writes them: names in the category, ``x, y, v`` by name in the annotation."""

from __future__ import annotations

from typing import Any

from visionllm.data.report import Report

# Name to x, y in pixels and v: 0 not labelled (x = y = 0), 1 labelled but hidden, 2 visible.
Points = dict[str, tuple[float, float, int]]


def keypoint_names(content: dict[str, Any], report: Report) -> dict[str, tuple[str, ...]]:
    """The points' names by category name, of the usable categories that have points."""
    categories = [content["categories"][index] for index in report.categories]
    return {
        category["name"]: tuple(category["keypoints"]) for category in categories if category.get("keypoints")
    }


def points_by_annotation(content: dict[str, Any], report: Report) -> dict[Any, Points]:
    """The points of the usable annotations that have some, by annotation id."""
    categories = [content["categories"][index] for index in report.categories]
    names = {category["id"]: category.get("keypoints", ()) for category in categories}
    found: dict[Any, Points] = {}
    for index in report.annotations:
        entry = content["annotations"][index]
        if names[entry["category_id"]] and "keypoints" in entry:
            found[entry["id"]] = _points(names[entry["category_id"]], entry["keypoints"])
    return found


def _points(names: list[str], flat: list[float]) -> Points:
    points: Points = {}
    for number, name in enumerate(names):
        x, y, flag = flat[3 * number : 3 * number + 3]
        points[name] = (float(x), float(y), int(flag)) if flag else (0.0, 0.0, 0)
    return points
