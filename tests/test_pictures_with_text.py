"""Captions and conversations about pictures: COCO's caption files, Karpathy's splits, LLaVA-Instruct."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
from annotation_files import CAPTIONS, KARPATHY, LLAVA
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from visionllm.data.coco_captions import CocoCaptionDataset, validate_captions
from visionllm.data.karpathy import KarpathyDataset, validate_karpathy
from visionllm.data.llava import LlavaDataset, validate_llava
from visionllm.data.report import DatasetError
from visionllm.data.sample import Question

SHARED = Path(os.environ.get("VISIONLLM_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
COCO_MINI = SHARED / "coco_mini"

# what the tests do with every format: content, data set, validator, list and index to damage
FORMATS = {
    "captions": (CAPTIONS, CocoCaptionDataset, validate_captions),
    "karpathy": (KARPATHY, KarpathyDataset, validate_karpathy),
    "llava": (LLAVA, LlavaDataset, validate_llava),
}


@pytest.fixture
def folder(tmp_path):
    for number in (7, 8, 9):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(tmp_path / f"00000000000{number}.jpg")
    return tmp_path


def written(folder, content):
    path = folder / "text.json"
    path.write_text(json.dumps(content))
    return path


def test_caption_files(folder):
    data = CocoCaptionDataset(written(folder, CAPTIONS), folder)
    assert [data[i].captions for i in range(len(data))] == [
        {"short": ["A cat on a mat.", "Cat."]},
        {"short": ["A dog."]},
    ]
    first = data[0]
    assert (first.image_id, first.image.shape, first.image.dtype) == (7, (30, 40, 3), np.uint8)
    assert first.boxes.shape == (0, 4)
    assert (first.names, first.vocabulary, first.questions) == ([], (), [])


def test_karpathy_parts(folder):
    path = written(folder, KARPATHY)
    both = KarpathyDataset(path, folder)  # train+restval
    assert [both[i].image_id for i in range(len(both))] == [7, 8]
    assert both[0].captions == {"short": ["Picture 7.", "Nice."]}
    assert both.image_path(1) == folder / "000000000008.jpg"
    assert [entry.image_id for entry in KarpathyDataset(path, folder, split="test").entries] == [9]
    assert len(KarpathyDataset(path, folder, split="val")) == 0
    with pytest.raises(ValueError, match=r"split: expected one of train, restval, val, test.*, got 'dev'"):
        KarpathyDataset(path, folder, split="dev")


def test_only_the_pictures_of_the_part_need_to_be_there(folder):
    (folder / "000000000009.jpg").unlink()
    path = written(folder, KARPATHY)
    assert len(KarpathyDataset(path, folder, split="train")) == 1
    with pytest.raises(DatasetError, match=r"images\[2\]\.filename: missing file"):
        KarpathyDataset(path, folder, split="test")


def test_flickr_has_no_folders(folder):
    image = {**KARPATHY["images"][0], "filename": "000000000007.jpg"}
    del image["filepath"], image["cocoid"]
    data = KarpathyDataset(written(folder, {"images": [image], "dataset": "flickr30k"}), folder)
    assert data[0].image_id == 0


def test_conversations(folder):
    data = LlavaDataset(written(folder, LLAVA), folder)
    assert data[0].questions == [
        Question("What is there?", "A cat.\n\nIt sleeps.", "conversation"),
        Question("Where?", "On a mat.", "conversation"),
    ]
    assert data[1].questions == [
        Question("Describe it in detail.", "A grey cat lies on a mat.", "conversation")
    ]
    assert data[0].image_id == data[1].image_id == "000000000007"
    assert data[0].captions == data[1].captions == {}


def test_conversations_that_are_descriptions(folder):
    data = LlavaDataset(written(folder, LLAVA), folder, descriptions=True)
    assert data[1].captions == {"detailed": ["A grey cat lies on a mat."]}
    assert data[1].questions == []
    assert len(data[0].questions) == 2  # no single question: still a conversation


DELETED = object()
# format, list, index, field, new value, message
DAMAGE = [
    ("captions", "images", 0, "file_name", DELETED, "missing"),
    ("captions", "images", 0, "file_name", "/etc/passwd", "expected a path inside the image folder"),
    ("captions", "images", 0, "file_name", "x.jpg", "missing file"),
    ("captions", "images", 0, "width", "40", "expected a positive integer, got str"),
    ("captions", "images", 0, "width", 41, None),  # the picture's file is another's
    ("captions", "annotations", 2, "caption", "", "expected a caption, got str"),
    ("captions", "annotations", 2, "image_id", 5, "expected the id of an image, got int 5"),
    ("captions", "annotations", 2, "id", 1, "duplicate id 1"),
    ("karpathy", "images", 0, "cocoid", 8.5, "expected int or str, got float"),
    ("karpathy", "images", 1, "cocoid", 7, "duplicate id 7"),
    ("karpathy", "images", 0, "split", "dev", "expected one of train, restval, val, test, got str 'dev'"),
    ("karpathy", "images", 0, "split", DELETED, "missing"),
    ("karpathy", "images", 0, "filename", DELETED, "missing"),
    ("karpathy", "images", 0, "filename", "../x.jpg", "expected a path inside the image folder"),
    ("karpathy", "images", 0, "filepath", 3, "expected a folder's name, got int 3"),
    ("karpathy", "images", 0, "sentences", [], "expected a list of sentences"),
    ("karpathy", "images", 0, "sentences", [{"tokens": ["a"]}], 'sentences 0: expected "raw" with text'),
    ("llava", "entries", 0, "id", DELETED, "missing"),
    ("llava", "entries", 0, "id", True, "expected an id, got bool"),
    ("llava", "entries", 0, "image", DELETED, "missing"),
    ("llava", "entries", 0, "image", "9.jpg", "missing file"),
    ("llava", "entries", 0, "conversations", "Hi", "expected questions and answers in turn, got str"),
    ("llava", "entries", 0, "conversations", LLAVA[0]["conversations"][:3], "expected questions and answers"),
    ("llava", "entries", 0, "conversations", LLAVA[0]["conversations"][1:3], 'turn 0: expected "from"'),
    ("llava", "entries", 0, "conversations",
     [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": "A cat."}],
     'turn 0: expected "value" with text'),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "section", "index", "field", "value", "message"), DAMAGE)
def test_damage_is_named_and_left_out(folder, kind, section, index, field, value, message):
    good, dataset, validate = FORMATS[kind]
    content = copy.deepcopy(good)
    entry = (content if kind == "llava" else content[section])[index]
    if value is DELETED:
        del entry[field]
    else:
        entry[field] = value
    whole = dataset(written(folder, good), folder)
    path = written(folder, content)
    report = validate(path, folder)
    problem = report.problems[0]
    assert (problem.section, problem.index) == (section, index)
    if message is not None:
        assert problem.field == field
        assert problem.message.startswith(message)
    assert not [one for one in report.problems[1:] if "is itself wrong" not in one.message]
    with pytest.raises(DatasetError, match=rf"{section}\[{index}\]"):
        dataset(path, folder)
    rest = dataset(path, folder, on_error="skip")
    assert rest.skipped[section] == 1
    texts = [
        sum(len(one.questions) + sum(map(len, one.captions.values())) for one in data.entries)
        for data in (whole, rest)
    ]
    assert texts[1] < texts[0]
    for i in range(len(rest)):
        assert rest[i].image.shape == (30, 40, 3)


def test_captions_of_a_wrong_picture_are_wrong_too(folder):
    (folder / "000000000007.jpg").unlink()
    report = validate_captions(written(folder, CAPTIONS), folder)
    assert [(one.section, one.index) for one in report.problems] == [
        ("images", 0),
        ("annotations", 0),
        ("annotations", 2),
    ]
    assert report.problems[1].message == "image 7 is itself wrong"


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("text", ["{", '"text"', '{"images": 3, "annotations": []}', "9" * 5000])
def test_what_is_no_such_file(folder, kind, text):
    path = folder / "text.json"
    path.write_text(text)
    _, dataset, validate = FORMATS[kind]
    for attempt in (lambda: validate(path, None), lambda: dataset(path, folder, on_error="skip")):
        with pytest.raises(DatasetError, match="expected|missing") as error:
            attempt()
        assert str(path) in str(error.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("kind", FORMATS)
@given(data=st.data())
def test_any_json_value_in_any_place_is_survived(folder, kind, data):
    good, dataset, validate = FORMATS[kind]
    content = copy.deepcopy(good)
    entries = content
    if isinstance(content, dict):
        sections = [key for key, value in content.items() if isinstance(value, list)]
        entries = content[data.draw(st.sampled_from(sections))]
    index = data.draw(st.integers(0, len(entries) - 1))
    field = data.draw(st.sampled_from([None, *sorted(entries[index])]))
    if field is None:
        entries[index] = data.draw(json_values)
    else:
        entries[index][field] = data.draw(json_values)
    path = written(folder, content)
    validate(path, folder, "header")
    loaded = dataset(path, folder, on_error="skip", check_images="header")
    for i in range(len(loaded)):
        assert loaded[i].image.shape == (30, 40, 3)


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason=f"no real data at {COCO_MINI}")
def test_real_captions():
    data = CocoCaptionDataset(
        COCO_MINI / "annotations" / "captions_val.json", COCO_MINI / "val", check_images="header"
    )
    assert len(data) == 96
    assert all(len(entry.captions["short"]) == 5 for entry in data.entries)
    sample = data[0]
    assert sample.image.shape[1::-1] == data.entries[0].size
