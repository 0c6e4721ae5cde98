"""Chooses, on training pictures, how a score is made and from which one a box is shown.

score = objectness^a · class probability^(1 − a) · (probability among all known names)^c. Of all a and c that
cost no more than SPARED_AP against the best, those are taken under which the fewest pictures show a box when
they are asked for absent names only, at the score where 80 % of the objects are found. Boxes that repeat
others or tell of parts count less (model/boxes.py), unless that costs AP. The threshold is the score with the
highest F1 (IoU ≥ 0.5, same class). All go into config.json; no validation picture is looked at. The model is
written as it ships, its weights in bfloat16; with --classifier it gets a photo classifier first
(train/photo_classifier.py).

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
from visionllm.data.sample import Sample
from visionllm.evaluate.coco import coco_metrics
from visionllm.evaluate.matching import box_iou, match_greedily
from visionllm.evaluate.rejection import FOUND_SHARE
from visionllm.image import network_batch
from visionllm.model.boxes import doubtful_lowered
from visionllm.model.config import ModelConfig
from visionllm.model.groups import find_groups
from visionllm.model.image_tokenizer import two_stage
from visionllm.model.network import Network
from visionllm.model.scores import combined
from visionllm.train.build import backbone_weights
from visionllm.train.photo_classifier import add_classifier
from visionllm.train.validation import Samples, ValidationSet

TOP = 100  # boxes kept per picture
POWERS = (0.15, 0.35, 0.45, 0.55, 0.7, 0.8)
SPARED_AP = 0.0025
REPEAT_FACTOR, PART_FACTOR = 0.5, 0.8
LISTED = 20  # names a scene is asked for
ABSENT = 2  # scenes asked for absent names only, per picture of each kind
ROUTER_VIEWS = 8  # pictures of each kind that it is fitted on, per picture that scores are chosen on
ROUTER_DECAY = 3e-3  # L2 on the weights of standardised features
KNOWN_POWERS = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class Candidates:
    """What the scores of one picture are made of, for every image token and name that it is asked for.

    Attributes:
        boxes: fp32 [n, 4], x1 y1 x2 y2 in shares of the picture.
        labels: int64 [n], positions in the picture's names.
        objectness, probability, known: fp32 [n]; known is the probability among all known names, 1 where a
            model has none.
    """

    boxes: torch.Tensor
    labels: torch.Tensor
    objectness: torch.Tensor
    probability: torch.Tensor
    known: torch.Tensor

    def found(self, config: ModelConfig, top: int = TOP) -> list[tuple[list[float], float, int]]:
        """Box, score and label of the best ones, as `Network.find` has them under a configuration."""
        powers = config.objectness_power, config.known_power
        scores = combined(self.objectness, self.probability, self.known, *powers)
        best, index = scores.topk(min(2 * top, len(scores)))
        best, order = doubtful_lowered(
            self.boxes[index], best, self.labels[index], config.repeat_factor, config.part_factor
        )
        index = index[order[:top]]
        return list(
            zip(self.boxes[index].tolist(), best[:top].tolist(), self.labels[index].tolist(), strict=True)
        )


def candidates(network: Network, one: ValidationSet) -> list[Candidates]:
    """Those of all pictures of a set; each goes through the network once, whatever is then tried."""
    original, rows = network.config, []
    # Any power above 0: names are then held against the known ones, and `known` is told.
    network.config = dataclasses.replace(original, known_power=1.0)
    try:
        for picture in one.pictures:
            pixels, sizes = network_batch([picture.image], one.image_size, one.longest_side)
            images, lengths = torch.from_numpy(pixels), None if sizes is None else torch.from_numpy(sizes)
            originals = None if picture.original is None else [picture.original]
            instructions, parts, first = picture.asked.instructions, [], 0
            for answers in find_groups(network, images, instructions, lengths, originals):
                names = answers.probabilities[0, :, :-1]  # [M, K]
                known = torch.ones_like(names) if answers.known is None else answers.known[0]
                parts.append(
                    (
                        answers.boxes[0][:, None].expand(*names.shape, 4).flatten(0, 1),
                        torch.arange(first, first + names.shape[1]).expand_as(names).flatten(),
                        answers.objectness[0][:, None].expand_as(names).flatten(),
                        names.flatten(),
                        known.flatten(),
                    )
                )
                first += names.shape[1]
            rows.append(Candidates(*(torch.cat(column).cpu() for column in zip(*parts, strict=True))))
    finally:
        network.config = original
    return rows


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Answers in descending order of their scores, and which of them are right.

    Attributes:
        scores: float64 [n].
        true: int64 [n], how many of the first ones are right.
        objects: how many there are to find.
    """

    scores: np.ndarray
    true: np.ndarray
    objects: int

    def best_threshold(self) -> tuple[float, float]:
        """The score with the highest F1, and that F1 (0, 0 without predictions or objects)."""
        if not len(self.scores) or not self.objects:
            return 0.0, 0.0
        f1 = 2 * self.true / (np.arange(1, len(self.true) + 1) + self.objects)
        best = int(f1.argmax())
        return float(self.scores[best]), float(f1[best])

    def score_that_finds(self, share: float) -> float:
        """The highest score at which this share of the objects is found; 0 if none does."""
        enough = np.flatnonzero(self.true >= np.ceil(share * self.objects))
        return float(self.scores[enough[0]]) if len(enough) else 0.0


def rank(ground_truth: dict[str, Any], predictions: Sequence[dict[str, Any]]) -> Ranking:
    """COCO results of all pictures against what is there; crowds are left out."""
    objects: dict[int, list[dict[str, Any]]] = {}
    for entry in ground_truth["annotations"]:
        if not entry["iscrowd"]:
            objects.setdefault(entry["image_id"], []).append(entry)
    answers: dict[int, list[dict[str, Any]]] = {}
    for entry in predictions:
        answers.setdefault(entry["image_id"], []).append(entry)
    scores, hits = list[float](), list[bool]()
    for image, found in answers.items():
        found = sorted(found, key=lambda entry: -entry["score"])
        there = objects.get(image, [])
        same = np.array([[a["category_id"] == b["category_id"] for b in there] for a in found], bool)
        iou = box_iou(box_corners(found), box_corners(there))
        matched = match_greedily(iou, same.reshape(iou.shape))
        scores += [entry["score"] for entry in found]
        hits += (matched >= 0).tolist()
    order = np.argsort(-np.array(scores), kind="stable")
    true = np.cumsum(np.array(hits, np.int64)[order])
    return Ranking(np.array(scores)[order], true, sum(map(len, objects.values())))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one way to make scores gives.

    Attributes:
        config: with a and c.
        precision, threshold: means over the sets, of AP and of the threshold with the best F1.
        shown: share of the pictures asked for absent names only that show a box, at the score where 80 % of
            the first set's objects are found.
    """

    config: ModelConfig
    precision: float
    threshold: float
    shown: float


def measure(
    config: ModelConfig,
    sets: Sequence[tuple[ValidationSet, Sequence[Candidates]]],
    absent: Sequence[Candidates],
) -> Outcome:
    """The outcome of a configuration; prints it, with F1, for each set."""
    rows, told, usual = [], [], list[float]()
    for one, pictures in sets:
        predictions = [
            entry
            for index, picture in enumerate(pictures)
            for entry in one.results(index, picture.found(config), TOP)
        ]
        ranking = rank(one.ground_truth, predictions)
        usual.append(ranking.score_that_finds(FOUND_SHARE))
        threshold, f1 = ranking.best_threshold()
        rows.append((coco_metrics(one.ground_truth, predictions)["AP"], threshold))
        told.append(f"{one.name}: AP {100 * rows[-1][0]:.1f}, F1 {100 * f1:.1f} at {threshold:.2f}")
    best = [max((score for _, score, _ in picture.found(config, top=1)), default=-1.0) for picture in absent]
    shown = float(np.mean([score >= usual[0] for score in best])) if best else 0.0
    told.append(f"absent names shown: {100 * shown:.1f} %")
    powers = f"a = {config.objectness_power:.2f}, c = {config.known_power:.2f}"
    factors = f"factors {config.repeat_factor:g}, {config.part_factor:g}"
    print(f"{powers}, {factors}  {', '.join(told)}", file=sys.stderr)
    precision, threshold = np.mean(rows, 0).tolist()
    return Outcome(config, precision, threshold, shown)


def choose(outcomes: Sequence[Outcome]) -> Outcome:
    """Of those whose AP is nearly the best, the one that shows the least of what is absent."""
    least = max(outcome.precision for outcome in outcomes) - SPARED_AP
    allowed = [outcome for outcome in outcomes if outcome.precision >= least]
    return min(allowed, key=lambda outcome: (outcome.shown, -outcome.precision))


def calibrate(
    network: Network, sets: Sequence[ValidationSet], absent: ValidationSet | None = None
) -> ModelConfig:
    """The network's configuration with the chosen powers, factors and threshold.

    Args:
        sets: what AP is measured on.
        absent: pictures like the first set's, asked for absent names only.
    """
    seen = [(one, candidates(network, one)) for one in sets]
    nothing = candidates(network, absent) if absent else []
    known_powers = (0.0, *KNOWN_POWERS) if network.known_names and network.config.text_guidance else (0.0,)
    doubting = dataclasses.replace(network.config, repeat_factor=REPEAT_FACTOR, part_factor=PART_FACTOR)
    tried = [
        dataclasses.replace(doubting, objectness_power=a, known_power=c) for a in POWERS for c in known_powers
    ]
    best = choose([measure(config, seen, nothing) for config in tried])
    trusting = dataclasses.replace(best.config, repeat_factor=1.0, part_factor=1.0)
    best = max(best, measure(trusting, seen, nothing), key=lambda outcome: outcome.precision)
    return dataclasses.replace(best.config, score_threshold=round(best.threshold, 3))


@torch.no_grad()
def mean_of(folders: Sequence[str]) -> Network:
    """The first folder's network with the mean of all folders' weights.

    Of one run's weights at several times it often finds more than any of them (model soups, Wortsman et al.
    2022, arXiv:2203.05482).

    Raises:
        ValueError: the folders' weights have different names or shapes.
    """
    network = Network.from_pretrained(folders[0])
    state = network.state_dict()
    for count, folder in enumerate(folders[1:], 2):
        other = Network.from_pretrained(folder).state_dict()
        differing = {
            name
            for name in state.keys() | other.keys()
            if name not in state or name not in other or state[name].shape != other[name].shape
        }
        if differing:
            raise ValueError(f"{folder}: expected the tensors of {folders[0]}, got another {min(differing)}")
        for name, tensor in state.items():
            if tensor.is_floating_point():
                tensor += (other[name] - tensor) / count
    return network


class Absent:
    """Pictures of a data set without their objects, so that prompts list none of them."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        return Sample(
            image=sample.image,
            boxes=sample.boxes[:0],
            names=[],
            area=sample.area[:0],
            iscrowd=sample.iscrowd[:0],
            image_id=sample.image_id,
            vocabulary=tuple(name for name in sample.vocabulary if name not in sample.names),
        )


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
    parser.add_argument(
        "--model",
        nargs="+",
        required=True,
        metavar="DIR",
        help="pretrained folder that training wrote; of several of one run, the mean of their weights",
    )
    parser.add_argument("--output", required=True, help="pretrained folder to write, its weights in bfloat16")
    parser.add_argument("--glyphs", help="glyph atlas (visionllm glyphs); without one: plain shapes only")
    parser.add_argument("--annotations", help="COCO file of training photos")
    parser.add_argument("--images", help="their folder")
    parser.add_argument(
        "--classifier",
        help="EfficientNet-Lite0 state dict, or 'imagenet' for its package's: gives the model a photo "
        "classifier for the photos' names",
    )
    parser.add_argument("--count", type=int, default=150, help="pictures of each kind")
    parser.add_argument("--seed", type=int, default=1, help="of the training scenes; not the run's")
    arguments = parser.parse_args(argv)
    if arguments.classifier and not arguments.annotations:
        parser.error("--classifier: expected --annotations and --images of photos to fit it on, got none")
    network = mean_of(arguments.model)
    size = network.config.image_size
    scenes = SceneDataset(
        "train",
        seed=arguments.seed,
        size=size,
        glyphs=arguments.glyphs,
        backgrounds=arguments.images,
        background_annotations=arguments.annotations,
    )
    sets = [ValidationSet("scenes", scenes, arguments.count, LISTED, size)]
    absent = ValidationSet("absent", Absent(scenes), ABSENT * arguments.count, LISTED, size)
    if arguments.annotations:
        photos = CocoDataset(arguments.annotations, arguments.images)
        sets.append(ValidationSet("photos", photos, arguments.count, None, size, keep_originals=True))
        if network.config.keep_pretrained:
            views, rng = AugmentedPhotos(photos, size), np.random.default_rng(arguments.seed)
            count = ROUTER_VIEWS * arguments.count
            mistaken = fit_router(
                network,
                (views.draw(rng).image for _ in range(count)),
                (scenes[i].image for i in range(count)),
            )
            if arguments.classifier:
                add_classifier(network, photos, backbone_weights(arguments.classifier), arguments.seed)
            print(
                f"router: takes {100 * mistaken:.1f} % of {2 * count} pictures for the other kind",
                file=sys.stderr,
            )
    network.config = config = calibrate(network, sets, absent)
    network.save_pretrained(arguments.output, torch.bfloat16)
    print(
        f"objectness_power {config.objectness_power}, known_power {config.known_power}, "
        f"score_threshold {config.score_threshold}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
