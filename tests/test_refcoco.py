"""Referring expressions in RefCOCO's form: pickled and as JSON, in parts, with damage named."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from annotation_files import REF_INSTANCES, REF_NAMES, REFS
from PIL import Image

from visionllm.data.coco_pictures import picture_name
from visionllm.data.refcoco import RefCocoDataset, validate_refcoco
from visionllm.data.report import DatasetError
from visionllm.data.sample import Expression


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in REF_NAMES.values():
        Image.new("RGB", (40, 30)).save(tmp_path / "pictures" / name)
    return tmp_path


def written(folder, refs=REFS, protocol=2, instances=REF_INSTANCES):
    (folder / "instances.json").write_text(json.dumps(instances))
    path = folder / ("refs(unc).json" if protocol is None else "refs(unc).p")
    path.write_bytes(json.dumps(refs).encode() if protocol is None else pickle.dumps(refs, protocol))
    return path


@pytest.mark.parametrize("protocol", [None, 0, 2, 5])
def test_expressions_with_their_objects(folder, protocol):
    data = RefCocoDataset(written(folder, protocol=protocol), folder / "pictures", outlines=True)
    assert data.report.ok
    assert data.skipped == {"images": 0, "categories": 0, "annotations": 0, "refs": 0}
    assert len(data) == 2
    first, second = data[0], data[1]
    assert first.expressions == [
        Expression("man on the right", (2,)),
        Expression("the older man", (2,)),
        Expression("dog", (1,)),
    ]
    assert first.names == ["person", "dog", "person"]
    assert first.boxes[2].tolist() == [3, 2, 13, 10]
    assert first.outlines[2].min(0).tolist() == [3, 2]
    assert second.expressions == [Expression("only person", (0,))]
    assert second.vocabulary == ("person", "dog")


def test_parts(folder):
    path = written(folder)
    train = RefCocoDataset(path, folder / "pictures", split="train")
    assert [sample.image_id for sample in map(train.__getitem__, range(len(train)))] == [7]
    assert [one.text for one in train[0].expressions] == ["man on the right", "the older man"]
    assert train[0].names == ["person", "dog", "person"]  # objects without an expression too
    test = RefCocoDataset(path, folder / "pictures", split="testA")
    assert (len(test), test[0].image_id) == (1, 8)
    with pytest.raises(ValueError, match=r"split: expected one of train, testA, val as in .*, got 'test'"):
        RefCocoDataset(path, folder / "pictures", split="test")


def test_only_the_pictures_of_the_part_need_to_be_there(folder):
    (folder / "pictures" / REF_NAMES[8]).unlink()
    path = written(folder)
    assert len(RefCocoDataset(path, folder / "pictures", split="val")) == 1
    with pytest.raises(DatasetError, match=r"images\[1\]\.file_name: missing file"):
        RefCocoDataset(path, folder / "pictures", split="testA")
    report = validate_refcoco(path, folder / "pictures")
    assert {problem.section for problem in report.problems} == {"images", "annotations", "refs"}
    assert validate_refcoco(path, None).ok


def test_pictures_by_their_names_of_2017(folder):
    (folder / "pictures" / "val2017").mkdir()
    (folder / "pictures" / REF_NAMES[7]).rename(folder / "pictures" / "val2017" / "000000000007.jpg")
    data = RefCocoDataset(written(folder), folder / "pictures", split="train")
    assert data.image_path(0) == folder / "pictures" / "val2017" / "000000000007.jpg"
    assert data[0].image.shape == (30, 40, 3)
    assert picture_name(folder / "pictures", "somewhere/000000000008.jpg") == REF_NAMES[8]
    assert picture_name(folder / "pictures", "000000000009.jpg") == "000000000009.jpg"
    assert picture_name(folder / "pictures", "a\0b.jpg") == "a\0b.jpg"


def test_an_objects_file_elsewhere(folder):
    path = written(folder)
    (folder / "instances.json").rename(folder / "objects.json")
    with pytest.raises(DatasetError, match=r"instances\.json: .*found nothing there"):
        RefCocoDataset(path, folder / "pictures")
    assert len(RefCocoDataset(path, folder / "pictures", instances=folder / "objects.json")) == 2


DAMAGE = {
    "no ref_id": ("ref_id", None, "missing"),
    "a ref_id twice": ("ref_id", 1, "duplicate id 1"),
    "no part": ("split", None, "missing"),
    "part is a number": ("split", 3, "expected the name of a part, got int 3"),
    "unknown object": ("ann_id", 5, "expected the id of a right annotation, got int 5"),
    "object is a list": ("ann_id", [103], "expected an id, got list"),
    "object of another picture": ("image_id", 8, "expected 7 as annotation 103 has, got int 8"),
    "no picture": ("image_id", None, "missing"),
    "no sentences": ("sentences", [], "expected a list of sentences"),
    "sentences are text": ("sentences", "man", "expected a list of sentences, got str"),
    "an empty sentence": ("sentences", [{"sent": " "}], 'expected "sent" with text in each'),
    "a sentence without text": ("sentences", [{"raw": "MAN"}], 'expected "sent" with text in each'),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_left_out(folder, damage):
    field, value, message = DAMAGE[damage]
    refs = copy.deepcopy(REFS)
    index = 2 if damage == "a ref_id twice" else 0
    if value is None:
        del refs[index][field]
    else:
        refs[index][field] = value
    path = written(folder, refs)
    (problem,) = validate_refcoco(path, folder / "pictures").problems
    assert str(problem).startswith(f"{path}: refs[{index}].{field}: {message}")
    with pytest.raises(DatasetError, match=rf"refs\[{index}\]\.{field}"):
        RefCocoDataset(path, folder / "pictures")
    data = RefCocoDataset(path, folder / "pictures", on_error="skip")
    assert data.skipped["refs"] == 1
    assert sum(len(data[i].expressions) for i in range(len(data))) == (2 if index == 0 else 3)


def test_references_to_a_wrong_object(folder):
    instances = copy.deepcopy(REF_INSTANCES)
    instances["annotations"][3]["bbox"] = [1, 1, 0, 5]
    path = written(folder, instances=instances)
    places = [(p.section, p.index, p.field) for p in validate_refcoco(path, folder / "pictures").problems]
    assert places == [("annotations", 3, "bbox"), ("refs", 0, "ann_id")]
    data = RefCocoDataset(path, folder / "pictures", on_error="skip")
    assert [one.text for one in data[0].expressions] == ["dog"]
    assert data[0].vocabulary == ("dog",)  # a person is there without its box


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"refs": REFS}), "expected a list of references, got dict"),
        (b'{"refs": []}', "expected a list of references, got dict"),
        (b"[{", "expected JSON"),
        (b"", "broken pickle"),
        (pickle.dumps(json.dumps), r"expected plain data, got the instruction STACK_GLOBAL"),
        (pickle.dumps([1, 2])[:-4], "broken pickle"),
    ],
)
def test_what_is_no_file_of_references(folder, content, message):
    path = written(folder)
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=message) as error:
        RefCocoDataset(path, folder / "pictures", on_error="skip")
    assert str(path) in str(error.value)
