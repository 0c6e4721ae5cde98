"""Outlines, captions and keypoints of COCO-format data sets: what samples hold, and what damage is named."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
from annotation_files import COCO, SQUARE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from visionllm.data.coco import CocoDataset
from visionllm.data.polygons import mask_iou, polygon_rle, rle_of
from visionllm.data.validate import DatasetError, compressed_pixels, validate_coco

SHARED = Path(os.environ.get("VISIONLLM_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
COCO_MINI = SHARED / "coco_mini"
real_data = pytest.mark.skipif(
    not COCO_MINI.is_dir(),
    reason=f"no real data at {COCO_MINI}; VISIONLLM_SHARED_DATA names the folder that has it",
)

CAPTIONS = {
    "images": [{"id": 7}, {"id": 99}],
    "annotations": [
        {"id": 1, "image_id": 7, "caption": " A square\nand a cup."},
        {"id": 2, "image_id": 99, "caption": "Another picture."},
        {"id": 3, "image_id": 7, "caption": "Two things."},
    ],
}


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30), "grey").save(tmp_path / name)
    return tmp_path


def written(folder, content, name="instances.json"):
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def area(outline):
    x, y = outline.astype(np.float64).T
    return abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def test_outlines_are_those_of_the_largest_parts(folder):
    data = CocoDataset(written(folder, COCO), folder, outlines=True)
    square, crowd, nothing = data[0].outlines
    assert square.dtype == np.float32
    np.testing.assert_array_equal(square, np.reshape(SQUARE, (4, 2)))
    assert crowd is None
    assert nothing is None
    (half,) = data[1].outlines
    assert area(half) == pytest.approx(600, abs=2)
    assert half.min(0).tolist() == [20, 0]
    assert half.max(0).tolist() == [40, 30]
    lost, total = data.lost_area()
    assert (lost, total) == (pytest.approx(25), 725)


def test_outlines_only_when_asked_for(folder):
    assert CocoDataset(written(folder, COCO), folder)[0].outlines is None


def test_outlines_are_clipped_to_the_picture(folder):
    content = copy.deepcopy(COCO)
    content["annotations"][0]["segmentation"] = [[-0.7, -0.5, 40.6, 4, 20, 30.9]]
    outline = CocoDataset(written(folder, content), folder, outlines=True)[0].outlines[0]
    np.testing.assert_array_equal(outline, np.array([[0, 0], [40, 4], [20, 30]], np.float32))


def test_captions(folder):
    data = CocoDataset(written(folder, COCO), folder, captions=written(folder, CAPTIONS, "captions.json"))
    assert data[0].captions == {"short": ["A square and a cup.", "Two things."]}
    assert data[1].captions == {}


def test_keypoints_of_the_annotation_file(folder):
    data = CocoDataset(written(folder, COCO), folder)
    assert data.keypoint_names == {"person": ("nose", "left eye")}
    # clipped to the picture; an unlabelled point has no place; a cup has no points
    assert data[0].keypoints == [{"nose": (40.0, 9.0, 2), "left eye": (0.0, 0.0, 0)}, {}, {}]
    assert data[1].keypoints == [{}]


def test_keypoints_of_a_file_of_their_own(folder):
    plain = copy.deepcopy(COCO)
    del plain["categories"][0]["keypoints"], plain["annotations"][0]["keypoints"]
    people = copy.deepcopy(COCO)
    people["categories"] = people["categories"][:1]
    people["annotations"] = people["annotations"][:1]
    instances = written(folder, plain)
    assert CocoDataset(instances, folder)[0].keypoints is None
    data = CocoDataset(instances, folder, keypoints=written(folder, people, "person_keypoints.json"))
    assert data[0].keypoints[0]["nose"] == (40.0, 9.0, 2)
    assert data[0].names == ["person", "cup", "cup"]


def test_names_that_a_picture_may_show_unmarked_are_not_in_its_vocabulary(folder):
    data = CocoDataset(written(folder, COCO), folder)
    assert data[0].vocabulary == ("person", "cup")
    assert data[1].vocabulary == ("person",)


DAMAGE = {
    "names of points missing": ("categories", 0, "keypoints", "nose"),
    "a name twice": ("categories", 0, "keypoints", ["nose", "nose"]),
    "a point too many": ("annotations", 0, "keypoints", [1, 1, 1] * 3),
    "no triples": ("annotations", 0, "keypoints", [1, 1, 1, 2, 2]),
    "points are text": ("annotations", 0, "keypoints", "12"),
    "visibility of 3": ("annotations", 0, "keypoints", [1, 1, 3, 2, 2, 2]),
    "a point outside": ("annotations", 0, "keypoints", [1, 33, 2, 2, 2, 2]),
    "a point that is no number": ("annotations", 0, "keypoints", [1, float("nan"), 2, 2, 2, 2]),
    "points in a category without": ("annotations", 2, "keypoints", [1, 1, 1]),
    "RLE string of no runs": ("annotations", 3, "segmentation", {"size": [30, 40], "counts": ""}),
    "RLE string cut off": ("annotations", 3, "segmentation", {"size": [30, 40], "counts": "o"}),
    "RLE string for more pixels": ("annotations", 3, "segmentation", {"size": [30, 40], "counts": "ooo0"}),
    "RLE string of other signs": ("annotations", 3, "segmentation", {"size": [30, 40], "counts": "ö!"}),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_left_out(folder, damage):
    section, index, field, value = DAMAGE[damage]
    content = copy.deepcopy(COCO)
    content[section][index][field] = value
    path = written(folder, content)
    report = validate_coco(path, folder)
    assert (report.problems[0].section, report.problems[0].index, report.problems[0].field) == (
        section,
        index,
        field,
    )
    if section == "annotations":
        assert len(report.problems) == 1
    data = CocoDataset(path, folder, on_error="skip", outlines=True)
    assert [len(data[i].outlines) == len(data[i].names) for i in range(2)] == [True, True]


CAPTION_DAMAGE = {
    "no caption": ({"id": 1, "image_id": 7}, "caption: missing"),
    "empty caption": ({"id": 1, "image_id": 7, "caption": " "}, r"caption: expected a caption, got str"),
    "unknown picture": ({"id": 1, "image_id": 5, "caption": "A"}, "image_id: expected the id of an image"),
    "no id": ({"image_id": 7, "caption": "A"}, "id: missing"),
    "no object": ("A", "expected an object, got str"),
}


@pytest.mark.parametrize("damage", CAPTION_DAMAGE)
def test_damaged_captions(folder, damage):
    entry, message = CAPTION_DAMAGE[damage]
    content = copy.deepcopy(CAPTIONS)
    content["annotations"][0] = entry
    captions = written(folder, content, "captions.json")
    with pytest.raises(DatasetError, match=rf"captions\.json: annotations\[0\].*{message}"):
        CocoDataset(written(folder, COCO), folder, captions=captions)
    data = CocoDataset(written(folder, COCO), folder, captions=captions, on_error="skip")
    assert data[0].captions == {"short": ["Two things."]}
    assert data[0].names == ["person", "cup", "cup"]
    assert data.skipped["caption annotations"] == 1


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 200), min_size=1, max_size=40))
def test_pixels_of_compressed_rle(lengths):
    """Against pycocotools, whose strings these are."""
    height, width = sum(lengths), 1
    encoded = coco_mask.frPyObjects({"size": [height, width], "counts": lengths}, height, width)
    assert compressed_pixels(encoded["counts"].decode()) == height


@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12))
def test_any_string_of_counts_is_survived(text):
    pixels = compressed_pixels(text)
    assert pixels is None or pixels >= 0


@real_data
def test_outlines_of_real_photos_cover_their_masks():
    """Objects in one piece: the outline gives the mask back. All: no more area is lost than reported."""
    data = CocoDataset(
        COCO_MINI / "annotations" / "instances_train.json",
        COCO_MINI / "train",
        check_images="none",
        outlines=True,
        captions=COCO_MINI / "annotations" / "captions_train.json",
    )
    checked = 0
    for index in range(0, len(data), 12):
        sample = data[index]
        height, width = sample.image.shape[:2]
        for outline, segmentation, crowd in zip(
            sample.outlines, sample.masks or [], sample.iscrowd, strict=True
        ):
            assert (outline is None) == bool(crowd)
            if outline is not None and len(segmentation) == 1:
                again = polygon_rle(outline, height, width)
                iou = mask_iou([again], [rle_of(segmentation, height, width)])[0, 0]
                # of a small object the last pixel, lost in float32, is a larger share
                assert iou > (0.98 if area(outline) > 400 else 0.8), (sample.image_id, iou)
                checked += 1
    assert checked > 80
    assert sum(bool(captions) for captions in data._captions.values()) == 129
    lost, total = data.lost_area()
    assert 0 < lost / total < 0.2
