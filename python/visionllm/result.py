"""What the model found in one picture: objects or text, the answer in words, pictures and files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from visionllm.atomic_file import replacing
from visionllm.boxes import Box, Boxes
from visionllm.image import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from PIL import Image

    from visionllm.instruction import Instruction, MalformedAnswer

__all__ = ["Box", "Boxes", "Grounded", "Result"]


ROUNDING = 1e-6  # of a score and what it leaves to 1, in float32


class Grounded(NamedTuple):
    """What was found for one expression: its best box, None where it is not in the picture.

    ``absent`` is the score that it is not there; None where the network does not say it.
    """

    text: str
    box: Box | None
    absent: float | None


@dataclass(eq=False)
class Result:
    """What was found in one picture.

    Attributes:
        image: uint8 RGB ``[H, W, 3]``, the picture as it was read.
        all_boxes: every candidate, best first, at most 100: what evaluation counts.
        boxes: those that are shown and named in the answer: from the threshold on.
        classes: the names asked for; ``labels`` are positions in it. For grounding the expressions, for
            captions and answers none.
        instructions: what was asked: one, or with more than 512 classes one for each group of them, in order.
        threshold: score from which an object is shown and named in the answer.
        source: where the picture came from: a path or the kind of object.
        text: the caption or the answer to the question; for the other tasks None.
        absent: float32 ``[K]``, grounding only: the score that each expression is not in the picture. One
            above 1 − threshold has no boxes.
        error: why the model's answer could not be read, None where it could.
    """

    image: np.ndarray
    all_boxes: Boxes
    classes: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    threshold: float
    source: str = ""
    text: str | None = None
    absent: np.ndarray | None = None
    error: MalformedAnswer | None = None
    boxes: Boxes = field(init=False)

    def __post_init__(self) -> None:
        shown = self.all_boxes.scores >= self.threshold
        if self.absent is not None:
            shown &= self.absent[self.all_boxes.labels] <= 1 - self.threshold + ROUNDING
        self.boxes = self.all_boxes.select(np.flatnonzero(shown))

    @classmethod
    def from_answer(
        cls,
        image: np.ndarray,
        instruction: Instruction,
        text: str,
        centers: np.ndarray | Sequence[Sequence[float]] | None = None,
    ) -> Result:
        """What an answer in words says of a picture, as `answer` writes it.

        Args:
            image: uint8 RGB ``[H, W, 3]``.
            instruction: what was asked.
            text: the answer. One that cannot be read, or does not fit the instruction, gives a result without
                objects whose ``error`` says where and why. Words have no scores: objects get 1.
            centers: ``[n, 2]``, the objects' centre points in pixels, which answers in offsets count from.

        Raises:
            ValueError: an answer in offsets without as many centres.
        """
        from visionllm.detections import result_of_answer

        return result_of_answer(image, instruction, text, centers)

    def __len__(self) -> int:
        return len(self.boxes)

    def __iter__(self) -> Iterator[Box]:
        return iter(self.boxes)

    @property
    def instruction(self) -> Instruction:
        """What was asked; of several groups of classes the first."""
        return self.instructions[0]

    @property
    def task(self) -> str:
        return self.instruction.task

    @property
    def format_source(self) -> str:
        """Who read the output format: "grammar", the parser's rules, or "model" where the LLM wrote it."""
        return self.instruction.format_source

    @property
    def width(self) -> int:
        return self.image.shape[1]

    @property
    def height(self) -> int:
        return self.image.shape[0]

    @property
    def polygons(self) -> list[np.ndarray] | None:
        """Segmentation: float32 ``[N, 2]``, x, y in pixels, for each shown object; else None."""
        if self.task != "segmentation":
            return None
        return [] if self.boxes.points is None else list(self.boxes.points)

    @property
    def masks(self) -> list[dict[str, Any]] | None:
        """Segmentation: the polygon's mask as compressed COCO RLE, for each shown object; else None."""
        if self.task != "segmentation":
            return None
        from visionllm.result_formats import polygon_masks

        return polygon_masks(self.boxes, self.height, self.width)

    @property
    def keypoints(self) -> np.ndarray | None:
        """Keypoints: float32 ``[n, K, 3]``, x, y in pixels and COCO's v, for each shown object; else None."""
        if self.task != "keypoints":
            return None
        found = self.boxes.keypoints()
        return np.zeros((0, self.instruction.points, 3), np.float32) if found is None else found

    @property
    def expressions(self) -> list[Grounded] | None:
        """Grounding: what was found for each expression, in their order; else None."""
        if self.task != "grounding":
            return None
        labels = self.boxes.labels.tolist()
        return [
            Grounded(
                text,
                self.boxes.box(labels.index(label)) if label in labels else None,
                None if self.absent is None else float(self.absent[label]),
            )
            for label, text in enumerate(self.classes)
        ]

    def answer(self) -> str:
        """The model's answer: objects in the paper's form, or the caption or answer in words.

        "The bounding boxes are [(<c0>, 226.4, 229.8, 363.1, 347.4), ...]." in the range and coordinate mode
        that the instruction asks for. Where the classes were asked in groups, there is one line for each,
        and <c0> is the group's first class.
        """
        from visionllm.instruction import format_answer

        if self.text is not None:
            return self.text
        size = (self.width, self.height)
        lines, first = [], 0
        for instruction in self.instructions:
            labels = self.boxes.labels - first
            mine = self.boxes.select(np.flatnonzero((labels >= 0) & (labels < len(instruction.classes))))
            centers = mine.centers * size
            lines.append(format_answer(instruction, mine.labels - first, mine.answer_points(), size, centers))
            first += len(instruction.classes)
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.answer()

    def __repr__(self) -> str:
        return f"Result({self.source or 'picture'}, {self.width}x{self.height}, {self.summary()})"

    def summary(self) -> str:
        """One line: how many of what, "2 dog, 1 red car", in the order of the classes, or "nothing found".

        Of expressions, whether each was found: "the left dog: 0.93, a cup: absent"; of texts, the text.
        """
        if self.error is not None:
            return str(self.error)
        if self.text is not None:
            return self.text
        if self.expressions is not None:
            scores = ["absent" if one.box is None else f"{one.box.score:.2f}" for one in self.expressions]
            return ", ".join(f"{text}: {score}" for text, score in zip(self.classes, scores, strict=True))
        counts = np.bincount(self.boxes.labels, minlength=len(self.classes))
        found = [f"{count} {name}" for name, count in zip(self.classes, counts, strict=True) if count]
        return ", ".join(found) or "nothing found"

    def plot(self, scale: float = 1.0, spread: bool = False) -> Image.Image:
        """The picture with what was found drawn in; words, and what is absent, stand below it.

        Args:
            scale: enlargement of the picture before the drawing; labels stay readable on small pictures.
            spread: also a cross over every point, whose arms are its coordinates' standard deviations.

        Returns:
            An RGB image.
        """
        from visionllm.drawing import draw_result

        return draw_result(self, scale, spread)

    def to_dict(self, spread: bool = False) -> dict[str, Any]:
        """Plain Python values: size, instruction, task, what is shown, answer.

        Args:
            spread: also each coordinate's standard deviation in pixels, x1, y1, ..., xN, yN.
        """
        from visionllm.result_formats import plain_values

        return plain_values(self, spread)

    def to_json(self, spread: bool = False) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(spread), ensure_ascii=False, indent=1)

    def to_coco(
        self, image_id: int | str, category_ids: Mapping[str, int] | Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """COCO results of all candidates, those below the threshold too: average precision needs them.

        The result format of the task: ``bbox``; ``segmentation`` as RLE; ``keypoints`` as x1, y1, v1, ...;
        ``caption``; or ``question`` and ``answer``.

        Args:
            image_id: the picture's id in the data set.
            category_ids: category id by class name, or one for each class in order; None: the class index.

        Raises:
            ValueError: a class has no category id.
        """
        from visionllm.result_formats import coco_results

        return coco_results(self, image_id, category_ids)

    def to_supervision(self) -> Any:
        """What is shown, as `supervision.Detections` (with masks) or, for keypoints, `supervision.KeyPoints`.

        Raises:
            ImportError: the package supervision is not installed.
            ValueError: the result is text.
        """
        from visionllm.result_formats import supervision_objects

        return supervision_objects(self)

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
