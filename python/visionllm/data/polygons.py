"""Outlines of objects: from masks and COCO segmentations to boundary points, and back to masks.

Coordinates are continuous pixels, as in COCO: pixel (column x, row y) covers [x, x+1] × [y, y+1].
An outline is float32 ``[P, 2]`` of x, y, closed from its last point to its first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import contourpy
import numpy as np
from pycocotools import mask as coco_mask

LEAST_POINTS = 3


def signed_area(outline: np.ndarray) -> float:
    """Area of an outline ``[P, 2]`` in square pixels (shoelace); positive if clockwise on the screen."""
    points = np.asarray(outline, np.float64)
    x, y = (points - points[0]).T
    return 0.5 * float(x @ np.roll(y, -1) - y @ np.roll(x, -1))


def outline_of(segmentation: Any, height: int, width: int) -> tuple[np.ndarray | None, float]:
    """The boundary of an object's largest part.

    Args:
        segmentation: a mask ``[height, width]`` (bool or 0/1), COCO RLE (a dict, compressed or not), or COCO
            polygons (a list of flat lists ``x1, y1, x2, y2, …``).

    Returns:
        The outer boundary, float32 ``[P, 2]`` in the source's own points, P ≥ 3, or None if nothing encloses
        an area; and the share of the object's area that lies in other parts (1.0 without an outline). Holes
        are not part of the area, but an outline cannot leave them out.

    Raises:
        ValueError: a mask of another size, or something that is none of the three.
    """
    if isinstance(segmentation, (list, tuple)):
        parts = [_polygon(flat) for flat in segmentation]
        areas = [abs(signed_area(part)) if len(part) >= LEAST_POINTS else 0.0 for part in parts]
    else:
        parts, areas = _parts(mask_of(segmentation, height, width))
    total = sum(areas)
    if total <= 0:
        return None, 1.0
    largest = int(np.argmax(areas))
    return parts[largest].astype(np.float32), 1.0 - areas[largest] / total


def _polygon(flat: Any) -> np.ndarray:
    points = np.asarray(flat, np.float64)
    if points.ndim == 1 and points.size % 2 == 0:
        points = points.reshape(-1, 2)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise ValueError(
            "polygon: expected an even number of finite coordinates x1, y1, …, got " + _short(flat)
        )
    return points


def _parts(mask: np.ndarray) -> tuple[list[np.ndarray], list[float]]:
    """Outer boundaries of a mask's connected parts, and their areas without holes."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return [], []
    top, left = rows[0], columns[0]
    window = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1], 1).astype(np.float32)
    generator = contourpy.contour_generator(z=window, fill_type=contourpy.FillType.OuterOffset)
    filled: Any = generator.filled(0.5, np.inf)  # points of each part, and where each part's rings begin
    parts, areas = [], []
    for vertices, bounds in zip(*filled, strict=True):
        rings = [vertices[a : b - 1] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]  # last = first
        # samples stand at the pixels' centres; the padding is one pixel
        parts.append(rings[0] + (left - 0.5, top - 0.5))
        areas.append(abs(signed_area(rings[0])) - sum(abs(signed_area(hole)) for hole in rings[1:]))
    return parts, areas


def resample(outline: np.ndarray, count: int) -> np.ndarray:
    """``count`` points at equal arc length along an outline: the polygon that instance segmentation asks for.

    Args:
        outline: ``[P, 2]``, P ≥ 1, of finite numbers.
        count: at least 1.

    Returns:
        float32 ``[count, 2]``, clockwise on the screen (y points down) from the outline's topmost point; of
        several, the leftmost.
    """
    points = np.asarray(outline, np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points) or not np.isfinite(points).all():
        raise ValueError(f"outline: expected finite points of shape [P, 2], P ≥ 1, got {_short(outline)}")
    if count < 1:
        raise ValueError(f"count: expected at least 1 point, got {count}")
    if signed_area(points) < 0:
        points = points[::-1]
    points = np.roll(points, -np.lexsort((points[:, 0], points[:, 1]))[0], axis=0)
    closed = np.concatenate([points, points[:1]])
    length = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))])
    at = np.arange(count) * (length[-1] / count)
    return np.stack([np.interp(at, length, closed[:, k]) for k in (0, 1)], axis=1).astype(np.float32)


def clip_outline(outline: np.ndarray, width: float, height: float) -> np.ndarray | None:
    """The part of an outline ``[P, 2]`` within a picture (Sutherland and Hodgman 1974), or None.

    Parts that are separate within the picture stay joined along its border.
    """
    points = np.asarray(outline, np.float64)
    for axis, limit, sign in ((0, 0.0, 1), (0, width, -1), (1, 0.0, 1), (1, height, -1)):
        depth = sign * (points[:, axis] - limit)  # how far inside
        if (depth >= 0).all():
            continue
        following = np.roll(points, -1, 0)
        beyond = np.roll(depth, -1)
        inside, crosses = depth >= 0, (depth >= 0) != (beyond >= 0)
        share = np.divide(depth, depth - beyond, out=np.zeros_like(depth), where=crosses)
        crossing = points + share[:, None] * (following - points)
        both = np.stack([points, crossing], 1)  # [P, 2, 2], a point and what follows it on the border
        points = both[np.stack([inside, crosses], 1)]
        if len(points) < LEAST_POINTS:
            return None
    return points.astype(np.float32) if abs(signed_area(points)) > 0 else None


def mask_of(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The mask, bool ``[height, width]``, of a segmentation as `outline_of` takes it."""
    if isinstance(segmentation, np.ndarray) and segmentation.ndim == 2:
        if segmentation.shape != (height, width):
            raise ValueError(f"mask: expected shape [{height}, {width}], got {list(segmentation.shape)}")
        return segmentation.astype(bool)
    return coco_mask.decode(rle_of(segmentation, height, width)).astype(bool)


def rle_of(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Compressed COCO RLE of a segmentation as `outline_of` takes it; polygons are merged into one mask."""
    if isinstance(segmentation, np.ndarray) and segmentation.ndim == 2:
        mask = mask_of(segmentation, height, width)
        return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
            raise ValueError(f"RLE: expected size [{height}, {width}], got {size}")
        if isinstance(counts, (str, bytes)):
            return segmentation
        if isinstance(counts, list):
            return coco_mask.frPyObjects(segmentation, height, width)
        raise ValueError(f"RLE: expected counts as a list or a string, got {_short(counts)}")
    if isinstance(segmentation, (list, tuple)):
        parts = [_polygon(flat) for flat in segmentation]
        return polygon_rle([part for part in parts if len(part) >= LEAST_POINTS], height, width)
    raise ValueError(
        f"segmentation: expected a mask [{height}, {width}], RLE or polygons, got {_short(segmentation)}"
    )


def polygon_rle(polygons: np.ndarray | Sequence[np.ndarray], height: int, width: int) -> dict[str, Any]:
    """Compressed COCO RLE of one polygon ``[N, 2]``, or of several that make one object; N ≥ 3 each."""
    if isinstance(polygons, np.ndarray) and polygons.ndim == 2:
        polygons = [polygons]
    for polygon in polygons:
        if polygon.ndim != 2 or polygon.shape[1] != 2 or len(polygon) < LEAST_POINTS:
            raise ValueError(f"polygon: expected shape [N, 2], N ≥ 3, got {list(polygon.shape)}")
    if not len(polygons):
        return coco_mask.encode(np.zeros((height, width), np.uint8, order="F"))
    flat = [np.asarray(polygon, np.float64).reshape(-1).tolist() for polygon in polygons]
    return coco_mask.merge(coco_mask.frPyObjects(flat, height, width))


def mask_iou(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> np.ndarray:
    """Intersection over union of two lists of compressed RLE: float64 ``[len(first), len(second)]``."""
    if not len(first) or not len(second):
        return np.zeros((len(first), len(second)))
    return np.asarray(coco_mask.iou(list(first), list(second), [0] * len(second)), np.float64)


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of shape {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
