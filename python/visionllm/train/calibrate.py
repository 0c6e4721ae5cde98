"""Chooses, on training pictures, how a score is made and from which one a box is shown.

score = objectness^a · class probability^(1 − a) · (probability among all known names)^c. a is the one with
the highest AP while c is 0; c is the largest that costs no more than SPARED_AP against the best c, since more
of it leaves alone more of what is not listed; the threshold is the score with the highest F1 (IoU ≥ 0.5, same
class). All go into config.json; no validation picture is looked at. The model is written as it ships, its
weights in bfloat16.

    python -m visionllm.train.calibrate --model runs/tiny/model --glyphs glyphs --output DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit

from visionllm.data.coco import box_corners
from visionllm.data.photo_augmentation import AugmentedPhotos
from visionllm.evaluate.coco import coco_metrics
from visionllm.evaluate.matching import box_iou, match_greedily
from visionllm.model.config import ModelConfig
from visionllm.model.image_tokenizer import two_stage
from visionllm.model.network import Network
from visionllm.train.validation import ValidationSet

POWERS = (0.15, 0.35, 0.45, 0.55, 0.7, 0.8)
SPARED_AP = 0.0025
ROUTER_VIEWS = 8  # pictures of each kind that it is fitted on, per picture that scores are chosen on
ROUTER_DECAY = 3e-3  # L2 on the weights of standardised features
KNOWN_POWERS = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


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


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one way to make scores gives: means over the sets of AP and of the threshold with the best F1."""

    config: ModelConfig
    precision: float
    threshold: float


def measure(network: Network, config: ModelConfig, sets: Sequence[ValidationSet], batch_size: int) -> Outcome:
    """AP and threshold under another way to make scores; prints them and F1 for each set."""
    original, rows = network.config, []
    network.config = config
    try:
        for one in sets:
            predictions = one.predictions(network, range(len(one.pictures)), batch_size, top=100)
            threshold, f1 = best_threshold(one.ground_truth, predictions)
            rows.append((coco_metrics(one.ground_truth, predictions)["AP"], f1, threshold))
    finally:
        network.config = original
    each = ", ".join(
        f"{one.name}: AP {100 * ap:.1f}, F1 {100 * f1:.1f} at {score:.2f}"
        for one, (ap, f1, score) in zip(sets, rows, strict=True)
    )
    print(f"a = {config.objectness_power:.2f}, c = {config.known_power:.2f}  {each}", file=sys.stderr)
    precision, _, threshold = np.mean(rows, 0)
    return Outcome(config, float(precision), float(threshold))


def calibrate(network: Network, sets: Sequence[ValidationSet], batch_size: int = 8) -> ModelConfig:
    """The network's configuration with the chosen powers and threshold."""
    plain = dataclasses.replace(network.config, known_power=0.0)
    outcomes = [
        measure(network, dataclasses.replace(plain, objectness_power=power), sets, batch_size)
        for power in POWERS
    ]
    best = max(outcomes, key=lambda outcome: (outcome.precision, outcome.config.objectness_power))
    if network.known_names:
        outcomes = [best] + [
            measure(network, dataclasses.replace(best.config, known_power=power), sets, batch_size)
            for power in KNOWN_POWERS
        ]
        least = max(outcome.precision for outcome in outcomes) - SPARED_AP
        best = max(
            (outcome for outcome in outcomes if outcome.precision >= least),
            key=lambda outcome: outcome.config.known_power,
        )
    return dataclasses.replace(best.config, score_threshold=round(best.threshold, 3))


def fit_router(network: Network, photos: Iterable[np.ndarray], drawings: Iterable[np.ndarray]) -> float:
    """Sets the router to tell photos from drawings; returns the share of these pictures that it mistakes.

    Args:
        photos, drawings: pictures, uint8 [S, S, 3].
    """
    tokenizer, rows = two_stage(network.image_tokenizer, "fit_router"), list[torch.Tensor]()
    hook = tokenizer.router.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0]))
    labels = []
    with torch.inference_mode():
        for label, pictures in ((0.0, photos), (1.0, drawings)):
            for picture in pictures:
                tokenizer.pyramid(torch.from_numpy(np.array(picture))[None])
                labels.append(label)
    hook.remove()
    x, y = torch.cat(rows).double().numpy(), np.array(labels)  # [n, C], [n]
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x = np.append((x - mean) / deviation, np.ones((len(x), 1)), axis=1)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        logits, decay = x @ w, ROUTER_DECAY * np.append(w[:-1], 0.0)
        value = np.mean(np.logaddexp(0, logits) - y * logits) + decay @ w / 2
        return value, x.T @ (expit(logits) - y) / len(y) + decay

    w = minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 1000}).x
    weight = w[:-1] / deviation
    with torch.no_grad():
        tokenizer.router.weight.copy_(torch.from_numpy(weight[None]))
        tokenizer.router.bias.fill_(float(w[-1] - mean @ weight))
    return float(np.mean((x @ w > 0) != (y > 0)))


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
        if network.config.keep_pretrained:
            views, rng = AugmentedPhotos(photos, size), np.random.default_rng(arguments.seed)
            drawn = SceneDataset(
                "train",
                seed=arguments.seed,
                size=size,
                glyphs=arguments.glyphs,
                backgrounds=arguments.images,
                background_annotations=arguments.annotations,
            )
            count = ROUTER_VIEWS * arguments.count
            mistaken = fit_router(
                network,
                (views.draw(rng).image for _ in range(count)),
                (drawn[i].image for i in range(count)),
            )
            print(
                f"router: takes {100 * mistaken:.1f} % of {2 * count} pictures for the other kind",
                file=sys.stderr,
            )
    network.config = config = calibrate(network, sets)
    network.save_pretrained(arguments.output, torch.bfloat16)
    print(
        f"objectness_power {config.objectness_power}, known_power {config.known_power}, "
        f"score_threshold {config.score_threshold}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
