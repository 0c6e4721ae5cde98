"""The COCO validator: each kind of damage is named by file, index and field, and nothing else is."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from visionllm.data.coco import CocoDataset
from visionllm.data.validate import DatasetError, validate_coco, validate_content
from visionllm.image import ImageError

GOOD = {
    "images": [
        {"id": 7, "file_name": "a.jpg", "width": 40, "height": 30},
        {"id": 8, "file_name": "sub/b.png", "width": 20, "height": 50},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 5, "name": "red car"}],
    "annotations": [
        {"id": 100, "image_id": 7, "category_id": 1, "bbox": [2, 3, 10, 12], "area": 90.5, "iscrowd": 0,
         "segmentation": [[2, 3, 12, 3, 12, 15, 2, 15]]},
        {"id": 101, "image_id": 7, "category_id": 5, "bbox": [0, 0, 40.4, 30], "area": 600, "iscrowd": 1,
         "segmentation": {"size": [30, 40], "counts": [600, 600]}},
        {"id": 102, "image_id": 8, "category_id": 5, "bbox": [1, 1, 5, 6], "area": 30},
    ],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Two pictures, as GOOD describes them."""
    (tmp_path / "sub").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    Image.fromarray(np.full((50, 20), 9, np.uint8)).save(tmp_path / "sub" / "b.png")
    return tmp_path


def written(folder, content):
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


def test_a_right_data_set_has_no_problem(folder):
    report = validate_coco(written(folder, GOOD), folder)
    assert report.problems == []
    assert (report.images, report.categories, report.annotations) == ([0, 1], [0, 1], [0, 1, 2])
    assert report.skipped == {"images": 0, "categories": 0, "annotations": 0}


# section, index and field to change, new value (DELETED removes it), further problems that follow
DELETED = object()
DAMAGE = {
    "missing area": ("annotations", 0, "area", DELETED, []),
    "negative area": ("annotations", 0, "area", -1, []),
    "area is text": ("annotations", 0, "area", "12", []),
    "area is NaN": ("annotations", 1, "area", math.nan, []),
    "area is true": ("annotations", 1, "area", True, []),
    "missing box": ("annotations", 2, "bbox", DELETED, []),
    "box right of the image": ("annotations", 2, "bbox", [18, 1, 5, 6], []),
    "box above the image": ("annotations", 2, "bbox", [1, -3, 5, 6], []),
    "box wholly outside": ("annotations", 2, "bbox", [100, 100, 5, 6], []),
    "box just outside": ("annotations", 2, "bbox", [20.2, 1, 0.5, 6], []),
    "box of no width": ("annotations", 0, "bbox", [2, 3, 0, 12], []),
    "box of negative height": ("annotations", 0, "bbox", [2, 13, 10, -10], []),
    "box with NaN": ("annotations", 0, "bbox", [2, math.nan, 10, 12], []),
    "box with infinity": ("annotations", 0, "bbox", [2, 3, math.inf, 12], []),
    "box of three numbers": ("annotations", 0, "bbox", [2, 3, 10], []),
    "box is an object": ("annotations", 0, "bbox", {"x": 1}, []),
    "unknown category": ("annotations", 1, "category_id", 2, []),
    "category by name": ("annotations", 1, "category_id", "cat", []),
    "no category": ("annotations", 1, "category_id", DELETED, []),
    "unknown image": ("annotations", 1, "image_id", 9, []),
    "no image id": ("annotations", 1, "image_id", DELETED, []),
    "image id is a list": ("annotations", 1, "image_id", [7], []),
    "duplicate annotation id": ("annotations", 2, "id", 100, []),
    "no annotation id": ("annotations", 2, "id", DELETED, []),
    "crowd flag of 2": ("annotations", 0, "iscrowd", 2, []),
    "polygon of two points": ("annotations", 0, "segmentation", [[1, 2, 3, 4]], []),
    "polygon of odd length": ("annotations", 0, "segmentation", [[1, 2, 3, 4, 5, 6, 7]], []),
    "flat polygon": ("annotations", 0, "segmentation", [1, 2, 3, 4, 5, 6], []),
    "RLE of another size": ("annotations", 1, "segmentation", {"size": [40, 30], "counts": [600, 600]}, []),
    "RLE too short": ("annotations", 1, "segmentation", {"size": [30, 40], "counts": [600, 500]}, []),
    "duplicate image id": ("images", 1, "id", 7, [("annotations", 2, "image_id")]),
    "missing file": ("images", 1, "file_name", "c.png", [("annotations", 2, "image_id")]),
    "file is a folder": ("images", 1, "file_name", "sub", [("annotations", 2, "image_id")]),
    "file outside the folder": ("images", 1, "file_name", "../x.png", [("annotations", 2, "image_id")]),
    "file name too long": ("images", 1, "file_name", "x" * 300, [("annotations", 2, "image_id")]),
    "file name of no characters": ("images", 1, "file_name", "\ud800", [("annotations", 2, "image_id")]),
    "file is a number": ("images", 1, "file_name", 3, [("annotations", 2, "image_id")]),
    "no width": ("images", 1, "width", DELETED, [("annotations", 2, "image_id")]),
    "negative height": ("images", 1, "height", -50, [("annotations", 2, "image_id")]),
    "width is text": ("images", 1, "width", "20", [("annotations", 2, "image_id")]),
    "duplicate category id": ("categories", 1, "id", 1, [("annotations", 1, "category_id"),
                                                         ("annotations", 2, "category_id")]),
    "duplicate category name": ("categories", 1, "name", "cat", [("annotations", 1, "category_id"),
                                                                 ("annotations", 2, "category_id")]),
    "empty category name": ("categories", 0, "name", " ", [("annotations", 0, "category_id")]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_only_it(folder, damage):
    section, index, field, value, consequences = DAMAGE[damage]
    content = copy.deepcopy(GOOD)
    if value is DELETED:
        del content[section][index][field]
    else:
        content[section][index][field] = value
    path = written(folder, content)

    report = validate_coco(path, folder)
    assert [(p.section, p.index, p.field) for p in report.problems] == [
        (section, index, field),
        *consequences,
    ]
    assert f"{path}: {section}[{index}].{field}: " in str(report.problems[0])
    assert index not in getattr(report, section)

    with pytest.raises(DatasetError, match=rf"{section}\[{index}\]\.{field}"):
        CocoDataset(path, folder)
    skipping = CocoDataset(path, folder, on_error="skip")
    lost = {(p.section, p.index) for p in report.problems}
    assert sum(skipping.skipped.values()) == len(lost)
    assert sum(len(skipping[i].names) for i in range(len(skipping))) == 3 - skipping.skipped["annotations"]


def test_wrong_size_and_broken_pictures(folder):
    content = copy.deepcopy(GOOD)
    content["images"][1]["width"] = 21
    problem = validate_coco(written(folder, content), folder).problems[0]
    assert (problem.index, problem.field) == (
        1,
        "file_name",
    )

    jpeg = (folder / "a.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(jpeg[: len(jpeg) * 2 // 3])
    path = written(folder, GOOD)
    assert validate_coco(path, folder, check_images="header").ok
    report = validate_coco(path, folder)
    assert (report.problems[0].section, report.problems[0].index) == ("images", 0)
    assert "a.jpg" in report.problems[0].message
    with pytest.raises(ImageError, match=r"a\.jpg.*broken"):
        CocoDataset(path, folder, check_images="header")[0]

    (folder / "a.jpg").write_text("no picture")
    assert not validate_coco(path, folder, check_images="header").ok
    assert validate_coco(path, folder, check_images="none").ok
    assert validate_coco(path, None).ok


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected an object"),
        ("\xff", "expected JSON"),
        ('{"images": [], "categories": []}', "annotations: missing"),
        ('{"images": {}, "categories": [], "annotations": []}', "images: expected a list, got dict"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_what_is_no_annotation_file(folder, text, message):
    path = folder / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    for attempt in (lambda: validate_coco(path, folder), lambda: CocoDataset(path, folder, on_error="skip")):
        with pytest.raises(DatasetError, match=message) as error:
            attempt()
        assert str(path) in str(error.value)
    with pytest.raises(DatasetError, match="found nothing"):
        validate_coco(folder / "nowhere.json", folder)


def test_the_error_lists_the_first_problems_and_the_count(folder):
    content = copy.deepcopy(GOOD)
    content["annotations"] = [
        {"id": i, "image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1]} for i in range(50)
    ]
    with pytest.raises(DatasetError) as error:
        CocoDataset(written(folder, content), folder, shown=3)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("50 problems")
    assert len(lines) == 5
    assert "annotations[2].area" in lines[3]
    assert "47 more" in lines[4]
    assert len(error.value.problems) == 50


def test_a_name_that_lost_an_object_is_no_longer_known_to_be_absent(folder):
    content = copy.deepcopy(GOOD)
    del content["annotations"][0]["area"]
    data = CocoDataset(written(folder, content), folder, on_error="skip")
    assert data.vocabulary == ("cat", "red car")
    assert data[0].vocabulary == ("red car",)
    assert data[1].vocabulary == ("cat", "red car")


def test_samples(folder):
    data = CocoDataset(written(folder, GOOD), folder)
    first, second = data[0], data[1]
    assert first.image.shape == (30, 40, 3)
    assert first.image.dtype == np.uint8
    np.testing.assert_allclose(first.boxes, [[2, 3, 12, 15], [0, 0, 40, 30]])  # clipped to the picture
    assert first.names == ["cat", "red car"]
    assert first.iscrowd.tolist() == [False, True]
    np.testing.assert_allclose(first.area, [90.5, 600])
    assert first.masks == [entry["segmentation"] for entry in GOOD["annotations"][:2]]
    assert (second.image == 9).all()
    assert second.masks is None
    assert second.image_id == 8
    assert second.iscrowd.tolist() == [False]


@pytest.mark.parametrize(("width", "height", "top_left"), [(40, 30, 200), (30, 40, 0)])
def test_the_recorded_size_decides_about_rotation(tmp_path, width, height, top_left):
    """A picture stored as 40 x 30 that a viewer turns clockwise: bottom left becomes top left."""
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:8, :8] = 200
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    content = {"images": [{"id": 1, "file_name": "a.png", "width": width, "height": height}],
               "categories": [], "annotations": []}  # fmt: skip
    image = CocoDataset(written(tmp_path, content), tmp_path)[0].image
    assert image.shape == (height, width, 3)
    assert image[2, 2, 0] == top_left


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 200) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_json_value_in_any_place_is_survived(folder, data):
    """What a value of the wrong kind leads to is a report and a loadable rest, never a crash."""
    content = copy.deepcopy(GOOD)
    section = data.draw(st.sampled_from(("images", "categories", "annotations")))
    index = data.draw(st.integers(0, len(content[section]) - 1))
    if data.draw(st.booleans()):
        field = data.draw(st.sampled_from(sorted(content[section][index])))
        content[section][index][field] = data.draw(json_values)
    else:
        content[section][index] = data.draw(json_values)
    path = written(folder, content)
    report = validate_coco(path, folder, check_images="header")
    loaded = CocoDataset(path, folder, on_error="skip", check_images="header")
    assert len(loaded) == len(report.images)
    for i in range(len(loaded)):
        assert np.isfinite(loaded[i].boxes).all()
        assert (loaded[i].boxes[:, 2:] > loaded[i].boxes[:, :2]).all()


def test_arguments(folder):
    path = written(folder, GOOD)
    with pytest.raises(ValueError, match="on_error: expected fail or skip, got 'ignore'"):
        CocoDataset(path, folder, on_error="ignore")
    with pytest.raises(ValueError, match="check_images: expected one of"):
        CocoDataset(path, folder, check_images="all")
    with pytest.raises(ValueError, match="purpose: expected one of training, evaluation, got 'fun'"):
        validate_content(GOOD, path, folder, purpose="fun")
