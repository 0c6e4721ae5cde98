"""The grammar of output formats: what it lets through is what the parser reads, and it never gets stuck."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visionllm.instruction import format_text, parse_format
from visionllm.instruction.format_grammar import START, FormatGrammar
from visionllm.instruction.instruction import MAX_POLYGON_POINTS

GRAMMAR = FormatGrammar()
EVERY = FormatGrammar(1, MAX_POLYGON_POINTS, MAX_POLYGON_POINTS)


@pytest.mark.parametrize("points", range(1, MAX_POLYGON_POINTS + 1))
def test_every_format_is_let_through(points):
    abridged = format_text(points)
    expanded = f"(c, {', '.join(f'x{i}, y{i}' for i in range(1, points + 1))})"
    for text in (abridged, expanded):
        assert EVERY.complete(text)
        state = EVERY.advance(START, text)
        assert state is not None and state.points == parse_format(text) == points
        assert EVERY.following(state) == frozenset()
        assert not any(EVERY.complete(text[:end]) for end in range(len(text)))
    assert GRAMMAR.complete(abridged) == (points >= 2)
    assert GRAMMAR.complete(expanded) == (2 <= points <= 3)
    assert len(abridged) <= FormatGrammar.MOST_CHARACTERS


@st.composite
def grammars(draw: st.DrawFn) -> FormatGrammar:
    least = draw(st.integers(1, 120))
    return FormatGrammar(least, draw(st.integers(least, 120)), draw(st.integers(1, 20)))


@settings(max_examples=200, deadline=None)
@given(st.data(), grammars() | st.just(GRAMMAR))
def test_any_walk_ends_in_a_format_that_the_parser_reads(data, grammar):
    state, text = START, ""
    while not grammar.complete(text):
        allowed = grammar.following(state)
        assert allowed  # never stuck
        text += data.draw(st.sampled_from(sorted(allowed)))
        state = grammar.advance(state, text[-1])
        assert state is not None and state == grammar.advance(START, text)
    assert grammar.least <= parse_format(text) == state.points <= grammar.most
    if grammar is GRAMMAR:
        assert len(text) <= FormatGrammar.MOST_CHARACTERS


@settings(max_examples=60, deadline=None)
@given(st.integers(2, MAX_POLYGON_POINTS), st.data())
def test_what_may_not_follow_is_refused(points, data):
    text = format_text(points)
    start = text[: data.draw(st.integers(0, len(text)))]
    allowed = GRAMMAR.following(GRAMMAR.advance(START, start))
    for character in string.ascii_letters + string.digits + " ,.()[]é…":
        assert GRAMMAR.allows(start + character) == (character in allowed)


@pytest.mark.parametrize(
    "text",
    [
        "c",
        "(c,x1",
        "(c)",
        "(c, ...",
        "(c, x1, y1, ..., x1,",
        "(c, x1, y1, x2, y2, ..., x2,",
        "(c, x1, y1, ..., x08",
        "(c, x1, y1, ..., x65",
        "(c, x1, y1, ..., x8, y9",
        "(c, x1, y1, ..., x8, y8, x9",
        "(c, x1, y1, x2, y2) ",
    ],
)
def test_no_beginning_of_a_format(text):
    assert not EVERY.allows(text)
    assert EVERY.advance(None, "(") is None


def test_bounds():
    assert not GRAMMAR.allows("(c, x1, y1)")
    assert not FormatGrammar(3, 5).allows("(c, x1, y1, x2, y2)")
    assert not FormatGrammar(3, 5).allows("(c, x1, y1, ..., x6")
    for bounds in ((0, 4, 3), (5, 4, 3), (2, 4, 0)):
        with pytest.raises(ValueError, match="least"):
            FormatGrammar(*bounds)


def test_pieces_of_any_length_lead_to_the_same_state():
    text = format_text(16)
    for size in (1, 2, 3, 7, len(text)):
        state = START
        for at in range(0, len(text), size):
            state = GRAMMAR.advance(state, text[at : at + size])
        assert state == GRAMMAR.advance(START, text)
