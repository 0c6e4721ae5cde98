"""The language of the answers, against Figure 2 and numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visionllm.instruction import (
    Answer,
    Instruction,
    MalformedAnswer,
    box_numbers,
    format_answer,
    parse_answer,
    pixel_points,
)

FIGURE_2A = "The bounding boxes are [(<c0>, 226.4, 229.8, 363.1, 347.4), (<c1>, 441.1, 183.5, 538.6, 269.9)]."
ABSOLUTE = Instruction(classes=("food", "red gamepad"), range=1024, coordinates="absolute")
OFFSET = Instruction(classes=("food", "red gamepad"))


def test_figure_2_both_ways():
    answer = parse_answer(FIGURE_2A, ABSOLUTE)
    assert isinstance(answer, Answer)
    assert answer.kind == "bounding boxes"
    assert answer.labels.tolist() == [0, 1]
    assert answer.numbers.tolist() == [[226.4, 229.8, 363.1, 347.4], [441.1, 183.5, 538.6, 269.9]]
    size = (640, 480)
    pixels = pixel_points(ABSOLUTE, answer.numbers, size)
    assert pixels[0, 0] == pytest.approx(226.4 * 640 / 1024)
    assert pixels[0, 1] == pytest.approx(229.8 * 480 / 1024)
    assert format_answer(ABSOLUTE, answer.labels, pixels, size) == FIGURE_2A


def test_offsets_are_whole_steps_of_the_pictures_sides_from_the_center():
    size = (1024, 256)  # a step of range 512 is 2 pixels across and half a pixel down
    boxes = [[100.0, 50.0, 140.0, 90.0]]
    assert format_answer(OFFSET, [1], boxes, size) == "The bounding boxes are [(<c1>, -10, -40, 10, 40)]."
    text = format_answer(OFFSET, [1], boxes, size, centers=[[110.0, 60.0]])
    assert text == "The bounding boxes are [(<c1>, -5, -20, 15, 60)]."
    answer = parse_answer(text, OFFSET)
    assert isinstance(answer, Answer)
    assert pixel_points(OFFSET, answer.numbers, size, [[110.0, 60.0]]).tolist() == boxes
    with pytest.raises(ValueError, match="offsets need the centre points"):
        pixel_points(OFFSET, answer.numbers, size)


def test_numbers_stay_in_the_range_and_there_is_no_minus_zero():
    assert box_numbers(ABSOLUTE, [[-50, -0.001, 700, 480]], (640, 480)).tolist() == [[0, 0, 1024, 1024]]
    assert box_numbers(OFFSET, [[-5000, 0, 0, 5000]], (10, 10), [[0, 0]]).tolist() == [[-512, 0, 0, 512]]
    assert "-0" not in format_answer(OFFSET, [0], [[99.99, 99.99, 100.01, 100.01]], (640, 480))
    assert "-0" not in format_answer(ABSOLUTE, [0], [[-0.001, -0.001, 1, 1]], (640, 480))


def test_nothing_found():
    for instruction in (ABSOLUTE, OFFSET):
        text = format_answer(instruction, [], np.zeros((0, 4)), (640, 480))
        assert text == "The bounding boxes are []."
        answer = parse_answer(text, instruction)
        assert isinstance(answer, Answer)
        assert answer.numbers.shape == (0, 4)


def test_polygons_and_keypoints():
    polygon = Instruction("segmentation", ("motorbike",), 100, "absolute", 3)
    text = format_answer(polygon, [0], [[0, 0, 5, 0, 5, 10]], (10, 10))
    assert text == "The detected polygons are [(<c0>, 0.0, 0.0, 50.0, 0.0, 50.0, 100.0)]."
    assert isinstance(parse_answer(text, polygon), Answer)
    assert isinstance(parse_answer(text, ABSOLUTE), MalformedAnswer)
    keypoints = Instruction("keypoints", ("man",), 100, "absolute", 1)
    assert (
        format_answer(keypoints, [0], [[5, 5]], (10, 10))
        == "The detected keypoints are [(<c0>, 50.0, 50.0)]."
    )


GROUNDING = Instruction("grounding", ("the left dog", "a red car"), 1024, "absolute")
KEYPOINTS = Instruction("keypoints", ("dog",), 100, keypoints=("nose", "tail", "ear"))


def test_absent_expressions():
    text = format_answer(GROUNDING, [0], [[0, 0, 5, 10]], (10, 10), absent=[1])
    assert text == "The bounding boxes are [(<c0>, 0.0, 0.0, 512.0, 1024.0), (<c1>, absent)]."
    answer = parse_answer(text, GROUNDING)
    assert isinstance(answer, Answer)
    assert (answer.labels.tolist(), answer.absent, answer.numbers.shape) == ([0], (1,), (1, 4))
    nothing = parse_answer(format_answer(GROUNDING, [], [], (10, 10), absent=[0, 1]), GROUNDING)
    assert isinstance(nothing, Answer)
    assert nothing.absent == (0, 1)
    assert isinstance(parse_answer(text, ABSOLUTE), MalformedAnswer)


@pytest.mark.parametrize(
    "items", ["(<c0>, 1, 2, 3, 4), (<c0>, absent)", "(<c0>, absent), (<c0>, 1, 2, 3, 4)", "(<c1>, absent, 1)"]
)
def test_an_expression_is_found_or_absent(items):
    assert isinstance(parse_answer(f"The bounding boxes are [{items}].", GROUNDING), MalformedAnswer)


@pytest.mark.parametrize("absent", [[0], [2], [-1]])
def test_only_expressions_without_box_are_absent(absent):
    with pytest.raises(ValueError, match="absent must list"):
        format_answer(GROUNDING, [0], [[0, 0, 5, 10]], (10, 10), absent=absent)
    with pytest.raises(ValueError, match="absent must list"):
        format_answer(ABSOLUTE, [], [], (10, 10), absent=[0])


def test_keypoints_that_are_not_there():
    nan = float("nan")
    points = np.array([[0, 0, nan, nan, 10, 20]])
    text = format_answer(KEYPOINTS, [0], points, (100, 100))
    assert text == "The detected keypoints are [(<c0>, -5, -10, -, -, 5, 10)]."
    answer = parse_answer(text, KEYPOINTS)
    assert isinstance(answer, Answer)
    np.testing.assert_array_equal(answer.numbers, [[-5, -10, nan, nan, 5, 10]])
    np.testing.assert_array_equal(pixel_points(KEYPOINTS, answer.numbers, (100, 100), [[5, 10]]), points)
    half = parse_answer("The detected keypoints are [(<c0>, -, 1, -, -, 5, 10)].", KEYPOINTS)
    assert isinstance(half, MalformedAnswer)
    assert isinstance(parse_answer("The bounding boxes are [(<c0>, -, -, 3, 4)].", OFFSET), MalformedAnswer)


@pytest.mark.parametrize("instruction", [Instruction("captioning"), Instruction("vqa", question="who?")])
def test_text_is_its_own_answer(instruction):
    answer = parse_answer(" a dog on the left \n", instruction)
    assert isinstance(answer, Answer)
    assert (answer.kind, answer.text) == ("text", "a dog on the left")
    assert parse_answer("  ", instruction) == MalformedAnswer(0, "text", "none")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(0, 640, width=32)] * 4), max_size=5),
    st.integers(1, 4096),
    st.sampled_from(["offset", "absolute"]),
)
def test_answers_round_trip(corners, value, coordinates):
    instruction = Instruction(classes=("a",), range=value, coordinates=coordinates)
    boxes = np.array(corners, dtype=np.float64).reshape(-1, 4)
    boxes = np.concatenate(
        [np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1
    )
    size = (640, 640)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    answer = parse_answer(format_answer(instruction, [0] * len(boxes), boxes, size, centers), instruction)
    assert isinstance(answer, Answer)
    np.testing.assert_array_equal(answer.numbers, box_numbers(instruction, boxes, size, centers))
    step = 640 / value * (0.1 if coordinates == "absolute" else 1)
    back = pixel_points(instruction, answer.numbers, size, centers)
    np.testing.assert_allclose(back, boxes, rtol=0, atol=step / 2 * 1.001 + 1e-9)


@pytest.mark.parametrize(
    ("text", "at", "expected"),
    [
        ("I see a dog.", "I", "The bounding boxes are"),
        ("The bounding boxes are (<c0>, 1, 2, 3, 4).", "(<c0>", "`[`"),
        ("The bounding boxes are [(dog, 1, 2, 3, 4)].", "dog", "a class token"),
        ("The bounding boxes are [(<c2>, 1, 2, 3, 4)].", "<c2>", "<c0> to <c1>"),
        ("The bounding boxes are [(<c0>, 1, 2, 3)].", ")", "4 numbers"),
        ("The bounding boxes are [(<c0>, 1, 2, 3, four)].", " four", "a number"),
        ("The bounding boxes are [(<c0>, 1, 2, 3, 2000)].", " 2000", "from 0 to 1024"),
        ("The bounding boxes are [(<c0>, 1, 2, 3, -4)].", " -4", "from 0 to 1024"),
        ("The bounding boxes are [(<c0>, 1, 2, 3, 4) (<c1>, 1, 2, 3, 4)].", " (<c1>", "`,` or `]`"),
        ("The bounding boxes are [(<c0>, 1, 2, 3, 4)", "", "`,` or `]`"),
        ("The bounding boxes are [(<c0>, 1, 2, 3, 4)]. And a cat.", ". And", "the end of the answer"),
        (
            "The detected polygons are [(<c0>, 135.3, 95.7, ..., 124.9, 119.3]].",
            "The",
            "The bounding boxes are",
        ),
    ],
)
def test_malformed_answers_are_data(text, at, expected):
    answer = parse_answer(text, ABSOLUTE)
    assert isinstance(answer, MalformedAnswer)
    assert expected in answer.expected
    assert answer.position == (text.rindex(at) if at else len(text))


def test_offsets_are_whole_and_abridged_answers_are_malformed():
    answer = parse_answer("The bounding boxes are [(<c0>, 1.5, 2, 3, 4)].", OFFSET)
    assert isinstance(answer, MalformedAnswer)
    assert answer.expected == "a whole number"
    abridged = parse_answer("The detected polygons are [(<c0>, 135.3, 95.7, ..., 124.9, 119.3]].")
    assert isinstance(abridged, MalformedAnswer)
    assert abridged.found.startswith("` ...")
    uneven = parse_answer("The bounding boxes are [(<c0>, 1, 2, 3, 4), (<c0>, 1, 2)].")
    assert isinstance(uneven, MalformedAnswer)


@pytest.mark.parametrize(
    ("labels", "points", "size", "centers", "message"),
    [
        ([0], [[1, 2, 3]], (10, 10), None, "shape"),
        ([0], [[1, 2, 3, float("nan")]], (10, 10), None, "finite"),
        ([0, 1], [[1, 2, 3, 4]], (10, 10), None, "labels"),
        ([2], [[1, 2, 3, 4]], (10, 10), None, "from 0 to 1, got 2"),
        ([0], [[1, 2, 3, 4]], (0, 10), None, "size"),
        ([0], [[1, 2, 3, 4]], (10, 10), [[1, 2], [3, 4]], "centers must have shape"),
    ],
)
def test_wrong_arguments(labels, points, size, centers, message):
    with pytest.raises(ValueError, match=message):
        format_answer(OFFSET, labels, points, size, centers)
    with pytest.raises(ValueError, match="expected an instruction for"):
        format_answer(Instruction("captioning"), labels, points, size, centers)
