"""A network that can be reasoned about: its classes are colours, and it boxes what has a listed colour.

It has the interface of `visionllm.model.network.Network` that inference uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "pink": (255, 0, 255),
}


@dataclass
class Found:
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    centers: Tensor
    bins: Tensor


@dataclass(frozen=True)
class Config:
    image_size: int = 64
    score_threshold: float = 0.3


class ColourNetwork:
    """One box, of score 0.9, for each listed colour that is in the picture, and an empty one of score 0.1.

    Attributes:
        calls: the batches' instructions, in order.
        mistaken: score with which things of unlisted colours are boxed as the first class; 0: not at all.
    """

    def __init__(self, mistaken: float = 0.0) -> None:
        self.config = Config()
        self.calls: list[list] = []
        self.mistaken = mistaken

    def eval(self) -> ColourNetwork:
        return self

    def detect(self, images: Tensor, instructions: Sequence, top: int = 100) -> list[Found]:
        assert images.dtype == torch.uint8 and images.shape[1:] == (64, 64, 3)
        assert len(images) == len(instructions)
        self.calls.append(list(instructions))
        return [
            self._find(image.numpy(), i.classes, top) for image, i in zip(images, instructions, strict=True)
        ]

    def _find(self, image: np.ndarray, classes: Sequence[str], top: int) -> Found:
        rows = [(0.1, [0.0, 0.0, 0.01, 0.01], 0)]
        for name, colour in COLOURS.items():
            mask = (np.abs(image.astype(int) - colour) < 100).all(axis=2)
            if not mask.any():
                continue
            y, x = np.nonzero(mask)
            box = [x.min() / 64, y.min() / 64, (x.max() + 1) / 64, (y.max() + 1) / 64]
            if name in classes:
                rows.append((0.9 - 0.01 * len(rows), box, classes.index(name)))
            elif self.mistaken:
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
        )


def picture(width: int = 128, height: int = 64, **places: tuple[int, int, int, int]) -> np.ndarray:
    """Black, with filled rectangles: ``picture(red=(x1, y1, x2, y2))`` in pixels."""
    image = np.zeros((height, width, 3), np.uint8)
    for name, (x1, y1, x2, y2) in places.items():
        image[y1:y2, x1:x2] = COLOURS[name]
    return image
