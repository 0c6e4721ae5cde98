"""The output formats as an automaton over characters: what may follow the beginning of a format.

    format := "(c" point+ [", ..." last] ")"        point, last := ", x" i ", y" i

The points count from 1; the last one's N is larger than the number of points before the ellipsis. These are
the formats as ``format_text`` writes them and their other expansions; ``parse_format`` reads each.

A decoder that may write nothing but a format asks of each piece of text whether it is allowed. From every
beginning that is, a format can be completed within ``FormatGrammar.MOST_CHARACTERS``.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

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


class FormatGrammar:
    """Formats of ``least`` to ``most`` points, of which at most ``written_out`` stand before an ellipsis.

    Args:
        least: the smallest N; a single point is a format of keypoints alone.
        most: the largest N.
        written_out: 3 as in ``format_text``; ``most`` lets every expansion through.

    Raises:
        ValueError: the bounds are not 1 <= least <= most and 1 <= written_out.
    """

    MOST_CHARACTERS: ClassVar[int] = len("(c, x1, y1, x2, y2, x3, y3, ..., x64, y64)")  # with the defaults

    def __init__(self, least: int = 2, most: int = MAX_POLYGON_POINTS, written_out: int = 3) -> None:
        if not (1 <= least <= most and written_out >= 1):
            raise ValueError(
                f"format grammar: expected 1 <= least <= most and 1 <= written_out, "
                f"got {least}, {most}, {written_out}"
            )
        self.least, self.most, self.written_out = least, most, written_out

    def allows(self, text: str) -> bool:
        """Whether a format begins so."""
        return self.advance(START, text) is not None

    def complete(self, text: str) -> bool:
        """Whether the text is a whole format."""
        state = self.advance(START, text)
        return state is not None and state.stage == "end" and not state.rest

    def following(self, state: FormatState) -> frozenset[str]:
        """The characters that may follow; none after a complete format."""
        if state.rest:
            return frozenset(state.rest[0])
        if state.stage == "point":
            end = ")" if state.points >= self.least else ""
            return frozenset(end + ("," if state.points < self.most else ""))
        if state.stage == "item":
            return frozenset("x." if state.points < self.written_out else ".")
        if state.stage == "number":
            numbers = [str(n) for n in range(max(state.points + 1, self.least), self.most + 1)]
            place = len(state.digits)
            digits = {n[place] for n in numbers if n.startswith(state.digits) and len(n) > place}
            return frozenset(digits | ({","} if state.digits in numbers else set()))
        return frozenset()

    def advance(self, state: FormatState | None, text: str) -> FormatState | None:
        """The state after more text; None where no format goes on like this."""
        for character in text:
            if state is None or character not in self.following(state):
                return None
            state = _step(state, character)
        return state


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
