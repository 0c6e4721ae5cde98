"""The COCO detection metrics, computed by pycocotools without its prints.

The twelve numbers and their definitions: https://cocodataset.org/#detection-eval. A number is -1 where the
ground truth has nothing to measure (``APs`` of a set without small objects), as pycocotools has it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True)
class CocoEvaluation:
    """What one run of pycocotools found.

    Attributes:
        metrics: the twelve numbers, by METRIC_NAMES.
        category_ids: the K categories, in the order of the arrays below.
        precision: float64 ``[10, 101, K]``: IoU 0.50:0.05:0.95, recall 0:0.01:1; all areas, 100 detections a
            picture; -1 for a category without ground truth.
        recall: float64 ``[10, K]``: the highest recall reached.
    """

    metrics: dict[str, float]
    category_ids: tuple[int, ...]
    precision: np.ndarray
    recall: np.ndarray

    def class_average_precision(self) -> dict[int, tuple[float, float]]:
        """(AP, AP50) of each category, by category id; -1 where it has no ground truth."""
        table = {}
        for k, category_id in enumerate(self.category_ids):
            table[category_id] = (
                _mean_of_valid(self.precision[:, :, k]),
                _mean_of_valid(self.precision[0, :, k]),
            )
        return table

    def curves(self) -> dict[str, Any]:
        """Mean precision of the classes with ground truth at each recall, at some IoUs and on average.

        Returns:
            ``recall``: 0:0.01:1; ``classes``: how many; ``curves``: ``iou`` ("0.50", ..., "0.50:0.95" for the
            mean), ``AP`` and ``precision``, one number for each recall; none without ground truth.
        """
        valid = self.precision[:, :, (self.precision > -1).all(axis=(0, 1))]  # [10, 101, classes]
        rows = {"0.50": slice(0, 1), "0.75": slice(5, 6), "0.90": slice(8, 9), "0.50:0.95": slice(None)}
        means = {iou: valid[chosen].mean(axis=(0, 2)) for iou, chosen in rows.items() if valid.shape[2]}
        return {
            "recall": (np.arange(101) / 100).tolist(),
            "classes": valid.shape[2],
            "curves": [
                {"iou": iou, "AP": float(mean.mean()), "precision": mean.tolist()}
                for iou, mean in means.items()
            ],
        }


def coco_metrics(ground_truth: dict[str, Any], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The twelve COCO numbers of boxes.

    Args:
        ground_truth: a COCO data set: ``images`` (``id``), ``categories`` (``id``) and ``annotations``
            (``image_id``, ``category_id``, ``bbox`` as x, y, width, height in pixels; ``area`` defaults to
            the box's, ``iscrowd`` to 0). It is not changed.
        predictions: COCO results: ``image_id``, ``category_id``, ``bbox``, ``score``. May be empty.

    Returns:
        METRIC_NAMES with their values as fractions (0.505, not 50.5); -1 where there is nothing to measure.

    Raises:
        ValueError: a prediction or an annotation names a picture or a category that the data set lacks, or a
            box or score is not finite.
    """
    return evaluate_boxes(ground_truth, predictions).metrics


def evaluate_boxes(ground_truth: dict[str, Any], predictions: Sequence[dict[str, Any]]) -> CocoEvaluation:
    """Like `coco_metrics`, with the precision and recall arrays as well."""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = _indexed(ground_truth, ground_truth["annotations"], "annotation")
        detected = _indexed(ground_truth, predictions, "prediction")
        evaluation = COCOeval(truth, detected, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        if evaluation.params.catIds and evaluation.params.imgIds:
            evaluation.summarize()
            values = [float(value) for value in evaluation.stats]
        else:
            values = [-1.0] * len(METRIC_NAMES)
    return CocoEvaluation(
        metrics=dict(zip(METRIC_NAMES, values, strict=True)),
        category_ids=tuple(evaluation.params.catIds),
        precision=evaluation.eval["precision"][:, :, :, 0, -1],
        recall=evaluation.eval["recall"][:, :, 0, -1],
    )


def _indexed(dataset: dict[str, Any], entries: Sequence[dict[str, Any]], kind: str) -> Any:
    """A pycocotools COCO of the data set's pictures and categories and of these entries, checked and copied.

    Ids are given anew from 1: pycocotools takes a match with annotation 0 for no match.
    """
    from pycocotools.coco import COCO

    image_ids = {image["id"] for image in dataset["images"]}
    category_ids = {category["id"] for category in dataset["categories"]}
    annotations = []
    for position, entry in enumerate(entries):
        if entry["image_id"] not in image_ids:
            raise ValueError(
                f"{kind} {position}: image_id {entry['image_id']!r} is not in the data set's images"
            )
        if entry["category_id"] not in category_ids:
            raise ValueError(
                f"{kind} {position}: category_id {entry['category_id']!r} is not in the data set's categories"
            )
        box = [float(value) for value in entry["bbox"]]
        if len(box) != 4 or not np.isfinite(box).all():
            raise ValueError(f"{kind} {position}: bbox must be 4 finite numbers, got {entry['bbox']!r}")
        score = float(entry.get("score", 0.0))
        if not np.isfinite(score):
            raise ValueError(f"{kind} {position}: score must be a finite number, got {score}")
        area = entry.get("area") if kind == "annotation" else None
        annotations.append(
            {
                "id": position + 1,
                "image_id": entry["image_id"],
                "category_id": entry["category_id"],
                "bbox": box,
                "area": box[2] * box[3] if area is None else float(area),
                "iscrowd": int(entry.get("iscrowd", 0)),
                "score": score,
            }
        )
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": dataset["images"],
        "categories": dataset["categories"],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _mean_of_valid(precision: np.ndarray) -> float:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else -1.0
