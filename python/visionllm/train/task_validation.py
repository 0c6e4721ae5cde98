"""Accuracy during a run of the tasks beside detection, on generated scenes: one number a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from visionllm.data.sample import CAPTION_LENGTHS
from visionllm.evaluate.answering import evaluate_answers
from visionllm.evaluate.captioning import evaluate_captions
from visionllm.evaluate.evaluation import PromptOptions, evaluate
from visionllm.evaluate.grounding import evaluate_grounding
from visionllm.evaluate.keypoints import common_names
from visionllm.evaluate.samples import Samples, SampleSet
from visionllm.pipeline import VisionLLM

POINTS = 16  # of outlines
EXPRESSIONS_AT_ONCE = 4
MEASURED = ("segmentation", "grounding", "keypoints", "captioning", "vqa")


class TaskValidation:
    """The tasks' numbers in percent, each by its name: what a run is judged by, from few pictures.

    Args:
        samples: with outlines, keypoints and language as the tasks need them.
        limit: the first so many.
        tasks: some of MEASURED.
        names: class names that a prompt lists.
    """

    def __init__(
        self, samples: Samples, limit: int, tasks: Sequence[str], names: int, batch_size: int
    ) -> None:
        self.dataset = SampleSet(samples, limit)
        self.tasks = [task for task in MEASURED if task in tasks]
        self.names, self.batch_size = names, batch_size

    def __call__(self, network: Any, tasks: Sequence[str]) -> dict[str, float]:
        """The numbers of some of the tasks."""
        model = VisionLLM(network)
        found = {name: value for task in tasks for name, value in self._measure(model, task).items()}
        return {name: 100.0 * value for name, value in found.items() if value is not None}

    def _measure(self, model: VisionLLM, task: str) -> dict[str, float | None]:
        dataset, size = self.dataset, self.batch_size
        if task == "grounding":
            numbers = evaluate_grounding(
                model, dataset, at_once=EXPRESSIONS_AT_ONCE, batch_size=size
            ).to_dict()
            return {f"grounding/{key}": numbers[key] for key in ("P@0.5", "absent_auc")}
        if task == "captioning":
            captions = evaluate_captions(model, dataset, batch_size=size).to_dict()
            found = [captions[length]["CIDEr"] for length in CAPTION_LENGTHS if length in captions]
            return {"captioning/CIDEr": float(np.mean(found))}
        if task == "vqa":
            return {
                "vqa/exact_match": evaluate_answers(model, dataset, batch_size=size).to_dict()["exact_match"]
            }
        keypoints = common_names(dataset.content["annotations"]) if task == "keypoints" else ()
        options = PromptOptions(listed=self.names, task=task, points=POINTS, keypoints=keypoints)
        return {f"{task}/AP": evaluate(model, dataset, options, size).coco.metrics["AP"]}
