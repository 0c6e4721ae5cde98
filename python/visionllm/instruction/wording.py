"""What the words around a class set ask for: the range, the coordinate mode and the task.

The text is cut into words, numbers and signs once and walked from left to right, so the time is linear in its
length.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .instruction import MAX_RANGE, InstructionError

_TOKEN = re.compile(r"<[a-z]+>|[^\W\d_]\w*|\d+(?:\.\d+)?|\.\.\.?|\S")
_OFFSET_WORDS = frozenset({"offset", "offsets", "displacement", "displacements"})
_ABSOLUTE_WORDS = frozenset({"coordinate", "coordinates", "pixel", "pixels"})
_CENTER_WORDS = frozenset({"center", "centre", "centers", "centres", "midpoint"})
_RANGE_WORDS = frozenset(
    {
        "range",
        "ranges",
        "ranging",
        "within",
        "between",
        "interval",
        "limits",
        "bounds",
        "scale",
        "scaled",
        "normalized",
    }
    | {"normalised"}
)
_RANGE_FILLERS = frozenset(
    {
        "the",
        "a",
        "an",
        "of",
        "is",
        "are",
        "be",
        "to",
        "by",
        "from",
        "range",
        "interval",
        "as",
        "in",
        "integer",
        "integers",
    }
    | {"value", "values", "limits", "bounds", "between", "within", ":", "=", "whole", "numbers"}
)
_OPEN, _CLOSE = "([{", ")]}"
_MINUS = frozenset("-−–")
_DASHES = frozenset("-–—")
_TO = frozenset({"to", "..", "...", "…", "~", "∼", "through"}) | _DASHES
_KEYPOINT_WORDS = frozenset(
    {"keypoint", "keypoints", "pose", "poses", "landmark", "landmarks", "joint", "joints"}
    | {"skeleton", "skeletons"}
)
_MASK_WORDS = frozenset(
    {
        "segment",
        "segmentation",
        "segmenting",
        "mask",
        "masks",
        "polygon",
        "polygons",
        "contour",
        "contours",
        "outline",
    }
    | {"outlines", "silhouette", "silhouettes", "boundary", "boundaries", "perimeter", "trace", "traces"}
    | {"border", "borders", "rim"}
)
_GROUNDING_WORDS = frozenset(
    {"expression", "expressions", "phrase", "phrases", "referring", "refer", "refers", "referred"}
    | {"grounding", "described"}
)
_DETECTION_WORDS = frozenset({"detect", "detects", "detected", "detecting", "detection"})
_SHORT_WORDS = frozenset({"short", "brief", "briefly", "concise", "concisely", "shortly", "quick", "quickly"})
_DETAILED_WORDS = frozenset(
    {"detailed", "detail", "details", "comprehensive", "comprehensively", "thorough", "thoroughly"}
    | {"exhaustive", "exhaustively", "elaborate", "meticulous", "everything"}
)
_LONG_WORDS = frozenset(
    {"long", "longer", "lengthy", "paragraph", "paragraphs", "extended", "extensive", "story"}
)
BOX_WORDS = frozenset({"box", "boxes", "bounding", "rectangle", "rectangles"})
_ANSWER_WORDS = frozenset({"question", "answer"})
_CAPTION_WORDS = frozenset(
    {
        "caption",
        "captions",
        "describe",
        "description",
        "descriptions",
        "analyze",
        "analyse",
        "summarize",
        "summarise",
    }
    | {"summary", "title", "explain", "narrate", "story", "sum", "describes", "paragraph"}
)


class Word(NamedTuple):
    """A word in lower case, a number or a sign, and where it stands."""

    text: str
    position: int


def words_of(text: str, offset: int = 0) -> list[Word]:
    """The text's words, numbers and signs; positions count from ``offset``."""
    return [Word(match.group().lower(), match.start() + offset) for match in _TOKEN.finditer(text)]


def coordinates_of(text: str) -> str:
    """``"offset"`` or ``"absolute"``, from a text without class set."""
    return read_coordinates(words_of(text), None)


def read_coordinates(words: list[Word], signed: bool | None) -> str:
    """The coordinate mode.

    "absolute" says so; otherwise "offsets", or "relative to" or "from" the centre, are offsets; otherwise
    "coordinates" or "pixels" are absolute (Figure 2). A text that says nothing goes by its range, [-r, r] or
    [0, r]; without one: offsets.
    """
    texts = [word.text for word in words]
    present = set(texts)
    if "absolute" in present:
        return "absolute"
    if present & _OFFSET_WORDS:
        return "offset"
    if present & _CENTER_WORDS:
        for i, text in enumerate(texts):
            if text in ("relative", "from", "against") and _CENTER_WORDS.intersection(texts[i + 1 : i + 6]):
                return "offset"
    if present & _ABSOLUTE_WORDS:
        return "absolute"
    return "absolute" if signed is False else "offset"


class RangeReader:
    """Finds "within the range 1024", "[-512, 512]", "between 0 and 1024" and the like.

    Args:
        words: the words around the class set.
        default: what an unfilled ``<range>`` stands for.
    """

    def __init__(self, words: list[Word], default: int) -> None:
        self.words = words
        self.default = default

    def read(self) -> tuple[int | None, bool | None]:
        """The range or None, and whether it was written as [-r, r] (True), [0, r] (False) or r (None)."""
        value: int | None = None
        signed: bool | None = None
        i = 0
        while i < len(self.words):
            found = self._range_at(i)
            if found is None:
                i += 1
                continue
            position, number, is_signed, i = found
            if value is not None and number != value:
                raise InstructionError(position, f"the range {value} of before", f"the range {number}")
            value = number
            signed = is_signed if signed is None else signed
        return value, signed

    def _text(self, i: int) -> str:
        return self.words[i].text if i < len(self.words) else ""

    def _range_at(self, i: int) -> tuple[int, int, bool | None, int] | None:
        """A range that begins at word i: its position, r, signed, and the word after it."""
        text = self._text(i)
        if text == "<range>":
            return self.words[i].position, self.default, None, i + 1
        trigger = text in _RANGE_WORDS
        j = i
        if trigger or text == "from":
            j += 1
            while j < i + 8 and self._text(j) in _RANGE_FILLERS:
                j += 1
        elif text not in ("[", "±") and text not in _MINUS:
            return None
        symmetric = self._text(j) == "±"
        if symmetric:
            j += 1
        bracket = not symmetric and self._text(j) != "" and self._text(j) in _OPEN
        first = self._number_at(j + bracket)
        if first is None:
            return None
        low, position, j = first
        separators = _TO | {","} if bracket else _TO | {"and"} if text in ("between", "from") else _TO
        if low > 0:
            separators = separators - _DASHES  # "within 512 - 2 corners"
        second = self._number_at(j + 1) if not symmetric and self._text(j) in separators else None
        if second is not None and not (bracket and self._text(second[2]) not in (*_CLOSE, "")):
            high, _, j = second
            if high <= 0 and low <= 0:
                raise InstructionError(
                    position, "a positive range (range must be positive)", f"{low} to {high}"
                )
            if low not in (0, -high):
                raise InstructionError(position, "a range from -r to r or from 0 to r", f"{low} to {high}")
            return position, self._checked(high, position), low < 0, j
        if symmetric:
            return position, self._checked(low, position), True, j
        if not trigger or (bracket and self._text(j) not in tuple(_CLOSE)):
            return None
        if (
            self._text(j) == ","
            and self._adjoins(j)
            and re.fullmatch(r"\d{3}", self._text(j + 1))
            and self._adjoins(j + 1)
        ):
            raise InstructionError(
                position, "a range without thousands separator", f"{low},{self._text(j + 1)}"
            )
        return position, self._checked(low, position), None, j

    def _adjoins(self, i: int) -> bool:
        """Whether word i follows the one before it without a space."""
        before = self.words[i - 1]
        return before.position + len(before.text) == self.words[i].position

    def _number_at(self, i: int) -> tuple[int, int, int] | None:
        """A signed whole number or ``<range>`` at word i: its value, its position and the word after it."""
        if i >= len(self.words):
            return None
        position = self.words[i].position
        negative = self._text(i) in _MINUS
        i += negative or self._text(i) == "+"
        text = self._text(i)
        if text == "<range>":
            value = self.default
        elif text[:1].isdigit() and text.isascii():
            if "." in text:
                raise InstructionError(position, "a range in whole numbers", f"`{text}`")
            value = int(text) if len(text) < 12 else MAX_RANGE + 1
        else:
            return None
        return (-value if negative else value), position, i + 1

    def _checked(self, value: int, position: int) -> int:
        if value <= 0:
            raise InstructionError(position, "a positive range (range must be positive)", str(value))
        if value > MAX_RANGE:
            raise InstructionError(position, f"a range of at most {MAX_RANGE}", "a larger number")
        return value


def set_task_of(words: list[Word], points: int | None, bare: int) -> str:
    """The task of a text with a class set.

    Args:
        words: the words around the class set.
        points: N of the output format, None without one.
        bare: how many names the set has if none is in quotes, ``{<expression>: <c0>}``; else 0.
    """
    present = {word.text for word in words}
    if present & _KEYPOINT_WORDS:
        return "keypoints"
    if (points or 0) > 2 or (points is None and present & _MASK_WORDS and not present & BOX_WORDS):
        return "segmentation"
    if bare == 1 or (bare and not present & _DETECTION_WORDS) or present & _GROUNDING_WORDS:
        return "grounding"
    return "detection"


def length_of(text: str) -> str:
    """``"short"``, ``"long"`` or ``"detailed"``: how much a caption is to say."""
    present = {word.text for word in words_of(text)}
    if present & _SHORT_WORDS:
        return "short"
    if present & _DETAILED_WORDS:
        return "detailed"
    return "long" if present & _LONG_WORDS else "short"


def word_task_of(words: list[Word]) -> str | None:
    """The task "captioning" or "vqa" of a text without class set; None if it asks for something else."""
    present = {word.text for word in words}
    if present & {"bounding", "polygon", "polygons"} or ("boxes" in present and "?" not in present):
        return None
    if present & _ANSWER_WORDS or "?" in present:
        return "vqa"
    if present & _CAPTION_WORDS:
        return "captioning"
    return None
