"""How much of the objects a polygon of N points loses: nothing that the model could make good.

Ground truth masks become polygons as in training: the largest part's outer boundary, resampled to N points at
equal arc length. Compared with the whole masks that gives the loss of area, and the mask AP of a model that
said these very polygons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from visionllm.data.polygons import mask_iou, outline_of, polygon_rle, resample, rle_of
from visionllm.evaluate.coco import evaluate_objects


def polygon_loss(ground_truth: dict[str, Any], points: Sequence[int]) -> list[dict[str, float]]:
    """The loss for each number of points.

    Args:
        ground_truth: COCO data set whose pictures have ``width`` and ``height`` and whose annotations have a
            ``segmentation``. Crowds are left out.
        points: numbers of points, from 3 on.

    Returns:
        For each number: ``points``; ``objects``; ``other_parts``: share of the objects' area outside their
        largest part; ``area_lost``: share of the area outside the polygons; ``area_added``: area that is in
        the polygons and not in the objects, as a share of the objects'; ``mean_iou`` of polygon and mask; and
        the mask ``AP``, ``AP50`` and ``AP75`` of these polygons.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    objects = []
    for entry in ground_truth["annotations"]:
        if not entry.get("iscrowd", 0):
            mask = rle_of(entry["segmentation"], *sizes[entry["image_id"]])
            outline, elsewhere = outline_of(entry["segmentation"], *sizes[entry["image_id"]])
            objects.append((entry, mask, outline, elsewhere))
    areas = np.array([float(coco_mask.area(mask)) for _, mask, _, _ in objects])
    total = max(float(areas.sum()), 1.0)
    other_parts = sum(area * elsewhere for area, (*_, elsewhere) in zip(areas, objects, strict=True))
    rows = []
    for count in points:
        inside = np.zeros(len(objects))
        covered, overlap = inside.copy(), inside.copy()
        results = []
        for k, (entry, mask, outline, _) in enumerate(objects):
            if outline is None:
                continue
            polygon = polygon_rle(resample(outline, count), *sizes[entry["image_id"]])
            covered[k] = coco_mask.area(polygon)
            inside[k] = coco_mask.area(coco_mask.merge([polygon, mask], intersect=True))
            overlap[k] = mask_iou([polygon], [mask])[0, 0]
            said = {name: entry[name] for name in ("image_id", "category_id")}
            results.append({**said, "segmentation": polygon, "score": 1.0})
        metrics = evaluate_objects("masks", ground_truth, results).metrics
        rows.append(
            {
                "points": count,
                "objects": len(objects),
                "other_parts": float(other_parts) / total,
                "area_lost": float((areas - inside).sum()) / total,
                "area_added": float((covered - inside).sum()) / total,
                "mean_iou": float(overlap.mean()) if len(objects) else 0.0,
                **{name: metrics[name] for name in ("AP", "AP50", "AP75")},
            }
        )
    return rows
