"""How much the numbers depend on the wording and on the order of the classes (VisionLLM, Figure 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from visionllm.evaluate.evaluation import (
    COMPARED,
    ObjectSet,
    PromptOptions,
    class_listings,
    listed_ground_truth,
)
from visionllm.evaluate.prediction import coco_results, predict_set

if TYPE_CHECKING:
    from visionllm.pipeline import VisionLLM

CLASS_ORDERS = 2  # random class orders, in the default wording


def robustness_runs(options: PromptOptions) -> list[tuple[str, PromptOptions]]:
    """The evaluation-only descriptions in the given class order, then the random class orders; with names."""
    from visionllm.instruction import EVAL_TEMPLATES

    runs = [
        (f"description {number}", replace(options, template=template))
        for number, template in enumerate(EVAL_TEMPLATES[options.task], start=1)
    ]
    first = 0 if options.shuffle is None else options.shuffle + 1
    runs += [
        (f"class order {seed}", replace(options, shuffle=seed)) for seed in range(first, first + CLASS_ORDERS)
    ]
    return runs


def evaluate_robustness(
    model: VisionLLM,
    dataset: ObjectSet,
    options: PromptOptions,
    batch_size: int = 8,
    done: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:
    """AP under every description and class order.

    Returns:
        ``runs``: name, wording and the COCO numbers of each; ``AP_spread``: the largest AP minus the
        smallest, in points (hundredths); ``AP_min``, ``AP_max`` as fractions.
    """
    from visionllm.evaluate.coco import evaluate_objects

    runs: list[dict[str, Any]] = []
    for name, run in robustness_runs(options):
        listings = class_listings(dataset, run)
        predictions = predict_set(model, dataset, dataset.images, listings, run.wanted(), batch_size, done)
        results = coco_results(predictions, dataset.category_ids)
        truth = listed_ground_truth(dataset, listings, run.keypoints)
        metrics = evaluate_objects(COMPARED[run.task], truth, results, run.sigmas).metrics
        runs.append({"name": name, "wording": run.template.text if run.template else None, **metrics})
    precisions = [run["AP"] for run in runs]
    return {
        "AP_spread": 100 * (max(precisions) - min(precisions)),
        "AP_min": min(precisions),
        "AP_max": max(precisions),
        "runs": runs,
    }
