"""One evaluation: prompts, predictions, every number, and the files with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visionllm.atomic_file import write_json
from visionllm.evaluate.coco import CocoEvaluation, evaluate_objects
from visionllm.evaluate.confusion import confusion_matrix, confusion_pairs
from visionllm.evaluate.dataset import EvaluationSet, by_image
from visionllm.evaluate.keypoints import flat_keypoints, with_points
from visionllm.evaluate.prediction import PicturePrediction, Wanted, coco_results, predict_set
from visionllm.evaluate.prompts import ClassListing, list_absent, list_all, list_some
from visionllm.evaluate.rejection import Rejection, measure_rejection
from visionllm.evaluate.samples import SampleSet

if TYPE_CHECKING:
    from visionllm.instruction import Template
    from visionllm.pipeline import VisionLLM

COMPARED = {"detection": "boxes", "segmentation": "masks", "keypoints": "keypoints"}  # by task
DEFAULT_POINTS = 16  # of a polygon

ObjectSet = EvaluationSet | SampleSet


@dataclass(frozen=True)
class PromptOptions:
    """How the prompts are made.

    Raises:
        ValueError: keypoints without names, or another task than those of COMPARED.
    """

    template: Template | None = None  # wording; None: the default one
    listed: int | None = None  # classes per prompt, chosen for each picture; None: all of them
    seed: int = 0  # of that choice
    shuffle: int | None = None  # seed of a random class order; None: file order, or the choice's own
    task: str = "detection"  # one of COMPARED
    points: int = DEFAULT_POINTS  # segmentation: of a polygon
    keypoints: tuple[str, ...] = ()  # keypoints: the points' names
    sigmas: tuple[float, ...] | None = None  # keypoints: see `evaluate_objects`

    def __post_init__(self) -> None:
        if self.task not in COMPARED:
            raise ValueError(f"task: expected one of {', '.join(COMPARED)}, got {self.task!r}")
        if (self.task == "keypoints") != bool(self.keypoints):
            raise ValueError(
                f"keypoints: expected names for the task keypoints alone, got {len(self.keypoints)} "
                f"for {self.task}"
            )

    def wanted(self) -> Wanted:
        """What each picture is asked for beside the classes."""
        points = self.points if self.task == "segmentation" else None
        return Wanted(self.task, self.template, points, self.keypoints)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What came out.

    Attributes:
        ground_truth: the data set's content with the objects whose class their picture's prompt lists.
        coco: the COCO numbers of the task and the curves, over the ground truth.
        results: COCO results.
        predictions: the same by picture.
        rejection: None where all the classes were listed.
        boxes: segmentation alone: the numbers of the polygons' extents as boxes.
    """

    ground_truth: dict[str, Any]
    coco: CocoEvaluation
    results: list[dict[str, Any]]
    predictions: list[PicturePrediction]
    rejection: Rejection | None
    boxes: CocoEvaluation | None = None

    @property
    def malformed(self) -> int:
        """Pictures whose answer could not be read."""
        return sum(prediction.error is not None for prediction in self.predictions)


def evaluate(
    model: VisionLLM,
    dataset: ObjectSet,
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
        options: how the prompts are made; None: boxes of all the classes in the default wording.
        batch_size: pictures in one pass.
        done: told the number of pictures after each pass; `passes` says how many there are in all.
    """
    options = options or PromptOptions()
    listings = class_listings(dataset, options)
    images = dataset.images
    predictions = predict_set(model, dataset, images, listings, options.wanted(), batch_size, done)
    results = coco_results(predictions, dataset.category_ids)
    truth = listed_ground_truth(dataset, listings, options.keypoints)
    coco = evaluate_objects(COMPARED[options.task], truth, results, options.sigmas)
    boxes = evaluate_objects("boxes", truth, results) if options.task == "segmentation" else None
    rejection = None
    if options.listed is not None:
        asked = absent_listings(dataset, options)
        absent = predict_set(
            model,
            dataset,
            [image for image, listing in zip(images, asked, strict=True) if listing],
            [listing for listing in asked if listing],
            options.wanted(),
            batch_size,
            done,
        )
        rejection = measure_rejection(predictions, absent, dataset.objects(), dataset.category_ids)
    return Evaluation(truth, coco, results, predictions, rejection, boxes)


def passes(dataset: ObjectSet, options: PromptOptions) -> int:
    """How many pictures `evaluate` will show the model."""
    count = len(dataset.images)
    if options.listed is not None:
        count += sum(listing is not None for listing in absent_listings(dataset, options))
    return count


def class_listings(dataset: ObjectSet, options: PromptOptions) -> list[ClassListing]:
    """Which classes each picture's prompt lists; for keypoints only those that have such points."""
    count = len(dataset.names)
    askable = askable_classes(dataset, options)
    if options.listed is None:
        everything = ClassListing(tuple(sorted(askable))) if len(askable) < count else list_all(count)
        listings = [everything] * len(dataset.images)
    else:
        others = [index for index in range(count) if index not in askable]
        listings = [
            list_some(
                count,
                [index for index in present if index in askable],
                options.listed,
                options.seed,
                image["id"],
                [*unsure_classes(dataset, image), *others],
            )
            for image, present in zip(dataset.images, present_classes(dataset), strict=True)
        ]
    if options.shuffle is not None:
        listings = [listing.shuffled(options.shuffle) for listing in listings]
    return listings


def absent_listings(dataset: ObjectSet, options: PromptOptions) -> list[ClassListing | None]:
    """Prompts of absent classes only; None for a picture that shows every class."""
    assert options.listed is not None, "only asked where a part of the classes is listed"
    count = len(dataset.names)
    others = set(range(count)) - askable_classes(dataset, options)
    return [
        list_absent(
            count,
            present,
            options.listed,
            options.seed,
            image["id"],
            [*unsure_classes(dataset, image), *others],
        )
        for image, present in zip(dataset.images, present_classes(dataset), strict=True)
    ]


def askable_classes(dataset: ObjectSet, options: PromptOptions) -> set[int]:
    """Positions of the categories that have what the task asks for: all, or those with such keypoints."""
    if options.task != "keypoints":
        return set(range(len(dataset.names)))
    ids = with_points(dataset.content["annotations"], options.keypoints)
    return {index for index, category_id in enumerate(dataset.category_ids) if category_id in ids}


def present_classes(dataset: ObjectSet) -> list[list[int]]:
    """Positions of the categories in each picture, crowds included."""
    position = {category_id: index for index, category_id in enumerate(dataset.category_ids)}
    objects = dataset.objects()
    return [sorted({position[e["category_id"]] for e in objects[image["id"]]}) for image in dataset.images]


def unsure_classes(dataset: ObjectSet, image: dict[str, Any]) -> list[int]:
    """Positions of the categories that may be in a picture without a box: its ``not_exhaustive`` ids."""
    unsure = set(image.get("not_exhaustive", ()))
    return [index for index, category_id in enumerate(dataset.category_ids) if category_id in unsure]


def listed_ground_truth(
    dataset: ObjectSet, listings: Sequence[ClassListing], keypoints: Sequence[str] = ()
) -> dict[str, Any]:
    """The data set's content without the objects that their picture's prompt does not list.

    With names of keypoints every object gets its ``keypoints`` in their order.
    """
    listed = {
        (image["id"], dataset.category_ids[index])
        for image, listing in zip(dataset.images, listings, strict=True)
        for index in listing.indices
    }
    kept = [e for e in dataset.content["annotations"] if (e["image_id"], e["category_id"]) in listed]
    if keypoints:
        kept = [{**entry, "keypoints": flat_keypoints(entry, keypoints)} for entry in kept]
    return {**dataset.content, "annotations": kept}


def class_table(dataset: ObjectSet, evaluation: Evaluation) -> list[dict[str, Any]]:
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
    dataset: ObjectSet,
    threshold: float,
    about: dict[str, Any],
    output: Path,
) -> dict[str, Any]:
    """Writes all files into a folder and returns what metrics.json says.

    metrics.json: the COCO numbers, counts, how it was asked, rejection. predictions.json: COCO
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
        "malformed": evaluation.malformed,
        **({"boxes": evaluation.boxes.metrics} if evaluation.boxes is not None else {}),
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
