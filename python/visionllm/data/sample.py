"""One picture with its objects, as every data source hands it over: before any instruction is attached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Sample:
    """A picture and what is in it.

    Attributes:
        image: uint8 RGB ``[H, W, 3]``.
        boxes: float32 ``[n, 4]``, ``x1, y1, x2, y2`` in pixels.
        names: the n objects' class names.
        area: float32 ``[n]``, mask areas in square pixels (COCO's ``area``).
        iscrowd: bool ``[n]``; crowds are never training targets and are ignored by the metrics.
        masks: None, or n entries: COCO RLE dicts or polygons, as the source has them.
        image_id: the source's own identifier.
        vocabulary: every name that this source annotates exhaustively. A name outside it may be in the
            picture without a box, so it must never be listed as an absent class.
    """

    image: np.ndarray
    boxes: np.ndarray
    names: list[str]
    area: np.ndarray
    iscrowd: np.ndarray
    image_id: int | str
    vocabulary: tuple[str, ...]
    masks: list[Any] | None = None
