"""Drawings of every task: what is where, in which colour, and what stands below the picture."""

from __future__ import annotations

import numpy as np
import pytest
from colour_network import ColourNetwork, picture

from visionllm.boxes import Boxes
from visionllm.drawing import FILL, class_colour, draw_keypoints, draw_polygons
from visionllm.drawing_text import (
    MAX_ROWS,
    PAPER,
    Line,
    label_font,
    shortened,
    with_legend_below,
    with_lines_below,
    wrapped,
)
from visionllm.instruction import Instruction
from visionllm.pipeline import VisionLLM
from visionllm.result import Result

RED, GREEN = (40, 60, 120, 180), (160, 60, 280, 120)


@pytest.fixture
def model() -> VisionLLM:
    return VisionLLM(ColourNetwork())


@pytest.fixture
def image() -> np.ndarray:
    return picture(320, 240, red=RED, green=GREEN)


def boxes_with(points: list, **fields: object) -> Boxes:
    """Objects of these points, each of a class of its own."""
    array = np.array(points, np.float32)
    n = len(array)
    return Boxes(
        np.concatenate([array.min(axis=1), array.max(axis=1)], axis=1),
        np.linspace(0.9, 0.5, n, dtype=np.float32),
        np.arange(n),
        [f"thing {k}" for k in range(n)],
        np.full((n, 2), 0.5, np.float32),
        array,
        **fields,
    )


def test_polygons_are_tinted_and_outlined():
    image = np.full((200, 300, 3), 100, np.uint8)
    triangle = [(50, 50), (250, 50), (150, 190)]
    drawn = np.asarray(draw_polygons(image, boxes_with([triangle])), int)
    colour = np.array(class_colour(0))
    np.testing.assert_allclose(drawn[100, 150], 100 + (colour - 100) * FILL / 255, atol=2)
    np.testing.assert_array_equal(drawn[50, 150], colour)
    np.testing.assert_array_equal(drawn[180, 60], [100] * 3)
    np.testing.assert_array_equal(drawn[180, 240], [100] * 3)


def test_the_best_object_is_on_top():
    image = np.zeros((100, 100, 3), np.uint8)
    square = [(20, 30), (80, 30), (80, 90), (20, 90)]
    drawn = np.asarray(draw_polygons(image, boxes_with([square, square])))
    assert drawn[60, 20].tolist() == list(class_colour(0))


def test_keypoints_are_full_hidden_or_left_out():
    image = np.full((200, 300, 3), 100, np.uint8)
    places = [(60, 60), (150, 100), (240, 140)]
    visibility = np.eye(3, dtype=np.float32)[[[2, 1, 0]]]
    drawn = np.asarray(draw_keypoints(image, boxes_with([places], visibility=visibility)))
    assert drawn[58, 58].tolist() == list(class_colour(0)), "visible: full"
    assert drawn[100, 150].tolist() == [100] * 3, "hidden: a ring"
    ring = drawn[90:111, 140:161].reshape(-1, 3).tolist()
    assert list(class_colour(1)) in ring
    assert (drawn[142:145, 242:245] == 100).all(), "not in the picture"


def test_a_polygon_outside_the_picture_and_one_of_one_place():
    image = np.zeros((30, 30, 3), np.uint8)
    boxes = boxes_with([[(-50, -50), (500, -50), (500, 500)], [(5, 5), (5, 5), (5, 5)]])
    assert draw_polygons(image, boxes, scale=0.05).size == (2, 2)
    assert draw_keypoints(image, boxes).size == (30, 30)


def test_results_are_drawn_by_task(model, image):
    for result in (model.detect(image, ["red"]), model.segment(image, ["red", "green"])):
        assert result.plot().size == (320, 240)
        assert result.plot(scale=2).size == (640, 480)
        assert (np.asarray(result.plot()) != image).any()
    assert model.keypoints(image, ["red"], ["top left", "nose"]).plot().height > 240
    assert model.keypoints(image, ["blue"], ["top left"]).plot().size == (320, 240), "nothing found"


@pytest.mark.parametrize("task", ["caption", "answer", "ground"])
def test_words_stand_below_an_untouched_picture(model, image, task):
    call = {
        "caption": lambda: model.caption(image, "long"),
        "answer": lambda: model.answer(image, "how many colours are there?"),
        "ground": lambda: model.ground(image, ["the pink one"]),
    }[task]
    drawn = np.asarray(call().plot())
    np.testing.assert_array_equal(drawn[:240], image)
    assert drawn.shape[0] > 240 and drawn.shape[1] == 320
    below = drawn[240:].reshape(-1, 3)
    assert (below == PAPER).all(axis=1).mean() > 0.5
    assert (below.astype(int).sum(axis=1) < 400).any(), "letters"


def test_a_question_takes_two_lines_more_than_nothing(model, image):
    one = model.caption(image).plot().height
    two = model.answer(image, "how many?").plot().height
    row = two - one
    assert row > 8
    grounded = model.ground(image, ["the red one", "a pink one", "the green one"]).plot().height
    assert grounded - one == 2 * row


def test_absent_expressions_have_no_dot(model, image):
    drawn = np.asarray(model.ground(image, ["the pink one", "the red one"]).plot())
    dots = drawn[240:, :20].reshape(-1, 3).tolist()
    assert list(class_colour(1)) in dots and list(class_colour(0)) not in dots


def test_an_answer_that_could_not_be_read_is_said(image):
    result = Result.from_answer(image, Instruction(classes=("red",)), "nonsense")
    assert result.plot().height > 240


def test_spread_is_drawn_as_crosses(model, image):
    result = model.segment(image, ["red"], points=4, spread=True)
    with_crosses, without = np.asarray(result.plot(spread=True)), np.asarray(result.plot())
    x, y = result.polygons[0][2].round().astype(int)
    arm = int(result.boxes.spread[0, 2, 0])
    assert arm >= 3 and with_crosses[y, x + arm - 1].tolist() == [255] * 3
    assert (with_crosses != without).any()
    plain = model.segment(image, ["red"], points=4)
    np.testing.assert_array_equal(np.asarray(plain.plot(spread=True)), np.asarray(plain.plot()))


@pytest.mark.parametrize("width", [1, 30, 100, 1000])
def test_wrapping_keeps_every_letter(width):
    font = label_font((400, 400))
    text = "a rather longwindedandunbreakableexpression of the thing, 猫 and Höhe"
    pieces = list(wrapped(text, font, width))
    assert "".join(pieces).replace(" ", "") == text.replace(" ", "")
    assert all(font.getlength(piece) <= width or len(piece) == 1 for piece in pieces)
    assert list(wrapped("", font, width)) == [""]
    assert list(wrapped("a\nb", font, 1000)) == ["a", "b"]


def test_shortening():
    font = label_font((400, 400))
    assert shortened("short", font, 500) == "short"
    text = shortened("a very long expression that nobody would read", font, 100)
    assert text.endswith("…") and font.getlength(text) <= 100


def test_lines_below_end_somewhere():
    from PIL import Image

    small = Image.new("RGB", (60, 40))
    assert with_lines_below(small, []) is small and with_legend_below(small, []) is small
    many = with_lines_below(small, [Line("word " * 400)])
    most = with_lines_below(small, [Line("x")] * MAX_ROWS)
    assert many.height == most.height
    for size in ((1, 1), (3, 200)):
        assert with_lines_below(Image.new("RGB", size), [Line("some words", dot=(1, 2, 3))]).width == size[0]
        assert with_legend_below(Image.new("RGB", size), [Line("words", dot=(1, 2, 3))] * 3).width == size[0]


def test_a_legend_stands_side_by_side():
    from PIL import Image

    wide = Image.new("RGB", (600, 300))
    entries = [Line(name, dot=(200, 0, 0)) for name in ("nose", "left eye", "right eye")]
    assert with_legend_below(wide, entries).height < with_lines_below(wide, entries).height
