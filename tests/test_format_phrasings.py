"""Formats in words: no rule reads them, what a model writes for them is taken, and evaluation stays apart."""

from __future__ import annotations

import re
from itertools import islice

import pytest

from visionllm.instruction import UnknownFormat, format_text, parse
from visionllm.instruction.format_phrasings import (
    evaluation_phrasings,
    format_phrasings,
    number_words,
    training_phrasings,
)

TRAINING = training_phrasings()
NAMES = ["cat", "big dog"]


def check(phrasing) -> None:
    """The text is understood with its format only, and is then asked for with N points."""
    with pytest.raises(UnknownFormat) as caught:
        parse(phrasing.text, classes=NAMES)
    assert caught.value.wording == phrasing.text
    instruction = parse(phrasing.text, classes=NAMES, format=phrasing.format)
    assert instruction.points == phrasing.points
    assert instruction.classes == tuple(NAMES)
    assert (instruction.range, instruction.format_source) == (512, "model")
    assert phrasing.format == format_text(phrasing.points)
    if phrasing.points == 2:
        assert instruction.task == "detection"
    assert (instruction.task == "detection") == (instruction.points == 2)


def test_no_rule_reads_what_is_trained_on():
    for phrasing in TRAINING[::3]:
        check(phrasing)


@pytest.mark.parametrize("phrasing", evaluation_phrasings(), ids=lambda phrasing: phrasing.text[:40])
def test_no_rule_reads_what_is_evaluated(phrasing):
    check(phrasing)


def test_evaluation_is_apart_from_training():
    assert len(evaluation_phrasings()) >= 30

    def words(text):
        """Without the numbers and what every text has."""
        return frozenset(re.findall(r"[a-z]+", text.lower())) - {
            "class",
            "image",
            *map(number_words, range(65)),
        }

    trained = {words(phrasing.text) for phrasing in islice(format_phrasings(1), 20000)}
    for phrasing in evaluation_phrasings():
        assert words(phrasing.text) not in trained


def test_the_generator_is_large_varied_and_repeatable():
    assert len(TRAINING) == 6000 == len({phrasing.text for phrasing in TRAINING})
    assert training_phrasings(50) == TRAINING[:50]
    assert training_phrasings(50, seed=1) != TRAINING[:50]
    assert {phrasing.points for phrasing in TRAINING} >= set(range(2, 65))
    boxes = sum(phrasing.points == 2 for phrasing in TRAINING)
    assert any(phrasing.text.endswith("Segment them.") for phrasing in TRAINING)
    assert 0.35 <= boxes / len(TRAINING) <= 0.45


@pytest.mark.parametrize(
    ("number", "text"), [(4, "four"), (12, "twelve"), (20, "twenty"), (24, "twenty-four"), (64, "sixty-four")]
)
def test_number_words(number, text):
    assert number_words(number) == text
