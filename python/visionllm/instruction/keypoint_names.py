"""The names of keypoints in an instruction, ``["nose", "left eye", "right eye"]``, in the points' order.

    list   := open name (separator name)* close                     open, close: [] () or {}
    name   := quote characters quote  |  words, where the list follows a word such as "keypoints"

A third form names the coordinates: ``(c, nose_x, nose_y, left_eye_x, left_eye_y)``. Every step is linear in
the length of the text: a name has no bracket in it that is not escaped, so no two attempts overlap.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from .class_set import skip_space
from .instruction import MAX_POINTS, InstructionError

_QUOTE_PAIRS = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’", "„": "”", "«": "»"}
_CLOSER = {"{": "}", "[": "]", "(": ")"}
_QUOTED_LIST = re.compile(rf"[(\[{{]\s*(?=[{''.join(_QUOTE_PAIRS)}])")
_SEPARATOR = re.compile(r"\s*(?:,\s*and\b|[,;]|\band\b)\s*", re.IGNORECASE)
_STOP = re.compile(r"[\\()\[\]{}]")
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
# "keypoints (nose, left eye)", "keypoints in the order [nose, left eye]"
_WORD_LIST = re.compile(
    r"\b(?:key ?points|points|landmarks|joints) ?(?:in (?:the|this) order|are|named|called)? ?:? ?"
    r"([(\[{])([^()\[\]{}<:]{1,4000})([)\]}])",
    re.IGNORECASE,
)
# "keypoints: nose, left eye and right eye."
_COLON_LIST = re.compile(r"\bkey ?points: ?([^.;:\n()\[\]{}<]{1,4000})(?=[.;\n]|\Z)", re.IGNORECASE)
# "keypoints nose, left eye and right eye of"
_PLAIN_LIST = re.compile(r"\bkey ?points ([^.;:\n()\[\]{}<]{1,400}?) (?:of|on|for|in|from)\b", re.IGNORECASE)
_NAME = re.compile(r"[^\W\d_][\w'’/-]{0,30}(?: [\w'’/-]{1,30}){0,3}")
_COORDINATE_NAMES = re.compile(
    r"[(\[] ?(?:c|cls|class)((?:, ?[^\W\d_][\w -]{0,60}_[xy])+) ?[)\]]", re.IGNORECASE
)
# Words that say how to write points are no names of points.
_NO_NAMES = re.compile(r"\b(?:offsets?|coordinates?|range|within|format|absolute|relative|pixels?)\b", re.I)

# An output format lists a class and then coordinates: "c", "x1", "y1", …; "c", "nose_x", "nose_y".
_CLASS_WORDS = ("c", "cls", "class")
_COORDINATE = re.compile(r"(?:\w*_)?[xyv][ _]?(?:\d+|n)?|\.{2,3}|…", re.IGNORECASE)


class KeypointNames(NamedTuple):
    """The names and the span of their list in the text."""

    names: tuple[str, ...]
    start: int
    end: int


def keypoints_text(names: Sequence[str]) -> str:
    """``["nose", "left eye"]``."""
    return "[" + ", ".join(f'"{_escape(name)}"' for name in names) + "]"


def _escape(name: str) -> str:
    return re.sub(r"[\\()\[\]{}\"]", lambda match: "\\" + match.group(), name)


def find_keypoints(text: str, excluded: tuple[int, int]) -> KeypointNames | None:
    """The list of names outside the span ``excluded``, the class set's; None without one.

    Raises:
        InstructionError: a name stands in it twice, or there are too many.
    """
    start, end = excluded
    found = _first_quoted(text, start, end) or _first_of_words(text, start, end)
    if found is None:
        return None
    if len(found.names) > MAX_POINTS:
        raise InstructionError(found.start, f"at most {MAX_POINTS} keypoints", f"{len(found.names)}")
    seen: set[str] = set()
    for name in found.names:
        if name in seen:
            raise InstructionError(found.start, "each keypoint once", f"{name!r} twice")
        seen.add(name)
    return found


def _first_quoted(text: str, start: int, end: int) -> KeypointNames | None:
    for match in _QUOTED_LIST.finditer(text):
        if not start <= match.start() < end:
            found = _read_quoted(text, match.start(), match.end())
            if found is not None and not _is_format(found.names):
                return found
    return None


def _read_quoted(text: str, start: int, at: int) -> KeypointNames | None:
    """A list of quoted names whose bracket stands at ``start`` and first quote at ``at``; or None."""
    names: list[str] = []
    while True:
        closing = _QUOTE_PAIRS.get(text[at : at + 1])
        if closing is None:
            return None
        place = at + 1
        while text[place : place + 1] != closing:
            if place >= len(text):
                return None
            if text[place] == "\\":
                place += 1
            elif _STOP.match(text, place):
                return None
            place += 1
        name = _ESCAPED.sub(r"\1", text[at + 1 : place])
        if not name.strip() or "<" in name:
            return None
        names.append(name)
        at = skip_space(text, place + 1)
        if text[at : at + 1] == _CLOSER[text[start]]:
            return KeypointNames(tuple(names), start, at + 1)
        separator = _SEPARATOR.match(text, at)
        if separator is None:
            return None
        at = separator.end()


def _first_of_words(text: str, start: int, end: int) -> KeypointNames | None:
    for pattern in (_COORDINATE_NAMES, _WORD_LIST, _COLON_LIST, _PLAIN_LIST):
        for match in pattern.finditer(text):
            if start < match.end() and match.start() < end:
                continue
            names = _coordinate_names(match.group(1)) if pattern is _COORDINATE_NAMES else None
            if pattern is _WORD_LIST and _CLOSER[match.group(1)] == match.group(3):
                names = _words(match.group(2))
            elif pattern in (_COLON_LIST, _PLAIN_LIST):
                names = _words(match.group(1))
            if names is not None and not _is_format(names):
                return KeypointNames(names, match.start(), match.end())
    return None


def _is_format(names: Sequence[str]) -> bool:
    """Whether a list is an output format and not of points, one of which may be called "C"."""
    first, *others = (name.strip() for name in names)
    return first.lower() in _CLASS_WORDS and bool(others) and all(map(_COORDINATE.fullmatch, others))


def _words(listed: str) -> tuple[str, ...] | None:
    names = [" ".join(name.split()) for name in _SEPARATOR.split(" ".join(listed.split()))]
    if len(names) < 2 or _NO_NAMES.search(listed) is not None:
        return None
    return tuple(names) if all(map(_NAME.fullmatch, names)) else None


def _coordinate_names(listed: str) -> tuple[str, ...] | None:
    """Names of ``, nose_x, nose_y, left_eye_x, left_eye_y``; None where the pairs do not fit."""
    items = [item.strip() for item in listed.split(",")[1:]]
    names = [item[:-2].replace("_", " ").strip() for item in items]
    axes = [item[-1].lower() for item in items]
    if axes != ["x", "y"] * (len(items) // 2) or names[::2] != names[1::2] or not all(names):
        return None
    return tuple(names[::2])
