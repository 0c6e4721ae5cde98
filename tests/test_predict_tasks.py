"""Every task from pictures to results, alone and mixed, with a network whose answers are known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from colour_network import SPREAD, ColourNetwork, picture

from visionllm.instruction import Instruction, MalformedAnswer, parse_answer
from visionllm.instruction.instruction import SET_TASKS, UnknownFormat
from visionllm.pipeline import VisionLLM, class_request, request_of
from visionllm.request import requests_of
from visionllm.text_options import TextOptions

RED, BLUE = (16, 8, 48, 40), (80, 16, 112, 64)
UNKNOWN = (
    'Look at <image>. For every animal of {"red": <c0>} give me its label followed by its top-left and '
    "bottom-right corner."
)


@pytest.fixture
def model() -> VisionLLM:
    return VisionLLM(ColourNetwork())


@pytest.fixture
def image() -> np.ndarray:
    return picture(red=RED, blue=BLUE)


@pytest.mark.parametrize("points", [4, 16, 64])
def test_segment(model, image, points):
    result = model.segment(image, ["blue", "red"], points=points)
    assert result.task == "segmentation" and result.instruction.points == points
    assert result.boxes.names == ["red", "blue"] and result.boxes.labels.tolist() == [1, 0]
    assert [polygon.shape for polygon in result.polygons] == [(points, 2)] * 2
    for polygon, (x1, y1, x2, y2) in zip(result.polygons, (RED, BLUE), strict=True):
        assert polygon.dtype == np.float32
        np.testing.assert_allclose([*polygon.min(axis=0), *polygon.max(axis=0)], [x1, y1, x2, y2], atol=2)
    assert result.keypoints is None and result.expressions is None and result.text is None
    answer = parse_answer(str(result), result.instruction)
    assert answer.numbers.shape == (2, 2 * points)


def test_masks_are_those_of_the_polygons(model, image):
    from pycocotools import mask as coco_mask

    result = model.segment(image, ["red"], points=8)
    (mask,) = coco_mask.decode(result.masks).transpose(2, 0, 1)
    x1, y1, x2, y2 = RED
    wanted = np.zeros(image.shape[:2], bool)
    wanted[y1:y2, x1:x2] = True
    assert (mask & wanted).sum() / (mask | wanted).sum() > 0.9
    assert model.segment(picture(), ["red"]).masks == []
    assert model.detect(image, ["red"]).masks is None


def test_ground(model, image):
    expressions = ["the pink one", "the red thing on the left", "what is blue"]
    result = model.ground(image, expressions)
    found = result.expressions
    assert [one.text for one in found] == expressions
    assert [one.box is not None for one in found] == [False, True, True]
    assert [one.absent for one in found] == pytest.approx([0.9, 0.11, 0.12], abs=0.02)
    np.testing.assert_allclose(found[1].box.xyxy, RED, atol=2)
    assert found[1].box.name == expressions[1]
    assert model.ground(image, "the red one").expressions[0].box is not None
    assert len(model.ground(image, expressions, threshold=0.0)) == 3


def test_an_absent_expression_has_no_box_whatever_its_candidates_score():
    class Sure(ColourNetwork):
        def _complete(self, found, instruction, spread):
            super()._complete(found, instruction, spread)
            found.absent[:] = 0.8

    image = picture(red=RED)
    assert VisionLLM(Sure()).ground(image, "the red one").expressions[0].box is None
    result = VisionLLM(Sure()).ground(image, "the red one", threshold=0.15)
    assert result.expressions[0].box is not None and result.expressions[0].absent == pytest.approx(0.8)


def test_more_expressions_than_class_tokens(model, image):
    expressions = [f"the thing number {k}" for k in range(600)] + ["the red one"]
    result = model.ground(image, expressions)
    assert len(result.absent) == len(result.expressions) == 601
    assert [k for k, one in enumerate(result.expressions) if one.box is not None] == [600]
    assert result.expressions[600].absent < 0.3


def test_keypoints(model, image):
    names = ["top left", "center", "nose"]
    result = model.keypoints(image, ["red"], names)
    assert result.instruction.keypoints == tuple(names) and result.instruction.points == 3
    assert result.keypoints.shape == (1, 3, 3) and result.keypoints.dtype == np.float32
    np.testing.assert_allclose(result.keypoints[0, :2, :2], [(16, 8), (32, 24)], atol=2)
    assert result.keypoints[0, :, 2].tolist() == [2, 1, 0], "visible, hidden, not in the picture"
    np.testing.assert_allclose(result.boxes.visibility.sum(axis=2), 1, atol=1e-6)
    assert model.keypoints(picture(), ["red"], names).keypoints.shape == (0, 3, 3)


def test_caption_and_answer(model, image):
    texts = [model.caption(image, length).text for length in ("short", "long", "detailed")]
    assert texts == ["red and blue", "a picture of red and blue", "a black picture, and in it red and blue"]
    result = model.answer(image, "how many colours are there?")
    assert str(result) == result.text == "2" and result.instruction.question == "how many colours are there?"
    assert len(result) == 0 and result.boxes.xyxy.shape == (0, 4) and result.error is None
    results = model.answer([image, picture(green=RED)], ["how many?", "how many now?"])
    assert [one.text for one in results] == ["2", "1"]
    assert [one.instruction.question for one in results] == ["how many?", "how many now?"]


def test_an_empty_answer_is_a_typed_error(model):
    result = model.answer(picture(), "how many?")
    assert isinstance(result.error, MalformedAnswer) and result.text == ""
    assert "expected words" in result.summary()


def test_text_options_reach_the_network(model, image):
    options = TextOptions(max_tokens=5, temperature=0.5, top_p=0.9, seed=3)
    model.caption(image, options=options)
    assert model.network.options == options
    model.answer(image, "how many?", options=TextOptions(beams=3))
    assert model.network.options.beams == 3
    model.caption(image)
    assert model.network.options == TextOptions()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be a whole number >= 1, got 0"),
        ({"beams": 1.5}, "beams must be a whole number"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"seed": -1}, "seed must be"),
        ({"beams": 2, "temperature": 1.0}, "exclude each other"),
    ],
)
def test_bad_text_options(fields, message):
    with pytest.raises(ValueError, match=message):
        TextOptions(**fields)


def test_streaming_tells_the_picture(model, image):
    pieces: dict[int, str] = {}

    def listen(position: int, piece: str) -> None:
        pieces[position] = pieces.get(position, "") + piece

    asked = [Instruction("captioning", length="long"), Instruction(classes=("red",))] * 2
    asked.append(Instruction("vqa", question="how many?"))
    results = model.predict([image] * 5, asked, batch_size=3, on_text=listen)
    assert pieces == {i: result.text for i, result in enumerate(results) if result.text is not None}
    assert list(pieces) == [0, 2, 4]
    with pytest.raises(ValueError, match="on_text: expected 1 beam, .* got 2"):
        model.caption(image, options=TextOptions(beams=2), on_text=listen)


def test_a_batch_of_all_tasks(model, image):
    asked = [
        Instruction(classes=("blue",)),
        Instruction("vqa", question="how many?"),
        Instruction("segmentation", ("red", "blue"), points=5),
        Instruction("keypoints", ("red",), points=1, keypoints=("top left",)),
        Instruction("segmentation", ("green", "red"), points=24),
        Instruction("captioning", length="detailed"),
        Instruction("grounding", ("the blue one", "the green one")),
    ]
    results = model.predict([image] * len(asked), asked)
    assert [result.task for result in results] == [one.task for one in asked]
    assert [len(call) for call in model.network.calls] == [5, 2], "one pass of sets, one of texts"
    assert [len(result) for result in results] == [1, 0, 2, 1, 1, 0, 1]
    assert [result.text is None for result in results] == [one.task in SET_TASKS for one in asked]
    for alone, together in zip([model.predict(image, one) for one in asked], results, strict=True):
        assert str(alone) == str(together)
        assert alone.to_dict() == together.to_dict()


def test_spread_is_in_pixels_and_on_request(model, image):
    assert model.segment(image, ["red"], points=6).boxes.spread is None
    result = model.segment(image, ["red"], points=6, spread=True)
    assert result.boxes.spread.shape == (1, 6, 2)
    np.testing.assert_allclose(result.boxes.spread[0, 0], [128 * SPREAD, 64 * SPREAD], rtol=1e-5)
    boxes = model.detect(image, ["red"], spread=True).boxes
    assert boxes.spread.shape == (1, 2, 2)
    assert "spread" not in result.to_dict()["boxes"][0]
    assert result.to_dict(spread=True)["boxes"][0]["spread"] == pytest.approx([1.28, 0.64] * 6)


def test_tasks_that_the_weights_do_not_know():
    model = VisionLLM(ColourNetwork(tasks=("detection", "grounding")))
    for call in (
        lambda: model.segment([], ["red"]),
        lambda: model.keypoints([], ["red"], ["top"]),
        lambda: model.caption([]),
        lambda: model.answer([], "how many?"),
        lambda: model.run([picture()], [request_of(Instruction("captioning"))], 0.3),
    ):
        with pytest.raises(ValueError, match="trained for detection, grounding, not for"):
            call()
    assert model.ground([], "the red one") == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.ground(picture(), []), "expressions: expected at least one name"),
        (lambda model: model.ground(picture(), ["a", "a"]), "expressions: 'a' is listed twice"),
        (lambda model: model.keypoints(picture(), ["red"], []), "keypoints: expected at least one name"),
        (lambda model: model.keypoints(picture(), ["red"], "nose"), "keypoints: expected a list"),
        (lambda model: model.segment(picture(), ["red"], points=65), "points"),
        (lambda model: model.caption(picture(), "endless"), "length must be one of short, long, detailed"),
        (lambda model: model.answer(picture(), ""), "question"),
        (lambda model: model.answer([picture()], ["a?", "b?"]), "expected one, or 1 for as many pictures"),
    ],
)
def test_bad_arguments(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_formats_that_the_parser_does_not_know_are_written_by_the_model(model, image):
    with pytest.raises(UnknownFormat):
        request_of(UNKNOWN)
    result = model.predict(image, UNKNOWN)
    assert result.format_source == result.to_dict()["format_source"] == "model"
    assert result.boxes.names == ["red"] and result.instruction.points == 2
    known = 'Find {"red": <c0>} in <image>. Output (c, x1, y1, x2, y2).'
    results = model.predict([image] * 3, [UNKNOWN, known, UNKNOWN])
    assert [one.format_source for one in results] == ["model", "grammar", "model"]


def test_formats_are_asked_for_in_one_call():
    calls = []

    def write(texts):
        calls.append(list(texts))
        return ["(c, x1, y1, x2, y2)"] * len(texts)

    known = Instruction(classes=("red",))
    asked = requests_of([UNKNOWN, known, UNKNOWN], write)
    assert len(calls) == 1 and len(calls[0]) == 2
    assert [one.instructions[0].format_source for one in asked] == ["model", "grammar", "model"]


def test_a_written_format_that_is_none_is_an_error(image):
    model = VisionLLM(ColourNetwork(format="(c, x1, y1, x2"))
    with pytest.raises(UnknownFormat, match=r"position .*for which the model wrote `\(c, x1, y1, x2`"):
        model.predict(image, UNKNOWN)


def test_requests_of_every_set_task():
    names = [f"thing {k}" for k in range(700)]
    asked = class_request(names, task="segmentation", points=12)
    assert asked.task == "segmentation" and len(asked.instructions) == 2
    assert {one.points for one in asked.instructions} == {12}
    asked = class_request(names, task="keypoints", keypoints=["a", "b"])
    assert {one.keypoints for one in asked.instructions} == {("a", "b")}
    assert {one.points for one in asked.instructions} == {2}
    with pytest.raises(dataclasses.FrozenInstanceError):
        asked.classes = ()
