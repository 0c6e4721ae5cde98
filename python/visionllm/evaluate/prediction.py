"""The model's boxes, polygons or keypoints for every picture of a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from visionllm.evaluate.prompts import ClassListing

if TYPE_CHECKING:
    from visionllm.evaluate.dataset import EvaluationSet
    from visionllm.evaluate.samples import SampleSet
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
        polygons: float32 ``[n, N, 2]`` in pixels, of the task segmentation.
        keypoints: float32 ``[n, N, 3]``, x and y in pixels and v, of the task keypoints.
        size: width and height of the picture in pixels.
        error: why the model's answer could not be read; None where it could.
    """

    image_id: int | str
    listing: ClassListing
    xyxy: np.ndarray
    scores: np.ndarray
    categories: np.ndarray
    polygons: np.ndarray | None = None
    keypoints: np.ndarray | None = None
    size: tuple[int, int] = (0, 0)
    error: str | None = None


@dataclass(frozen=True)
class Wanted:
    """What is asked for beside the classes.

    Attributes:
        task: detection, segmentation or keypoints.
        template: the wording of the prompts; None: the task's default one.
        points: of a polygon.
        keypoints: the points' names.
    """

    task: str = "detection"
    template: Template | None = None
    points: int | None = None
    keypoints: tuple[str, ...] = ()


def predict_set(
    model: VisionLLM,
    dataset: EvaluationSet | SampleSet,
    images: Sequence[dict[str, Any]],
    listings: Sequence[ClassListing],
    wanted: Wanted | None = None,
    batch_size: int = 8,
    done: Callable[[int], object] = lambda count: None,
) -> list[PicturePrediction]:
    """Every picture with the classes listed for it.

    Args:
        model: a loaded model.
        dataset: where the pictures are read from.
        images: entries of ``dataset.images``.
        listings: the classes of each picture's prompt.
        wanted: task and form; None: boxes, in the default wording.
        batch_size: pictures in one pass.
        done: told the number of pictures after each pass.

    Raises:
        ImageError: a picture is broken; names it.
    """
    from visionllm.request import class_request

    wanted = wanted or Wanted()
    requests = {
        listing: class_request(
            [dataset.names[index] for index in listing.indices],
            wanted.template,
            task=wanted.task,
            points=wanted.points,
            keypoints=wanted.keypoints,
        )
        for listing in set(listings)
    }
    predictions = []
    for start in range(0, len(images), batch_size):
        entries, listed = images[start : start + batch_size], listings[start : start + batch_size]
        pixels = [dataset.read(entry) for entry in entries]
        results = model.run(pixels, [requests[listing] for listing in listed], model.threshold)
        for entry, listing, result in zip(entries, listed, results, strict=True):
            boxes = result.all_boxes
            predictions.append(
                PicturePrediction(
                    entry["id"],
                    listing,
                    boxes.xyxy,
                    boxes.scores,
                    np.asarray(listing.indices, np.int64)[boxes.labels],
                    boxes.points if wanted.task == "segmentation" else None,
                    boxes.keypoints() if wanted.task == "keypoints" else None,
                    (result.width, result.height),
                    None if result.error is None else str(result.error),
                )
            )
        done(len(entries))
    return predictions


def coco_results(
    predictions: Sequence[PicturePrediction], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """The predictions as COCO results: ``image_id``, ``category_id``, ``bbox`` (x, y, w, h), ``score``.

    Polygons also have ``segmentation`` (compressed RLE) and keypoints ``keypoints`` (N times x, y, v).
    """
    results = []
    for prediction in predictions:
        columns = zip(
            prediction.xyxy.tolist(), prediction.scores.tolist(), prediction.categories, strict=True
        )
        for index, ((x1, y1, x2, y2), score, category) in enumerate(columns):
            entry: dict[str, Any] = {
                "image_id": prediction.image_id,
                "category_id": category_ids[category],
                "bbox": [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)],
                "score": round(score, 6),
            }
            if prediction.polygons is not None:
                entry["segmentation"] = _rle(prediction.polygons[index], prediction.size)
            if prediction.keypoints is not None:
                entry["keypoints"] = [
                    round(value, 3) for value in prediction.keypoints[index].ravel().tolist()
                ]
            results.append(entry)
    return results


def _rle(polygon: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """Compressed RLE with the counts as text, as JSON needs them."""
    from visionllm.data.polygons import polygon_rle

    width, height = size
    rle = polygon_rle(polygon, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}
