"""The typed instruction: what a picture is asked for, and in which form the answer is wanted.

VisionLLM, arXiv 2305.11175, section 3.2: an instruction names a task, a category set that maps names to the
class tokens ``<c0>`` ... ``<c511>``, and an output format, the tuple (C, P) of a class index and N points
whose coordinates lie within a range.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from .render import Template

TASKS = ("detection", "segmentation", "grounding", "keypoints", "captioning", "vqa")
SET_TASKS = TASKS[:4]  # answered by a list of tuples (c, x1, y1, ...); the others by words
MAX_CLASSES = 512  # <c0> ... <c511>, section 3.4
MAX_POINTS = 512
MAX_POLYGON_POINTS = 64
LENGTHS = ("short", "long", "detailed")
DEFAULT_RANGE = 512  # the location tokens <p-512> ... <p512>, section 3.4
MAX_RANGE = 10**9


class Segment(NamedTuple):
    """A piece of an instruction's text.

    Attributes:
        kind: ``"text"``; ``"image"``, the ``<image>`` placeholder; ``"name"``, a class name as it stands in
            the text (with its escapes, without its quotes); ``"class_token"``, ``<ck>`` in the class set.
        text: the piece itself.
        index: k for names and class tokens, None otherwise.
    """

    kind: Literal["text", "image", "name", "class_token"]
    text: str
    index: int | None = None  # type: ignore[assignment]  # hides tuple.index


class InstructionError(ValueError):
    """Text that is not an instruction.

    Attributes:
        position: offset in characters, from 0, into the text that was parsed.
        expected: what should have stood there.
        found: what stands there.
    """

    def __init__(self, position: int, expected: str, found: str) -> None:
        super().__init__(position, expected, found)
        self.position = position
        self.expected = expected
        self.found = found

    def __str__(self) -> str:
        return f"instruction, position {self.position}: expected {self.expected}, found {self.found}"


class UnknownFormat(InstructionError):
    """An instruction whose output format is described in words that no rule reads.

    The model can be asked for the format: ``parse(text, format=network.write_format([error.wording])[0])``.

    Attributes:
        wording: the text with its class set as ``<class>``, what the model reads.
    """

    def __init__(self, position: int, expected: str, found: str, wording: str = "") -> None:
        super().__init__(position, expected, found)
        self.wording = wording


def found_at(text: str, position: int) -> str:
    """What stands at a position, for an error."""
    rest = text[position : position + 24]
    return f"`{rest}`" if rest else "the end of the text"


@dataclass(frozen=True)
class Instruction:
    """What is asked of a picture.

    Two instructions are equal when they ask for the same; their wording (``text``) is not compared.

    Raises:
        ValueError: a field is out of its bounds; the message names field, expected and got.
    """

    task: str = "detection"  # one of TASKS
    classes: tuple[
        str, ...
    ] = ()  # names in token order: classes[k] is <ck>; empty for captioning and vqa alone
    range: int = DEFAULT_RANGE  # > 0; the largest number of an answer, see answer.py
    coordinates: str = (
        "offset"  # "offset": relative to the centre point; "absolute": from the top left corner
    )
    points: int = 2  # N of the tuple (c, x1, y1, ..., xN, yN); 2 for boxes
    text: str | None = field(default=None, compare=False, repr=False)  # the wording, placeholders filled
    question: str | None = None  # vqa only: the question
    keypoints: tuple[str, ...] = ()  # keypoints only: the points' names in order, which set `points`
    length: str = "short"  # captioning only: one of LENGTHS
    format_source: str = field(default="grammar", compare=False)  # "model" where it wrote the output format

    def __post_init__(self) -> None:
        if not isinstance(self.classes, tuple):
            if isinstance(self.classes, str):
                raise ValueError(
                    f"instruction: classes must be a list of names, got the string {self.classes!r}"
                )
            object.__setattr__(self, "classes", tuple(self.classes))
        if self.task not in TASKS:
            raise ValueError(f"instruction: task must be one of {', '.join(TASKS)}, got {self.task!r}")
        if self.coordinates not in ("offset", "absolute"):
            raise ValueError(
                f"instruction: coordinates must be 'offset' or 'absolute', got {self.coordinates!r}"
            )
        for name in ("range", "points"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"instruction: {name} must be a whole number, got {value!r}")
        if not 0 < self.range <= MAX_RANGE:
            raise ValueError(f"instruction: range must be positive and at most {MAX_RANGE}, got {self.range}")
        self._check_classes()
        self._check_keypoints()
        self._check_points()
        if self.length not in LENGTHS:
            raise ValueError(f"instruction: length must be one of {', '.join(LENGTHS)}, got {self.length!r}")
        if self.length != "short" and self.task != "captioning":
            raise ValueError(
                f"instruction: length belongs to the task captioning, got {self.length!r} for {self.task}"
            )
        if self.format_source not in ("grammar", "model"):
            raise ValueError(
                f"instruction: format_source must be 'grammar' or 'model', got {self.format_source!r}"
            )
        if (self.question is not None) != (self.task == "vqa"):
            raise ValueError(
                f"instruction: question belongs to the task vqa, got {self.question!r} for {self.task}"
            )
        question = self.question
        if question is not None and (not question or question != question.strip() or "<image>" in question):
            raise ValueError(
                f"instruction: question must be text without outer spaces or <image>, got {question!r}"
            )

    def _check_classes(self) -> None:
        if self.task not in SET_TASKS:
            if self.range != DEFAULT_RANGE or self.coordinates != "offset":
                raise ValueError(
                    f"instruction: {self.task} has no range, got {self.range}, {self.coordinates}"
                )
            if self.classes:
                raise ValueError(
                    f"instruction: {self.task} takes no class set, got {len(self.classes)} classes"
                )
            return
        if not self.classes:
            raise ValueError("instruction: class set is empty")
        if len(self.classes) > MAX_CLASSES:
            raise ValueError(f"instruction: more than {MAX_CLASSES} classes, got {len(self.classes)}")
        for k, name in enumerate(self.classes):
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"instruction: the name of <c{k}> must be a non-empty string, got {name!r}")
        if len(set(self.classes)) != len(self.classes):
            first: dict[str, int] = {}
            for k, name in enumerate(self.classes):
                if first.setdefault(name, k) != k:
                    raise ValueError(f"instruction: {name!r} is named twice, by <c{first[name]}> and <c{k}>")

    def _check_keypoints(self) -> None:
        names = self.keypoints
        if isinstance(names, str):
            raise ValueError(f"instruction: keypoints must be a list of names, got the string {names!r}")
        object.__setattr__(self, "keypoints", names := tuple(names))
        if not names:
            return
        if self.task != "keypoints":
            raise ValueError(
                f"instruction: keypoints belong to the task keypoints, got {len(names)} for {self.task}"
            )
        for place, name in enumerate(names):
            if not isinstance(name, str) or not name.strip():
                raise ValueError(
                    f"instruction: the name of keypoint {place + 1} must be a non-empty string, got {name!r}"
                )
            if "<" in name:
                raise ValueError(f"instruction: the name of a keypoint must not contain `<`, got {name!r}")
            if name in names[:place]:
                raise ValueError(f"instruction: two keypoints have the name {name!r}")
        if self.points == 2:  # its default
            object.__setattr__(self, "points", len(names))
        if self.points != len(names):
            raise ValueError(
                f"instruction: points must be {len(names)}, as many as keypoints, got {self.points}"
            )

    def _check_points(self) -> None:
        if self.task == "segmentation":
            least, most = 3, MAX_POLYGON_POINTS
        elif self.task == "keypoints":
            least, most = 1, MAX_POINTS
        else:
            least, most = 2, 2
        if not least <= self.points <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            raise ValueError(f"instruction: points must be {wanted} for {self.task}, got {self.points}")

    def render(self, template: Template | None = None) -> str:
        """The instruction in words; ``parse`` of the result equals ``self``.

        Args:
            template: the wording, of the same task and coordinates; the task's default when None.

        Raises:
            ValueError: the template cannot say this instruction.
        """
        from .render import render

        return render(self, template)

    def segments(self, template: Template | None = None) -> list[Segment]:
        """The text cut in pieces, in order: ``"".join(s.text for s in segments) == text``.

        Args:
            template: the wording. When None: ``self.text`` if it is set, or else the task's default.

        Raises:
            ValueError: ``self.text`` says something else than the fields, or the template cannot say it.
        """
        if template is not None or self.text is None:
            from .render import fill

            return fill(self, template)
        cached = self.__dict__.get("_segments")
        if cached is None:
            from .parse import parse
            from .render import format_text

            written = format_text(self.points) if self.format_source == "model" else None
            parsed = parse(self.text, format=written)
            if parsed != self:
                raise ValueError(f"instruction: the text says {parsed!r}, the fields say {self!r}")
            cached = parsed.__dict__["_segments"]
            object.__setattr__(self, "_segments", cached)
        return list(cached)
