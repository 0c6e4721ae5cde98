"""Does the model leave alone what the prompt does not ask for?

Measured at the score where 80 % of the listed objects are found: the share of objects of classes that were
not listed which get a box, and the share of pictures that show a box although their prompt lists absent
classes only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from visionllm.data.coco import box_corners
from visionllm.evaluate.matching import IOU_FOUND, box_iou, match_greedily
from visionllm.evaluate.prediction import PicturePrediction

FOUND_SHARE = 0.8


@dataclass(frozen=True)
class Rejection:
    """Counts and rates; a rate is None where there is nothing to count or no such score exists.

    Attributes:
        score: the highest score at which FOUND_SHARE of the listed objects are found.
        listed_objects, listed_found: objects whose class was listed; those found at any score.
        unlisted_objects, unlisted_boxed: objects whose class was not listed; those with a box at ``score``.
        absent_pictures, absent_shown: pictures asked for absent classes only; those with a box at ``score``.
    """

    score: float | None
    listed_objects: int
    listed_found: int
    unlisted_objects: int
    unlisted_boxed: int | None
    absent_pictures: int
    absent_shown: int | None

    def to_dict(self) -> dict[str, float | int | None]:
        """The counts and the two rates."""
        return {
            "score": self.score,
            "listed_objects": self.listed_objects,
            "listed_found": self.listed_found,
            "unlisted_objects": self.unlisted_objects,
            "unlisted_boxed": self.unlisted_boxed,
            "unlisted_boxed_rate": _rate(self.unlisted_boxed, self.unlisted_objects),
            "absent_pictures": self.absent_pictures,
            "absent_shown": self.absent_shown,
            "absent_shown_rate": _rate(self.absent_shown, self.absent_pictures),
        }


def measure_rejection(
    predictions: Sequence[PicturePrediction],
    absent_predictions: Sequence[PicturePrediction],
    objects: Mapping[Any, Sequence[dict[str, Any]]],
    category_ids: Sequence[int],
) -> Rejection:
    """Counts for prompts that list a part of the classes.

    Args:
        predictions: for prompts that list present and absent classes.
        absent_predictions: for prompts that list absent classes only.
        objects: each picture's COCO annotations, by image id. Crowds are left out.
        category_ids: the categories' ids in the order that predictions count them.
    """
    found_scores: list[float] = []  # of the listed objects that were found
    listed_objects = 0
    box_on_unlisted: list[float] = []  # best score on each unlisted object, -1 without a box
    position = {category_id: index for index, category_id in enumerate(category_ids)}
    for prediction in predictions:
        entries = [entry for entry in objects[prediction.image_id] if not entry["iscrowd"]]
        boxes = box_corners(entries)
        categories = np.array([position[entry["category_id"]] for entry in entries], np.int64)
        is_listed = np.isin(categories, prediction.listing.indices)
        iou = box_iou(prediction.xyxy.astype(np.float64), boxes)  # [n, m]
        matched = match_greedily(iou, prediction.categories[:, None] == categories)
        listed_objects += int(is_listed.sum())
        found_scores += prediction.scores[matched >= 0].tolist()
        # A box that rightly marks a listed object is no box of an unlisted one beneath it.
        astray = matched < 0
        for m in np.flatnonzero(~is_listed):
            on_it = prediction.scores[astray & (iou[:, m] >= IOU_FOUND)]
            box_on_unlisted.append(float(on_it.max()) if on_it.size else -1.0)
    needed = math.ceil(FOUND_SHARE * listed_objects)
    score = sorted(found_scores, reverse=True)[needed - 1] if 0 < needed <= len(found_scores) else None
    absent_best = [float(p.scores.max()) if p.scores.size else -1.0 for p in absent_predictions]
    return Rejection(
        score=score,
        listed_objects=listed_objects,
        listed_found=len(found_scores),
        unlisted_objects=len(box_on_unlisted),
        unlisted_boxed=None if score is None else sum(best >= score for best in box_on_unlisted),
        absent_pictures=len(absent_best),
        absent_shown=None if score is None else sum(best >= score for best in absent_best),
    )


def _rate(count: int | None, total: int) -> float | None:
    return count / total if count is not None and total else None
