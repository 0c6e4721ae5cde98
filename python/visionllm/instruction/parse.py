"""From text to a typed instruction: a hand-written scanner, linear in the length of the text.

The class set (``class_set.py``) is found first and cut out, so that nothing inside a name is ever taken for
syntax, and so is a list of keypoints (``keypoint_names.py``). The output format (``output_format.py``),
range, coordinates and task (``wording.py``) are then read from the words around it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NoReturn

from .class_set import CLASS_TOKEN, QUOTES, ClassEntry, ClassSet, find_class_set
from .described_format import read_point_count, unread_format_at
from .instruction import DEFAULT_RANGE, Instruction, InstructionError, Segment, UnknownFormat, found_at
from .keypoint_names import KeypointNames, find_keypoints, keypoints_text
from .output_format import FORMAT_START, find_points, parse_format
from .question import marked_question, unmarked_question
from .render import class_set_text, expressions_text
from .wording import (
    RangeReader,
    Word,
    length_of,
    read_coordinates,
    set_task_of,
    word_task_of,
    words_of,
)

_EMPTY_SET = re.compile(r"\{\s*\}|\[\s*\]|\(\s*\)")
_EXPRESSION = re.compile(r"<expression>\s{0,8}:\s{0,8}<c0>")


def parse(
    text: str,
    *,
    classes: Sequence[str] | None = None,
    range: int | None = None,
    question: str | None = None,
    keypoints: Sequence[str] | None = None,
    format: str | None = None,
) -> Instruction:
    """Reads an instruction.

    Args:
        text: the instruction. ``<image>`` stands in it exactly once.
        classes: fills the placeholders ``<class>`` and ``<expression>``, in token order.
        range: fills the placeholder ``<range>``, and holds where the text names no range; 512 when None.
        question: fills the placeholder ``<question>``.
        keypoints: fills the placeholder ``<keypoints>``, the points' names in order.
        format: the output format as a model wrote it, such as ``(c, x1, y1, ..., x8, y8)``: holds where the
            text describes one that no rule reads, and ``format_source`` is ``"model"`` then.

    Returns:
        The instruction, its ``text`` with the placeholders filled.

    Raises:
        UnknownFormat: the output format is described in words that no rule reads, and ``format`` is None.
        InstructionError: the text is not an instruction; says where (in the text with its placeholders
            filled in) and what was expected.
        ValueError: ``format`` is no output format.
    """
    written = None if format is None else parse_format(format)
    text, default_range = _filled(text, classes, range, question, keypoints)
    class_set = find_class_set(text)
    if class_set is None:
        words = words_of(text)
        image = _find_image(text, None)
        result = _word_instruction(text, words)
        spans: list[ClassEntry] = []
    else:
        words = words_of(text[: class_set.start])
        words.append(Word("<class>", class_set.start))
        words += words_of(text[class_set.end :], class_set.end)
        image = _find_image(text, class_set)
        result = _set_instruction(text, class_set, words, default_range, written)
        spans = class_set.entries
    segments = _cut(text, image, spans, None if class_set is None else default_range)
    if class_set is not None and "<range>" in text:
        object.__setattr__(result, "text", "".join([segment.text for segment in segments]))
    object.__setattr__(result, "_segments", segments)
    return result


def _filled(
    text: str,
    classes: Sequence[str] | None,
    range: int | None,
    question: str | None,
    keypoints: Sequence[str] | None,
) -> tuple[str, int]:
    """The text with its placeholders filled, and the range that an absent ``<range>`` stands for."""
    for name, given in (("keypoints", keypoints), ("question", question)):
        if given is not None and f"<{name}>" not in text:
            raise InstructionError(len(text), f"a placeholder `<{name}>` for the given {name}", "none")
    if keypoints is not None:
        text = text.replace("<keypoints>", keypoints_text(keypoints), 1)
    if classes is not None and "<class>" in text:
        before, after = text.split("<class>", 1)
        text = before + class_set_text(classes) + after
    elif classes is not None and "<expression>" in text:
        place = _EXPRESSION.search(text)
        if place is None:
            raise InstructionError(
                text.index("<expression>"), "`<expression>` with its token, {<expression>: <c0>}", "none"
            )
        text = text[: place.start()] + expressions_text(classes)[1:-1] + text[place.end() :]
    elif classes is not None:
        raise InstructionError(len(text), "a placeholder `<class>` for the given names", "none")
    if question is not None:
        # "... <question>." and a question with a mark of its own
        full_stop = "." if question[-1:] in tuple(".?!") and "<question>." in text else ""
        text = text.replace("<question>" + full_stop, question, 1)
    return text, DEFAULT_RANGE if range is None else range


def _find_image(text: str, class_set: ClassSet | None) -> int:
    """Where ``<image>`` stands, outside the class set; exactly one is wanted."""
    positions = []
    at = text.find("<image>")
    while at >= 0:
        if class_set is None or not class_set.start <= at < class_set.end:
            positions.append(at)
        at = text.find("<image>", at + 1)
    if not positions:
        raise InstructionError(len(text), "the placeholder `<image>` once in the text", "none")
    if len(positions) > 1:
        raise InstructionError(positions[1], "`<image>` once", "a second `<image>`")
    return positions[0]


def _set_instruction(
    text: str, class_set: ClassSet, words: list[Word], default_range: int, written: int | None
) -> Instruction:
    """The instruction of a text with a class set.

    Args:
        written: N of the format that a model wrote.
    """
    span = (class_set.start, class_set.end)
    bare = len(class_set.entries) if class_set.bare else 0
    named: KeypointNames | None = None
    if set_task_of(words, None, bare) == "keypoints":
        named = find_keypoints(text, span)
        if named is None and "<keypoints>" in text:
            at = text.index("<keypoints>")
            raise InstructionError(at, "names of keypoints", "the unfilled placeholder `<keypoints>`")
    if named is not None:
        words = [word for word in words if not named.start <= word.position < named.end]
    points = find_points(text, [span] if named is None else [span, (named.start, named.end)])
    value, signed = RangeReader(words, default_range).read()
    if points is None:
        points = len(named.names) if named is not None else read_point_count(words)
    task = "keypoints" if named is not None else set_task_of(words, points, bare)
    source = "grammar"
    if points is None:
        # Boxes go without saying; polygons and keypoints never do.
        needed = task in ("segmentation", "keypoints")
        described = len(text) if needed else unread_format_at(words, value)
        if described is not None:
            if written is None:
                wording = f"{text[: class_set.start]}<class>{text[class_set.end :]}"
                expected = f"an output format with the points of the {task}, such as (c, x1, y1, ..., x8, y8)"
                found = "none" if needed else found_at(text, described)
                raise UnknownFormat(described, expected, found, wording)
            points, source = written, "model"
            task = set_task_of(words, points, bare)
    names = [""] * len(class_set.entries)
    for entry in class_set.entries:
        names[entry.index] = entry.name
    try:
        return Instruction(
            task,
            tuple(names),
            value or default_range,
            read_coordinates(words, signed),
            points or 2,
            text,
            keypoints=() if named is None else named.names,
            format_source=source,
        )
    except ValueError as error:
        raise InstructionError(class_set.start, "a consistent instruction", str(error)) from error


def _word_instruction(text: str, words: list[Word]) -> Instruction:
    if "<question>" in text:
        raise InstructionError(
            text.index("<question>"), "a question", "the unfilled placeholder `<question>`"
        )
    question = marked_question(text)
    task = word_task_of(words) if question is None else "vqa"
    if task is None or (task != "vqa" and FORMAT_START.search(text) is not None):
        _raise_no_class_set(text)
    if task == "vqa":
        return Instruction(task, text=text, question=question or unmarked_question(text))
    return Instruction(task, text=text, length=length_of(text))


def _raise_no_class_set(text: str) -> NoReturn:
    """Says what is wrong with a text that has no class set."""
    expected = 'a class set such as {"person": <c0>, "car": <c1>}'
    for placeholder in ("<class>", "<expression>"):
        if placeholder in text:
            raise InstructionError(
                text.index(placeholder), expected, f"the unfilled placeholder `{placeholder}`"
            )
    token = CLASS_TOKEN.search(text)
    if token is not None:
        raise InstructionError(
            token.start(), f"`:` between a name and {token.group()}", found_at(text, token.start())
        )
    empty = _EMPTY_SET.search(text)
    if empty is not None:
        raise InstructionError(empty.start(), "a name (class set is empty)", f"`{empty.group()}`")
    quoted = re.search(rf"[(\[{{]\s*[{QUOTES}]", text)
    if quoted is not None:
        raise InstructionError(quoted.start(), expected, found_at(text, quoted.start()))
    raise InstructionError(len(text), expected, "none")


def _cut(text: str, image: int, entries: list[ClassEntry], fill_range: int | None) -> list[Segment]:
    """The text in pieces: the picture, names, class tokens and what is between, with ``<range>`` filled."""

    def words(start: int, end: int) -> Segment:
        piece = text[start:end]
        return Segment("text", piece if fill_range is None else piece.replace("<range>", str(fill_range)))

    marks = [
        mark
        for entry in entries
        for mark in (
            (entry.name_start, entry.name_end, "name", entry.index),
            (entry.token_start, entry.token_end, "class_token", entry.index),
        )
    ]
    place = 0 if not entries or image < entries[0].name_start else len(marks)
    marks.insert(place, (image, image + len("<image>"), "image", None))  # type: ignore[arg-type]
    result: list[Segment] = []
    at = 0
    for start, end, kind, index in marks:
        if start > at:
            result.append(words(at, start))
        result.append(Segment(kind, text[start:end], index))  # type: ignore[arg-type]
        at = end
    if at < len(text):
        result.append(words(at, len(text)))
    return result
