"""Results: views, drawings and files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from colour_network import ColourNetwork, picture
from PIL import Image

from visionllm.drawing import class_colour, draw_boxes, overlap, place_label
from visionllm.pipeline import VisionLLM
from visionllm.result import Boxes, Result


@pytest.fixture
def result() -> Result:
    image = picture(320, 240, red=(40, 60, 120, 180), green=(160, 60, 280, 120))
    return VisionLLM(ColourNetwork()).detect(image, ["blue", "green", "red"])


def test_iteration_and_summary(result):
    boxes = list(result)
    assert [(box.name, box.label) for box in boxes] == [("red", 2), ("green", 1)]
    assert len(result) == len(boxes) == 2
    assert all(isinstance(value, float) for value in (*boxes[0].xyxy, boxes[0].score))
    assert result.summary() == "1 green, 1 red"
    assert repr(result) == "Result(<ndarray>, 320x240, 1 green, 1 red)"
    assert str(result).startswith("The bounding boxes are [(<c2>, ")


def test_json(result):
    content = json.loads(result.to_json())
    assert (content["width"], content["height"]) == (320, 240)
    assert content["answer"] == str(result)
    assert [box["label"] for box in content["boxes"]] == ["red", "green"]
    np.testing.assert_allclose(content["boxes"][0]["xyxy"], [40, 60, 120, 180], atol=5)
    assert set(content["boxes"][0]) == {"xyxy", "label", "class", "score"}


def test_coco(result):
    results = result.to_coco("picture 1", {"red": 30, "green": 20, "blue": 10})
    assert [entry["category_id"] for entry in results] == [30, 20, 10], (
        "the box under the threshold is there too"
    )
    x1, y1, x2, y2 = result.boxes.xyxy[0]
    np.testing.assert_allclose(results[0]["bbox"], [x1, y1, x2 - x1, y2 - y1], atol=1e-3)
    assert results[0]["image_id"] == "picture 1"
    assert [entry["category_id"] for entry in result.to_coco(1)] == [2, 1, 0]
    assert [entry["category_id"] for entry in result.to_coco(1, [7, 8, 9])] == [9, 8, 7]
    with pytest.raises(ValueError, match="category_ids: no id for 'green', 'red'"):
        result.to_coco(1, {"blue": 1})
    with pytest.raises(ValueError, match="category_ids: expected 3 ids, one a class, got 2"):
        result.to_coco(1, [1, 2])
    json.dumps(results)


def test_plot_draws_on_a_copy(result):
    before = result.image.copy()
    drawn = np.asarray(result.plot())
    np.testing.assert_array_equal(result.image, before)
    assert drawn.shape == (240, 320, 3)
    for box in result:
        x1, y1, x2, y2 = (round(value) for value in box.xyxy)
        middle = (y1 + y2) // 2
        assert drawn[middle, x1].tolist() == list(class_colour(box.label)), f"left edge of {box.name}"
    np.testing.assert_array_equal(drawn[200:, 200:], before[200:, 200:])
    assert result.plot(scale=2.5).size == (800, 600)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (30, 30)])
def test_plot_of_tiny_pictures_and_odd_boxes(size):
    width, height = size
    xyxy = np.array([[0, 0, width, height], [5, 5, 5, 5], [width, height, width, height]], np.float32)
    boxes = Boxes(
        xyxy,
        np.full(3, 0.5, np.float32),
        np.arange(3),
        ["ein Höhenzug", "猫", ""],
        np.zeros((3, 2), np.float32),
    )
    assert draw_boxes(np.zeros((height, width, 3), np.uint8), boxes).size == size


def test_labels_stay_inside_and_apart():
    taken = []
    box = (90.0, 2.0, 99.0, 30.0)
    for _ in range(3):
        taken.append(place_label(box, (40.0, 10.0), (100, 100), taken))
    for place in taken:
        assert place[0] >= 0 and place[1] >= 0 and place[2] <= 100 and place[3] <= 100
    assert sum(overlap(a, b) for i, a in enumerate(taken) for b in taken[:i]) == 0


def test_neighbouring_classes_have_different_colours():
    colours = np.array([class_colour(label) for label in range(20)], int)
    distance = np.abs(colours[:, None] - colours[None]).sum(axis=2) + 1000 * np.eye(20, dtype=int)
    assert distance.min() > 20
    assert distance[np.arange(19), np.arange(1, 20)].min() > 150


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "A.JPEG", "a.webp", "deep/er/a.png"])
def test_save_picture(result, tmp_path, name):
    path = result.save(tmp_path / name)
    with Image.open(path) as image:
        assert image.size == (320, 240)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "no temporary file stays"


def test_save_json_and_unknown_suffix(result, tmp_path):
    assert json.loads(result.save(tmp_path / "a.json").read_text())["width"] == 320
    with pytest.raises(ValueError, match=r"expected a picture's suffix .* got '\.txt'"):
        result.save(tmp_path / "a.txt")
    assert not (tmp_path / "a.txt").exists()


def test_a_failed_save_leaves_the_old_file(result, tmp_path, monkeypatch):
    path = result.save(tmp_path / "a.png")
    before = path.read_bytes()

    def fail(self, *args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        result.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]
