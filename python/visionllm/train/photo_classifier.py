"""Fits the rows of a photo classifier on annotated photos (model/photo_classifier.py).

Softmax regression on the pretrained features of boxes: the annotated ones, a little moved, and others that
hold nothing, in views of the photos. What the classes of ImageNet say of a box is added to the logits, so
that the rows only have to learn what that leaves open. Few photos show most names: names count by the inverse
square root of how often they are seen, and large weights cost.

    python -m visionllm.train.photo_classifier --annotations FILE --images DIR   # how good is it?
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from visionllm.data.photo_augmentation import (
    AugmentedPhotos,
    PhotoAugmentation,
    SampleSource,
    jitter_colours,
    resize,
)
from visionllm.data.sample import Sample
from visionllm.evaluate.matching import box_iou
from visionllm.image import resize_square
from visionllm.model.backbone import EfficientNetLite
from visionllm.model.image_tokenizer import two_stage
from visionllm.model.photo_classifier import CLASSES, PARTS, PhotoClassifier

if TYPE_CHECKING:
    from visionllm.data.coco import CocoDataset
    from visionllm.model.network import Network

VIEWS, VIEW_SIDE = 8, 640  # of each photo, beside the whole one; pixels
LOOKED_AT = 0.8  # share of the views' boxes that get a closer look: others have to do without
AUGMENTATION = PhotoAugmentation(mosaic=0, whole=0.4, on_object=0.4, zoom_out=0, max_cached_side=VIEW_SIDE)
MOVED = 0.06  # standard deviation of a view's box edges, of the box's sides
LEAST_AREA, LEAST_SIDE = 1 / 400, 4  # of the picture; pixels: smaller boxes teach nothing
EMPTY, EMPTY_SIDES = 4, (0.09, 0.87)  # boxes tried a view that hold nothing, and their sides
MOST_OVERLAP = 0.3  # IoU of such a box with an annotated one
FEW = 20  # boxes of a name, below which it counts no more for being rare
DECAY = 0.1  # L2 on the weights of standardised features
STEPS = 60
FOLDS = 5


def imagenet_members(names: Sequence[str]) -> Tensor:
    """int16 [CLASSES], for each class of ImageNet the position of the name it bears, or the number of names.

    From `imagenet_names.txt`, lines of ``name: 3, 7-9``.

    Raises:
        ValueError: the file is broken.
    """
    text = resources.files("visionllm.train").joinpath("imagenet_names.txt").read_text(encoding="utf-8")
    position = {name.casefold(): n for n, name in enumerate(names)}
    members, seen = torch.full((CLASSES,), len(names), dtype=torch.int16), set[int]()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, ranges = line.partition(":")
        for part in ranges.split(","):
            first, _, last = part.partition("-")
            for one in range(int(first), int(last or first) + 1):
                if one in seen or not 0 <= one < CLASSES:
                    raise ValueError(f"imagenet_names.txt, line {number}: expected a new class, got {one}")
                seen.add(one)
                members[one] = position.get(name.strip().casefold(), len(names))
    return members


@dataclass(frozen=True)
class PhotoBoxes:
    """Boxes in views of photos, as a classifier sees them.

    Attributes:
        features: fp32 [n, sum(PARTS)], c, f, g and place.
        labels: int64 [n], positions in the names, or their number for "nothing".
        photo: int64 [n], which one; whole: bool [n], in the photo as it is.
    """

    features: Tensor
    labels: Tensor
    photo: Tensor
    whole: Tensor


@torch.inference_mode()
def boxes_of_photos(
    trunk: EfficientNetLite,
    classifier: PhotoClassifier,
    photos: SampleSource,
    names: Sequence[str],
    size: int,
    rng: np.random.Generator,
) -> PhotoBoxes:
    """Annotated boxes that have one of the names, and boxes that hold nothing, in views of all photos.

    Args:
        size: side that the network sees a view at, in pixels.

    Raises:
        ValueError: no photo has such an object.
    """
    views = AugmentedPhotos(photos, VIEW_SIDE, AUGMENTATION)
    position = {name.casefold(): n for n, name in enumerate(names)}
    features, labels, shown = list[Tensor](), list[int](), list[tuple[int, bool]]()
    for index in range(len(photos)):
        for number in range(1 + VIEWS):
            if number == 0:
                view, moved = resize(views.photo(index), VIEW_SIDE, VIEW_SIDE), 0.0
            else:
                view, moved = views.view(index, rng), MOVED
                view.image = jitter_colours(view.image, rng, AUGMENTATION)
            boxes, called = _annotated(view, position, VIEW_SIDE, moved, rng)
            called += [len(names)] * len(empty := _empty(view, VIEW_SIDE, rng))
            if not called:
                continue
            corners = torch.from_numpy(np.concatenate([boxes, empty])).float() / VIEW_SIDE
            low, high = corners[:, :2], corners[:, 2:]
            places = torch.cat([(low + high) / 2, high - low], 1)
            c5 = trunk.pretrained_c5(torch.from_numpy(resize_square(view.image, size))[None])
            closer = classifier.look(trunk, view.image, places)
            parts = closer[None], *classifier.from_afar(classifier.cells(c5), places[None])
            row = torch.cat([part.expand(1, len(places), -1) for part in parts], -1)[0]
            if number > 0:
                without = torch.from_numpy(rng.random(len(row)) >= LOOKED_AT)
                row[without, : PARTS[0]] = row[without, PARTS[0] : sum(PARTS[:2])]
            features.append(row)
            labels += called
            shown += [(index, number == 0)] * len(called)
    if not any(label < len(names) for label in labels):
        raise ValueError(
            f"photos: expected objects called {', '.join(names[:5])} …, got none that is large enough"
        )
    photo, whole = zip(*shown, strict=True)
    return PhotoBoxes(torch.cat(features), torch.tensor(labels), torch.tensor(photo), torch.tensor(whole))


def _annotated(
    view: Sample, position: Mapping[str, int], size: int, moved: float, rng: np.random.Generator
) -> tuple[np.ndarray, list[int]]:
    """Boxes [n, 4] in pixels of the view's objects that have a name, and the names' positions."""
    boxes, called = [np.zeros((0, 4))], list[int]()
    for box, name, crowd in zip(view.boxes, view.names, view.iscrowd, strict=True):
        sides = np.tile(box[2:] - box[:2], 2)
        if crowd or name.casefold() not in position or sides[:2].prod() < LEAST_AREA * size**2:
            continue
        box = np.clip(box + moved * rng.normal(size=4) * sides, 0, size)
        if (box[2:] - box[:2]).min() >= LEAST_SIDE:
            boxes.append(box[None])
            called.append(position[name.casefold()])
    return np.concatenate(boxes), called


def _empty(view: Sample, size: int, rng: np.random.Generator) -> np.ndarray:
    """Boxes [n, 4] in pixels that overlap none of the view's objects by much."""
    least, most = (math.log(side) for side in EMPTY_SIDES)
    sides = size * np.exp(rng.uniform(least, most, (EMPTY, 2)))
    low = rng.uniform(0, size - sides)
    boxes = np.concatenate([low, low + sides], 1)
    return boxes[box_iou(boxes, view.boxes).max(1, initial=0) < MOST_OVERLAP]


def regression(features: Tensor, told: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [K, C] and bias [K] of softmax(weight features + bias + told), fitted as this file's head says.

    Args:
        features: fp32 [n, C]; told: fp32 [n, K]; labels: int64 [n], below K.
    """
    names = told.shape[1]
    mean, deviation = features.mean(0), features.std(0) + 1e-3
    x = (features - mean) / deviation
    seen = torch.bincount(labels, minlength=names).float()
    weights = ((seen + FEW) ** -0.5)[labels]
    weights /= weights.sum()
    target = F.one_hot(labels, names).float()

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        w = torch.from_numpy(values).float().view(names, -1)
        log = (torch.addmm(w[:, -1], x, w[:, :-1].T) + told).log_softmax(1)
        error = (log.exp() - target) * weights[:, None]
        gradient = torch.cat([error.T @ x + 2 * DECAY * w[:, :-1], error.sum(0)[:, None]], 1)
        value = DECAY * w[:, :-1].square().sum() - (weights * log[torch.arange(len(log)), labels]).sum()
        return float(value), gradient.double().flatten().numpy()

    start = np.zeros(names * (x.shape[1] + 1))
    best = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": STEPS}).x
    w = torch.from_numpy(best).float().view(names, -1)
    weight = w[:, :-1] / deviation
    return weight, w[:, -1] - weight @ mean


@torch.inference_mode()
def told_by_imagenet(classifier: PhotoClassifier, features: Tensor) -> Tensor:
    ways = (part.split(PARTS, 1) for part in features.split(1024))
    return torch.cat([classifier.told(closer, inside) for closer, inside, *_ in ways])


def cross_validated(classifier: PhotoClassifier, boxes: PhotoBoxes, folds: int = FOLDS) -> dict[str, float]:
    """Mean AP over the names of naming given boxes of whole photos, each fold by what the others taught: with
    the rows alone, with ImageNet's classes alone, with both, and with both but no closer look.
    """
    told = told_by_imagenet(classifier, boxes.features)
    names = told.shape[1] - 1
    afar = boxes.features.clone()
    afar[:, : PARTS[0]] = afar[:, PARTS[0] : sum(PARTS[:2])]
    ways = {"rows": torch.zeros_like(told), "both": told}
    logits = {"rows": torch.zeros_like(told), "ImageNet": told, "both": torch.zeros_like(told)}
    logits["both, from afar"] = torch.zeros_like(told)
    told_afar = told_by_imagenet(classifier, afar)
    for fold in range(folds):
        held = boxes.photo % folds == fold
        for way, given in ways.items():
            weight, bias = regression(boxes.features[~held], given[~held], boxes.labels[~held])
            logits[way][held] = boxes.features[held] @ weight.T + bias + given[held]
            if way == "both":
                logits["both, from afar"][held] = afar[held] @ weight.T + bias + told_afar[held]
    labels = boxes.labels[boxes.whole]
    shown = [n for n in range(names) if (labels == n).any()]
    return {
        way: float(
            np.mean([average_precision(values.softmax(1)[boxes.whole, n], labels == n) for n in shown])
        )
        for way, values in logits.items()
    }


def average_precision(scores: Tensor, right: Tensor) -> float:
    """Mean precision at the right ones, the best scores first."""
    hits = right[scores.argsort(descending=True, stable=True)].double()
    return float((hits.cumsum(0) / torch.arange(1, len(hits) + 1) * hits).sum() / hits.sum())


def add_classifier(
    network: Network, photos: CocoDataset, state: Mapping[str, Tensor], seed: int = 0
) -> tuple[PhotoClassifier, PhotoBoxes]:
    """Gives a network a photo classifier for the categories of annotated photos.

    Args:
        network: with pretrained stages of its own (`ModelConfig.keep_pretrained`).
        state: published EfficientNet-Lite0 state dict, whose trunk they are.
        seed: of the photos' views.

    Returns:
        the classifier, and what it was fitted on.

    Raises:
        ValueError: it has no pretrained stages, or the photos no objects.
    """
    tokenizer = two_stage(network.image_tokenizer, "add_classifier")
    names = photos.vocabulary
    config = replace(network.config, classifier_names=names)
    classifier = PhotoClassifier(len(names))
    classifier.load_imagenet(state)
    classifier.members.copy_(imagenet_members(names))
    rng, size = np.random.default_rng(seed), config.image_size
    boxes = boxes_of_photos(tokenizer.backbone, classifier, photos, names, size, rng)
    weight, bias = regression(boxes.features, told_by_imagenet(classifier, boxes.features), boxes.labels)
    with torch.no_grad():
        classifier.rows.weight.copy_(weight)
        classifier.rows.bias.copy_(bias)
    network.config, tokenizer.classifier = config, classifier
    return classifier, boxes


def main(argv: Sequence[str] | None = None) -> int:
    """How well boxes are named, without writing anything."""
    from visionllm.data.coco import CocoDataset
    from visionllm.model.network import Network
    from visionllm.model_folder import model_folder
    from visionllm.train.build import backbone_weights

    parser = argparse.ArgumentParser(
        prog="python -m visionllm.train.photo_classifier", description=main.__doc__
    )
    parser.add_argument("--model", default="tiny", help="packaged name or folder, for its pretrained stages")
    parser.add_argument("--annotations", required=True, help="COCO file of photos")
    parser.add_argument("--images", required=True, help="their folder")
    parser.add_argument("--classifier", default="imagenet", help="EfficientNet-Lite0 state dict")
    arguments = parser.parse_args(argv)
    network = Network.from_pretrained(model_folder(arguments.model))
    photos = CocoDataset(arguments.annotations, arguments.images)
    classifier, boxes = add_classifier(network, photos, backbone_weights(arguments.classifier))
    for way, value in cross_validated(classifier, boxes).items():
        print(f"{way}: mean AP {100 * value:.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
