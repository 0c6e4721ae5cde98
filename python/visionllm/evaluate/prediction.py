"""The model's boxes for every picture of a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from visionllm.evaluate.dataset import EvaluationSet
from visionllm.evaluate.prompts import ClassListing

if TYPE_CHECKING:
    from visionllm.instruction import Template
    from visionllm.pipeline import VisionLLM


@dataclass(frozen=True, eq=False)
class PicturePrediction:
    """What was found in one picture.

    Attributes:
        image_id: the picture's id in the data set.
        listing: the classes its prompt listed.
        xyxy: float32 ``[n, 4]`` in pixels.
        scores: float32 ``[n]``, descending.
        categories: int64 ``[n]``, positions in the data set's categories.
    """

    image_id: int | str
    listing: ClassListing
    xyxy: np.ndarray
    scores: np.ndarray
    categories: np.ndarray


def predict_set(
    model: VisionLLM,
    dataset: EvaluationSet,
    images: Sequence[dict[str, Any]],
    listings: Sequence[ClassListing],
    template: Template | None = None,
    batch_size: int = 8,
    done: Callable[[int], object] = lambda count: None,
) -> list[PicturePrediction]:
    """Every picture with the classes listed for it.

    Args:
        model: a loaded model.
        dataset: where the pictures are read from.
        images: entries of ``dataset.images``.
        listings: the classes of each picture's prompt.
        template: the wording of the prompts; None: the default one.
        batch_size: pictures in one pass.
        done: told the number of pictures after each pass.

    Raises:
        ImageError: a picture is broken; names it.
    """
    from visionllm.pipeline import class_request

    requests = {
        listing: class_request([dataset.names[index] for index in listing.indices], template)
        for listing in set(listings)
    }
    predictions = []
    for start in range(0, len(images), batch_size):
        entries, listed = images[start : start + batch_size], listings[start : start + batch_size]
        pixels = [dataset.read(entry) for entry in entries]
        results = model.run(pixels, [requests[listing] for listing in listed], model.threshold)
        for entry, listing, result in zip(entries, listed, results, strict=True):
            boxes = result.all_boxes
            categories = np.asarray(listing.indices, np.int64)[boxes.labels]
            predictions.append(PicturePrediction(entry["id"], listing, boxes.xyxy, boxes.scores, categories))
        done(len(entries))
    return predictions


def coco_results(
    predictions: Sequence[PicturePrediction], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """The predictions as COCO results: ``image_id``, ``category_id``, ``bbox`` (x, y, w, h), ``score``."""
    results = []
    for prediction in predictions:
        columns = zip(
            prediction.xyxy.tolist(), prediction.scores.tolist(), prediction.categories, strict=True
        )
        for (x1, y1, x2, y2), score, category in columns:
            bbox = [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)]
            results.append(
                {
                    "image_id": prediction.image_id,
                    "category_id": category_ids[category],
                    "bbox": bbox,
                    "score": round(score, 6),
                }
            )
    return results
