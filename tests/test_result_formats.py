"""Results of every task: answers read back, COCO results, plain values, supervision."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout

import numpy as np
import pytest
from colour_network import ColourNetwork, picture
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from visionllm.instruction import Instruction, MalformedAnswer
from visionllm.pipeline import VisionLLM
from visionllm.result import Result

RED, BLUE = (40, 60, 120, 180), (160, 60, 280, 120)
NAMES = ("top left", "bottom right", "center", "nose")


@pytest.fixture
def model() -> VisionLLM:
    return VisionLLM(ColourNetwork())


@pytest.fixture
def image() -> np.ndarray:
    return picture(320, 240, red=RED, blue=BLUE)


def ground_truth(**fields: object) -> dict:
    """One picture with a red and a blue object."""
    objects = [
        {
            "id": k + 1,
            "image_id": 7,
            "category_id": (30, 10)[k],
            "iscrowd": 0,
            "area": float((x2 - x1) * (y2 - y1)),
        }
        | {"bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]]}
        | {name: values[k] for name, values in fields.items()}
        for k, (x1, y1, x2, y2) in enumerate((RED, BLUE))
    ]
    return {
        "images": [{"id": 7, "width": 320, "height": 240}],
        "categories": [{"id": 30, "name": "red"}, {"id": 10, "name": "blue"}],
        "annotations": objects,
    }


def average_precision(
    truth: dict, results: list[dict], kind: str, sigmas: list[float] | None = None
) -> float:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(json.loads(json.dumps(results))), kind)
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[1])  # at 0.5


def test_coco_results_of_polygons_are_masks(model, image):
    result = model.segment(image, ["blue", "red"], points=24)
    entries = result.to_coco(7, {"blue": 10, "red": 30})
    assert [entry["category_id"] for entry in entries] == [30, 10, 10], "candidates under the threshold too"
    assert set(entries[0]) == {"image_id", "category_id", "segmentation", "score"}
    assert average_precision(ground_truth(), entries, "segm") == pytest.approx(1.0)
    assert coco_mask.area(entries[0]["segmentation"]) == pytest.approx(80 * 120, rel=0.1)


def test_coco_results_of_keypoints(model, image):
    result = model.keypoints(image, ["blue", "red"], NAMES[:3])
    entries = result.to_coco(7, [10, 30])
    assert set(entries[0]) == {"image_id", "category_id", "keypoints", "score"}
    assert len(entries[0]["keypoints"]) == 9 and entries[0]["keypoints"][2::3] == [2, 2, 1]
    truth = ground_truth(
        num_keypoints=[3, 3],
        keypoints=[[x1, y1, 2, x2, y2, 2, (x1 + x2) / 2, (y1 + y2) / 2, 1] for x1, y1, x2, y2 in (RED, BLUE)],
    )
    assert average_precision(truth, entries, "keypoints", [0.05] * 3) == pytest.approx(1.0)


def test_coco_results_of_words(model, image):
    assert model.caption(image).to_coco("p") == [{"image_id": "p", "caption": "red and blue"}]
    (entry,) = model.answer(image, "how many?").to_coco(1)
    assert entry == {"image_id": 1, "question": "how many?", "answer": "2"}


def test_plain_values_of_every_task(model, image):
    segmented = json.loads(model.segment(image, ["red"], points=6).to_json())
    assert segmented["task"] == "segmentation" and segmented["format_source"] == "grammar"
    assert len(segmented["boxes"][0]["polygon"]) == 12
    points = model.keypoints(image, ["red"], NAMES).to_dict()["boxes"][0]["keypoints"]
    assert list(points) == list(NAMES) and [v for _, _, v in points.values()] == [2, 2, 1, 0]
    unnamed = Instruction("keypoints", ("red",), points=2)
    model.network._complete = lambda found, instruction, spread: None  # the two corners
    assert list(model.predict(image, unnamed).to_dict()["boxes"][0]["keypoints"]) == ["1", "2"]
    words = model.answer(image, "how many?").to_dict()
    assert words["text"] == words["answer"] == "2" and words["boxes"] == [] and "expressions" not in words
    assert "expected words" in model.answer(picture(), "how many?").to_dict()["error"]


def test_plain_values_of_expressions(model, image):
    content = json.loads(model.ground(image, ["the red one", "a pink one"]).to_json())
    assert [entry["expression"] for entry in content["expressions"]] == ["the red one", "a pink one"]
    assert [entry["found"] for entry in content["expressions"]] == [True, False]
    assert content["expressions"][1]["score"] is None and content["expressions"][1]["absent"] == 1.0
    assert content["boxes"][0]["label"] == "the red one"


@pytest.mark.parametrize("coordinates", ["absolute", "offset"])
@pytest.mark.parametrize("task", ["detection", "segmentation", "grounding", "keypoints"])
def test_answers_can_be_read_back(model, image, task, coordinates):
    fields = {"segmentation": {"points": 9}, "keypoints": {"points": 4, "keypoints": NAMES}}.get(task, {})
    asked = Instruction(task, ("blue", "red"), range=512, coordinates=coordinates, **fields)
    result = model.predict(image, asked)
    centers = result.boxes.centers * (320, 240)
    read = Result.from_answer(image, asked, str(result), centers)
    assert read.error is None and read.task == task and str(read) == str(result)
    assert read.boxes.names == result.boxes.names
    if task != "keypoints":
        np.testing.assert_allclose(read.boxes.xyxy, result.boxes.xyxy, atol=0.7)
    if result.boxes.points is not None:
        np.testing.assert_allclose(read.boxes.points, result.boxes.points, atol=0.7)


@pytest.mark.parametrize("threshold", [None, 1.0])
def test_nothing_found_in_every_form(model, image, threshold):
    for result in (
        model.detect(image, ["pink"], threshold, spread=True),
        model.segment(image, ["pink"], 5, threshold, spread=True),
        model.keypoints(image, ["pink"], NAMES, threshold, spread=True),
        model.ground(image, ["the pink one"], threshold, spread=True),
    ):
        assert len(result) == 0 and str(result).endswith(" are [].")
        nothing = "the pink one: absent" if result.task == "grounding" else "nothing found"
        assert result.summary() == nothing and result.to_dict(spread=True)["boxes"] == []
        assert Result.from_answer(image, result.instruction, str(result), []).error is None
        assert result.plot(spread=True).width == 320


@pytest.mark.parametrize(
    "text",
    [
        "",
        "there is a dog",
        "The bounding boxes are [(<c0>, 1, 2, 3)].",
        "The bounding boxes are [(<c2>, 1, 2, 3, 4)]",
    ],
)
def test_an_answer_that_cannot_be_read_is_in_the_result(image, text):
    result = Result.from_answer(image, Instruction(classes=("red", "blue"), coordinates="absolute"), text)
    assert isinstance(result.error, MalformedAnswer) and len(result) == 0
    assert result.summary() == result.to_dict()["error"] == str(result.error)
    assert result.plot().width == 320


@given(st.text(max_size=60))
def test_any_text_is_an_answer_or_an_error(text):
    image = np.zeros((8, 8, 3), np.uint8)
    for asked in (
        Instruction(classes=("red",), coordinates="absolute"),
        Instruction("segmentation", ("red",), coordinates="absolute", points=4),
        Instruction("vqa", question="what?"),
    ):
        result = Result.from_answer(image, asked, "The bounding boxes are [" + text)
        assert len(result) == 0 or result.error is None
        assert asked.task != "segmentation" or result.error is not None, "the subject is another"
        assert asked.task != "vqa" or result.error is None
        json.loads(result.to_json())


def test_supervision(model, image):
    supervision = pytest.importorskip("supervision")
    result = model.segment(image, ["blue", "red"], points=16)
    found = result.to_supervision()
    assert isinstance(found, supervision.Detections) and len(found) == 2
    assert found.mask.shape == (2, 240, 320) and found.mask.dtype == bool
    assert found.class_id.tolist() == [1, 0] and found.data["class_name"].tolist() == ["red", "blue"]
    np.testing.assert_array_equal(found.xyxy, result.boxes.xyxy)
    assert model.detect(image, ["red"]).to_supervision().mask is None
    assert len(model.detect(picture(), ["red"]).to_supervision()) == 0
    assert len(model.segment(picture(), ["red"]).to_supervision()) == 0
    points = model.keypoints(image, ["red"], NAMES[:2]).to_supervision()
    assert isinstance(points, supervision.KeyPoints) and points.xy.shape == (1, 2, 2)
    with pytest.raises(ValueError, match="expected objects, got a result in words"):
        model.caption(image).to_supervision()


def test_without_supervision_the_error_says_what_to_install(model, image, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        model.detect(image, ["red"]).to_supervision()
