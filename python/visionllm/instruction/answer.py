"""The language of the answers: "The bounding boxes are [(<c0>, 226.4, 229.8, 363.1, 347.4), ...]."

An answer is a view of the picture's objects in the range r and the coordinate mode that the instruction asks
for (VisionLLM, section 3.2 and Figure 2). With a point (x, y) in pixels, a picture of width W and height H,
and the object's centre point (cx, cy):

    absolute   x / W * r,         y / H * r           one decimal, in [0, r], as Figure 2 prints them
    offset     (x - cx) / W * r,  (y - cy) / H * r    whole numbers in [-r, r]

A step of an offset is 1/r of the width or the height; with r = 512 offsets are the location tokens' own i/512
(section 3.4).

Halves round to even; values outside the interval are moved to its end. An answer in offsets does not hold the
centres: they are needed to come back to pixels.

An expression that nothing in the picture fits is ``(<c1>, absent)``; a keypoint that is not there is
``-, -``, NaN among the numbers. Captions and answers to questions are text as it stands.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .instruction import MAX_CLASSES, SET_TASKS, Instruction

_SUBJECTS = {
    "detection": "bounding boxes",
    "grounding": "bounding boxes",
    "segmentation": "detected polygons",
    "keypoints": "detected keypoints",
}
_HEAD = re.compile(r"\s*[\"“]?\s*The (bounding boxes|detected polygons|detected keypoints) are\s*")
_TOKEN = re.compile(r"\s*<c(\d{1,6})>\s*", re.ASCII)
_ABSENT = re.compile(r"\s*absent\s*")
_NO_NUMBER = re.compile(r"\s*[-−]\s*(?=[,)])")
_NUMBER = re.compile(r"\s*([-−]?\d{1,12}(?:\.\d{1,12})?)\s*", re.ASCII)
_TAIL = re.compile(r"\s*\.?\s*[\"”]?\s*\Z")
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True, eq=False)
class Answer:
    """An answer that was read.

    Attributes:
        kind: ``"bounding boxes"``, ``"detected polygons"``, ``"detected keypoints"`` or ``"text"``.
        labels: int64 ``[n]``, k of the class token ``<ck>``.
        numbers: float64 ``[n, 2 N]``, ``x1, y1, ..., xN, yN`` as written, in the instruction's range and
            coordinates; NaN for a keypoint that is not there.
        absent: k of the expressions that nothing in the picture fits.
        text: of a caption or an answer to a question; None for the others.
    """

    kind: str
    labels: np.ndarray
    numbers: np.ndarray
    absent: tuple[int, ...] = ()
    text: str | None = None


@dataclass(frozen=True)
class MalformedAnswer:
    """An answer that could not be read: data to be counted, not an exception.

    Attributes:
        position: offset in characters, from 0, into the answer.
        expected: what should have stood there.
        found: what stands there.
    """

    position: int
    expected: str
    found: str

    def __str__(self) -> str:
        return f"answer, position {self.position}: expected {self.expected}, found {self.found}"


def box_numbers(
    instruction: Instruction,
    points: np.ndarray | Sequence[Sequence[float]],
    size: tuple[int, int],
    centers: np.ndarray | Sequence[Sequence[float]] | None = None,
) -> np.ndarray:
    """Pixels to the numbers of an answer, by the formula at the head of this file.

    Args:
        instruction: gives range and coordinates.
        points: ``[n, 2 N]``, ``x1, y1, ..., xN, yN`` in pixels (boxes: corners xyxy).
        size: (width, height) of the picture in pixels.
        centers: ``[n, 2]``, centre points (x, y) in pixels; the middle of the points' extent when None.
            Absolute answers do not use them.

    Returns:
        float64 ``[n, 2 N]``, rounded to what the answer prints; NaN stays.

    Raises:
        ValueError: a shape does not fit, or a number is infinite, or NaN where it is no keypoint.
    """
    array, scale = _checked(instruction, points, size)
    if instruction.coordinates == "absolute":
        return np.clip(np.round(array * scale, 1), 0, instruction.range) + 0.0
    offsets = (array - np.tile(_centers(array, centers), instruction.points)) * scale
    return np.clip(np.rint(offsets), -instruction.range, instruction.range) + 0.0


def pixel_points(
    instruction: Instruction,
    numbers: np.ndarray | Sequence[Sequence[float]],
    size: tuple[int, int],
    centers: np.ndarray | Sequence[Sequence[float]] | None = None,
) -> np.ndarray:
    """The numbers of an answer back to pixels: the inverse of :func:`box_numbers`, up to its rounding.

    Args:
        instruction: gives range and coordinates.
        numbers: ``[n, 2 N]``.
        size: (width, height) of the picture in pixels.
        centers: ``[n, 2]`` in pixels; needed for offsets.

    Returns:
        float64 ``[n, 2 N]`` in pixels.

    Raises:
        ValueError: a shape does not fit, a number is not finite, or offsets come without centres.
    """
    array, scale = _checked(instruction, numbers, size)
    if instruction.coordinates == "absolute":
        return array / scale
    if centers is None:
        raise ValueError("answer: offsets need the centre points, got None")
    return array / scale + np.tile(_centers(array, centers), instruction.points)


def _checked(
    instruction: Instruction, values: np.ndarray | Sequence[Sequence[float]], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The values as float64 ``[n, 2 N]``, and the factor ``[2 N]`` from pixels to the range."""
    if instruction.task not in SET_TASKS:
        raise ValueError(
            f"answer: expected an instruction for one of {', '.join(SET_TASKS)}, got {instruction.task}"
        )
    width, height = size
    if not (width > 0 and height > 0):
        raise ValueError(f"answer: size must be a positive (width, height), got {size}")
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        array = array.reshape(0, 2 * instruction.points)
    if array.ndim != 2 or array.shape[1] != 2 * instruction.points:
        raise ValueError(
            f"answer: points must have shape [n, {2 * instruction.points}], got {list(array.shape)}"
        )
    if not (np.isfinite(array) | (np.isnan(array) & (instruction.task == "keypoints"))).all():
        raise ValueError("answer: points must be finite")
    return array, np.tile([instruction.range / width, instruction.range / height], instruction.points)


def _centers(points: np.ndarray, centers: np.ndarray | Sequence[Sequence[float]] | None) -> np.ndarray:
    """float64 ``[n, 2]``."""
    if centers is None:
        if len(points) == 0:
            return np.zeros((0, 2))
        pairs = points.reshape(len(points), -1, 2)
        lowest, highest = np.fmin.reduce(pairs, axis=1), np.fmax.reduce(pairs, axis=1)  # without NaN
        return (lowest + highest) / 2
    array = np.asarray(centers, dtype=np.float64)
    if array.size == 0:
        array = array.reshape(0, 2)
    if array.shape != (len(points), 2):
        raise ValueError(f"answer: centers must have shape [{len(points)}, 2], got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError("answer: centers must be finite")
    return array


def format_answer(
    instruction: Instruction,
    labels: np.ndarray | Sequence[int],
    points: np.ndarray | Sequence[Sequence[float]],
    size: tuple[int, int],
    centers: np.ndarray | Sequence[Sequence[float]] | None = None,
    absent: Sequence[int] = (),
) -> str:
    """The answer in words, such as ``The bounding boxes are [(<c0>, 226.4, 229.8, 363.1, 347.4)].``

    Args:
        instruction: gives task, range and coordinates.
        labels: ``[n]``, indices into ``instruction.classes``.
        points: ``[n, 2 N]`` in pixels (boxes: corners xyxy); NaN for a keypoint that is not there.
        size: (width, height) of the picture in pixels.
        centers: ``[n, 2]`` in pixels, see :func:`box_numbers`.
        absent: grounding only: indices of the expressions that nothing in the picture fits.

    Raises:
        ValueError: a shape does not fit, a number is not finite, a label is not in the class set, or an
            expression is both absent and found.
    """
    numbers = box_numbers(instruction, points, size, centers)
    indices = [int(label) for label in labels]
    if len(indices) != len(numbers):
        raise ValueError(f"answer: expected {len(numbers)} labels, one for each object, got {len(indices)}")
    for label in indices:
        if not 0 <= label < len(instruction.classes):
            raise ValueError(f"answer: labels must be from 0 to {len(instruction.classes) - 1}, got {label}")
    form = "{:.1f}" if instruction.coordinates == "absolute" else "{:.0f}"
    items = [
        f"(<c{label}>, {', '.join([form.format(value) if value == value else '-' for value in row])})"
        for label, row in zip(indices, numbers.tolist(), strict=True)
    ]
    for label in absent:
        if instruction.task != "grounding" or not 0 <= label < len(instruction.classes) or label in indices:
            raise ValueError(f"answer: absent must list expressions without a box, got {list(absent)}")
        items.append(f"(<c{label}>, absent)")
    return f"The {_SUBJECTS[instruction.task]} are [{', '.join(items)}]."


def parse_answer(text: str, instruction: Instruction | None = None) -> Answer | MalformedAnswer:
    """Reads an answer.

    Args:
        text: the answer.
        instruction: when given, the answer has to fit it: kind, classes, number of points, range, whole
            offsets. For captions and questions any text is an answer, but none at all.

    Returns:
        The answer, or where and why it could not be read.
    """
    if instruction is not None and instruction.task not in SET_TASKS:
        written = text.strip()
        if not written:
            return MalformedAnswer(0, "text", "none")
        return Answer("text", np.zeros(0, np.int64), np.zeros((0, 0)), text=written)
    try:
        return _AnswerReader(text, instruction).read()
    except _MalformedError as error:
        return error.answer


class _MalformedError(Exception):
    def __init__(self, answer: MalformedAnswer) -> None:
        self.answer = answer


class _AnswerReader:
    def __init__(self, text: str, instruction: Instruction | None) -> None:
        self.text = text
        self.instruction = instruction
        self.at = 0
        self.labels: list[int] = []
        self.rows: list[list[float]] = []
        self.absent: list[int] = []
        self.kind = ""

    def read(self) -> Answer:
        head = _HEAD.match(self.text)
        expected = None if self.instruction is None else _SUBJECTS.get(self.instruction.task)
        if head is None or (expected is not None and head.group(1) != expected):
            raise self._error(f"`The {expected or 'bounding boxes'} are [`")
        self.at, self.kind = head.end(), head.group(1)
        self._take("[")
        if not self._accept("]"):
            while True:
                self._read_item()
                if self._accept("]"):
                    break
                self._take(",", "`,` or `]`")
        if _TAIL.match(self.text, self.at) is None:
            raise self._error("the end of the answer")
        columns = len(self.rows[0]) if self.rows else 2 * (self.instruction.points if self.instruction else 2)
        numbers = np.array(self.rows, dtype=np.float64).reshape(len(self.rows), columns)
        return Answer(self.kind, np.array(self.labels, dtype=np.int64), numbers, tuple(self.absent))

    def _error(self, expected: str, found: str | None = None) -> _MalformedError:
        if found is None:
            rest = self.text[self.at : self.at + 24]
            found = f"`{rest}`" if rest else "the end of the answer"
        return _MalformedError(MalformedAnswer(self.at, expected, found))

    def _accept(self, character: str) -> bool:
        space = _SPACE.match(self.text, self.at)
        after = space.end() if space is not None else self.at
        if self.text[after : after + 1] != character:
            return False
        self.at = after + 1
        return True

    def _take(self, character: str, expected: str | None = None) -> None:
        if not self._accept(character):
            raise self._error(expected or f"`{character}`")

    def _read_item(self) -> None:
        self._take("(")
        token = _TOKEN.match(self.text, self.at)
        if token is None:
            raise self._error("a class token such as `<c0>`")
        label = int(token.group(1))
        count = MAX_CLASSES if self.instruction is None else len(self.instruction.classes)
        if label >= count:
            raise self._error(f"a class token from <c0> to <c{count - 1}>")
        self.at = token.end()
        if self._read_absent(label):
            return
        row: list[float] = []
        while self._accept(","):
            row.append(self._read_number())
        wanted = None if self.instruction is None else 2 * self.instruction.points
        if wanted is None and self.rows:
            wanted = len(self.rows[0])
        if not row or len(row) % 2 or (wanted is not None and len(row) != wanted):
            raise self._error(f"{wanted or 'pairs of'} numbers after <c{label}>", f"{len(row)}")
        halves = [x != x for x in row]  # NaN
        if halves[::2] != halves[1::2]:
            raise self._error("both numbers of a point or neither", "one")
        if label in self.absent:
            raise self._error(f"no box of <c{label}>, which is absent", "one")
        self._take(")", "`,` or `)`")
        self.labels.append(label)
        self.rows.append(row)

    def _read_absent(self, label: int) -> bool:
        """Whether the item says that nothing fits expression k."""
        absent = _ABSENT.match(self.text, self.at + 1) if self.text[self.at : self.at + 1] == "," else None
        if absent is None or (self.instruction is not None and self.instruction.task != "grounding"):
            return False
        if label in self.labels or label in self.absent:
            raise self._error(f"<c{label}> once, or boxes of it")
        self.at = absent.end()
        self._take(")")
        self.absent.append(label)
        return True

    def _read_number(self) -> float:
        nothing = _NO_NUMBER.match(self.text, self.at) if self.kind == "detected keypoints" else None
        if nothing is not None:
            self.at = nothing.end()
            return math.nan
        number = _NUMBER.match(self.text, self.at)
        if number is None:
            raise self._error("a number")
        written = number.group(1).replace("−", "-")
        value = float(written)
        if self.instruction is not None:
            most = self.instruction.range
            least = 0 if self.instruction.coordinates == "absolute" else -most
            if not least <= value <= most:
                raise self._error(f"a number from {least} to {most}")
            if self.instruction.coordinates == "offset" and not value.is_integer():
                raise self._error("a whole number")
        self.at = number.end()
        return value
