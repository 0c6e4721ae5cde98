"""Which tasks a configuration's data sets are taken for, and the accuracy of each during a run."""

from __future__ import annotations

import json

import pytest
import torch
from annotation_files import CAPTIONS, COCO, KARPATHY
from PIL import Image
from small_network import small_network

from visionllm.data.scenes import SceneDataset
from visionllm.instruction.instruction import TASKS
from visionllm.train.build import asked_tasks, make_validation, photo_sources, training_sources
from visionllm.train.config import PhotosConfig, load_config
from visionllm.train.distributed import Processes
from visionllm.train.task_validation import MEASURED, TaskValidation

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def folder(tmp_path):
    """Annotations in three formats, with their pictures."""
    (tmp_path / "val2014").mkdir()
    for number in (7, 8, 9):
        for name in (f"{number:012d}.jpg", f"val2014/COCO_val2014_{number:012d}.jpg"):
            Image.new("RGB", (40, 30), (number, 0, 0)).save(tmp_path / name)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    for name, content in (("coco", COCO), ("captions", CAPTIONS), ("karpathy", KARPATHY)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def sources(folder, kind, asked=TASKS, **changes):
    changes = {"options": {"on_error": "skip"}} | changes
    entry = PhotosConfig(str(folder / f"{kind}.json"), str(folder), 2.0, format=kind, **changes)
    return {source.whole: source for source in photo_sources(entry, asked, True)}


def test_objects_are_taken_for_what_their_file_has(folder):
    found = sources(folder, "coco")
    assert found[False].tasks == ("detection", "segmentation", "grounding")
    assert found[True].tasks == ("keypoints",)  # there are no captions
    assert found[False].dataset is found[True].dataset and found[False].weight == 2.0
    assert found[False].dataset.outlines


def test_captions_beside_objects(folder):
    captions = folder / "more.json"
    captions.write_text(json.dumps(CAPTIONS | {"images": COCO["images"]}))
    found = sources(folder, "coco", options={"on_error": "skip", "captions": str(captions)})
    assert found[True].tasks == ("keypoints", "captioning")


def test_only_asked_tasks_are_taken(folder):
    found = sources(folder, "coco", asked=("detection", "vqa"))
    assert set(found) == {False} and found[False].tasks == ("detection",)
    assert not found[False].dataset.outlines  # which cost time
    found = sources(folder, "coco", tasks=["grounding", "keypoints"])
    assert (found[False].tasks, found[True].tasks) == (("grounding",), ("keypoints",))


@pytest.mark.parametrize("kind", ["captions", "karpathy"])
def test_texts_are_of_whole_pictures(folder, kind):
    found = sources(folder, kind)
    assert set(found) == {True} and found[True].tasks == ("captioning",)
    assert len(found[True].dataset) > 0


def test_scenes_hold_what_the_tasks_need(tmp_path):
    def scenes(tasks):
        overrides = ["steps=1", f"mixture.tasks={{{tasks}}}", "scenes.options={length: 4}", "image_size=96"]
        config = load_config(overrides=overrides)
        return training_sources(config, True)[0], asked_tasks(config)

    source, asked = scenes("detection: 1")
    sample = source.dataset[0]
    assert source.tasks == asked == ("detection",)
    assert sample.outlines is None and sample.keypoints is None and not sample.questions
    source, asked = scenes("detection: 1, segmentation: 2, keypoints: 1, vqa: 1, captioning: 0")
    sample = source.dataset[0]
    assert source.tasks == asked == ("detection", "segmentation", "keypoints", "vqa")
    assert sample.outlines is not None and sample.keypoints is not None and sample.questions


def test_every_task_is_measured():
    samples = SceneDataset(
        "val", seed=0, size=64, outlines=True, keypoints=True, language=True, masks=True, length=3
    )
    network = small_network(tasks=TASKS)
    validation = TaskValidation(samples, 2, TASKS, names=5, batch_size=4)
    assert validation.tasks == list(MEASURED)
    found = validation(network, validation.tasks)
    assert set(found) == {
        "segmentation/AP", "grounding/P@0.5", "grounding/absent_auc", "keypoints/AP", "captioning/CIDEr",
        "vqa/exact_match",
    }  # fmt: skip
    assert all(-100 <= value <= 1000 for value in found.values())
    again = {}
    for task in validation.tasks:  # divided among processes it is the same
        again |= validation(network, [task])
    assert again == pytest.approx(found)


def test_a_configuration_says_what_is_measured():
    overrides = [
        "steps=1",
        "image_size=64",
        "validation.scenes=0",
        "validation.heldout=0",
        "validation.tasks=2",
    ]
    assert make_validation(load_config(overrides=overrides), ALONE) is None
    validation = make_validation(
        load_config(overrides=[*overrides, "mixture.tasks={detection: 1, vqa: 1}"]), ALONE
    )
    assert validation.others.tasks == ["vqa"]
    found = validation(small_network(tasks=TASKS))
    assert set(found) == {"vqa/exact_match"}
