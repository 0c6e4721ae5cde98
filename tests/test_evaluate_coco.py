"""The COCO numbers against the published oracle and against cases small enough to know by heart."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from visionllm.evaluate.coco import METRIC_NAMES, coco_metrics, evaluate_boxes

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
