"""Evaluation of polygons and keypoints on samples, with a network whose right and wrong answers are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from colour_network import COLOURS, ColourNetwork
from coloured_samples import POINTS, coloured_samples
from hypothesis import given, settings
from hypothesis import strategies as st

import visionllm.evaluate.samples
from visionllm.evaluate.evaluation import PromptOptions, class_listings, evaluate, write_evaluation
from visionllm.evaluate.keypoints import common_names, flat_keypoints, with_points
from visionllm.evaluate.polygon_loss import polygon_loss
from visionllm.evaluate.robustness import evaluate_robustness
from visionllm.evaluate.samples import SampleSet
from visionllm.instruction import EVAL_TEMPLATES
from visionllm.pipeline import VisionLLM


@pytest.fixture
def dataset() -> SampleSet:
    return SampleSet(coloured_samples())


def test_samples_in_coco_form(dataset):
    assert dataset.names == list(COLOURS) and dataset.category_ids == [1, 2, 3, 4, 5]
    assert [image["id"] for image in dataset.images] == [1, 2, 3, 4], "the source's ids are no numbers"
    assert [len(entries) for entries in dataset.objects().values()] == [2, 1, 3, 0]
    first = dataset.content["annotations"][0]
    assert first["bbox"] == [16, 8, 32, 32] and first["area"] == 1024 and first["category_id"] == 1
    np.testing.assert_array_equal(dataset.read(dataset.images[2]), coloured_samples()[2].image)
    assert all(sample.image.size == 0 for sample in dataset.samples)


def test_pictures_beyond_the_limit_are_read_again(monkeypatch):
    reads = []

    class Counted(list):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    samples = coloured_samples()
    monkeypatch.setattr(visionllm.evaluate.samples, "KEPT_BYTES", samples[0].image.nbytes)
    dataset = SampleSet(Counted(samples), limit=3)
    assert reads == [0, 1, 2]
    for index in (0, 2):
        np.testing.assert_array_equal(dataset.read(dataset.images[index]), samples[index].image)
    assert reads == [0, 1, 2, 2]


def test_numbers_of_the_source_are_kept():
    class Source(list):
        category_names = {7: "red", 3: "green", 9: "blue", 4: "yellow", 5: "pink"}

    samples = [replace(sample, image_id=50 - index) for index, sample in enumerate(coloured_samples())]
    samples[1] = replace(samples[1], vocabulary=("red", "pink"))
    dataset = SampleSet(Source(samples))
    assert [image["id"] for image in dataset.images] == [50, 49, 48, 47]
    assert dataset.category_ids == [7, 3, 9, 4, 5]
    assert dataset.images[1]["not_exhaustive"] == [3, 9, 4]
    with pytest.raises(ValueError, match="sample picture 0: 'red' is none of its source's 1 names"):
        SampleSet(type("Few", (list,), {"names": ("blue",)})(coloured_samples()))
    with pytest.raises(ValueError, match="expected at least one, got none"):
        SampleSet([])


def test_samples_are_a_detection_set_too(dataset):
    found = evaluate(VisionLLM(ColourNetwork()), dataset, PromptOptions(listed=2, seed=1))
    assert found.coco.metrics["AP"] == pytest.approx(1.0)
    assert found.rejection is not None and found.rejection.listed_objects > 0 and found.boxes is None


@pytest.mark.parametrize("points", [4, 16])
def test_polygons_that_are_right(dataset, points, tmp_path):
    network = ColourNetwork()
    options = PromptOptions(task="segmentation", points=points)
    found = evaluate(VisionLLM(network), dataset, options, batch_size=3)
    assert {one.points for call in network.calls for one in call} == {points}
    assert found.coco.metrics["AP50"] == pytest.approx(1.0)
    if points == 16:
        assert found.coco.metrics["AP"] > 0.9 and found.boxes.metrics["AP"] == pytest.approx(1.0)
    assert set(found.results[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    metrics = write_evaluation(found, dataset, 0.3, {"task": "segmentation"}, tmp_path)
    assert metrics["boxes"] == found.boxes.metrics and metrics["malformed"] == 0
    assert (tmp_path / "predictions.json").is_file()


def test_a_polygon_of_the_wrong_shape_is_wrong_as_a_mask_alone():
    """A circle is told as its box's outline: the box is right, the mask is not."""
    y, x = np.mgrid[:64, :128]
    samples = coloured_samples()[:1]
    disk = (x - 31.5) ** 2 + (y - 23.5) ** 2 < 16**2
    samples[0].masks[0] = None
    samples[0].masks = [disk_rle(disk), samples[0].masks[1]]
    found = evaluate(VisionLLM(ColourNetwork()), SampleSet(samples), PromptOptions(task="segmentation"))
    scores = found.coco.class_average_precision()
    assert scores[1][0] == pytest.approx(0.6), "pi / 4 = 0.785: IoU 0.50 ... 0.75"
    assert scores[3][0] > 0.9
    assert found.boxes.metrics["AP"] == pytest.approx(1.0)


def disk_rle(mask):
    from visionllm.data.polygons import rle_of

    return rle_of(mask, *mask.shape)


def test_keypoints(dataset):
    network = ColourNetwork()
    options = PromptOptions(task="keypoints", keypoints=POINTS)
    found = evaluate(VisionLLM(network), dataset, options)
    assert network.calls[0][0].keypoints == POINTS
    assert found.coco.metrics["AP"] == pytest.approx(1.0)
    assert len(found.results[0]["keypoints"]) == 15
    swapped = (POINTS[1], POINTS[0], *POINTS[2:])

    class Confused(ColourNetwork):
        def find(self, images, instructions, top=100, spread=False):
            answers = super().find(images, instructions, top, spread)
            for answer in answers:
                answer.points = answer.points[:, [1, 0, 2, 3, 4]]
            return answers

    wrong = evaluate(VisionLLM(Confused()), dataset, PromptOptions(task="keypoints", keypoints=swapped))
    assert wrong.coco.metrics["AP"] < 0.5, "order counts"


def test_only_classes_with_such_points_are_asked_for():
    samples = coloured_samples()
    for sample in samples:
        sample.keypoints = [
            {"tip": (1.0, 1.0, 2)} if name == "red" else points
            for name, points in zip(sample.names, sample.keypoints, strict=True)
        ]
    dataset = SampleSet(samples)
    options = PromptOptions(task="keypoints", keypoints=("tip",))
    assert {listing.indices for listing in class_listings(dataset, options)} == {(0,)}
    some = class_listings(dataset, replace(options, listed=3))
    assert {listing.indices for listing in some} == {(0,)}
    with pytest.raises(ValueError, match="no point is named in all objects"):
        common_names(dataset.content["annotations"])
    with pytest.raises(ValueError, match="no object has one of the points 'toe'"):
        with_points(dataset.content["annotations"], ["toe"])


def test_names_and_flat_keypoints(dataset):
    assert common_names(dataset.content["annotations"]) == POINTS
    first = dataset.content["annotations"][0]
    assert flat_keypoints(first, ["center", "toe"]) == [32, 24, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="objects with named points, got none"):
        common_names([{"bbox": []}])


def test_prompt_options_that_do_not_fit():
    with pytest.raises(ValueError, match="task: expected one of detection, segmentation, keypoints"):
        PromptOptions(task="vqa")
    for options in ({"task": "keypoints"}, {"keypoints": ("tip",)}):
        with pytest.raises(ValueError, match="expected names for the task keypoints alone"):
            PromptOptions(**options)


def test_robustness_of_polygons(dataset):
    found = evaluate_robustness(VisionLLM(ColourNetwork()), dataset, PromptOptions(task="segmentation"))
    assert len(found["runs"]) == len(EVAL_TEMPLATES["segmentation"]) + 2 and found[
        "AP_spread"
    ] == pytest.approx(0, abs=1e-9)


def test_malformed_answers_are_counted(dataset):
    class Error:
        def __str__(self):
            return "answer, position 0: expected something, found nothing"

    class Mumbling(VisionLLM):
        def run(self, images, requests, threshold, **options):
            results = super().run(images, requests, threshold, **options)
            results[0].error = Error()
            return results

    found = evaluate(Mumbling(ColourNetwork()), dataset, batch_size=2)
    assert found.malformed == 2


def test_loss_of_polygons(dataset):
    rows = polygon_loss(dataset.content, [4, 8, 64])
    assert [row["points"] for row in rows] == [4, 8, 64] and rows[0]["objects"] == 6
    assert all(row["other_parts"] == 0 for row in rows)
    assert rows[2]["area_lost"] < 0.02 and rows[2]["area_added"] < 0.02 and rows[2]["AP"] > 0.95
    assert rows[0]["area_lost"] > rows[2]["area_lost"], "corners of oblong rectangles are cut"


def test_what_lies_in_other_parts_is_lost():
    mask = np.zeros((40, 40), bool)
    mask[2:32, 2:32], mask[34:38, 2:12] = True, True  # 900 and 40 pixels
    entry = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 30, 36], "segmentation": disk_rle(mask)}
    crowd = {**entry, "id": 2, "iscrowd": 1}
    truth = {
        "images": [{"id": 1, "width": 40, "height": 40}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [entry, crowd],
    }
    (row,) = polygon_loss(truth, [64])
    assert row["objects"] == 1
    assert row["other_parts"] == pytest.approx(40 / 940, abs=0.002)
    assert row["area_lost"] == pytest.approx(40 / 940, abs=0.01)


@settings(deadline=None, max_examples=20)
@given(st.integers(3, 64), st.integers(4, 25), st.integers(4, 25))
def test_the_loss_adds_up(points, width, height):
    mask = np.zeros((32, 32), bool)
    mask[3 : 3 + height, 2 : 2 + width] = True
    entry = {
        "id": 1,
        "image_id": 1,
        "category_id": 1,
        "bbox": [2, 3, width, height],
        "segmentation": disk_rle(mask),
    }
    truth = {
        "images": [{"id": 1, "width": 32, "height": 32}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [entry],
    }
    (row,) = polygon_loss(truth, [points])
    lost, added = row["area_lost"], row["area_added"]
    assert row["mean_iou"] == pytest.approx((1 - lost) / (1 + added))
    assert 0 <= lost < 0.9 and 0 <= added < 0.5
