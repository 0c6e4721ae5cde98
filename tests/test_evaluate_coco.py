"""The COCO numbers against the published oracle and against cases small enough to know by heart."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from visionllm.evaluate.coco import (
    DEFAULT_SIGMA,
    KEYPOINT_METRIC_NAMES,
    METRIC_NAMES,
    PERSON_SIGMAS,
    coco_metrics,
    evaluate_boxes,
    evaluate_objects,
)

SHARED_DATA = Path(
    os.environ.get("VISIONLLM_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)
ORACLE = SHARED_DATA / "coco_oracle"


def one_picture(**annotation) -> dict:
    return {
        "images": [{"id": 7, "width": 100, "height": 100}],
        "categories": [{"id": 3, "name": "dog"}, {"id": 9, "name": "cat"}],
        "annotations": [{"id": 0, "image_id": 7, "category_id": 3, "bbox": [10, 10, 40, 40], **annotation}],
    }


def dog(score: float = 0.9, bbox=(10, 10, 40, 40), category_id: int = 3) -> dict:
    return {"image_id": 7, "category_id": category_id, "bbox": list(bbox), "score": score}


@pytest.mark.skipif(
    not ORACLE.is_dir(), reason=f"needs the COCO oracle files in {ORACLE} (VISIONLLM_SHARED_DATA)"
)
def test_oracle_numbers(capfd):
    truth = json.loads((ORACLE / "instances_val2014_100.json").read_text())
    results = json.loads((ORACLE / "instances_val2014_fakebbox100_results.json").read_text())
    metrics = coco_metrics(truth, results)
    # The numbers printed by the evaluation demo of the COCO API.
    expected = [0.505, 0.697, 0.573, 0.586, 0.519, 0.501, 0.387, 0.594, 0.595, 0.640, 0.566, 0.564]
    np.testing.assert_allclose([metrics[name] for name in METRIC_NAMES], expected, atol=5e-4)
    assert capfd.readouterr().out == ""


@pytest.mark.skipif(
    not ORACLE.is_dir(), reason=f"needs the COCO oracle files in {ORACLE} (VISIONLLM_SHARED_DATA)"
)
def test_oracle_numbers_of_masks():
    truth = json.loads((ORACLE / "instances_val2014_100.json").read_text())
    results = json.loads((ORACLE / "instances_val2014_fakesegm100_results.json").read_text())
    metrics = evaluate_objects("masks", truth, results).metrics
    # The numbers printed by the evaluation demo of the COCO API.
    expected = [0.320, 0.562, 0.299, 0.387, 0.310, 0.327, 0.268, 0.415, 0.417, 0.469, 0.377, 0.381]
    np.testing.assert_allclose([metrics[name] for name in METRIC_NAMES], expected, atol=5e-4)


def test_perfect_box_with_annotation_id_zero_and_no_area():
    metrics = coco_metrics(one_picture(), [dog()])
    assert metrics["AP"] == pytest.approx(1.0)
    assert metrics["APm"] == pytest.approx(1.0), "area 1600 is the box's and counts as medium"
    assert metrics["APs"] == -1


def test_area_of_the_annotation_decides_the_size_class():
    metrics = coco_metrics(one_picture(area=500), [dog()])
    assert metrics["APs"] == pytest.approx(1.0)
    assert metrics["APm"] == -1


def test_no_predictions_score_zero_and_no_truth_scores_minus_one():
    assert coco_metrics(one_picture(), [])["AP"] == 0
    empty = {**one_picture(), "annotations": []}
    assert set(coco_metrics(empty, [dog()]).values()) == {-1.0}
    assert set(coco_metrics({"images": [], "categories": [], "annotations": []}, []).values()) == {-1.0}


def test_a_box_on_a_crowd_is_no_false_positive():
    truth = one_picture()
    truth["annotations"].append(
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [60, 60, 40, 40], "iscrowd": 1}
    )
    on_crowd = dog(0.95, (62, 62, 20, 20))
    assert coco_metrics(truth, [on_crowd, dog(0.9)])["AP"] == pytest.approx(1.0)
    truth["annotations"].pop()
    assert coco_metrics(truth, [on_crowd, dog(0.9)])["AP"] == pytest.approx(0.5)


def test_per_class_table_and_arrays():
    evaluation = evaluate_boxes(one_picture(), [dog(), dog(category_id=9)])
    assert evaluation.category_ids == (3, 9)
    assert evaluation.precision.shape == (10, 101, 2)
    table = evaluation.class_average_precision()
    assert table[3] == pytest.approx((1.0, 1.0))
    assert table[9] == (-1.0, -1.0)


def test_ground_truth_is_not_changed():
    truth = one_picture()
    before = json.dumps(truth)
    coco_metrics(truth, [dog()])
    assert json.dumps(truth) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 8}, "prediction 0: image_id 8 is not in the data set's images"),
        ({"category_id": 4}, "prediction 0: category_id 4 is not in the data set's categories"),
        ({"bbox": [0, 0, float("nan"), 1]}, "prediction 0: bbox must be 4 finite numbers"),
        ({"score": float("inf")}, "prediction 0: score must be a finite number, got inf"),
    ],
)
def test_bad_predictions_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        coco_metrics(one_picture(), [{**dog(), **change}])


SQUARE = [[10.0, 10, 50, 10, 50, 50, 10, 50]]
HALF = [[10.0, 10, 50, 10, 50, 30, 10, 30]]


def test_masks_are_compared_by_overlap():
    truth = one_picture(segmentation=SQUARE)
    right = {**dog(), "segmentation": SQUARE}
    assert evaluate_objects("masks", truth, [right]).metrics["AP"] == pytest.approx(1.0)
    half = evaluate_objects("masks", truth, [{**right, "segmentation": HALF}]).metrics
    assert (half["AP"], half["AP50"], half["AP75"]) == pytest.approx((0.1, 1.0, 0.0)), "IoU 0.5"
    assert half["APm"] == pytest.approx(0.1), "the mask's area is 1600"
    with pytest.raises(ValueError, match="prediction 0: expected a segmentation, got None"):
        evaluate_objects("masks", truth, [dog()])
    with pytest.raises(ValueError, match=r"annotation 0: .*got \[1, 2, 3\]"):
        evaluate_objects("masks", one_picture(segmentation=[[1, 2, 3]]), [])


def keypoints(*points) -> list[float]:
    return [value for point in points for value in point]


def test_keypoints_are_compared_by_their_distance():
    places = [(10, 10, 2), (50, 10, 1), (0, 0, 0)]
    truth = one_picture(keypoints=keypoints(*places), area=1600)
    right = {**dog(), "keypoints": keypoints(*places[:2], (90, 90, 2))}
    found = evaluate_objects("keypoints", truth, [right])
    assert tuple(found.metrics) == KEYPOINT_METRIC_NAMES
    assert found.metrics["AP"] == found.metrics["APm"] == pytest.approx(1.0), (
        "the third point is not labelled"
    )
    # Similarity of a point d away: exp(-d^2 / 2 (2 sigma)^2 area); the mean with the right one is 0.8.
    distance = (-2 * (2 * DEFAULT_SIGMA) ** 2 * 1600 * np.log(0.6001)) ** 0.5
    off = {**right, "keypoints": keypoints((10, 10 + distance, 2), *places[1:])}
    assert evaluate_objects("keypoints", truth, [off]).metrics["AP"] == pytest.approx(0.7), "0.5 ... 0.8"
    assert evaluate_objects("keypoints", truth, [off], [1, 1, 1]).metrics["AP"] == pytest.approx(1.0)
    unlabelled = one_picture(keypoints=[0.0] * 9, area=1600)
    assert evaluate_objects("keypoints", unlabelled, [right]).metrics["AP"] == -1


def test_a_persons_points_have_the_published_sigmas():
    from pycocotools.cocoeval import Params

    np.testing.assert_allclose(PERSON_SIGMAS, Params("keypoints").kpt_oks_sigmas)


@pytest.mark.parametrize(
    ("truth", "predictions", "sigmas", "message"),
    [
        ([1, 2], [], None, r"annotation 0: keypoints must be K times three finite numbers, got \[1, 2\]"),
        ([], [], None, "annotation 0: keypoints must be K times three"),
        ([1, 2, 2], [[1, 2, 2, 3, 4, 2]], None, r"as many points everywhere, got \[1, 2\]"),
        ([1, 2, 2], [], [0.1, 0.2], "sigmas: expected 1 positive numbers"),
        ([1, 2, 2], [], [0], "sigmas: expected 1 positive numbers"),
    ],
)
def test_bad_keypoints_are_named(truth, predictions, sigmas, message):
    results = [{**dog(), "keypoints": points} for points in predictions]
    with pytest.raises(ValueError, match=message):
        evaluate_objects("keypoints", one_picture(keypoints=truth), results, sigmas)
