"""Scenes written as COCO folders; objects cut out of COCO photos."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionllm.data.scenes import SceneDataset
from visionllm.data.scenes.cutouts import LARGEST_SIDE, load_cutouts
from visionllm.data.scenes.export import contact_sheet, main, write_coco

COCO = pytest.importorskip("pycocotools.coco").COCO


def test_folder_reads_back(tmp_path: Path) -> None:
    dataset = SceneDataset("val", seed=1, size=96, length=6, masks=True)
    coco = COCO(str(write_coco(dataset, tmp_path)))
    names = {category["id"]: category["name"] for category in coco.loadCats(coco.getCatIds())}
    assert tuple(names.values()) == dataset.names
    assert len(coco.getImgIds()) == 6
    for index, image in enumerate(coco.loadImgs(coco.getImgIds())):
        sample = dataset[index]
        pixels = np.asarray(Image.open(tmp_path / "images" / image["file_name"]))
        assert np.array_equal(pixels, sample.image)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        assert [names[a["category_id"]] for a in annotations] == sample.names
        for annotation, box, area in zip(annotations, sample.boxes, sample.area, strict=True):
            x, y, w, h = annotation["bbox"]
            assert [x, y, x + w, y + h] == box.tolist()
            assert annotation["area"] == area == coco.annToMask(annotation).sum()


def test_masks_are_required(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="masks=True"):
        write_coco(SceneDataset("val", length=1), tmp_path)
    with pytest.raises(ValueError, match="'png' or 'jpg', got 'gif'"):
        write_coco(SceneDataset("val", length=1, masks=True), tmp_path, image_format="gif")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheet.png"
    arguments = [
        "--output",
        str(tmp_path / "out"),
        "--count",
        "3",
        "--split",
        "test",
        "--size",
        "64",
        "--format",
        "jpg",
    ]
    assert main([*arguments, "--sheet", str(sheet)]) == 0
    assert "3 scenes, 80 classes" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "images").glob("*.jpg"))) == 3
    assert sheet.exists()
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path / "out"), "--split", "heldout_style"])
    assert "needs --glyphs" in capsys.readouterr().err


def test_contact_sheet_size() -> None:
    assert contact_sheet(SceneDataset("val", size=64), count=5, columns=3).size == (3 * 68, 2 * 68)


def test_cutouts_follow_the_mask(tmp_path: Path) -> None:
    pixels = np.zeros((200, 400, 3), np.uint8)
    pixels[40:160, 60:300] = (250, 120, 10)
    Image.fromarray(pixels).save(tmp_path / "photo.png")

    def annotation(number: int, x1: float, y1: float, x2: float, y2: float, **more: object) -> dict:
        outline = [[x1, y1, x2, y1, x2, y2, x1, y2]]
        row = {
            "id": number,
            "image_id": 1,
            "category_id": 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "iscrowd": 0,
        }
        return {**row, "area": (x2 - x1) * (y2 - y1), "segmentation": outline, **more}

    document = {
        "images": [{"id": 1, "file_name": "photo.png", "width": 400, "height": 200}],
        "categories": [{"id": 1, "name": "sofa"}],
        "annotations": [
            annotation(1, 60, 40, 300, 160),
            annotation(2, 0, 40, 300, 160),  # touches the border
            annotation(3, 60, 40, 80, 60),  # too small
            annotation(4, 60, 40, 300, 160, iscrowd=1),
            annotation(5, 60, 40, 300, 160, area=5000.0),  # thin against its box
            annotation(
                6, 60, 40, 300, 160, segmentation=[[60, 40, 90, 40, 90, 90], [200, 40, 300, 40, 300, 160]]
            ),
        ],
    }
    (tmp_path / "photos.json").write_text(json.dumps(document))
    cutouts = load_cutouts(tmp_path / "photos.json", tmp_path)
    assert [name for _, name in cutouts] == ["sofa"]
    picture = cutouts[0][0]
    assert picture.shape == (LARGEST_SIDE // 2, LARGEST_SIDE, 4)
    assert (picture[10:-10, 10:-10] == (250, 120, 10, 255)).all()


@pytest.mark.parametrize("count", [0, -1, 6])
def test_a_count_that_the_data_set_lacks_is_refused(tmp_path: Path, count: int) -> None:
    dataset = SceneDataset("val", size=64, length=5, masks=True)
    with pytest.raises(ValueError, match=f"write_coco: count must be 1 to 5, got {count}"):
        write_coco(dataset, tmp_path / "scenes", count)
    assert not (tmp_path / "scenes").exists()


def test_text_and_points_read_back(tmp_path: Path) -> None:
    """Through the readers of the formats that the files are in."""
    from visionllm.data.coco import CocoDataset
    from visionllm.data.coco_captions import CocoCaptionDataset
    from visionllm.data.llava import LlavaDataset
    from visionllm.data.refcoco import RefCocoDataset

    dataset = SceneDataset("val", seed=4, size=96, length=5, masks=True, keypoints=True, language=True)
    annotations, images = write_coco(dataset, tmp_path), tmp_path / "images"
    objects = CocoDataset(annotations, images, keypoints=annotations)
    refs = RefCocoDataset(tmp_path / "refs.json", images, annotations, split="val")
    talks = LlavaDataset(tmp_path / "questions.json", images)
    for index in range(5):
        sample, read = dataset[index], objects[index]
        assert sample.keypoints is not None and read.keypoints is not None
        for points, again in zip(sample.keypoints, read.keypoints, strict=True):
            assert points == again
        present = [expression for expression in sample.expressions if expression.objects]
        assert refs[index].expressions == present
        asked = [(question.text, question.answer) for question in sample.questions]
        assert [(question.text, question.answer) for question in talks[index].questions] == asked
    for length in ("short", "long", "detailed"):
        captions = CocoCaptionDataset(tmp_path / f"captions_{length}.json", images)
        for index in range(5):
            assert captions[index].captions["short"] == dataset[index].captions[length]
