"""What is asked of a picture: an instruction, or class names in as many instructions as they need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from visionllm.instruction import Instruction, InstructionError, parse
from visionllm.instruction.instruction import MAX_CLASSES, UnknownFormat

if TYPE_CHECKING:
    from visionllm.instruction import Template

InstructionLike = str | Instruction
FormatWriter = Callable[[Sequence[str]], list[str]]  # wordings → the output format of each, as text


@dataclass(frozen=True)
class Request:
    """What is asked of one picture: all classes, and instructions that ask for consecutive parts of them.

    Captions and answers have no classes and one instruction.
    """

    classes: tuple[str, ...]
    instructions: tuple[Instruction, ...]

    @property
    def task(self) -> str:
        return self.instructions[0].task


def request_of(instruction: InstructionLike, write_formats: FormatWriter | None = None) -> Request:
    """`requests_of` for one instruction."""
    return requests_of([instruction], write_formats)[0]


def requests_of(
    instructions: Sequence[InstructionLike], write_formats: FormatWriter | None = None
) -> list[Request]:
    """Instructions as they are asked.

    Args:
        instructions: in words or typed.
        write_formats: asked once for the output formats of all texts whose format the grammar does not know.

    Raises:
        InstructionError: a text is no instruction; `UnknownFormat` where only its format is unknown and
            there is no ``write_formats``.
        TypeError: neither text nor an Instruction.
    """
    understood: list[Instruction | None] = []
    unknown: dict[int, UnknownFormat] = {}
    for position, instruction in enumerate(instructions):
        if isinstance(instruction, str):
            try:
                understood.append(parse(instruction))
            except UnknownFormat as error:
                if write_formats is None:
                    raise
                unknown[position] = error
                understood.append(None)
        elif isinstance(instruction, Instruction):
            understood.append(instruction)
        else:
            raise TypeError(f"instruction: expected text or an Instruction, got {type(instruction).__name__}")
    if unknown and write_formats is not None:
        written = write_formats([one.wording for one in unknown.values()])
        for (position, one), text in zip(unknown.items(), written, strict=True):
            understood[position] = _parsed_with(str(instructions[position]), text, one)
    return [Request(one.classes, (one,)) for one in understood if one is not None]


def _parsed_with(text: str, written: str, unknown: UnknownFormat) -> Instruction:
    """The text with the format that the model wrote; where that is none, the format stays unknown."""
    try:
        return parse(text, format=written)
    except InstructionError:
        raise
    except ValueError as error:
        found = f"{unknown.found}, for which the model wrote `{written}`"
        raise UnknownFormat(unknown.position, unknown.expected, found, unknown.wording) from error


def class_request(
    classes: Sequence[str],
    template: Template | None = None,
    *,
    task: str = "detection",
    points: int | None = None,
    keypoints: Sequence[str] = (),
) -> Request:
    """Any number of classes, asked in as few groups of at most MAX_CLASSES as can be, of nearly equal size.

    Args:
        classes: their names; for grounding the expressions.
        template: the wording, of ``task``; None: the task's default one.
        task: detection, segmentation, grounding or keypoints.
        points: of each polygon; the other tasks have theirs.
        keypoints: the points' names, for the task keypoints.

    Raises:
        ValueError: no classes, an empty name or the same name twice; or the task does not take the points.
    """
    names = checked_names("classes" if task != "grounding" else "expressions", classes)
    fields: dict[str, Any] = {}
    if keypoints:
        fields["keypoints"] = checked_names("keypoints", keypoints)
        points = len(keypoints)
    if points is not None:
        fields["points"] = points
    groups = -(-len(names) // MAX_CLASSES)
    bounds = [len(names) * group // groups for group in range(groups + 1)]
    parts = [names[start:end] for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    if template is not None:
        return Request(names, tuple(template.instruction(part, **fields) for part in parts))
    return Request(names, tuple(Instruction(task, part, **fields) for part in parts))


def checked_names(what: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names, all different; ``what`` is the argument's name, for the errors."""
    if isinstance(names, str):
        raise ValueError(f"{what}: expected a list of names, got the text {names!r}: write [{names!r}]")
    names = tuple(names)
    if not names:
        raise ValueError(f"{what}: expected at least one name, got none")
    seen: set[str] = set()
    for position, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{what}: expected a name at position {position}, got {name!r}")
        if name in seen:
            raise ValueError(f"{what}: {name!r} is listed twice")
        seen.add(name)
    return names
