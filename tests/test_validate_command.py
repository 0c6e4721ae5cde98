"""``visionllm validate`` for every format, and the table of formats behind it."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
from annotation_files import CAPTIONS, COCO, KARPATHY, LLAVA, LVIS, REF_INSTANCES, REFS
from PIL import Image

from visionllm.cli import main
from visionllm.data.formats import FORMATS

FILES = {
    "coco": (COCO, "annotations"),
    "captions": (CAPTIONS, "annotations"),
    "karpathy": (KARPATHY, "images"),
    "refcoco": (REFS, None),
    "lvis": (LVIS, "annotations"),
    "llava": (LLAVA, None),
}


@pytest.fixture
def folder(tmp_path):
    names = ["a.png", "b.png"] + [f"00000000000{number}.jpg" for number in (7, 8, 9)]
    for name in names:
        Image.new("RGB", (40, 30), "grey").save(tmp_path / name)
    (tmp_path / "instances.json").write_text(json.dumps(REF_INSTANCES))
    return tmp_path


def written(folder, content, kind):
    path = folder / ("refs(unc).p" if kind == "refcoco" else f"{kind}.json")
    path.write_bytes(pickle.dumps(content, 2) if kind == "refcoco" else json.dumps(content).encode())
    return path


def test_every_format_has_a_case():
    assert set(FILES) == set(FORMATS)


@pytest.mark.parametrize("kind", FILES)
def test_right_and_wrong_files(folder, kind, capsys):
    content, section = FILES[kind]
    path = written(folder, content, kind)
    arguments = ["validate", "--annotations", str(path), "--images", str(folder)]
    arguments += [] if kind == "coco" else ["--format", kind]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("0 problems; usable: ")

    content = copy.deepcopy(content)
    entries = content if section is None else content[section]
    entries[0] = 3
    written(folder, content, kind)
    assert main(arguments) == 1
    assert f"{path}: {section or ('refs' if kind == 'refcoco' else 'entries')}[0]: expected an object" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("kind", FILES)
def test_data_sets_of_every_format(folder, kind):
    data = FORMATS[kind].open(written(folder, FILES[kind][0], kind), folder, check_images="header")
    sample = data[0]
    assert sample.image.shape == (30, 40, 3)
    assert sample.image.dtype == np.uint8
    assert len(sample.boxes) == len(sample.names) == len(sample.area) == len(sample.iscrowd)
    assert data.report.ok


def test_objects_of_references_elsewhere(folder, capsys):
    path = written(folder, REFS, "refcoco")
    (folder / "instances.json").rename(folder / "objects.json")
    arguments = ["validate", "--format", "refcoco", "--annotations", str(path)]
    assert main(arguments) == 1
    assert "instances.json: expected an annotation file, found nothing there" in capsys.readouterr().err
    assert main([*arguments, "--instances", str(folder / "objects.json")]) == 0


def test_lost_area(folder, capsys):
    path = written(folder, COCO, "coco")
    arguments = ["validate", "--annotations", str(path), "--images", str(folder), "--outlines"]
    assert main(arguments) == 0
    # 25 square pixels of a person in two parts, of 125 and 600 in all
    assert "3.45 % of the objects' area is outside them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--outlines"], "--outlines needs --images and --format coco or lvis"),
        (["--outlines", "--images", ".", "--format", "llava"], "--outlines needs --images"),
        (["--instances", "x.json"], "--instances is for --format refcoco, got --format coco"),
        (["--format", "yolo"], "invalid choice: 'yolo'"),
    ],
)
def test_wrong_arguments(more, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(["validate", "--annotations", "x.json", *more])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
