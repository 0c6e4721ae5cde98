"""From text to a typed instruction: a hand-written scanner, linear in the length of the text.

The class set is found first and cut out, so that nothing inside a name is ever taken for syntax; range, coordinates, output
format and task are then read from the words around it (``wording.py``).

    class set  := open entry ("," entry)* [","] close          open, close: {} [] () or \\{ \\}
    entry      := name ":" "<c" k ">"  |  "..."                 every k from 0 on once, in any order
    name       := quote characters quote  |  characters         the two quotes may differ
    format     := "(" "c" ("," "x" i "," "y" i)* ["," "..." "," "x" N "," "y" N] ")"

Inside a class set every ``<ck>`` ends an entry; a name that contains one has it escaped, ``\\<c3>`` (see ``render.py``).
An ellipsis among the entries is accepted only where it leaves out nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from .instruction import (
    DEFAULT_RANGE,
    MAX_CLASSES,
    MAX_POINTS,
    Instruction,
    InstructionError,
    Segment,
)
from .render import QUOTES, class_set_text
from .wording import (
    RangeReader,
    Word,
    read_coordinates,
    read_point_count,
    set_task_of,
    word_task_of,
    words_of,
)

_CLASS = re.compile(r"<c(\d+)>", re.ASCII)
_ENTRY = re.compile(r":\s*<c\d+>", re.ASCII)
_BRACKET = re.compile(r"[\[\](){}]")
_SPACE = re.compile(r"\s*")
_ESCAPE = re.compile(rf"\\([\\(){{}}\[\]<\s{QUOTES}])")
_ELLIPSIS = re.compile(r"(?:\.\.\.|…)\s*(?=[,;\])}])")
_FORMAT = re.compile(r"([(\[])\s*(?:c|cls|class)\s*,\s*(?=[xy.…])")
_FORMAT_ITEM = re.compile(r"([xy])_?\{?(\d+)\}?|\.\.\.|…", re.ASCII)
_EMPTY_SET = re.compile(r"\{\s*\}|\[\s*\]|\(\s*\)")
_QUESTION = re.compile(r"question:", re.IGNORECASE)
_CLOSER = {"{": "}", "[": "]", "(": ")"}


class _Entry(NamedTuple):
    """One name of a class set: spans into the text."""

    index: int
    name: str
    name_start: int
    name_end: int
    token_start: int
    token_end: int


class _ClassSet(NamedTuple):
    start: int  # of the opening bracket
    end: int  # after the closing bracket
    entries: list[_Entry]
    bare: bool  # whether the first name has no quotes


def parse(
    text: str, *, classes: Sequence[str] | None = None, range: int | None = None, question: str | None = None
) -> Instruction:
    """Reads an instruction.

    Args:
        text: the instruction. ``<image>`` stands in it exactly once.
        classes: fills the placeholders ``<class>`` and ``<expression>``, in token order.
        range: fills the placeholder ``<range>``; 512 when None, also where the text names no range.
        question: fills the placeholder ``<question>``.

    Returns:
        The instruction, its ``text`` with the placeholders filled.

    Raises:
        InstructionError: the text is not an instruction; says where and what was expected.
    """
    text, default_range = _filled(text, classes, range, question)
    class_set = _find_class_set(text)
    if class_set is None:
        words = words_of(text)
        image = _find_image(text, None)
        result = _word_instruction(text, words)
        spans: list[_Entry] = []
    else:
        words = words_of(text[: class_set.start]) + words_of(text[class_set.end :], class_set.end)
        image = _find_image(text, class_set)
        result = _set_instruction(text, class_set, words, default_range)
        spans = class_set.entries
    segments = _cut(text, image, spans, default_range)
    if "<range>" in text:
        object.__setattr__(result, "text", "".join([segment.text for segment in segments]))
    object.__setattr__(result, "_segments", segments)
    return result


def _found(text: str, position: int) -> str:
    """What stands at a position, for an error."""
    rest = text[position : position + 24]
    return f"`{rest}`" if rest else "the end of the text"


def _filled(
    text: str, classes: Sequence[str] | None, range: int | None, question: str | None
) -> tuple[str, int]:
    """The text with its placeholders filled, and the range that an absent ``<range>`` stands for."""
    if classes is not None and "<class>" in text:
        before, after = text.split("<class>", 1)
        text = before + class_set_text(classes) + after
    elif classes is not None and "<expression>" in text:
        if len(classes) != 1:
            raise InstructionError(text.index("<expression>"), "one name for `<expression>`", f"{len(classes)} names")
        instruction_name = Instruction("grounding", tuple(classes)).segments()
        name = next(segment.text for segment in instruction_name if segment.kind == "name")
        text = text.replace("<expression>", name, 1)
    elif classes is not None:
        raise InstructionError(len(text), "a placeholder `<class>` for the given names", "none")
    if question is not None:
        if "<question>" not in text:
            raise InstructionError(len(text), "a placeholder `<question>` for the given question", "none")
        text = text.replace("<question>", question, 1)
    return text, DEFAULT_RANGE if range is None else range


def _find_image(text: str, class_set: _ClassSet | None) -> int:
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


def _set_instruction(text: str, class_set: _ClassSet, words: list[Word], default_range: int) -> Instruction:
    points = _find_points(text, class_set)
    value, signed = RangeReader(words, default_range).read()
    bare = class_set.bare and len(class_set.entries) == 1
    task = set_task_of(words, points, bare)
    if points is None and task in ("segmentation", "keypoints"):
        points = read_point_count(words)
        if points is None:
            raise InstructionError(
                len(text), f"an output format with the points of the {task}, such as (c, x1, y1, ..., x8, y8)", "none"
            )
    names = [""] * len(class_set.entries)
    for entry in class_set.entries:
        names[entry.index] = entry.name
    coordinates = read_coordinates(words, signed)
    try:
        return Instruction(task, tuple(names), value or default_range, coordinates, points or 2, text)
    except ValueError as error:
        raise InstructionError(class_set.start, "a consistent instruction", str(error)) from error


def _word_instruction(text: str, words: list[Word]) -> Instruction:
    task = "vqa" if _QUESTION.search(text) is not None else word_task_of(words)
    if task is None or (task != "vqa" and _FORMAT.search(text) is not None):
        _raise_no_class_set(text)
    if "<question>" in text:
        raise InstructionError(text.index("<question>"), "a question", "the unfilled placeholder `<question>`")
    return Instruction(task, text=text, question=_question_of(text) if task == "vqa" else None)


def _question_of(text: str) -> str:
    """The question of a visual question: what follows "question:", or else the text without its image clause."""
    match = _QUESTION.search(text)
    if match is not None:
        question = text[match.end() :].strip()
        if question and "<image>" not in question:
            return question
    before, _, after = text.partition("<image>")
    before = before.rstrip()
    for clause in ("the image is:", "the image is", "with the objects in the", "in the"):
        if before.lower().endswith(clause):
            before = before[: -len(clause)]
            break
    return f"{before} {after.lstrip(' .,:')}".strip() or text.strip()


def _raise_no_class_set(text: str) -> NoReturn:
    """Says what is wrong with a text that has no class set."""
    expected = 'a class set such as {"person": <c0>, "car": <c1>}'
    for placeholder in ("<class>", "<expression>"):
        if placeholder in text:
            raise InstructionError(text.index(placeholder), expected, f"the unfilled placeholder `{placeholder}`")
    token = _CLASS.search(text)
    if token is not None:
        raise InstructionError(token.start(), f"`:` between a name and {token.group()}", _found(text, token.start()))
    empty = _EMPTY_SET.search(text)
    if empty is not None:
        raise InstructionError(empty.start(), "a name (class set is empty)", f"`{empty.group()}`")
    quoted = re.search(rf"[(\[{{]\s*[{QUOTES}]", text)
    if quoted is not None:
        raise InstructionError(quoted.start(), expected, _found(text, quoted.start()))
    raise InstructionError(len(text), expected, "none")


# --- the class set ---------------------------------------------------------------------------------------------------


def _find_class_set(text: str) -> _ClassSet | None:
    token = _ENTRY.search(text)
    while token is not None and _is_escaped(text, text.index("<", token.start())):
        token = _ENTRY.search(text, token.end())
    if token is None:
        return None
    start = _opening_bracket(text, token.start())
    result = _read_class_set(text, start)
    second = _ENTRY.search(text, result.end)
    if second is not None:
        raise InstructionError(second.start(), "one class set", f"a second one, {_found(text, second.start())}")
    if "<class>" in text[:start] or "<class>" in text[result.end :]:
        at = text.find("<class>")
        at = at if at < start else text.find("<class>", result.end)
        raise InstructionError(at, "one class set", "the placeholder `<class>` beside a class set")
    return result


def _opening_bracket(text: str, end: int) -> int:
    """The bracket that opens the set whose first entry's colon stands at ``end``.

    Of the brackets still open there, the first that a quote follows; if a bracket inside a name confuses the count, the
    last that a quote follows; if there is no quote, the last open one.
    """
    unclosed: list[int] = []
    last_quoted = -1
    for match in _BRACKET.finditer(text, 0, end):
        at, bracket = match.start(), match.group()
        if bracket in _CLOSER:
            unclosed.append(at)
            after = _skip_space(text, at + 1)
            if text[after] in QUOTES:
                last_quoted = at
        elif unclosed and _CLOSER[text[unclosed[-1]]] == bracket:
            unclosed.pop()
    for at in unclosed:
        if text[_skip_space(text, at + 1)] in QUOTES:
            return at
    quoted = text[:end].rstrip()[-1:] in tuple(QUOTES)
    if last_quoted >= 0 and (quoted or not unclosed):
        return last_quoted
    if unclosed:
        return unclosed[-1]
    raise InstructionError(end, "a class set in brackets, such as {\"person\": <c0>}", f"no bracket before {_found(text, end)}")


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match is not None else at


def _is_escaped(text: str, at: int, start: int = 0) -> bool:
    """Whether the character is preceded by an odd number of backslashes."""
    before = at
    while before > start and text[before - 1] == "\\":
        before -= 1
    return (at - before) % 2 == 1


def _read_class_set(text: str, start: int) -> _ClassSet:
    closer = _CLOSER[text[start]]
    entries: list[_Entry] = []
    token_of_name: dict[str, int] = {}
    seen: set[int] = set()
    gap = -1  # position of the first ellipsis
    bare = False
    at = _skip_space(text, start + 1)
    while True:
        ellipsis = _ELLIPSIS.match(text, at)
        if ellipsis is not None:
            gap = at if gap < 0 else gap
            at = ellipsis.end()
        else:
            entry, is_bare = _read_entry(text, at)
            _check_entry(text, entry, seen, token_of_name)
            bare = bare or (is_bare and not entries)
            entries.append(entry)
            at = _skip_space(text, entry.token_end)
        separated = text[at : at + 1] in (",", ";")
        if separated:
            at = _skip_space(text, at + 1)
        closing = at + (text[at : at + 1] == "\\")
        if text[closing : closing + 1] == closer:
            break
        if not separated:
            raise InstructionError(at, f"`,` or `{closer}` in the class set", _found(text, at))
    _check_indices(entries, gap)
    return _ClassSet(start, closing + 1, entries, bare)


def _read_entry(text: str, start: int) -> tuple[_Entry, bool]:
    token = _CLASS.search(text, start)
    while token is not None and _is_escaped(text, token.start(), start):
        token = _CLASS.search(text, token.end())
    if token is None:
        raise InstructionError(start, 'a class name with its token, such as "car": <c1>', _found(text, start))
    digits = token.group(1)
    if len(digits) > 1 and digits[0] == "0":
        raise InstructionError(token.start(), f"<c{digits.lstrip('0') or '0'}>", f"`{token.group()[:24]}`")
    index = int(digits) if len(digits) < 7 else MAX_CLASSES
    raw = text[start : token.start()].rstrip()
    if not raw.endswith(":"):
        at = start + len(raw)
        raise InstructionError(at, f"`:` between a name and {token.group()[:24]}", _found(text, at))
    whole, raw = raw[:-1], raw[:-1].rstrip()
    if len(raw) < len(whole) and _is_escaped(whole, len(raw)):
        raw = whole[: len(raw) + 1]  # an escaped space ends the name
    name_start, name_end = start, start + len(raw)
    opened = raw[:1] in tuple(QUOTES)
    closed = len(raw) > opened and raw[-1] in QUOTES and not _is_escaped(raw, len(raw) - 1)
    if opened and not closed:
        raise InstructionError(name_end, f"a closing quote for the name at {start}", _found(text, name_end))
    if closed and not opened:
        raise InstructionError(name_start, "an opening quote", _found(text, name_start))
    if opened:
        _check_inner_quotes(text, raw, start)
        name_start, name_end, raw = name_start + 1, name_end - 1, raw[1:-1]
    elif raw == "<expression>":
        raise InstructionError(start, "an expression", "the unfilled placeholder `<expression>`")
    name = _ESCAPE.sub(r"\1", raw) if "\\" in raw else raw
    if not name.strip():
        raise InstructionError(name_start, f"a name for {token.group()}", "an empty one")
    return _Entry(index, name, name_start, name_end, token.start(), token.end()), not opened


def _check_inner_quotes(text: str, raw: str, start: int) -> None:
    """Refuses ``"dog", "cat": <c0>`` and ``"dog": 0, "cat": <c0>``, where a name has no token of its own."""
    for quote in {raw[0], raw[-1]}:
        at = raw.find(quote, 1, len(raw) - 1)
        while at >= 0:
            after = _skip_space(raw, at + 1)
            if raw[after] in ",:" and not _is_escaped(raw, at):
                raise InstructionError(
                    start + after, "`:` and a class token after the name", _found(text, start + after)
                )
            at = raw.find(quote, at + 1, len(raw) - 1)


def _check_entry(text: str, entry: _Entry, seen: set[int], token_of_name: dict[str, int]) -> None:
    if entry.index >= MAX_CLASSES:
        token = text[entry.token_start : entry.token_end][:24]
        raise InstructionError(
            entry.token_start, f"<c0> to <c{MAX_CLASSES - 1}> (more than {MAX_CLASSES} classes)", f"`{token}`"
        )
    if entry.index in seen:
        raise InstructionError(entry.token_start, "each class token once", f"`<c{entry.index}>` is used twice")
    seen.add(entry.index)
    other = token_of_name.setdefault(entry.name, entry.index)
    if other != entry.index:
        raise InstructionError(
            entry.name_start, "each name once", f"{entry.name!r} is named by <c{other}> and <c{entry.index}>"
        )


def _check_indices(entries: list[_Entry], gap: int) -> None:
    """The tokens are <c0> ... <c(K-1)>: with K different ones, none may be K or more."""
    count = len(entries)
    if count == 0:
        raise InstructionError(gap, "a name (class set is empty)", "`...`")
    largest = max(entries, key=lambda entry: entry.index)
    if largest.index < count:
        return
    indices = {entry.index for entry in entries}
    missing = next(k for k in range(count) if k not in indices)
    if gap >= 0:
        raise InstructionError(gap, "every name written out", f"`...` in place of `<c{missing}>`")
    raise InstructionError(largest.token_start, "class tokens from <c0> on without gaps", f"`<c{missing}>` is missing")


# --- the output format -----------------------------------------------------------------------------------------------


def _find_points(text: str, class_set: _ClassSet) -> int | None:
    """N of the formats outside the class set, which have to agree; None when there is none."""
    points: int | None = None
    for match in _FORMAT.finditer(text):
        if class_set.start <= match.start() < class_set.end:
            continue
        number = _read_format(text, match.end(), ")" if match.group(1) == "(" else "]")
        if points is not None and number != points:
            raise InstructionError(match.start(), f"the format of {points} points of before", f"one of {number}")
        points = number
    return points


def _read_format(text: str, at: int, closer: str) -> int:
    """N of ``x1, y1, x2, y2, ..., xN, yN)``, from its first x on."""
    count = 0  # complete points
    axis = "x"
    skipping = False
    while True:
        wanted = f"{axis}{count + 1}"
        item = _FORMAT_ITEM.match(text, at)
        if item is None:
            raise InstructionError(at, f"`{wanted}` in the output format", _found(text, at))
        if item.group(1) is None:
            if skipping or axis == "y":
                raise InstructionError(at, f"`{wanted}` in the output format", _found(text, at))
            skipping = True
        else:
            digits = item.group(2)
            number = int(digits) if len(digits) < 6 else MAX_POINTS + 1
            if number > MAX_POINTS:
                raise InstructionError(at, f"at most {MAX_POINTS} points in the output format", f"`{item.group()[:24]}`")
            if skipping and item.group(1) == "x" and axis == "x" and number > count:
                count = number - 1
                skipping = False
            if item.group(1) != axis or number != count + 1 or skipping:
                raise InstructionError(at, f"`{wanted}` in the output format", f"`{item.group()}`")
            if axis == "y":
                count += 1
            axis = "y" if axis == "x" else "x"
        at = _skip_space(text, item.end())
        following = text[at : at + 1]
        if following == closer and axis == "x" and not skipping:
            return count
        if following != ",":
            what = f"`,` or `{closer}`" if axis == "x" and not skipping else "`,`"
            raise InstructionError(at, f"{what} in the output format", _found(text, at))
        at = _skip_space(text, at + 1)


# --- segments --------------------------------------------------------------------------------------------------------


def _cut(text: str, image: int, entries: list[_Entry], default_range: int) -> list[Segment]:
    """The text in pieces: the placeholder of the picture, names, class tokens and what is between, ``<range>`` filled."""

    def words(start: int, end: int) -> Segment:
        return Segment("text", text[start:end].replace("<range>", str(default_range)))

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

