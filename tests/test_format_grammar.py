"""The grammar of output formats: what it lets through is what the parser reads, and it never gets stuck."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visionllm.instruction import format_text, parse_format
from visionllm.instruction.format_grammar import START, advance, following, is_complete
from visionllm.instruction.instruction import MAX_POLYGON_POINTS


@pytest.mark.parametrize("points", range(1, MAX_POLYGON_POINTS + 1))
def test_every_format_is_let_through(points):
    abridged = format_text(points)
    expanded = f"(c, {', '.join(f'x{i}, y{i}' for i in range(1, points + 1))})"
    for text in (abridged, expanded):
        state = advance(START, text)
        assert is_complete(state)
        assert state.points == parse_format(text) == points
        assert following(state) == frozenset()
        assert not any(is_complete(advance(START, text[:end])) for end in range(len(text)))


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from([1, 2, 7, 10, 64, 100]))
def test_any_walk_ends_in_a_format_that_the_parser_reads(data, most):
    state, text = START, ""
    while not is_complete(state):
        allowed = following(state, most)
        assert allowed  # never stuck
        text += data.draw(st.sampled_from(sorted(allowed)))
        state = advance(state, text[-1], most)
        assert state is not None and state == advance(START, text, most)
    assert 1 <= parse_format(text) <= most
    assert state.points == parse_format(text)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, MAX_POLYGON_POINTS), st.data())
def test_what_may_not_follow_is_refused(points, data):
    text = format_text(points)
    start = text[: data.draw(st.integers(0, len(text)))]
    allowed = following(advance(START, start))
    for character in string.ascii_letters + string.digits + " ,.()[]é…":
        assert (advance(START, start + character) is not None) == (character in allowed)


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
        "(c, x1, y1) ",
    ],
)
def test_no_beginning_of_a_format(text):
    assert advance(START, text) is None
    assert advance(None, "(") is None


def test_pieces_of_any_length_lead_to_the_same_state():
    text = format_text(16)
    for size in (1, 2, 3, 7, len(text)):
        state = START
        for at in range(0, len(text), size):
            state = advance(state, text[at : at + size])
        assert is_complete(state)
