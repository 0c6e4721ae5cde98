"""A network that can be reasoned about: its classes are colours, and it finds what has a listed colour.

It has the interface of `visionllm.model.network.Network` that inference uses, for every task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from visionllm.data.polygons import resample
from visionllm.instruction import Instruction
from visionllm.instruction.instruction import SET_TASKS, TASKS
from visionllm.text_options import TextOptions

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "pink": (255, 0, 255),
}


PLACES = {  # keypoints of a rectangle, in shares of its width and height
    "top left": (0.0, 0.0),
    "top right": (1.0, 0.0),
    "bottom right": (1.0, 1.0),
    "bottom left": (0.0, 1.0),
    "center": (0.5, 0.5),
}
SPREAD = 0.01  # of every coordinate, in shares of the picture


@dataclass
class Found:
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    centers: Tensor
    bins: Tensor
    points: Tensor
    visibility: Tensor | None = None
    spread: Tensor | None = None
    absent: Tensor | None = None


@dataclass(frozen=True)
class Config:
    image_size: int = 64
    longest_side: int = 0
    score_threshold: float = 0.3
    tasks: tuple[str, ...] = TASKS
    classifier_names: tuple[str, ...] = ()


class ColourNetwork:
    """One box, of score 0.9, for each listed colour that is in the picture, and an empty one of score 0.1.

    An expression means the colour whose name is in it. Polygons follow the box's outline; keypoints are those
    of `PLACES`, the center hidden and unknown names not in the picture.

    Attributes:
        calls: the batches' instructions, in order.
        mistaken: score with which things of unlisted colours are boxed as the first class; 0: not at all.
        format: the output format that it writes.
        options: of the last texts.
    """

    def __init__(
        self,
        mistaken: float = 0.0,
        tasks: tuple[str, ...] = TASKS,
        format: str = "(c, x1, y1, x2, y2)",  # noqa: A002
    ) -> None:
        self.config = Config(tasks=tasks)
        self.calls: list[list[Instruction]] = []
        self.mistaken = mistaken
        self.format = format
        self.options: TextOptions | None = None

    def eval(self) -> ColourNetwork:
        return self

    def check_task(self, task: str) -> None:
        if task not in self.config.tasks:
            raise ValueError(f"these weights were trained for {', '.join(self.config.tasks)}, not for {task}")

    def find(
        self, images: Tensor, instructions: Sequence[Instruction], top: int = 100, spread: bool = False
    ) -> list[Found]:
        assert all(one.task in SET_TASKS for one in instructions)
        self._take(images, instructions)
        found = [
            self._find(image.numpy(), one.classes, top)
            for image, one in zip(images, instructions, strict=True)
        ]
        for one, instruction in zip(found, instructions, strict=True):
            self._complete(one, instruction, spread)
        return found

    def write(
        self,
        images: Tensor,
        instructions: Sequence[Instruction],
        options: TextOptions | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[str]:
        """Captions name the colours; the answer to any question is how many there are."""
        assert not any(one.task in SET_TASKS for one in instructions)
        self._take(images, instructions)
        self.options = options
        texts = []
        for image, one in zip(images, instructions, strict=True):
            colours = [name for name in COLOURS if coloured(image.numpy(), name).any()]
            if one.task == "vqa":
                texts.append(str(len(colours)) if colours else "")
            else:
                words = {"short": "", "long": "a picture of ", "detailed": "a black picture, and in it "}
                texts.append(words[one.length] + " and ".join(colours))
        for row, text in enumerate(texts):
            for number, word in enumerate(text.split(" ") if on_text else ()):
                on_text(row, word if number == 0 else f" {word}")
        return texts

    def write_format(self, texts: Sequence[str]) -> list[str]:
        return [self.format] * len(texts)

    def _take(self, images: Tensor, instructions: Sequence[Instruction]) -> None:
        assert images.dtype == torch.uint8 and images.shape[1:] == (64, 64, 3)
        assert len(images) == len(instructions)
        self.calls.append(list(instructions))

    def _find(self, image: np.ndarray, classes: Sequence[str], top: int) -> Found:
        rows = [(0.1, [0.0, 0.0, 0.01, 0.01], 0)]
        for name in COLOURS:
            mask = coloured(image, name)
            if not mask.any():
                continue
            y, x = np.nonzero(mask)
            box = [x.min() / 64, y.min() / 64, (x.max() + 1) / 64, (y.max() + 1) / 64]
            listed = [label for label, text in enumerate(classes) if name in text.split()]
            rows += [(0.9 - 0.01 * len(rows), box, label) for label in listed]
            if not listed and self.mistaken:
                rows.append((self.mistaken, box, 0))
        rows.sort(key=lambda row: -row[0])
        rows = rows[:top]
        boxes = torch.tensor([row[1] for row in rows], dtype=torch.float32)
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        return Found(
            boxes=boxes,
            scores=torch.tensor([row[0] for row in rows]),
            labels=torch.tensor([row[2] for row in rows]),
            centers=centers,
            bins=((boxes - centers.repeat(1, 2)) * 512).round().long(),
            points=boxes.view(-1, 2, 2),
        )

    def _complete(self, found: Found, instruction: Instruction, spread: bool) -> None:
        """What other tasks than detection have beside the boxes."""
        n, corner, size = len(found.boxes), found.boxes[:, None, :2], found.boxes[:, 2:] - found.boxes[:, :2]
        if instruction.task == "segmentation":
            square = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
            outline = torch.from_numpy(resample(square, instruction.points))
            found.points = corner + outline * size[:, None]
        elif instruction.task == "keypoints":
            places = torch.tensor([PLACES.get(name, (0.0, 0.0)) for name in instruction.keypoints])
            found.points = corner + places * size[:, None]
            flags = [(name in PLACES) * (1 + (name != "center")) for name in instruction.keypoints]
            found.visibility = torch.eye(3)[flags].expand(n, -1, -1) * 0.7 + 0.1
        elif instruction.task == "grounding":
            best = [
                found.scores[found.labels == k].max().item() if (found.labels == k).any() else 0.0
                for k in range(len(instruction.classes))
            ]
            found.absent = 1 - torch.tensor(best)
        if spread:
            found.spread = torch.full((n, 2 * instruction.points), SPREAD)


def coloured(image: np.ndarray, name: str) -> np.ndarray:
    """Which pixels have about this colour: bool ``[H, W]``."""
    return (np.abs(image.astype(int) - COLOURS[name]) < 100).all(axis=2)


def picture(width: int = 128, height: int = 64, **places: tuple[int, int, int, int]) -> np.ndarray:
    """Black, with filled rectangles: ``picture(red=(x1, y1, x2, y2))`` in pixels."""
    image = np.zeros((height, width, 3), np.uint8)
    for name, (x1, y1, x2, y2) in places.items():
        image[y1:y2, x1:x2] = COLOURS[name]
    return image
