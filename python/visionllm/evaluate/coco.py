"""The COCO metrics of boxes, masks and keypoints, computed by pycocotools without its prints.

The numbers and their definitions: https://cocodataset.org/#detection-eval and #keypoints-eval. A number is -1
where the ground truth has nothing to measure (``APs`` of a set without small objects), as pycocotools has it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KEYPOINT_METRIC_NAMES = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")

# What is compared: overlap of boxes or of masks, or the object keypoint similarity (OKS).
KINDS = {"boxes": "bbox", "masks": "segm", "keypoints": "keypoints"}

# sigma of the seventeen points of a COCO person: nose, eyes, ears, shoulders, elbows, wrists, hips, knees,
# ankles (left and right are equal). A point at distance d is similar by exp(-d^2 / 2 (2 sigma)^2 area).
PERSON_SIGMAS = (
    *(0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072),
    *(0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089),
)
DEFAULT_SIGMA = 0.05  # of other points: between a person's eyes and shoulders


@dataclass(frozen=True)
class CocoEvaluation:
    """What one run of pycocotools found.

    Attributes:
        metrics: the twelve numbers, by METRIC_NAMES; of keypoints the ten of KEYPOINT_METRIC_NAMES.
        category_ids: the K categories, in the order of the arrays below.
        precision: float64 ``[10, 101, K]``: IoU 0.50:0.05:0.95, recall 0:0.01:1; all areas, 100 detections a
            picture and category (keypoints: 20); -1 for a category without ground truth.
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
    return evaluate_objects("boxes", ground_truth, predictions)


def evaluate_objects(
    kind: str,
    ground_truth: dict[str, Any],
    predictions: Sequence[dict[str, Any]],
    sigmas: Sequence[float] | None = None,
) -> CocoEvaluation:
    """The COCO metrics of boxes, masks or keypoints.

    Args:
        kind: one of KINDS.
        ground_truth: as for `coco_metrics`. Masks: every annotation has a ``segmentation`` (polygons or RLE),
            every picture ``height`` and ``width``; ``area`` defaults to the mask's. Keypoints: every
            annotation has ``keypoints``, K times x, y, v; objects without a v above 0 are neither missed
            nor false.
        predictions: as for `coco_metrics`, with ``segmentation`` (masks) or ``keypoints`` (K times x, y and
            anything; ``bbox`` defaults to their extent).
        sigmas: keypoints only: K numbers, how exactly each point is to be met; None: PERSON_SIGMAS for 17
            points, else DEFAULT_SIGMA.

    Raises:
        ValueError: as `coco_metrics`; or a segmentation or keypoints are missing or malformed.
    """
    from pycocotools.cocoeval import COCOeval

    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = indexed(kind, ground_truth, ground_truth["annotations"], "annotation")
        detected = indexed(kind, ground_truth, predictions, "prediction")
        evaluation = COCOeval(truth, detected, KINDS[kind])
        if kind == "keypoints":
            evaluation.params.kpt_oks_sigmas = _checked_sigmas(truth, detected, sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        names = KEYPOINT_METRIC_NAMES if kind == "keypoints" else METRIC_NAMES
        if evaluation.params.catIds and evaluation.params.imgIds:
            evaluation.summarize()
            values = [float(value) for value in evaluation.stats]
        else:
            values = [-1.0] * len(names)
    return CocoEvaluation(
        metrics=dict(zip(names, values, strict=True)),
        category_ids=tuple(evaluation.params.catIds),
        precision=evaluation.eval["precision"][:, :, :, 0, -1],
        recall=evaluation.eval["recall"][:, :, 0, -1],
    )


def indexed(kind: str, dataset: dict[str, Any], entries: Sequence[dict[str, Any]], what: str) -> Any:
    """A pycocotools COCO of the data set's pictures and categories and of these entries, checked and copied.

    Ids are given anew from 1: pycocotools takes a match with annotation 0 for no match. ``what`` names the
    entries in errors: "annotation" or "prediction".
    """
    from pycocotools.coco import COCO

    images = {image["id"]: image for image in dataset["images"]}
    category_ids = {category["id"] for category in dataset["categories"]}
    annotations = []
    for position, entry in enumerate(entries):
        name = f"{what} {position}"
        if entry["image_id"] not in images:
            raise ValueError(f"{name}: image_id {entry['image_id']!r} is not in the data set's images")
        if entry["category_id"] not in category_ids:
            raise ValueError(
                f"{name}: category_id {entry['category_id']!r} is not in the data set's categories"
            )
        score = float(entry.get("score", 0.0))
        if not np.isfinite(score):
            raise ValueError(f"{name}: score must be a finite number, got {score}")
        copied = {
            "id": position + 1,
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "iscrowd": int(entry.get("iscrowd", 0)),
            "score": score,
            **_shape(kind, entry, images[entry["image_id"]], name),
        }
        if what == "annotation" and entry.get("area") is not None:
            copied["area"] = float(entry["area"])
        annotations.append(copied)
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": dataset["images"],
        "categories": dataset["categories"],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _shape(kind: str, entry: dict[str, Any], image: dict[str, Any], name: str) -> dict[str, Any]:
    """What is compared, and the area by itself."""
    if kind == "masks":
        from pycocotools import mask as coco_mask

        from visionllm.data.polygons import rle_of

        segmentation = entry.get("segmentation")
        if not segmentation:
            raise ValueError(f"{name}: expected a segmentation, got {segmentation!r}")
        try:
            rle = rle_of(segmentation, image["height"], image["width"])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return {"segmentation": rle, "area": float(coco_mask.area(rle))}
    if kind == "keypoints":
        keypoints = np.asarray(entry.get("keypoints") or [], np.float64)
        if (
            keypoints.ndim != 1
            or not keypoints.size
            or keypoints.size % 3
            or not np.isfinite(keypoints).all()
        ):
            raise ValueError(
                f"{name}: keypoints must be K times three finite numbers, got {entry.get('keypoints')!r}"
            )
        low, high = (edge(keypoints.reshape(-1, 3)[:, :2], axis=0) for edge in (np.min, np.max))
        box = [float(value) for value in entry.get("bbox", [*low, *(high - low)])]
        return {
            "keypoints": keypoints.tolist(),
            "num_keypoints": int((keypoints[2::3] > 0).sum()),
            "bbox": box,
            "area": box[2] * box[3],
        }
    box = [float(value) for value in entry["bbox"]]
    if len(box) != 4 or not np.isfinite(box).all():
        raise ValueError(f"{name}: bbox must be 4 finite numbers, got {entry['bbox']!r}")
    return {"bbox": box, "area": box[2] * box[3]}


def _checked_sigmas(truth: Any, detected: Any, sigmas: Sequence[float] | None) -> np.ndarray:
    """float64 ``[K]``."""
    entries = [*truth.dataset["annotations"], *detected.dataset["annotations"]]
    counts = {len(entry["keypoints"]) // 3 for entry in entries}
    if len(counts) > 1:
        raise ValueError(f"keypoints: expected as many points everywhere, got {sorted(counts)}")
    count = counts.pop() if counts else 1
    if sigmas is None:
        sigmas = PERSON_SIGMAS if count == len(PERSON_SIGMAS) else [DEFAULT_SIGMA] * count
    values = np.asarray(sigmas, np.float64)
    if values.shape != (count,) or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"sigmas: expected {count} positive numbers, one a keypoint, got {list(sigmas)}")
    return values


def _mean_of_valid(precision: np.ndarray) -> float:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else -1.0
