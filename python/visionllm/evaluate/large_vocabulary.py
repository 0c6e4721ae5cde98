"""Detection among more names than a prompt lists: merging the groups' answers, and LVIS's rules.

VisionLLM, Table 4e: LVIS's 1203 names are asked for in 16 groups of at most 80. A group's softmax is over its
own names and "no object", so a probability in it says nothing beside one in another group. Each name is
therefore weighed against "no object" alone:

    q_ik  = p_ik / (p_ik + p_i,no object)
    score = o_i^a q_ik^(1 - a), times the known names' factor where the model has it

LVIS (arXiv 1908.03195) does not know every picture's every class: boxes of classes about which a picture's
annotations are silent do not count at all, and of those that are not annotated exhaustively no box is false.
Up to 300 boxes a picture count.
"""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from visionllm.evaluate.coco import indexed
from visionllm.evaluate.evaluation import ObjectSet
from visionllm.evaluate.prediction import PicturePrediction, coco_results
from visionllm.evaluate.prompts import ClassListing

if TYPE_CHECKING:
    from torch import Tensor

    from visionllm.instruction import Instruction, Template
    from visionllm.model.groups import GroupAnswers, NameGroups
    from visionllm.model.network import Network
    from visionllm.pipeline import VisionLLM

GROUP_SIZE = 80  # names in a prompt, VisionLLM, section 4.3
MAX_BOXES = 300  # of a picture
FREQUENCIES = {"r": "APr", "c": "APc", "f": "APf"}  # rare, common and frequent classes


@dataclass(frozen=True, eq=False)
class VocabularyEvaluation:
    """What came out: AP, AP50, AP75, APs, APm, APl, AR and, where frequencies are known, APr, APc, APf."""

    metrics: dict[str, float]
    results: list[dict[str, Any]]
    groups: list[list[str]]


def grouped_names(names: Sequence[str], size: int = GROUP_SIZE, seed: int | None = None) -> list[list[str]]:
    """The names in as few groups of at most ``size`` as can be, of nearly equal size.

    Args:
        names: all different.
        size: 1 or more.
        seed: of a random order; None: as they stand.

    Raises:
        ValueError: no names, or a size below 1.
    """
    if size < 1 or not names:
        raise ValueError(
            f"groups: expected names and a size of 1 or more, got {len(names)} names, size {size}"
        )
    order = list(names)
    if seed is not None:
        random.Random(f"groups {seed}").shuffle(order)
    count = -(-len(order) // size)
    bounds = [len(order) * group // count for group in range(count + 1)]
    return [order[start:end] for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


def merged_scores(answers: GroupAnswers, objectness_power: float, known_power: float) -> Tensor:
    """Scores [B, M, K] of one group that can stand beside other groups'.

    Args:
        answers: of `visionllm.model.groups.find_groups`.
        objectness_power: a; known_power: that of ``answers.known``.
    """
    from visionllm.model.scores import combined

    names, nothing = answers.probabilities[..., :-1], answers.probabilities[..., -1:]
    share = names / (names + nothing).clamp(min=1e-12)
    return combined(answers.objectness[..., None], share, answers.known, objectness_power, known_power)


def detect_in_groups(
    network: Network,
    images: Tensor,
    groups: Sequence[Instruction] | NameGroups,
    top: int = MAX_BOXES,
    sizes: Tensor | None = None,
    originals: Sequence[np.ndarray] | None = None,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The best boxes of all the groups' names, for each picture.

    Args:
        network: in inference mode.
        images, sizes, originals: as for `find_groups`.
        groups: as for `find_groups`.
        top: boxes kept.

    Returns:
        For each picture: float32 xyxy ``[n, 4]`` in 0..1, float32 scores ``[n]``, descending, and int64
        labels ``[n]``, positions in the groups' names, one group after the other.
    """
    import torch

    from visionllm.model.boxes import doubtful_lowered
    from visionllm.model.groups import NameGroups, find_groups

    instructions = groups.groups if isinstance(groups, NameGroups) else groups
    config, first = network.config, 0
    best: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(len(images))]
    found_in_groups = find_groups(network, images, groups, sizes, originals)
    for group, answers in zip(instructions, found_in_groups, strict=True):
        scores = merged_scores(answers, config.objectness_power, config.known_power)
        count = scores.shape[2]
        for b, found in enumerate(best):
            # Twice as many as wanted: repeats among the best give their places to others.
            score, index = scores[b].flatten().topk(min(2 * top, scores[b].numel()))
            found.append((answers.boxes[b, index // count], score, index % count + first))
        first += len(group.classes)
    merged = []
    for found in best:
        boxes, scores, labels = (torch.cat(column) for column in zip(*found, strict=True))
        order = scores.argsort(descending=True, stable=True)[: 2 * top]
        scores, lowered = doubtful_lowered(
            boxes[order], scores[order], labels[order], config.repeat_factor, config.part_factor
        )
        scores, order = scores[:top], order[lowered[:top]]
        merged.append(
            (
                boxes[order].float().cpu().numpy(),
                scores.float().cpu().numpy(),
                labels[order].cpu().numpy(),
            )
        )
    return merged


def evaluate_large_vocabulary(
    model: VisionLLM,
    dataset: ObjectSet,
    names: Sequence[str] | None = None,
    group_size: int = GROUP_SIZE,
    seed: int | None = None,
    template: Template | None = None,
    frequency: Mapping[str, str] | None = None,
    batch_size: int = 8,
    done: Callable[[int], object] = lambda count: None,
) -> VocabularyEvaluation:
    """Every picture asked for every name, group by group, and the AP by LVIS's rules.

    Args:
        model: a loaded model.
        dataset: pictures and ground truth; a picture's ``not_exhaustive`` lists the categories whose boxes
            are not false there.
        names: what is asked for, at least the data set's names; None: those.
        group_size: names in a prompt, at most.
        seed: of a random order of the names; None: as they stand.
        template: the wording, with the picture before the class set; None: the default one.
        frequency: "r", "c" or "f" by name; None: the data set's own, where it has it.
        batch_size: pictures in one pass.
        done: told the number of pictures after each pass.

    Raises:
        ValueError: names lacks one of the data set's.
    """
    names = dataset.names if names is None else list(names)
    missing = sorted(set(dataset.names) - set(names))
    if missing:
        raise ValueError(f"names: expected all of the data set's, got none of {missing[:5]}")
    groups = grouped_names(names, group_size, seed)
    predictions = predict_in_groups(model, dataset, groups, template, batch_size, done)
    results = coco_results(predictions, dataset.category_ids)
    metrics = federated_metrics(dataset.content, results, frequencies_of(dataset, frequency))
    return VocabularyEvaluation(metrics, results, groups)


def predict_in_groups(
    model: VisionLLM,
    dataset: ObjectSet,
    groups: Sequence[Sequence[str]],
    template: Template | None = None,
    batch_size: int = 8,
    done: Callable[[int], object] = lambda count: None,
) -> list[PicturePrediction]:
    """Every picture asked for every group; of the best boxes of all names, those with the data set's.

    Args: as for `evaluate_large_vocabulary`.
    """
    from visionllm.model.groups import read_names
    from visionllm.pipeline import Pictures
    from visionllm.request import class_request

    asked = read_names(model.network, [class_request(group, template).instructions[0] for group in groups])
    position = {name: index for index, name in enumerate(dataset.names)}
    places = np.array([position.get(name, -1) for group in groups for name in group], np.int64)
    listing = ClassListing(tuple(range(len(dataset.names))))
    predictions = []
    for start in range(0, len(dataset.images), batch_size):
        entries = dataset.images[start : start + batch_size]
        pictures = [dataset.read(entry) for entry in entries]
        shown = Pictures.of(pictures, model.network.config)
        found = detect_in_groups(model.network, shown.pixels, asked, **shown.beside)
        for entry, picture, (boxes, scores, labels) in zip(entries, pictures, found, strict=True):
            height, width = picture.shape[:2]
            xyxy = boxes * np.array([width, height] * 2, np.float32)
            own = places[labels] >= 0
            predictions.append(
                PicturePrediction(entry["id"], listing, xyxy[own], scores[own], places[labels[own]])
            )
        done(len(entries))
    return predictions


def frequencies_of(dataset: ObjectSet, frequency: Mapping[str, str] | None = None) -> dict[int, str]:
    """ "r", "c" or "f" by category id: those given by name, else the ``frequency`` of the categories."""
    if frequency is None:
        entries = dataset.content["categories"]
        return {entry["id"]: entry["frequency"] for entry in entries if entry.get("frequency") in FREQUENCIES}
    ids = dict(zip(dataset.names, dataset.category_ids, strict=True))
    return {ids[name]: value for name, value in frequency.items() if name in ids and value in FREQUENCIES}


def federated_metrics(
    ground_truth: dict[str, Any],
    predictions: Sequence[dict[str, Any]],
    frequency: Mapping[int, str] | None = None,
    top: int = MAX_BOXES,
) -> dict[str, float]:
    """AP of boxes where not every class is annotated in every picture.

    Args:
        ground_truth: a COCO data set. An image's ``not_exhaustive`` lists the categories whose boxes there
            are either right or not counted.
        predictions: COCO results; of each picture the ``top`` best count.
        frequency: "r", "c" or "f" by category id.

    Returns:
        ``AP``, ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl``, ``AR``, and with frequencies ``APr``, ``APc``,
        ``APf``; -1 where there is nothing to measure.
    """
    from pycocotools.cocoeval import COCOeval

    unsure = {image["id"]: frozenset(image.get("not_exhaustive", ())) for image in ground_truth["images"]}

    class Federated(COCOeval):
        def evaluateImg(self, image_id: Any, category_id: Any, area: Any, most: Any) -> Any:  # noqa: N802
            found = super().evaluateImg(image_id, category_id, area, most)
            if found is not None and category_id in unsure[image_id]:
                found["dtIgnore"] = np.logical_or(found["dtIgnore"], found["dtMatches"] == 0)
            return found

    best: dict[Any, list[dict[str, Any]]] = {}
    for entry in predictions:
        best.setdefault(entry["image_id"], []).append(entry)
    kept = [
        entry
        for entries in best.values()
        for entry in sorted(entries, key=lambda entry: -entry["score"])[:top]
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = indexed("boxes", ground_truth, ground_truth["annotations"], "annotation")
        evaluation = Federated(truth, indexed("boxes", ground_truth, kept, "prediction"), "bbox")
        evaluation.params.maxDets = [top]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1]  # [10 IoU, 101 recall, K, 4 areas]
    metrics = {
        "AP": _mean(precision[..., 0]),
        "AP50": _mean(precision[0, ..., 0]),
        "AP75": _mean(precision[5, ..., 0]),
        **{f"AP{area}": _mean(precision[..., k]) for k, area in enumerate("sml", start=1)},
        "AR": _mean(evaluation.eval["recall"][..., 0, -1]),
    }
    for letter, name in FREQUENCIES.items() if frequency else ():
        of_letter = {number for number, given in (frequency or {}).items() if given == letter}
        chosen = [k for k, number in enumerate(evaluation.params.catIds) if number in of_letter]
        metrics[name] = _mean(precision[:, :, chosen, 0])
    return metrics


def _mean(values: np.ndarray) -> float:
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0
