"""LVIS: what is known of each picture, pictures by their address, names as in a sentence."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
from annotation_files import LVIS, LVIS_URL
from PIL import Image

from visionllm.data.lvis import LvisDataset, read_lvis_json, validate_lvis
from visionllm.data.report import DatasetError

SHARED = Path(os.environ.get("VISIONLLM_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
REAL = SHARED / "lvis_val_100.json"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train2017").mkdir()
    for number in (7, 8):
        Image.new("RGB", (40, 30)).save(tmp_path / "train2017" / f"00000000000{number}.jpg")
    return tmp_path


def written(folder, content=LVIS):
    path = folder / "lvis_v1_train.json"
    path.write_text(json.dumps(content))
    return path


def test_vocabularies_are_what_is_known_of_each_picture(folder):
    data = LvisDataset(written(folder), folder, outlines=True)
    assert data.vocabulary == ("alarm clock", "arctic (type of shoe)", "banana", "boot")
    assert data.frequency == {"alarm clock": "c", "arctic (type of shoe)": "r", "banana": "f"}
    first, second = data[0], data[1]
    assert first.names == ["alarm clock", "banana"]
    # the clock, and what was looked for and not found; of bananas only some have a box
    assert first.vocabulary == ("alarm clock", "arctic (type of shoe)", "boot")
    assert second.vocabulary == ("banana",)
    assert first.outlines[0].min(0).tolist() == [0, 2]
    assert not first.iscrowd.any()


def test_pictures_of_a_release_in_one_folder(folder):
    assert LvisDataset(written(folder), folder / "train2017").image_path(1).is_file()


def test_a_kind_that_lost_an_object_is_no_longer_known(folder):
    content = copy.deepcopy(LVIS)
    content["annotations"][0]["bbox"] = [0, 0, 0, 0]
    data = LvisDataset(written(folder, content), folder, on_error="skip")
    assert data[0].vocabulary == ("arctic (type of shoe)", "boot")


def test_names_stay_where_two_would_become_one(folder):
    content = copy.deepcopy(LVIS)
    content["categories"][3]["name"] = "alarm clock"
    names = [category["name"] for category in read_lvis_json(written(folder, content), None)["categories"]]
    assert names == ["alarm_clock", "arctic_(type_of_shoe)", "banana", "alarm clock"]


DAMAGE = {
    "negative kinds are text": ("neg_category_ids", "4", "expected a list of category ids, got str"),
    "negative kinds by name": ("neg_category_ids", ["boot"], "expected a list of category ids, got list"),
    "an unknown negative kind": ("neg_category_ids", [9], "unknown category 9"),
    "a negative kind with a box": ("neg_category_ids", [1], "expected kinds that are not in the picture"),
    "an unknown unsure kind": ("not_exhaustive_category_ids", [9], "unknown category 9"),
    "unsure kinds are nothing": ("not_exhaustive_category_ids", None, "expected a list of category ids, got"),
    "no file": ("coco_url", LVIS_URL + "9.jpg", "missing file"),
    "no address": ("coco_url", None, "missing"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_left_out(folder, damage):
    field, value, message = DAMAGE[damage]
    content = copy.deepcopy(LVIS)
    content["images"][0][field] = value
    path = written(folder, content)
    report = validate_lvis(path, folder)
    shown = "file_name" if field == "coco_url" else field
    assert str(report.problems[0]).startswith(f"{path}: images[0].{shown}: {message}")
    with pytest.raises(DatasetError, match=rf"images\[0\]\.{shown}"):
        LvisDataset(path, folder)
    data = LvisDataset(path, folder, on_error="skip")
    assert [data[i].image_id for i in range(len(data))] == [8]
    assert data.skipped["images"] == 1


@pytest.mark.skipif(not REAL.is_file(), reason=f"no real data at {REAL}")
def test_real_annotations():
    report = validate_lvis(REAL, None)
    assert report.ok
    assert (len(report.images), len(report.categories), len(report.annotations)) == (100, 1230, 977)
    content = read_lvis_json(REAL, None)
    assert content["images"][0]["file_name"] == "COCO_val2014_000000266409.jpg"
    names = {category["name"] for category in content["categories"]}
    assert len(names) == 1230
    assert not any("_" in name for name in names)
