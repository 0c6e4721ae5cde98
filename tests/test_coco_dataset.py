"""Real COCO data through the loader, against pycocotools. Needs ``coco_mini``, not part of the project."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from visionllm.data.coco import CocoDataset
from visionllm.data.photo_augmentation import AugmentedPhotos

SHARED = Path(os.environ.get("VISIONLLM_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
COCO_MINI = SHARED / "coco_mini"
pytestmark = pytest.mark.skipif(
    not COCO_MINI.is_dir(),
    reason=f"no real data at {COCO_MINI}; VISIONLLM_SHARED_DATA names the folder that has it",
)


@pytest.fixture(scope="module")
def data():
    return CocoDataset(COCO_MINI / "annotations" / "instances_val.json", COCO_MINI / "val")


def test_everything_is_read(data):
    assert data.report.ok
    assert len(data) == 180
    assert len(data.vocabulary) == 80
    assert sum(len(objects) for objects in data.objects) == 1634
    assert sum(entry["iscrowd"] for objects in data.objects for entry in objects) == 18


def test_samples_agree_with_pycocotools(data, capfd):
    from pycocotools.coco import COCO

    reference = COCO(str(data.annotations))
    for index in range(0, len(data), 9):
        sample = data[index]
        entries = reference.loadAnns(reference.getAnnIds(imgIds=sample.image_id))
        assert sample.names == [reference.cats[entry["category_id"]]["name"] for entry in entries]
        xywh = np.array([entry["bbox"] for entry in entries]).reshape(-1, 4)
        np.testing.assert_allclose(sample.boxes[:, 2:] - sample.boxes[:, :2], xywh[:, 2:], atol=0.05)
        np.testing.assert_allclose(sample.boxes[:, :2], xywh[:, :2], atol=0.05)
        height, width = sample.image.shape[:2]
        assert (width, height) == (
            reference.imgs[sample.image_id]["width"],
            reference.imgs[sample.image_id]["height"],
        )
        for segmentation, entry in zip(sample.masks or [], entries, strict=True):
            assert segmentation == entry["segmentation"]
    capfd.readouterr()


def test_views_of_real_photos(data):
    photos = AugmentedPhotos(data, 224)
    targets = 0
    for seed in range(60):
        view = photos.draw(np.random.default_rng(seed))
        assert view.image.shape == (224, 224, 3)
        assert (view.boxes >= 0).all()
        assert (view.boxes <= 224).all()
        assert (view.boxes[:, 2:] > view.boxes[:, :2]).all()
        assert set(view.names) <= set(view.vocabulary)
        targets += int((~view.iscrowd).sum())
    assert targets > 200
