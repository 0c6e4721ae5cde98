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
from .wording import coordinates_of

_PLACEHOLDER = re.compile(r"(<image>|<class>|<range>|<format>|<question>|\{<expression>: <c0>\})")
_QUOTED_SPECIAL = re.compile(rf"""[\\"]|<c\d|[(\[{{]\s*[{QUOTES}]""")
_QUOTED_ESCAPE = re.compile(rf"""[\\"]|<(?=c\d)|(?<=[(\[{{\s])[{QUOTES}]""")
_BARE_ESCAPE = re.compile(rf"""[\\(){{}}\[\]{QUOTES}]|<(?=c\d|expression>)""")
_CLASS_TOKENS = tuple(Segment("class_token", f"<c{k}>", k) for k in range(MAX_CLASSES))
_IMAGE = Segment("image", "<image>")
_NAME_END = Segment("text", '": ')
_NEXT_NAME = Segment("text", ', "')


def class_set_text(names: Sequence[str]) -> str:
    """``{"person": <c0>, "car": <c1>}``."""
    return "{" + ", ".join(f'"{_escape_quoted(name)}": <c{k}>' for k, name in enumerate(names)) + "}"


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

    ``<image>`` stands for the picture, ``<class>`` for the class set (grounding: ``{<expression>: <c0>}``),
    ``<range>`` for the range, ``<format>`` for the output format, ``<question>`` for the question.

    Raises:
        ValueError: a placeholder that the task needs is missing or stands twice.
    """

    text: str
    task: str = "detection"

    def __post_init__(self) -> None:
        pieces = tuple(piece for piece in _PLACEHOLDER.split(self.text) if piece)
        object.__setattr__(self, "_pieces", pieces)
        needed = ["<image>"]
        if self.task == "vqa":
            needed.append("<question>")
        elif self.task == "grounding":
            needed.append("{<expression>: <c0>}")
        elif self.task in SET_TASKS:
            needed.append("<class>")
        for placeholder in needed:
            count = pieces.count(placeholder)
            if count != 1:
                raise ValueError(
                    f"template {self.text!r}: expected {placeholder} once, found it {count} times"
                )
        coordinates = (
            coordinates_of(self.text.replace("<class>", " ")) if self.task in SET_TASKS else "offset"
        )
        object.__setattr__(self, "_coordinates", coordinates)

    @property
    def coordinates(self) -> str:
        """``"offset"`` or ``"absolute"``: what the wording asks for."""
        return self._coordinates  # type: ignore[attr-defined, no-any-return]

    def instruction(self, classes: Sequence[str], range: int = DEFAULT_RANGE, points: int = 2) -> Instruction:
        """An instruction in this wording with its ``text`` and segments, for the tasks with a class set.

        Args:
            classes: names in token order.
            range: the largest number of the answer.
            points: N, 2 for boxes.
        """
        bare = Instruction(self.task, tuple(classes), range, self.coordinates, points)
        segments = fill(bare, self)
        object.__setattr__(bare, "text", "".join([segment.text for segment in segments]))
        object.__setattr__(bare, "_segments", segments)
        return bare


@cache
def default_template(task: str, coordinates: str) -> Template:
    """The first template of the corpus with this task and these coordinates."""
    from .corpus import TRAIN_TEMPLATES

    for template in TRAIN_TEMPLATES[task]:
        if task not in SET_TASKS or template.coordinates == coordinates:
            return template
    raise ValueError(f"instruction: no template for {task} with {coordinates} coordinates")


def fill(instruction: Instruction, template: Template | None = None) -> list[Segment]:
    """The template's text with the instruction's values, cut in pieces; adjacent text is one piece."""
    if template is None:
        template = default_template(instruction.task, instruction.coordinates)
    _check_fit(instruction, template)
    result: list[Segment] = []
    text = ""
    for piece in template._pieces:  # type: ignore[attr-defined]
        if piece == "<image>":
            if text:
                result.append(Segment("text", text))
            result.append(_IMAGE)
            text = ""
        elif piece == "<class>":
            result.append(Segment("text", text + '{"'))
            for k, name in enumerate(instruction.classes):
                if k:
                    result.append(_NEXT_NAME)
                result.append(Segment("name", _escape_quoted(name), k))
                result.append(_NAME_END)
                result.append(_CLASS_TOKENS[k])
            text = "}"
        elif piece == "{<expression>: <c0>}":
            result.append(Segment("text", text + "{"))
            result.append(Segment("name", _escape_bare(instruction.classes[0]), 0))
            result.append(Segment("text", ": "))
            result.append(_CLASS_TOKENS[0])
            text = "}"
        elif piece == "<range>":
            text += str(instruction.range)
        elif piece == "<format>":
            text += format_text(instruction.points)
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
    if instruction.task not in SET_TASKS:
        return
    if template.coordinates != instruction.coordinates:
        raise ValueError(
            f"instruction: expected a template with {instruction.coordinates} coordinates, "
            f"got {template.coordinates}: {template.text!r}"
        )
    if instruction.range != DEFAULT_RANGE and "<range>" not in template.text:
        raise ValueError(
            f"instruction: range {instruction.range} needs <range> in the template {template.text!r}"
        )
    if instruction.points != 2 and "<format>" not in template.text:
        raise ValueError(
            f"instruction: {instruction.points} points need <format> in the template {template.text!r}"
        )


def render(instruction: Instruction, template: Template | None = None) -> str:
    """The instruction in words; see :meth:`Instruction.render`."""
    return "".join([segment.text for segment in fill(instruction, template)])
