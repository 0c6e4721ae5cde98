"""From a typed instruction to text: class sets, output formats and templates with placeholders.

Inside a class set every ``<ck>`` ends an entry, so a name that contains one has it escaped: ``\\<c3>``. A
backslash also escapes a backslash, a quote or a bracket where it would be misread. Ordinary names are written
as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from .class_set import QUOTES
from .instruction import DEFAULT_RANGE, MAX_CLASSES, SET_TASKS, Instruction, Segment
from .keypoint_names import keypoints_text
from .wording import coordinates_of, length_of

EXPRESSIONS = "{<expression>: <c0>}"
PLACEHOLDER = re.compile(r"(<image>|<class>|<range>|<format>|<keypoints>|<question>|\{<expression>: <c0>\})")
_QUOTED_SPECIAL = re.compile(rf"""[\\"]|<c\d|[(\[{{]\s*[{QUOTES}]""")
_QUOTED_ESCAPE = re.compile(rf"""[\\"]|<(?=c\d)|(?<=[(\[{{\s])[{QUOTES}]""")
_BARE_ESCAPE = re.compile(rf"""[\\(){{}}\[\]{QUOTES}]|<(?=c\d|expression>)|^[.…]""")
_CLASS_TOKENS = tuple(Segment("class_token", f"<c{k}>", k) for k in range(MAX_CLASSES))
_IMAGE = Segment("image", "<image>")


def class_set_text(names: Sequence[str]) -> str:
    """``{"person": <c0>, "car": <c1>}``."""
    return "{" + ", ".join(f'"{_escape_quoted(name)}": <c{k}>' for k, name in enumerate(names)) + "}"


def expressions_text(expressions: Sequence[str]) -> str:
    """``{the dog on the left: <c0>, a red car: <c1>}``."""
    return "{" + ", ".join(f"{_escape_bare(text)}: <c{k}>" for k, text in enumerate(expressions)) + "}"


def format_text(points: int) -> str:
    """The output format of N points: ``(c, x1, y1, x2, y2)``, and with an ellipsis from N = 4 on."""
    if points <= 3:
        pairs = [f"x{i}, y{i}" for i in range(1, points + 1)]
    else:
        pairs = ["x1, y1", "x2, y2", "...", f"x{points}, y{points}"]
    return f"(c, {', '.join(pairs)})"


def _escape_quoted(name: str) -> str:
    if _QUOTED_SPECIAL.search(name) is None:
        return name
    return _QUOTED_ESCAPE.sub(lambda match: "\\" + match.group(), name)


def _escape_bare(name: str) -> str:
    bare = name.strip()
    start = name.index(bare)
    before, after = name[:start], name[start + len(bare) :]
    escaped = _BARE_ESCAPE.sub(lambda match: "\\" + match.group(), bare)
    return "".join(["\\" + space for space in before] + [escaped] + ["\\" + space for space in after])


@dataclass(frozen=True)
class Template:
    """An instruction's wording, with placeholders for what varies.

    ``<image>`` stands for the picture, ``<class>`` for the class set (grounding: ``{<expression>: <c0>}``,
    for one expression or several), ``<range>`` for the range, ``<format>`` for the output format,
    ``<keypoints>`` for the list of the keypoints' names, ``<question>`` for the question.

    Raises:
        ValueError: a placeholder that the task needs is missing or stands twice.
    """

    text: str
    task: str = "detection"

    def __post_init__(self) -> None:
        pieces = tuple(piece for piece in PLACEHOLDER.split(self.text) if piece)
        object.__setattr__(self, "_pieces", pieces)
        needed = ["<image>"]
        if self.task == "vqa":
            needed.append("<question>")
        elif self.task == "grounding":
            needed.append(EXPRESSIONS)
        elif self.task in SET_TASKS:
            needed.append("<class>")
        for placeholder in needed:
            count = pieces.count(placeholder)
            if count != 1:
                raise ValueError(
                    f"template {self.text!r}: expected {placeholder} once, found it {count} times"
                )
        coordinates, length = "offset", "short"
        if self.task in SET_TASKS:
            coordinates = coordinates_of(self.text.replace("<class>", " "))
        elif self.task == "captioning":
            length = length_of(self.text)
        object.__setattr__(self, "_coordinates", coordinates)
        object.__setattr__(self, "_length", length)

    @property
    def coordinates(self) -> str:
        """``"offset"`` or ``"absolute"``: what the wording asks for."""
        return self._coordinates  # type: ignore[attr-defined, no-any-return]

    @property
    def length(self) -> str:
        """``"short"``, ``"long"`` or ``"detailed"``: what the wording of a caption asks for."""
        return self._length  # type: ignore[attr-defined, no-any-return]

    def instruction(
        self,
        classes: Sequence[str] = (),
        range: int = DEFAULT_RANGE,
        points: int = 2,
        keypoints: Sequence[str] = (),
        question: str | None = None,
    ) -> Instruction:
        """An instruction in this wording, with its ``text`` and segments.

        Args:
            classes: names in token order, grounding: expressions; none for captioning and vqa.
            range: the largest number of the answer.
            points: N, 2 for boxes; not needed with ``keypoints``.
            keypoints: the points' names in order, for the task "keypoints".
            question: for the task "vqa".

        Raises:
            ValueError: a value does not belong to the task, or the wording has no place for it.
        """
        bare = Instruction(
            self.task,
            tuple(classes),
            range,
            self.coordinates,
            points,
            question=question,
            keypoints=tuple(keypoints),
            length=self.length,
        )
        segments = fill(bare, self)
        object.__setattr__(bare, "text", "".join([segment.text for segment in segments]))
        object.__setattr__(bare, "_segments", segments)
        return bare


@cache
def unnamed_keypoint_templates() -> tuple[Template, ...]:
    """Wordings for keypoints that are only counted."""
    start = (
        "Find the keypoints of each object of <class> in <image>. The output format should be <format>, where"
    )
    return (
        Template(
            f"{start} the keypoints are offsets relative to the center point within the range <range>.",
            "keypoints",
        ),
        Template(f"{start} the coordinates of the keypoints are within the range <range>.", "keypoints"),
    )


@cache
def default_template(task: str, coordinates: str, length: str, named: bool) -> Template:
    """The first template of the corpus for such an instruction."""
    from .corpus import TRAIN_TEMPLATES

    unnamed = task == "keypoints" and not named
    for template in unnamed_keypoint_templates() if unnamed else TRAIN_TEMPLATES[task]:
        if template.coordinates == coordinates and template.length == length:
            return template
    raise ValueError(f"instruction: no template for {task} with {coordinates} coordinates, length {length}")


def fill(instruction: Instruction, template: Template | None = None) -> list[Segment]:
    """The template's text with the instruction's values, cut in pieces; adjacent text is one piece."""
    if template is None:
        template = default_template(
            instruction.task, instruction.coordinates, instruction.length, bool(instruction.keypoints)
        )
    _check_fit(instruction, template)
    result: list[Segment] = []
    text = ""
    for piece in template._pieces:  # type: ignore[attr-defined]
        if piece == "<image>":
            if text:
                result.append(Segment("text", text))
            result.append(_IMAGE)
            text = ""
        elif piece == "<class>" or piece == EXPRESSIONS:
            quote, escape = ('"', _escape_quoted) if piece == "<class>" else ("", _escape_bare)
            result.append(Segment("text", f"{text}{{{quote}"))
            between, end = Segment("text", f", {quote}"), Segment("text", f"{quote}: ")
            for k, name in enumerate(instruction.classes):
                if k:
                    result.append(between)
                result.append(Segment("name", escape(name), k))
                result.append(end)
                result.append(_CLASS_TOKENS[k])
            text = "}"
        elif piece == "<range>":
            text += str(instruction.range)
        elif piece == "<format>":
            text += format_text(instruction.points)
        elif piece == "<keypoints>":
            text += keypoints_text(instruction.keypoints)
        elif piece == "<question>":
            text += str(instruction.question)
        else:
            text += piece
    if text:
        result.append(Segment("text", text))
    return result


def _check_fit(instruction: Instruction, template: Template) -> None:
    if template.task != instruction.task:
        raise ValueError(
            f"instruction: expected a template for {instruction.task}, got one for {template.task}"
        )
    if template.length != instruction.length:
        raise ValueError(
            f"instruction: expected a template for a {instruction.length} caption, "
            f"got one for a {template.length} one: {template.text!r}"
        )
    if instruction.task not in SET_TASKS:
        return
    if ("<keypoints>" in template.text) != bool(instruction.keypoints):
        wanted = (
            "needs <keypoints>" if instruction.keypoints else "without keypoint names cannot fill <keypoints>"
        )
        raise ValueError(f"instruction: {instruction.task} {wanted} in the template {template.text!r}")
    if template.coordinates != instruction.coordinates:
        raise ValueError(
            f"instruction: expected a template with {instruction.coordinates} coordinates, "
            f"got {template.coordinates}: {template.text!r}"
        )
    if instruction.range != DEFAULT_RANGE and "<range>" not in template.text:
        raise ValueError(
            f"instruction: range {instruction.range} needs <range> in the template {template.text!r}"
        )
    if (
        instruction.points != 2
        and "<format>" not in template.text
        and len(instruction.keypoints) != instruction.points
    ):
        raise ValueError(
            f"instruction: {instruction.points} points need <format> in the template {template.text!r}"
        )


def render(instruction: Instruction, template: Template | None = None) -> str:
    """The instruction in words; see :meth:`Instruction.render`."""
    return "".join([segment.text for segment in fill(instruction, template)])
