"""Which class is taken for which: boxes over a score, matched to objects by overlap alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from visionllm.data.coco import box_corners
from visionllm.evaluate.matching import box_iou, match_greedily
from visionllm.evaluate.prediction import PicturePrediction


def confusion_matrix(
    predictions: Sequence[PicturePrediction],
    objects: Mapping[Any, Sequence[dict[str, Any]]],
    category_ids: Sequence[int],
    threshold: float,
) -> np.ndarray:
    """Counts of (true class, said class).

    Args:
        predictions: of every picture.
        objects: COCO annotations of what each picture's prompt lists, by image id. Crowds are left out.
        category_ids: the K categories' ids in the order that predictions count them.
        threshold: lowest score that counts.

    Returns:
        int64 ``[K + 1, K + 1]``: rows are true classes, columns said ones. The last row counts boxes on no
        object, the last column objects without a box.
    """
    count = len(category_ids)
    position = {category_id: index for index, category_id in enumerate(category_ids)}
    matrix = np.zeros((count + 1, count + 1), np.int64)
    for prediction in predictions:
        entries = [entry for entry in objects[prediction.image_id] if not entry["iscrowd"]]
        boxes = box_corners(entries)
        truth = np.array([position[entry["category_id"]] for entry in entries], np.int64)
        shown = prediction.scores >= threshold
        iou = box_iou(prediction.xyxy[shown].astype(np.float64), boxes)
        matched = match_greedily(iou, np.ones(iou.shape, bool))
        said = prediction.categories[shown]
        np.add.at(matrix, (np.where(matched >= 0, np.append(truth, count)[matched], count), said), 1)
        missed = np.setdiff1d(np.arange(len(truth)), matched)
        np.add.at(matrix, (truth[missed], np.full(len(missed), count)), 1)
    return matrix


def confusion_pairs(matrix: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """The counts that are not 0 by name, largest first; None stands for "no object" and "no box"."""
    labels = [*names, None]
    rows, columns = np.nonzero(matrix)
    order = np.argsort(-matrix[rows, columns], kind="stable")
    return [
        {"true": labels[rows[i]], "said": labels[columns[i]], "count": int(matrix[rows[i], columns[i]])}
        for i in order
    ]
