"""What the model found in one picture: boxes, the answer in the instruction's form, pictures and files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from visionllm.atomic_file import replacing
from visionllm.image import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from PIL import Image

    from visionllm.instruction import Instruction


class Box(NamedTuple):
    """One object: ``xyxy`` in pixels, score in 0..1, class index and name."""

    xyxy: tuple[float, float, float, float]
    score: float
    label: int
    name: str


@dataclass(frozen=True, eq=False)
class Boxes:
    """n objects, best first.

    Attributes:
        xyxy: float32 ``[n, 4]``, x1, y1, x2, y2 in pixels of the picture.
        scores: float32 ``[n]``, descending.
        labels: int64 ``[n]``, positions in the result's ``classes``.
        names: the n class names.
        centers: float32 ``[n, 2]``, x, y in 0..1 of the picture: the points l_i that offsets count from.
    """

    xyxy: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: list[str]
    centers: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Box]:
        for xyxy, score, label, name in zip(self.xyxy, self.scores, self.labels, self.names, strict=True):
            x1, y1, x2, y2 = (float(value) for value in xyxy)
            yield Box((x1, y1, x2, y2), float(score), int(label), name)

    def first(self, count: int) -> Boxes:
        """The ``count`` best objects."""
        return Boxes(
            self.xyxy[:count],
            self.scores[:count],
            self.labels[:count],
            self.names[:count],
            self.centers[:count],
        )


@dataclass(eq=False)
class Result:
    """What was found in one picture.

    Attributes:
        image: uint8 RGB ``[H, W, 3]``, the picture as it was read.
        all_boxes: every candidate, best first, at most 100: what evaluation counts.
        classes: the names asked for; ``labels`` are positions in it.
        instructions: what was asked: one, or with more than 512 classes one for each group of them, in order.
        threshold: score from which an object is shown and named in the answer.
        source: where the picture came from: a path or the kind of object.
    """

    image: np.ndarray
    all_boxes: Boxes
    classes: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    threshold: float
    source: str = ""
    boxes: Boxes = field(init=False)

    def __post_init__(self) -> None:
        self.boxes = self.all_boxes.first(int((self.all_boxes.scores >= self.threshold).sum()))

    def __len__(self) -> int:
        return len(self.boxes)

    def __iter__(self) -> Iterator[Box]:
        return iter(self.boxes)

    @property
    def instruction(self) -> Instruction:
        """What was asked; of several groups of classes the first."""
        return self.instructions[0]

    @property
    def width(self) -> int:
        return self.image.shape[1]

    @property
    def height(self) -> int:
        return self.image.shape[0]

    def answer(self) -> str:
        """The boxes in the paper's form, in the range and coordinate mode that the instruction asks for.

        "The bounding boxes are [(<c0>, 226.4, 229.8, 363.1, 347.4), ...]." Where the classes were asked in
        groups, there is one line for each, and <c0> is the group's first class.
        """
        from visionllm.instruction import format_answer

        size = (self.width, self.height)
        lines, first = [], 0
        for instruction in self.instructions:
            labels = self.boxes.labels - first
            mine = (labels >= 0) & (labels < len(instruction.classes))
            xyxy, centers = self.boxes.xyxy[mine], self.boxes.centers[mine] * size
            lines.append(format_answer(instruction, labels[mine], xyxy, size, centers))
            first += len(instruction.classes)
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.answer()

    def __repr__(self) -> str:
        return f"Result({self.source or 'picture'}, {self.width}x{self.height}, {self.summary()})"

    def summary(self) -> str:
        """How many of what: "2 dog, 1 red car", in the order of the classes; "nothing found"."""
        counts = np.bincount(self.boxes.labels, minlength=len(self.classes))
        found = [f"{count} {name}" for name, count in zip(self.classes, counts, strict=True) if count]
        return ", ".join(found) or "nothing found"

    def plot(self, scale: float = 1.0) -> Image.Image:
        """The picture with its boxes and labels drawn in.

        Args:
            scale: enlargement of the picture before the drawing; labels stay readable on small pictures.

        Returns:
            An RGB image.
        """
        from visionllm.drawing import draw_boxes

        return draw_boxes(self.image, self.boxes, scale)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values: size, instruction, boxes over the threshold, answer."""
        return {
            "source": self.source,
            "width": self.width,
            "height": self.height,
            "instruction": self.instruction.text or self.instruction.render(),
            "boxes": [
                {
                    "xyxy": [round(value, 2) for value in box.xyxy],
                    "label": box.name,
                    "class": box.label,
                    "score": round(box.score, 4),
                }
                for box in self
            ],
            "answer": self.answer(),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=1)

    def to_coco(
        self, image_id: int | str, category_ids: Mapping[str, int] | Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """COCO results of all candidates, those below the threshold too: average precision needs them.

        Args:
            image_id: the picture's id in the data set.
            category_ids: category id by class name, or one for each class in order; None: the class index.

        Raises:
            ValueError: a class has no category id.
        """
        ids = self._category_ids(category_ids)
        results = []
        for box in self.all_boxes:
            x1, y1, x2, y2 = box.xyxy
            bbox = [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)]
            results.append(
                {"image_id": image_id, "category_id": ids[box.label], "bbox": bbox, "score": box.score}
            )
        return results

    def save(self, path: str | os.PathLike[str], scale: float = 1.0) -> Path:
        """Writes the annotated picture, or with the suffix ``.json`` what `to_json` says.

        Raises:
            ValueError: the suffix is neither a picture's nor ``.json``.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix != ".json" and suffix not in IMAGE_SUFFIXES:
            raise ValueError(
                f"{path}: expected a picture's suffix (.png, .jpg, ...) or .json, got {suffix!r}"
            )
        with replacing(path) as part:
            if suffix == ".json":
                part.write_text(self.to_json() + "\n", encoding="utf-8")
            elif suffix in (".jpg", ".jpeg"):
                self.plot(scale).save(part, quality=92, subsampling=0)
            else:
                self.plot(scale).save(part)
        return path

    def _category_ids(self, given: Mapping[str, int] | Sequence[int] | None) -> Sequence[int]:
        if given is None:
            return range(len(self.classes))
        if isinstance(given, Mapping):
            missing = [name for name in self.classes if name not in given]
            if missing:
                raise ValueError(f"category_ids: no id for {', '.join(map(repr, missing[:5]))}")
            return [given[name] for name in self.classes]
        if len(given) != len(self.classes):
            raise ValueError(f"category_ids: expected {len(self.classes)} ids, one a class, got {len(given)}")
        return given
