"""The class set of an instruction, ``{"person": <c0>, "car": <c1>}``: where it stands and what it lists.

    class set  := open entry ("," entry)* [","] close      open, close: {} [] () or \\{ \\}
    entry      := name ":" "<c" k ">"  |  "..."            every k from 0 on once, in any order
    name       := quote characters quote  |  characters    the two quotes may differ

Inside a class set every ``<ck>`` ends an entry; a name that contains one has it escaped, ``\\<c3>``
(``render.py`` says what is escaped). An ellipsis among the entries is accepted only where it leaves out
nothing. Every step is linear in the length of the text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .instruction import MAX_CLASSES, InstructionError, found_at

QUOTES = "\"'`´‘’“”„«»"
CLASS_TOKEN = re.compile(r"<c(\d+)>", re.ASCII)
_ENTRY_END = re.compile(r":\s*<c\d+>", re.ASCII)
_BRACKET = re.compile(r"[\[\](){}]")
_SPACE = re.compile(r"\s*")
_ESCAPE = re.compile(rf"\\([\\(){{}}\[\]<.…\s{QUOTES}])")
_ELLIPSIS = re.compile(r"(?:\.\.\.|…)\s*(?=[,;\])}])")
_CLOSER = {"{": "}", "[": "]", "(": ")"}


class ClassEntry(NamedTuple):
    """One name of a class set: spans into the text."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    name: str
    name_start: int
    name_end: int
    token_start: int
    token_end: int


class ClassSet(NamedTuple):
    """A class set and its span in the text."""

    start: int  # of the opening bracket
    end: int  # after the closing bracket
    entries: list[ClassEntry]
    bare: bool  # whether no name has quotes


def find_class_set(text: str) -> ClassSet | None:
    """The class set of the text, None when no name is followed by ``: <ck>``.

    Raises:
        InstructionError: the set is malformed, or there is a second one.
    """
    token = _ENTRY_END.search(text)
    while token is not None and _is_escaped(text, text.index("<", token.start())):
        token = _ENTRY_END.search(text, token.end())
    if token is None:
        return None
    start = _opening_bracket(text, token.start())
    result = _read_class_set(text, start)
    second = _ENTRY_END.search(text, result.end)
    if second is not None:
        raise InstructionError(
            second.start(), "one class set", f"a second one, {found_at(text, second.start())}"
        )
    if "<class>" in text[:start] or "<class>" in text[result.end :]:
        at = text.find("<class>")
        at = at if at < start else text.find("<class>", result.end)
        raise InstructionError(at, "one class set", "the placeholder `<class>` beside a class set")
    return result


def _opening_bracket(text: str, end: int) -> int:
    """The bracket that opens the set whose first entry's colon stands at ``end``.

    Of the brackets still open there, the first that a quote follows; if a bracket inside a name confuses the
    count, the last that a quote follows; if there is no quote, the last open one.
    """
    start = _open_bracket(text, end, escaped=False)
    if start < 0:
        start = _open_bracket(text, end, escaped=True)
    if start < 0:
        expected = 'a class set in brackets, such as {"person": <c0>}'
        raise InstructionError(end, expected, f"no bracket before {found_at(text, end)}")
    return start


def _open_bracket(text: str, end: int, escaped: bool) -> int:
    """As :func:`_opening_bracket`, among the brackets without a backslash or among those with one; or -1."""
    name_end = len(text[:end].rstrip()) - 1
    quoted = name_end >= 0 and text[name_end] in QUOTES
    unclosed: list[int] = []
    last_quoted = -1
    for match in _BRACKET.finditer(text, 0, end):
        at, bracket = match.start(), match.group()
        if _is_escaped(text, at) != escaped:
            continue
        if bracket in _CLOSER:
            unclosed.append(at)
            if _quote_follows(text, at, name_end):
                last_quoted = at
        elif unclosed and _CLOSER[text[unclosed[-1]]] == bracket:
            unclosed.pop()
    for at in unclosed:
        if _quote_follows(text, at, name_end):
            return at
    if last_quoted >= 0 and (quoted or not unclosed):
        return last_quoted
    if unclosed:
        return unclosed[-1]
    return -1


def _quote_follows(text: str, bracket: int, name_end: int) -> bool:
    """Whether a quote that opens a name comes after the bracket; the one at ``name_end`` closes it."""
    after = skip_space(text, bracket + 1)
    return after < name_end and text[after] in QUOTES


def skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match is not None else at


def _is_escaped(text: str, at: int, start: int = 0) -> bool:
    """Whether the character is preceded by an odd number of backslashes."""
    before = at
    while before > start and text[before - 1] == "\\":
        before -= 1
    return (at - before) % 2 == 1


def _read_class_set(text: str, start: int) -> ClassSet:
    closer = _CLOSER[text[start]]
    escaped = _is_escaped(text, start)
    entries: list[ClassEntry] = []
    token_of_name: dict[str, int] = {}
    seen: set[int] = set()
    gap = -1  # position of the first ellipsis
    bare = True
    at = skip_space(text, start + 1)
    while True:
        ellipsis = _ELLIPSIS.match(text, at)
        if ellipsis is not None:
            gap = at if gap < 0 else gap
            at = ellipsis.end()
        else:
            entry, is_bare = _read_entry(text, at)
            _check_entry(text, entry, seen, token_of_name)
            bare = bare and is_bare
            entries.append(entry)
            at = skip_space(text, entry.token_end)
        separated = text[at : at + 1] in (",", ";")
        if separated:
            at = skip_space(text, at + 1)
        closing = at + (escaped and text[at : at + 1] == "\\")
        if text[closing : closing + 1] == closer:
            break
        if not separated:
            raise InstructionError(at, f"`,` or `{closer}` in the class set", found_at(text, at))
    _check_indices(entries, gap)
    return ClassSet(start, closing + 1, entries, bare)


def _read_entry(text: str, start: int) -> tuple[ClassEntry, bool]:
    token = CLASS_TOKEN.search(text, start)
    while token is not None and _is_escaped(text, token.start(), start):
        token = CLASS_TOKEN.search(text, token.end())
    if token is None:
        raise InstructionError(
            start, 'a class name with its token, such as "car": <c1>', found_at(text, start)
        )
    digits = token.group(1)
    if len(digits) > 1 and digits[0] == "0":
        raise InstructionError(token.start(), f"<c{digits.lstrip('0') or '0'}>", f"`{token.group()[:24]}`")
    index = int(digits) if len(digits) < 7 else MAX_CLASSES
    raw = text[start : token.start()].rstrip()
    if not raw.endswith(":"):
        at = start + len(raw)
        raise InstructionError(at, f"`:` between a name and {token.group()[:24]}", found_at(text, at))
    whole, raw = raw[:-1], raw[:-1].rstrip()
    if len(raw) < len(whole) and _is_escaped(whole, len(raw)):
        raw = whole[: len(raw) + 1]  # an escaped space ends the name
    name_start, name_end = start, start + len(raw)
    opened = raw[:1] in tuple(QUOTES)
    closed = len(raw) > opened and raw[-1] in QUOTES and not _is_escaped(raw, len(raw) - 1)
    if opened and not closed:
        raise InstructionError(name_end, f"a closing quote for the name at {start}", found_at(text, name_end))
    if closed and not opened:
        raise InstructionError(name_start, "an opening quote", found_at(text, name_start))
    if opened:
        _check_inner_quotes(text, raw, start)
        name_start, name_end, raw = name_start + 1, name_end - 1, raw[1:-1]
    elif raw == "<expression>":
        raise InstructionError(start, "an expression", "the unfilled placeholder `<expression>`")
    name = _ESCAPE.sub(r"\1", raw) if "\\" in raw else raw
    if not name.strip():
        raise InstructionError(name_start, f"a name for {token.group()}", "an empty one")
    return ClassEntry(index, name, name_start, name_end, token.start(), token.end()), not opened


def _check_inner_quotes(text: str, raw: str, start: int) -> None:
    """Refuses ``"dog", "cat": <c0>`` and ``"dog": 0, "cat": <c0>``, where a name has no token of its own."""
    for quote in {raw[0], raw[-1]}:
        at = raw.find(quote, 1, len(raw) - 1)
        while at >= 0:
            after = skip_space(raw, at + 1)
            if raw[after] in ",:" and not _is_escaped(raw, at):
                raise InstructionError(
                    start + after, "`:` and a class token after the name", found_at(text, start + after)
                )
            at = raw.find(quote, at + 1, len(raw) - 1)


def _check_entry(text: str, entry: ClassEntry, seen: set[int], token_of_name: dict[str, int]) -> None:
    if entry.index >= MAX_CLASSES:
        token = text[entry.token_start : entry.token_end][:24]
        raise InstructionError(
            entry.token_start, f"<c0> to <c{MAX_CLASSES - 1}> (more than {MAX_CLASSES} classes)", f"`{token}`"
        )
    if entry.index in seen:
        raise InstructionError(
            entry.token_start, "each class token once", f"`<c{entry.index}>` is used twice"
        )
    seen.add(entry.index)
    other = token_of_name.setdefault(entry.name, entry.index)
    if other != entry.index:
        raise InstructionError(
            entry.name_start, "each name once", f"{entry.name!r} is named by <c{other}> and <c{entry.index}>"
        )


def _check_indices(entries: list[ClassEntry], gap: int) -> None:
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
    raise InstructionError(
        largest.token_start, "class tokens from <c0> on without gaps", f"`<c{missing}>` is missing"
    )
