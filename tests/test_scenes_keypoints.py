"""Outlines and named points of generated scenes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from visionllm.data.polygons import mask_iou, polygon_rle
from visionllm.data.scenes import SceneDataset
from visionllm.data.scenes.appearance import Appearance
from visionllm.data.scenes.compose import Canvas, Placement
from visionllm.data.scenes.keypoints import ANY_POINTS, keypoints_of, point_names
from visionllm.data.scenes.shapes import POINTS, SHAPE_NAMES, SHAPES, shape_picture

PLAIN = Appearance()


def painted(*objects: tuple[str, Placement], size: int = 200) -> Canvas:
    canvas, rng = Canvas(np.full((size, size, 3), 250, np.float32)), np.random.default_rng(0)
    for name, place in objects:
        assert canvas.paint_posed(shape_picture(name, 112, rng), place, name, rng, PLAIN, True)
    return canvas


def placement(degrees: float = 0, mirror: bool = False, x: float = 0.5, side: float = 0.5) -> Placement:
    return Placement(x, 0.5, side, math.radians(degrees), mirror, 0, 0, False)


@pytest.mark.parametrize("shape", sorted(POINTS))
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("degrees", [0, 15, -25, 170])
def test_points_of_shapes_lie_on_the_edge(shape: str, mirror: bool, degrees: float) -> None:
    canvas = painted((f"red {shape}", placement(degrees, mirror)))
    (points,) = keypoints_of(canvas, canvas.boxes()[0])
    (outline,) = canvas.outlines()
    assert outline is not None and tuple(points) == point_names(f"red {shape}")
    for name in points:
        if name == "centre":
            continue
        x, y, visible = points[name]
        assert visible == 2
        assert point_to_edges(np.array([x, y]), outline) < 4  # a notch is rounded off


def point_to_edges(point: np.ndarray, outline: np.ndarray) -> float:
    following = np.roll(outline, -1, 0) - outline
    share = np.clip(((point - outline) * following).sum(1) / (following**2).sum(1).clip(1e-9), 0, 1)
    return float(np.hypot(*(outline + share[:, None] * following - point).T).min())


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("degrees", [0, 20, -20, 90, 110, 190, 250])
@pytest.mark.parametrize(
    "shape, direction",
    [
        ("square", (-1, -1)),
        ("triangle", (0, -1)),
        ("star", (0, -1)),
        ("cross", (0, -1)),
        ("hexagon", (0, -1)),
    ],
)
def test_the_first_name_goes_to_the_point_that_looks_like_it(
    shape: str, direction: tuple[int, int], degrees: float, mirror: bool
) -> None:
    canvas = painted((f"blue {shape}", placement(degrees, mirror)))
    (points,) = keypoints_of(canvas, canvas.boxes()[0])
    own = np.array([points[name][:2] for name in POINTS[shape]])
    offsets = own - own.mean(0)
    assert (offsets @ direction).argmax() == 0
    turning = offsets[0, 0] * offsets[1, 1] - offsets[0, 1] * offsets[1, 0]
    assert turning > 0  # clockwise on the screen
    for name, (x, _) in zip(POINTS[shape], offsets, strict=True):
        if "left" in name:
            assert x < 0
        if "right" in name:
            assert x > 0


@pytest.mark.parametrize("mirror", [False, True])
def test_an_arrow_points_where_it_points(mirror: bool) -> None:
    canvas = painted(("green arrow", placement(0, mirror)))
    (points,) = keypoints_of(canvas, canvas.boxes()[0])
    assert points["tip"][0] == pytest.approx(50 if mirror else 150, abs=1.5)
    assert points["tail"][0] == pytest.approx(150 if mirror else 50, abs=1.5)
    turned = painted(("green arrow", placement(90, mirror)))
    (points,) = keypoints_of(turned, turned.boxes()[0])
    assert points["tip"][1] == pytest.approx(50 if mirror else 150, abs=1.5)


def test_a_covered_point_is_hidden_and_one_outside_is_not_labelled() -> None:
    square, cover = ("red square", placement(side=0.4)), ("blue circle", placement(x=0.9, side=0.7))
    canvas = painted(square)
    assert {v for *_, v in keypoints_of(canvas, canvas.boxes()[0])[0].values()} == {2}
    canvas = painted(square, cover)
    points = keypoints_of(canvas, canvas.boxes()[0])[0]
    assert points["top right corner"][2] == points["bottom right corner"][2] == 1
    assert points["top left corner"][2] == 2
    canvas = painted(("red square", placement(x=0.1, side=0.4)))
    points = keypoints_of(canvas, canvas.boxes()[0])[0]
    assert points["top left corner"] == points["bottom left corner"] == (0, 0, 0)


def test_every_shape_has_its_names() -> None:
    assert set(POINTS) <= set(SHAPES) and point_names("dog") == ANY_POINTS
    assert all(len(set(point_names(name))) == len(point_names(name)) >= 5 for name in SHAPE_NAMES)


def test_outlines_and_points_of_scenes() -> None:
    dataset = SceneDataset("train", seed=7, masks=True, outlines=True, keypoints=True)
    overlaps = []
    for index in range(25):
        sample = dataset[index]
        assert sample.outlines is not None and sample.keypoints is not None and sample.masks is not None
        for k, outline in enumerate(sample.outlines):
            assert outline is not None and outline.dtype == np.float32
            x1, y1, x2, y2 = sample.boxes[k]
            assert (outline >= (x1, y1)).all() and (outline <= (x2, y2)).all()
            outlined = polygon_rle(outline, *sample.image.shape[:2])
            overlaps.append(mask_iou([outlined], [sample.masks[k]])[0, 0])
            points = sample.keypoints[k]
            assert points["topmost point"][1] == y1 and points["rightmost point"][0] == x2
            assert points["bottommost point"][1] == y2 and points["leftmost point"][0] == x1
            assert {v for *_, v in points.values()} <= {0, 1, 2}
    assert np.median(overlaps) > 0.98


def test_pictures_stay_the_same_whatever_is_asked_for() -> None:
    plain, full = SceneDataset("train", seed=2), SceneDataset("train", seed=2, outlines=True, keypoints=True)
    assert plain[3].outlines is None and plain[3].keypoints is None
    assert np.array_equal(plain[3].image, full[3].image) and np.array_equal(plain[3].boxes, full[3].boxes)
