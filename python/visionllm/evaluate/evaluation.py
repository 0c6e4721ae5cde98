"""One evaluation: prompts, predictions, every number, and the files with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visionllm.atomic_file import write_json
from visionllm.evaluate.coco import CocoEvaluation, evaluate_boxes
from visionllm.evaluate.confusion import confusion_matrix, confusion_pairs
from visionllm.evaluate.dataset import EvaluationSet, by_image
from visionllm.evaluate.prediction import PicturePrediction, coco_results, predict_set
from visionllm.evaluate.prompts import ClassListing, list_absent, list_all, list_some
from visionllm.evaluate.rejection import Rejection, measure_rejection

if TYPE_CHECKING:
    from visionllm.instruction import Template
    from visionllm.pipeline import VisionLLM


@dataclass(frozen=True)
class PromptOptions:
    """How the prompts are made."""

    template: Template | None = None  # wording; None: the default one
    listed: int | None = None  # classes per prompt, chosen for each picture; None: all of them
    seed: int = 0  # of that choice
    shuffle: int | None = None  # seed of a random class order; None: file order, or the choice's own


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What came out.

    Attributes:
        ground_truth: the data set's content with the objects whose class their picture's prompt lists.
        coco: the twelve numbers and the curves, over the ground truth.
        results: COCO results.
        predictions: the same by picture.
        rejection: None where all the classes were listed.
    """

    ground_truth: dict[str, Any]
    coco: CocoEvaluation
    results: list[dict[str, Any]]
    predictions: list[PicturePrediction]
    rejection: Rejection | None


def evaluate(
    model: VisionLLM,
    dataset: EvaluationSet,
    options: PromptOptions | None = None,
    batch_size: int = 8,
    done: Callable[[int], object] = lambda count: None,
) -> Evaluation:
    """Runs the model over the data set.

    With ``options.listed``, objects whose class a picture's prompt does not list are no ground truth there,
    and the pictures are asked a second time, for absent classes only.

    Args:
        model: a loaded model.
        dataset: pictures and ground truth.
        options: how the prompts are made; None: all the classes in the default wording.
        batch_size: pictures in one pass.
        done: told the number of pictures after each pass; `passes` says how many there are in all.
    """
    options = options or PromptOptions()
    listings = class_listings(dataset, options)
    images = dataset.images
    predictions = predict_set(model, dataset, images, listings, options.template, batch_size, done)
    results = coco_results(predictions, dataset.category_ids)
    truth = listed_ground_truth(dataset, listings)
    coco = evaluate_boxes(truth, results)
    rejection = None
    if options.listed is not None:
        asked = absent_listings(dataset, options)
        absent = predict_set(
            model,
            dataset,
            [image for image, listing in zip(images, asked, strict=True) if listing],
            [listing for listing in asked if listing],
            options.template,
            batch_size,
            done,
        )
        rejection = measure_rejection(predictions, absent, dataset.objects(), dataset.category_ids)
    return Evaluation(truth, coco, results, predictions, rejection)


def passes(dataset: EvaluationSet, options: PromptOptions) -> int:
    """How many pictures `evaluate` will show the model."""
    count = len(dataset.images)
    if options.listed is not None:
        count += sum(listing is not None for listing in absent_listings(dataset, options))
    return count


def class_listings(dataset: EvaluationSet, options: PromptOptions) -> list[ClassListing]:
    """Which classes each picture's prompt lists."""
    count = len(dataset.names)
    if options.listed is None:
        listings = [list_all(count)] * len(dataset.images)
    else:
        listings = [
            list_some(
                count, present, options.listed, options.seed, image["id"], unsure_classes(dataset, image)
            )
            for image, present in zip(dataset.images, present_classes(dataset), strict=True)
        ]
    if options.shuffle is not None:
        listings = [listing.shuffled(options.shuffle) for listing in listings]
    return listings


def absent_listings(dataset: EvaluationSet, options: PromptOptions) -> list[ClassListing | None]:
    """Prompts of absent classes only; None for a picture that shows every class."""
    assert options.listed is not None, "only asked where a part of the classes is listed"
    count = len(dataset.names)
    return [
        list_absent(count, present, options.listed, options.seed, image["id"], unsure_classes(dataset, image))
        for image, present in zip(dataset.images, present_classes(dataset), strict=True)
    ]


def present_classes(dataset: EvaluationSet) -> list[list[int]]:
    """Positions of the categories in each picture, crowds included."""
    position = {category_id: index for index, category_id in enumerate(dataset.category_ids)}
    objects = dataset.objects()
    return [sorted({position[e["category_id"]] for e in objects[image["id"]]}) for image in dataset.images]


def unsure_classes(dataset: EvaluationSet, image: dict[str, Any]) -> list[int]:
    """Positions of the categories that may be in a picture without a box: its ``not_exhaustive`` ids."""
    unsure = set(image.get("not_exhaustive", ()))
    return [index for index, category_id in enumerate(dataset.category_ids) if category_id in unsure]


def listed_ground_truth(dataset: EvaluationSet, listings: Sequence[ClassListing]) -> dict[str, Any]:
    """The data set's content without the objects that their picture's prompt does not list."""
    listed = {
        (image["id"], dataset.category_ids[index])
        for image, listing in zip(dataset.images, listings, strict=True)
        for index in listing.indices
    }
    kept = [e for e in dataset.content["annotations"] if (e["image_id"], e["category_id"]) in listed]
    return {**dataset.content, "annotations": kept}


def class_table(dataset: EvaluationSet, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Name, category id, number of objects, AP and AP50 of every class, best first, empty ones last."""
    objects: dict[Any, int] = {}
    for entry in evaluation.ground_truth["annotations"]:
        if not entry["iscrowd"]:
            objects[entry["category_id"]] = objects.get(entry["category_id"], 0) + 1
    scores = evaluation.coco.class_average_precision()
    table = [
        {
            "name": name,
            "category_id": category_id,
            "objects": objects.get(category_id, 0),
            "AP": scores[category_id][0],
            "AP50": scores[category_id][1],
        }
        for name, category_id in zip(dataset.names, dataset.category_ids, strict=True)
    ]
    return sorted(table, key=lambda row: (-row["AP"], row["name"]))


def write_evaluation(
    evaluation: Evaluation,
    dataset: EvaluationSet,
    threshold: float,
    about: dict[str, Any],
    output: Path,
) -> dict[str, Any]:
    """Writes all files into a folder and returns what metrics.json says.

    metrics.json: the twelve COCO numbers, counts, how it was asked, rejection. predictions.json: COCO
    results. classes.json: the per-class table. precision_recall and confusion, each as .json and .png.

    Args:
        evaluation: what `evaluate` returned.
        dataset: what it was measured on.
        threshold: lowest score that the confusion matrix counts.
        about: how the prompts were made, for metrics.json.
        output: the folder; made where it is missing.
    """
    from visionllm.evaluate.plots import plot_confusion, plot_precision_recall

    objects = by_image(dataset.images, evaluation.ground_truth["annotations"])
    matrix = confusion_matrix(evaluation.predictions, objects, dataset.category_ids, threshold)
    table = class_table(dataset, evaluation)
    metrics = {
        **evaluation.coco.metrics,
        "images": len(dataset.images),
        "objects": sum(row["objects"] for row in table),  # as the per-class table: listed, no crowds
        "categories": len(dataset.names),
        "boxes_per_image_over_threshold": float(
            np.mean([(p.scores >= threshold).sum() for p in evaluation.predictions] or [0])
        ),
        "threshold": threshold,
        **about,
        "rejection": None if evaluation.rejection is None else evaluation.rejection.to_dict(),
    }
    write_json(output / "metrics.json", metrics)
    write_json(output / "predictions.json", evaluation.results, indent=None)
    write_json(output / "classes.json", table)
    write_json(
        output / "confusion.json",
        {"threshold": threshold, "iou": 0.5, "pairs": confusion_pairs(matrix, dataset.names)},
    )
    curves = evaluation.coco.curves()
    write_json(output / "precision_recall.json", curves)
    plot_precision_recall(curves, output / "precision_recall.png")
    plot_confusion(matrix, dataset.names, output / "confusion.png")
    return metrics
