"""Every task with the real network, its weights random: forms, mixed batches, words, written formats."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from small_network import small_network

from visionllm.instruction import Instruction, MalformedAnswer, parse_answer
from visionllm.instruction.instruction import TASKS
from visionllm.pipeline import VisionLLM
from visionllm.text_options import TextOptions

UNKNOWN = (
    'Look at <image>. For every animal of {"dog": <c0>} give me its label followed by its top-left and '
    "bottom-right corner."
)
NAMES = ("top", "left", "a point of a long name")


@pytest.fixture(scope="module")
def model() -> VisionLLM:
    return VisionLLM(small_network(tasks=TASKS))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("points", [4, 7, 64])
def test_polygons_lie_in_the_picture(model, points):
    result = model.segment(noise(120, 300), ["dog", "red car"], points, threshold=0.0, spread=True)
    boxes = result.boxes
    assert boxes.points.shape == boxes.spread.shape == (len(boxes), points, 2)
    assert boxes.points.min() >= 0 and (boxes.points.max(axis=(0, 1)) <= [300, 120]).all()
    np.testing.assert_allclose(boxes.points.min(axis=1), boxes.xyxy[:, :2], atol=0.01)
    np.testing.assert_allclose(boxes.points.max(axis=1), boxes.xyxy[:, 2:], atol=0.01)
    assert (boxes.spread > 0).all() and np.isfinite(boxes.spread).all()
    assert len(result.masks) == len(boxes) and result.masks[0]["size"] == [120, 300]
    assert result.plot(spread=True).size == (300, 120)


def test_keypoints_have_probabilities_of_visibility(model):
    result = model.keypoints(noise(80, 80), ["dog"], NAMES, threshold=0.0)
    assert result.keypoints.shape == (len(result), 3, 3)
    assert set(np.unique(result.keypoints[..., 2])) <= {0, 1, 2}
    np.testing.assert_allclose(result.boxes.visibility.sum(axis=2), 1, atol=1e-4)
    assert list(result.to_dict()["boxes"][0]["keypoints"]) == list(NAMES)


def test_every_expression_has_a_score_of_absence(model):
    expressions = ["the dog on the left", "a cup", "the largest thing"]
    result = model.ground(noise(80, 120), expressions, threshold=0.0)
    assert result.absent.shape == (3,) and ((result.absent >= 0) & (result.absent <= 1)).all()
    assert [found.text for found in result.expressions] == expressions


@pytest.mark.parametrize("task", ["detection", "segmentation", "grounding", "keypoints"])
def test_the_answer_can_be_read(model, task):
    fields = {"segmentation": {"points": 6}, "keypoints": {"points": 3, "keypoints": NAMES}}.get(task, {})
    for coordinates in ("offset", "absolute"):
        asked = Instruction(task, ("dog", "cat"), range=1024, coordinates=coordinates, **fields)
        result = model.predict(noise(100, 80), asked, threshold=0.0)
        answer = parse_answer(str(result), asked)
        assert not isinstance(answer, MalformedAnswer), str(answer)
        assert len(answer.labels) == len(result)


def test_a_mixed_batch_says_what_single_pictures_say(model):
    asked = [
        Instruction(classes=("dog", "cat")),
        Instruction("segmentation", ("cup",), points=5),
        Instruction("vqa", question="how many dogs are there?"),
        Instruction("keypoints", ("dog",), points=3, keypoints=NAMES),
        Instruction("segmentation", ("cup", "dog", "cat"), points=8),
        Instruction("grounding", ("the dog on the left", "a cup")),
        Instruction("captioning", length="long"),
    ]
    images = [noise(60 + 10 * k, 80, k) for k in range(len(asked))]
    options = TextOptions(max_tokens=6)
    together = model.predict(images, asked, options=options)
    for image, one, result in zip(images, asked, together, strict=True):
        alone = model.predict(image, one, options=options)
        assert result.task == one.task and result.text == alone.text
        np.testing.assert_allclose(result.all_boxes.scores, alone.all_boxes.scores, atol=1e-4)
        # Equal scores may stand in another order.
        gaps = np.abs(np.diff(alone.all_boxes.scores, prepend=2.0, append=-1.0))
        clear = (gaps[:-1] > 1e-3) & (gaps[1:] > 1e-3)
        np.testing.assert_allclose(result.all_boxes.xyxy[clear], alone.all_boxes.xyxy[clear], atol=0.1)
        if alone.all_boxes.points is not None:
            np.testing.assert_allclose(
                result.all_boxes.points[clear], alone.all_boxes.points[clear], atol=0.1
            )


def test_what_is_streamed_is_what_is_written(model):
    pieces = {0: "", 1: ""}

    def listen(position: int, piece: str) -> None:
        pieces[position] += piece

    options = TextOptions(max_tokens=8)
    results = model.answer([noise(64, 64), noise(90, 64, 1)], "what is there?", options, listen)
    for position, result in enumerate(results):
        # A character whose bytes are not whole yet is not streamed.
        assert result.text.startswith(pieces[position].strip()) and pieces[position]


def test_words_are_the_same_again_and_sampling_follows_its_seed(model):
    image = noise(64, 64)

    def text(**options) -> str:
        return model.caption(image, options=TextOptions(max_tokens=8, **options)).text

    assert text() == text()
    assert text(temperature=2.0, seed=1) == text(temperature=2.0, seed=1)
    assert len({text(temperature=2.0, seed=seed) for seed in range(4)}) > 1
    assert isinstance(text(beams=3), str)


def test_a_written_format_is_always_one(model):
    """The weights are random: only the grammar makes it so."""
    asked = model.requests([UNKNOWN])[0].instructions[0]
    assert asked.format_source == "model" and asked.classes == ("dog",)


def test_tasks_that_were_not_trained():
    with pytest.raises(ValueError, match="trained for detection, not for captioning"):
        VisionLLM(small_network(tasks=("detection",))).caption(noise(64, 64))
