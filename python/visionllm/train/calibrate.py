"""Chooses, on training pictures, how a score is made and from which one a box is shown.

score = objectness^a · class probability^(1 − a): a is the one with the highest AP. The threshold is the score
with the highest F1 (IoU ≥ 0.5, same class). Both go into config.json; no validation picture is looked at. The
model is written as it ships, its weights in bfloat16.

    python -m visionllm.train.calibrate --model runs/tiny/model --glyphs glyphs --output DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from visionllm.data.coco import box_corners
from visionllm.evaluate.coco import coco_metrics
from visionllm.evaluate.matching import box_iou, match_greedily
from visionllm.model.network import Network
from visionllm.train.validation import ValidationSet

POWERS = (0.0, 0.15, 0.25, 0.35, 0.45, 0.55, 0.7)


def best_threshold(
    ground_truth: dict[str, Any], predictions: Sequence[dict[str, Any]]
) -> tuple[float, float]:
    """The score with the highest F1, and that F1 (0, 0 without predictions or objects)."""
    objects: dict[int, list[dict[str, Any]]] = {}
    for entry in ground_truth["annotations"]:
        if not entry["iscrowd"]:
            objects.setdefault(entry["image_id"], []).append(entry)
    answers: dict[int, list[dict[str, Any]]] = {}
    for entry in predictions:
        answers.setdefault(entry["image_id"], []).append(entry)
    scores, hits = [], []
    for image, found in answers.items():
        found = sorted(found, key=lambda entry: -entry["score"])
        there = objects.get(image, [])
        same = np.array([[a["category_id"] == b["category_id"] for b in there] for a in found], bool)
        iou = box_iou(box_corners(found), box_corners(there))
        matched = match_greedily(iou, same.reshape(iou.shape))
        scores += [entry["score"] for entry in found]
        hits += (matched >= 0).tolist()
    total = sum(map(len, objects.values()))
    if not scores or not total:
        return 0.0, 0.0
    order = np.argsort(-np.array(scores), kind="stable")
    true = np.cumsum(np.array(hits)[order])
    f1 = 2 * true / (np.arange(1, len(true) + 1) + total)
    best = int(f1.argmax())
    return float(np.array(scores)[order][best]), float(f1[best])


def calibrate(network: Network, sets: Sequence[ValidationSet], batch_size: int = 8) -> tuple[float, float]:
    """The power with the highest mean AP over the sets, and the mean of their best thresholds under it."""
    original, results = network.config, []
    for power in POWERS:
        network.config = dataclasses.replace(original, objectness_power=power)
        precision, thresholds = [], []
        for one in sets:
            predictions = one.predictions(network, range(len(one.pictures)), batch_size, top=100)
            precision.append(coco_metrics(one.ground_truth, predictions)["AP"])
            thresholds.append(best_threshold(one.ground_truth, predictions))
        results.append((float(np.mean(precision)), power, float(np.mean([score for score, _ in thresholds]))))
        each = ", ".join(
            f"{one.name}: AP {100 * ap:.1f}, F1 {100 * f1:.1f} at {score:.2f}"
            for one, ap, (score, f1) in zip(sets, precision, thresholds, strict=True)
        )
        print(f"a = {power:.2f}  {each}", file=sys.stderr)
    network.config = original
    _, power, threshold = max(results)
    return power, threshold


def main(argv: Sequence[str] | None = None) -> int:
    from visionllm.data.coco import CocoDataset
    from visionllm.data.scenes import SceneDataset

    parser = argparse.ArgumentParser(prog="python -m visionllm.train.calibrate", description=__doc__)
    parser.add_argument("--model", required=True, help="pretrained folder that training wrote")
    parser.add_argument("--output", required=True, help="pretrained folder to write, its weights in bfloat16")
    parser.add_argument("--glyphs", help="glyph atlas (visionllm glyphs); without one: plain shapes only")
    parser.add_argument("--annotations", help="COCO file of training photos")
    parser.add_argument("--images", help="their folder")
    parser.add_argument("--count", type=int, default=150, help="pictures of each kind")
    parser.add_argument("--seed", type=int, default=1, help="of the training scenes; not the run's")
    arguments = parser.parse_args(argv)
    network = Network.from_pretrained(arguments.model)
    size = network.config.image_size
    scenes = SceneDataset("train", seed=arguments.seed, size=size, glyphs=arguments.glyphs)
    sets = [ValidationSet("scenes", scenes, arguments.count, 20, size)]
    if arguments.annotations:
        photos = CocoDataset(arguments.annotations, arguments.images)
        sets.append(ValidationSet("photos", photos, arguments.count, None, size))
    power, threshold = calibrate(network, sets)
    network.config = dataclasses.replace(
        network.config, objectness_power=power, score_threshold=round(threshold, 3)
    )
    network.save_pretrained(arguments.output, torch.bfloat16)
    print(f"objectness_power {power}, score_threshold {threshold:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
