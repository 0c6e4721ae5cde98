"""What a training step takes: pictures with their instructions and what is right; batches that come again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from visionllm.instruction import Instruction


@dataclass
class TrainBatch:
    """B pictures with their instructions, all of one task, and targets.

    Attributes:
        images: uint8 RGB ``[B, S, S, 3]``, or ``[B, H, W, 3]`` with ``sizes``.
        boxes: B arrays float32 ``[n, 4]``, centre x, centre y, width, height in 0..1 of the picture: the
            objects whose class is listed.
        labels: B arrays int64 ``[n]``, positions in ``instruction.classes``.
        instructions: B instructions with their text.
        ignore: B arrays float32 ``[m, 4]`` like ``boxes``: areas with objects of listed classes that are no
            targets (crowds, objects cut off by the border, more objects than asked for); answers there are
            neither right nor wrong.
        unlisted: B arrays float32 ``[m, 4]`` like ``boxes``: objects whose class is not listed; nothing must
            be said there.
        unlisted_names: the m names of those.
        source: the B names of the sources.
        photo: B times whether it is a photo source.
        task: of all instructions.
        points: for outlines and keypoints, B arrays float32 ``[n, N, 2]``, x and y in 0..1 of the picture,
            in the order of ``boxes``; None for boxes, whose corners say it.
        visibility: for keypoints, B arrays int64 ``[n, N]`` as in COCO: 0 not labelled, 1 hidden, 2 visible.
        answers: for captioning and vqa, the B right texts; there are no objects then.
        turns: beside those, further questions about the B pictures with their answers, in the order in which
            they are asked after the first answer; [] for none.
        formats: beside those, pairs of an instruction in words and the output format it asks for.
        sizes: int64 ``[B, 2]``, height and width of what is no padding in the pictures; None: all of it.
        comes_again: one of `RepeatedBatches`; seen: what training keeps of its pictures then.
    """

    images: np.ndarray
    boxes: list[np.ndarray]
    labels: list[np.ndarray]
    instructions: list[Instruction]
    ignore: list[np.ndarray]
    unlisted: list[np.ndarray]
    unlisted_names: list[list[str]]
    source: list[str]
    photo: list[bool]
    task: str = "detection"
    points: list[np.ndarray] | None = None
    visibility: list[np.ndarray] | None = None
    answers: list[str] = field(default_factory=list)
    turns: list[list[tuple[str, str]]] = field(default_factory=list)
    formats: list[tuple[str, str]] = field(default_factory=list)
    sizes: np.ndarray | None = None
    comes_again: bool = False
    seen: Any = None


class RepeatedBatches:
    """The first `count` batches of others again and again, with further questions in changing order.

    They stay in memory, and where training keeps what it sees of them, seeing costs one round only.
    """

    def __init__(self, batches: Any, count: int, seed: int) -> None:
        self.batches, self.count, self.seed = batches, count, seed
        self._kept: dict[int, TrainBatch] = {}
        self._turns: dict[int, list[list[tuple[str, str]]]] = {}  # in their first order

    def __getitem__(self, step: int) -> TrainBatch:
        place = step % self.count
        kept = self._kept.get(place)
        if kept is None:
            kept = self._kept[place] = replace(self.batches[place], comes_again=True)
            self._turns[place] = kept.turns
        elif kept.seen is not None:
            kept.images = np.empty_like(kept.images[:0])  # a view would keep the pictures in memory
        rng = np.random.default_rng([self.seed, step])
        kept.turns = [[row[k] for k in rng.permutation(len(row))] for row in self._turns[place]]
        return kept
