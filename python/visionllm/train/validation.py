"""Average precision during a run: fixed pictures, fixed prompts, the COCO metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from visionllm.data.sample import Sample
from visionllm.evaluate.coco import coco_metrics
from visionllm.image import network_batch, resize_square, resize_to_fit
from visionllm.pipeline import Request, class_request
from visionllm.train.distributed import Processes
from visionllm.train.task_validation import TaskValidation

REPORTED = ("AP", "AP50", "AP75")


class Samples(Protocol):
    """A data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass
class AskedPicture:
    """A picture with what it is asked."""

    image: np.ndarray  # uint8 [S, S, 3], or [H, W, 3] where pictures keep their shape
    asked: Request  # one instruction, or several for more names than one can list
    size: tuple[int, int]  # width, height before resizing
    original: np.ndarray | None = None  # uint8 [H, W, 3], before resizing


class ValidationSet:
    """Pictures with one prompt each, and the ground truth for it.

    Args:
        name: prefix of the reported metrics.
        samples: data set; its first ``limit`` samples are used.
        names: how many names each prompt lists: those in the picture first, then absent ones of the sample's
            vocabulary, in random order drawn from (seed, index). None: the whole vocabulary in its own order.
            More than an instruction can list are asked in groups.
        image_size: side that pictures are resized to.
        longest_side: with it the shorter side, and this the longer one's most pixels; 0: squares.
        keep_originals: also keep the pictures before resizing, for `calibrate`. Without them, as during
            training, a photo classifier takes no closer look.

    Raises ValueError when there are no samples.
    """

    def __init__(
        self,
        name: str,
        samples: Samples,
        limit: int,
        names: int | None,
        image_size: int,
        seed: int = 0,
        longest_side: int = 0,
        keep_originals: bool = False,
    ) -> None:
        self.name = name
        self.image_size, self.longest_side = image_size, longest_side
        self.pictures: list[AskedPicture] = []
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        self.categories: dict[str, int] = {}
        for index in range(min(limit, len(samples))):
            sample = samples[index]
            listed = list(sample.vocabulary)
            if names is not None:
                listed = listed_names(sample, names, np.random.default_rng((seed, index)))
            height, width = sample.image.shape[:2]
            picture = (
                resize_to_fit(sample.image, image_size, longest_side)
                if longest_side
                else resize_square(sample.image, image_size)
            )
            original = sample.image if keep_originals else None
            self.pictures.append(AskedPicture(picture, class_request(listed), (width, height), original))
            images.append({"id": index, "width": width, "height": height})
            for entry in listed:
                self.categories.setdefault(entry, len(self.categories) + 1)
            for box, entry, area, crowd in zip(
                sample.boxes.tolist(), sample.names, sample.area.tolist(), sample.iscrowd, strict=True
            ):
                if entry in listed:
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": index,
                            "category_id": self.categories[entry],
                            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                            "area": area,
                            "iscrowd": int(crowd),
                        }
                    )
        if not self.pictures:
            raise ValueError(f"validation set {name!r} is empty")
        self.ground_truth: dict[str, Any] = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": number, "name": entry} for entry, number in self.categories.items()],
        }

    def predictions(
        self, network: Any, indices: Sequence[int], batch_size: int, top: int
    ) -> list[dict[str, Any]]:
        """COCO results of the network for these pictures."""
        results = []
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            for index, found in zip(chosen, self._answers(network, chosen, top), strict=True):
                results += self.results(index, found, top)
        return results

    def results(
        self, index: int, found: Sequence[tuple[list[float], float, int]], top: int
    ) -> list[dict[str, Any]]:
        """COCO results of one picture, the ``top`` best.

        Args:
            found: box in 0..1, score and position in the picture's ``asked.classes``, of all its groups.
        """
        picture = self.pictures[index]
        scale = np.array(picture.size * 2, dtype=np.float64)  # [4]
        results = []
        for box, score, label in sorted(found, key=lambda answer: -answer[1])[:top]:
            x1, y1, x2, y2 = (np.array(box) * scale).tolist()
            results.append(
                {
                    "image_id": index,
                    "category_id": self.categories[picture.asked.classes[label]],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": score,
                }
            )
        return results

    def _answers(
        self, network: Any, chosen: Sequence[int], top: int
    ) -> list[list[tuple[list[float], float, int]]]:
        """Box in 0..1, score and position in ``asked.classes`` of every object found, for each picture.

        The first instructions of all pictures go in one pass, then the second ones, ...
        """
        device = next(network.parameters()).device
        pictures = [self.pictures[index] for index in chosen]
        found: list[list[tuple[list[float], float, int]]] = [[] for _ in pictures]
        listed = [0] * len(pictures)  # names asked for so far
        for turn in range(max(len(picture.asked.instructions) for picture in pictures)):
            members = [i for i, picture in enumerate(pictures) if turn < len(picture.asked.instructions)]
            shown = [pictures[i].image for i in members]
            pixels, sizes = network_batch(shown, self.image_size, self.longest_side)
            shapes = {} if sizes is None else {"sizes": torch.from_numpy(sizes)}
            instructions = [pictures[i].asked.instructions[turn] for i in members]
            answers = network.find(torch.from_numpy(pixels).to(device), instructions, top=top, **shapes)
            for i, instruction, answer in zip(members, instructions, answers, strict=True):
                boxes = answer.boxes.detach().cpu().double().tolist()  # n times x1, y1, x2, y2
                labels = [listed[i] + label for label in answer.labels.tolist()]
                found[i] += zip(boxes, answer.scores.tolist(), labels, strict=True)
                listed[i] += len(instruction.classes)
        return found


class Validation:
    """Callable for the training loop: metrics of several sets, their pictures divided among the processes.

    Args:
        others: measures the tasks beside detection, divided among the processes.
    """

    def __init__(
        self,
        sets: Sequence[ValidationSet],
        processes: Processes,
        batch_size: int,
        top: int,
        others: TaskValidation | None = None,
    ) -> None:
        self.sets = list(sets)
        self.others = others
        self.processes = processes
        self.batch_size = batch_size
        self.top = top

    def __call__(self, network: nn.Module) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for one in self.sets:
            mine = range(self.processes.rank, len(one.pictures), self.processes.size)
            parts = self.processes.gather(one.predictions(network, mine, self.batch_size, self.top))
            if self.processes.first:
                numbers = coco_metrics(one.ground_truth, [entry for part in parts for entry in part])
                metrics.update({f"{one.name}/{key}": 100.0 * numbers[key] for key in REPORTED})
        if self.others is not None:
            # A task is measured by one process: what has to be gathered is numbers.
            tasks = self.others.tasks[self.processes.rank :: self.processes.size]
            for found in self.processes.gather(self.others(network, tasks)):
                metrics.update(found)
        return metrics


def listed_names(sample: Sample, count: int, rng: np.random.Generator) -> list[str]:
    """``count`` names, shuffled: the sample's objects' first, filled up with absent names it knows."""
    present = sorted(set(sample.names))
    absent = sorted(set(sample.vocabulary) - set(present))
    present = [present[i] for i in rng.permutation(len(present))][:count]
    absent = [absent[i] for i in rng.permutation(len(absent))][: max(0, count - len(present))]
    listed = present + absent
    return [listed[i] for i in rng.permutation(len(listed))]
