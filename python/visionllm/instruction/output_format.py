"""The output format of an instruction, ``(c, x1, y1, x2, y2)`` or ``(c, x1, y1, x2, y2, ..., x8, y8)``.

format  := "(" "c" ("," "x" i "," "y" i)* ["," "..." "," "x" N "," "y" N] ")"        or in square brackets
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .class_set import skip_space
from .instruction import MAX_POINTS, InstructionError, found_at

FORMAT_START = re.compile(r"([(\[])\s*(?:c|cls|class)\s*,\s*(?=[xy.…])")
_ITEM = re.compile(r"([xy])_?\{?(\d+)\}?|\.\.\.|…", re.ASCII)


def parse_format(text: str) -> int:
    """N of a text that is an output format and nothing else.

    Raises:
        ValueError: it is not one.
    """
    stripped = text.strip()
    match = FORMAT_START.match(stripped)
    if match is None:
        raise ValueError(f"format: expected one such as (c, x1, y1, x2, y2), got {text!r}")
    closer = ")" if match.group(1) == "(" else "]"
    if stripped.find(closer) != len(stripped) - 1:
        raise ValueError(f"format: expected `{closer}` once, at the end, got {text!r}")
    try:
        return _read_format(stripped, match.end(), closer)
    except InstructionError as error:
        raise ValueError(
            f"format, position {error.position}: expected {error.expected}, found {error.found}"
        ) from error


def find_points(text: str, excluded: Sequence[tuple[int, int]]) -> int | None:
    """N of the formats outside the spans ``(start, end)``, which have to agree; or None."""
    points: int | None = None
    for match in FORMAT_START.finditer(text):
        if any(start <= match.start() < end for start, end in excluded):
            continue
        number = _read_format(text, match.end(), ")" if match.group(1) == "(" else "]")
        if points is not None and number != points:
            raise InstructionError(
                match.start(), f"the format of {points} points of before", f"one of {number}"
            )
        points = number
    return points


def _read_format(text: str, at: int, closer: str) -> int:
    """N of ``x1, y1, x2, y2, ..., xN, yN)``, from its first x on."""
    count = 0  # complete points
    axis = "x"
    skipping = False
    while True:
        wanted = f"{axis}{count + 1}"
        item = _ITEM.match(text, at)
        if item is None:
            raise InstructionError(at, f"`{wanted}` in the output format", found_at(text, at))
        if item.group(1) is None:
            if skipping or axis == "y":
                raise InstructionError(at, f"`{wanted}` in the output format", found_at(text, at))
            skipping = True
        else:
            digits = item.group(2)
            number = int(digits) if len(digits) < 6 else MAX_POINTS + 1
            if number > MAX_POINTS:
                raise InstructionError(
                    at, f"at most {MAX_POINTS} points in the output format", f"`{item.group()[:24]}`"
                )
            if skipping and item.group(1) == "x" and axis == "x" and number > count:
                count = number - 1
                skipping = False
            if item.group(1) != axis or number != count + 1 or skipping:
                raise InstructionError(at, f"`{wanted}` in the output format", f"`{item.group()}`")
            if axis == "y":
                count += 1
            axis = "y" if axis == "x" else "x"
        at = skip_space(text, item.end())
        following = text[at : at + 1]
        if following == closer and axis == "x" and not skipping:
            return count
        if following != ",":
            what = f"`,` or `{closer}`" if axis == "x" and not skipping else "`,`"
            raise InstructionError(at, f"{what} in the output format", found_at(text, at))
        at = skip_space(text, at + 1)
