"""The models that come with the package: they load, they are small, and they see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import visionllm
from visionllm.data.scenes import SceneDataset
from visionllm.evaluate.coco import coco_metrics
from visionllm.evaluate.matching import box_iou
from visionllm.pipeline import VisionLLM
from visionllm.train.validation import ValidationSet

EXAMPLES = Path(__file__).parent.parent / "examples"
WEIGHTS = Path(visionllm.__file__).parent / "weights"


@pytest.fixture(scope="module", params=["tiny", "tiny-224"])
def model(request):
    return visionllm.load(request.param)


@pytest.mark.parametrize("name", ["tiny", "tiny-224"])
def test_it_is_small(name):
    assert (WEIGHTS / name / "model.safetensors").stat().st_size <= 25e6


def test_the_default_is_tiny():
    assert visionllm.load().network.config.image_size == 384
    assert visionllm.load("tiny-224").network.config.image_size == 224


def test_it_knows_the_names_of_its_training(model):
    """What is none of the listed names can be held against them."""
    assert {"person", "wine glass", "red circle"} < set(model.network.known_names)
    assert model.network.config.known_power > 0


def test_a_photo_of_a_person_has_a_person_in_it(model):
    result = model.detect(EXAMPLES / "astronaut.jpg", ["person", "dog", "pizza"])
    assert set(result.boxes.names) == {"person"}
    x1, y1, x2, y2 = result.boxes.xyxy[0]
    assert x1 < 220 < x2 and y1 < 120 < y2  # her face


@pytest.mark.parametrize(
    "names", [["cat", "dog"], ["person", "cup", "cat", "sheep", "bear", "fire", "cupcake"]]
)
def test_a_photo_of_a_cat_shows_a_cat(model, names):
    result = model.detect(EXAMPLES / "chelsea.jpg", names)
    assert result.boxes.names == ["cat"]
    x1, y1, x2, y2 = result.boxes.xyxy[0]
    assert x1 < 50 and y1 < 30 and x2 > 350 and y2 > 270  # it fills the 451 x 300 pixels


def test_a_photo_in_bfloat16(model):
    names = ["cat", "dog"]
    narrow = VisionLLM(model.network, torch.bfloat16)
    found, expected = (one.detect(EXAMPLES / "chelsea.jpg", names) for one in (narrow, model))
    assert found.boxes.names == expected.boxes.names == ["cat"]
    assert found.boxes.scores[0] == pytest.approx(expected.boxes.scores[0], abs=0.05)
    assert box_iou(found.boxes.xyxy, expected.boxes.xyxy)[0, 0] > 0.9


def test_a_photo_of_a_person_shows_a_person():
    names = ["person", "dog", "pizza"]
    result = visionllm.load().detect(EXAMPLES / "astronaut.jpg", names)
    assert result.boxes.names[0] == "person"
    she = np.array([[22.0, 15.0, 368.0, 512.0]])  # from her hair down, without the helmet in her arm
    assert box_iou(np.array(result.boxes.xyxy[:1]), she).item() > 0.8


def test_drawn_shapes_are_found(model):
    """Validation scenes that need no download: shapes alone, 20 of their 80 names listed."""
    size = model.network.config.image_size
    scenes = ValidationSet("shapes", SceneDataset("val", size=size), 40, 20, size)
    predictions = scenes.predictions(model.network, range(40), 8, top=100)
    metrics = coco_metrics(scenes.ground_truth, predictions)
    assert metrics["AP50"] > 0.9, metrics
