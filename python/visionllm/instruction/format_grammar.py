"""The output formats as an automaton over characters: what may follow the beginning of a format.

    format := "(c" point+ [", ..." last] ")"        point, last := ", x" i ", y" i

The points count from 1; the last one's N is larger than the number of points before the ellipsis. These are
the formats as ``format_text`` writes them and their other expansions; ``parse_format`` reads each.

A decoder that may write nothing but a format asks of each piece of text whether :func:`advance` gives a
state. States are hashable and few, so what a state allows can be kept.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from .instruction import MAX_POLYGON_POINTS


class FormatState(NamedTuple):
    """Where in a format a text ends.

    Attributes:
        rest: what must follow before there is a choice.
        stage: what is chosen then: after a point whether the format goes on, after a comma whether with a
            point or an ellipsis, after an ellipsis the digits of N; nothing after the end.
        points: complete points so far; those before the ellipsis until N is complete.
        digits: of N, those so far.
    """

    rest: str = "(c, x1, y1"
    stage: Literal["point", "item", "number", "end"] = "point"
    points: int = 1
    digits: str = ""


START = FormatState()


def following(state: FormatState, most: int = MAX_POLYGON_POINTS) -> frozenset[str]:
    """The characters that may follow; none after a complete format.

    Args:
        state: where the text ends.
        most: the largest N.
    """
    if state.rest:
        return frozenset(state.rest[0])
    if state.stage == "point":
        return frozenset("),") if state.points < most else frozenset(")")
    if state.stage == "item":
        return frozenset("x.")
    if state.stage == "number":
        numbers = [str(n) for n in range(state.points + 1, most + 1)]
        end = {","} if state.digits in numbers else set()
        place = len(state.digits)
        return frozenset(end | {n[place] for n in numbers if n.startswith(state.digits) and len(n) > place})
    return frozenset()


def advance(state: FormatState | None, text: str, most: int = MAX_POLYGON_POINTS) -> FormatState | None:
    """The state after more text; None where no format goes on like this."""
    for character in text:
        if state is None or character not in following(state, most):
            return None
        state = _step(state, character)
    return state


def is_complete(state: FormatState | None) -> bool:
    """Whether the text is a whole format."""
    return state is not None and state.stage == "end" and not state.rest


def _step(state: FormatState, character: str) -> FormatState:
    """The state after a character that may follow."""
    if state.rest:
        return state._replace(rest=state.rest[1:])
    if state.stage == "number":
        if character == ",":
            return FormatState(f" y{state.digits})", "end", int(state.digits))
        return state._replace(digits=state.digits + character)
    if state.stage == "item":
        if character == "x":
            number = state.points + 1
            return FormatState(f"{number}, y{number}", "point", number)
        return FormatState(".., x", "number", state.points)
    if character == ")":
        return FormatState("", "end", state.points)
    return FormatState(" ", "item", state.points)
