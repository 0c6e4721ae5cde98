"""Detection among many names: groups, their merging, and AP by LVIS's rules."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coloured_samples import coloured_samples
from hypothesis import given
from hypothesis import strategies as st
from small_network import small_network

from visionllm.evaluate.coco import coco_metrics
from visionllm.evaluate.large_vocabulary import (
    detect_in_groups,
    evaluate_large_vocabulary,
    federated_metrics,
    grouped_names,
    merged_scores,
)
from visionllm.evaluate.samples import SampleSet
from visionllm.instruction import Instruction
from visionllm.model.groups import GroupAnswers
from visionllm.pipeline import VisionLLM


@given(st.integers(1, 300), st.integers(1, 90), st.none() | st.integers(0, 3))
def test_groups_hold_every_name_once(count, size, seed):
    names = [f"name {index}" for index in range(count)]
    groups = grouped_names(names, size, seed)
    assert sorted(name for group in groups for name in group) == sorted(names)
    lengths = [len(group) for group in groups]
    assert len(groups) == -(-count // size) and max(lengths) <= size and max(lengths) - min(lengths) <= 1
    assert groups == grouped_names(names, size, seed)


def test_bad_groups():
    for names, size in (([], 3), (["a"], 0)):
        with pytest.raises(ValueError, match="expected names and a size of 1 or more"):
            grouped_names(names, size)
    assert len(grouped_names([str(k) for k in range(1203)])) == 16


def answers(probabilities, objectness=1.0, known=None) -> GroupAnswers:
    p = torch.tensor([[probabilities]])
    box = torch.tensor([[[0.1, 0.1, 0.5, 0.5]]])
    return GroupAnswers(
        p,
        box,
        box[..., :2],
        torch.full((1, 1), objectness),
        None if known is None else torch.tensor([[known]]),
    )


def test_a_name_is_weighed_against_no_object_alone():
    # The second name has taken the first one's probability: beside "no object" both are likely.
    shared = merged_scores(answers([0.45, 0.45, 0.1]), 0.0, 0.0)
    alone = merged_scores(answers([0.9, 0.2]), 0.0, 0.0)
    assert shared.flatten().tolist() == pytest.approx([0.45 / 0.55] * 2)
    assert alone.item() == pytest.approx(0.9 / 1.1)
    powered = merged_scores(answers([0.45, 0.45, 0.1], 0.25, [0.5, 1.0]), 0.5, 2.0)
    whole = (0.25 * 0.45 / 0.55) ** 0.5
    assert powered.flatten().tolist() == pytest.approx([whole * 0.25, whole])
    assert merged_scores(answers([0.0, 0.0]), 0.5, 0.0).item() == 0, "not 0/0"


def test_the_best_of_all_groups(monkeypatch):
    def said(network, images, groups, sizes, originals):
        assert sizes is originals is None
        for number, _ in enumerate(groups):
            p = torch.tensor([[[0.1 + 0.3 * number, 0.3, 0.5]] * 2])  # [1, 2, 3]
            boxes = torch.tensor([[[0.0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]]) * (number + 1) / 2
            yield GroupAnswers(p, boxes, boxes[..., :2], torch.tensor([[0.9, 0.1]]), None)

    monkeypatch.setattr("visionllm.model.groups.find_groups", said)
    scoring = {"objectness_power": 0.5, "known_power": 0.0, "repeat_factor": 1.0, "part_factor": 1.0}
    network = SimpleNamespace(config=SimpleNamespace(**scoring))
    groups = [Instruction(classes=("a", "b")), Instruction(classes=("c", "d"))]
    ((boxes, scores, labels),) = detect_in_groups(network, torch.zeros(1, 4, 4, 3), groups, top=3)
    assert labels.tolist() == [2, 1, 3] and (np.diff(scores) <= 0).all()
    assert boxes[0].tolist() == [0, 0, 0.5, 0.5] and boxes[1].tolist() == [0, 0, 0.25, 0.25]


def test_a_data_set_with_the_real_network():
    dataset = SampleSet(coloured_samples())
    model, progress = VisionLLM(small_network()), []
    names = [*dataset.names, "dog", "cat"]
    found = evaluate_large_vocabulary(model, dataset, names, 3, batch_size=3, done=progress.append)
    assert progress == [3, 1] and [len(group) for group in found.groups] == [2, 2, 3]
    assert {entry["image_id"] for entry in found.results} == {1, 2, 3, 4}
    assert all(entry["category_id"] <= 5 for entry in found.results), "the other names are not the data set's"
    assert 0 <= found.metrics["AP"] <= 1 and "APr" not in found.metrics
    with pytest.raises(ValueError, match=r"expected all of the data set's, got none of \['blue'"):
        evaluate_large_vocabulary(model, dataset, ["red"])


def picture(not_exhaustive=(), annotations=()) -> dict:
    return {
        "images": [{"id": 7, "width": 100, "height": 100, "not_exhaustive": list(not_exhaustive)}],
        "categories": [{"id": number, "name": str(number)} for number in (3, 9)],
        "annotations": [
            {"id": k, "image_id": 7, "category_id": number, "bbox": bbox}
            for k, (number, bbox) in enumerate(annotations)
        ],
    }


def box(category_id: int, bbox, score: float) -> dict:
    return {"image_id": 7, "category_id": category_id, "bbox": bbox, "score": score}


RIGHT, WRONG = [10, 10, 40, 40], [60, 60, 30, 30]


def test_classes_that_are_not_exhaustively_annotated_have_no_false_boxes():
    predictions = [box(3, WRONG, 0.9), box(3, RIGHT, 0.8), box(9, WRONG, 0.9)]
    strict = federated_metrics(picture(annotations=[(3, RIGHT)]), predictions)
    assert strict["AP"] == pytest.approx(0.5)
    lenient = federated_metrics(picture([3, 9], [(3, RIGHT)]), predictions)
    assert lenient["AP"] == pytest.approx(1.0) and lenient["AR"] == pytest.approx(1.0)
    elsewhere = federated_metrics(picture([9], [(3, RIGHT)]), predictions)
    assert elsewhere["AP"] == pytest.approx(0.5)


def test_metrics_are_cocos_where_everything_is_annotated():
    truth = picture(annotations=[(3, RIGHT), (3, WRONG), (9, RIGHT)])
    predictions = [box(3, [12, 12, 40, 40], 0.9), box(3, WRONG, 0.3), box(9, WRONG, 0.8), box(9, RIGHT, 0.5)]
    found, expected = federated_metrics(truth, predictions), coco_metrics(truth, predictions)
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
        assert found[name] == pytest.approx(expected[name]), name
    assert found["AR"] == pytest.approx(expected["AR100"])


def test_frequencies_and_the_number_of_boxes():
    truth = picture(annotations=[(3, RIGHT), (9, RIGHT)])
    predictions = [box(3, RIGHT, 0.9), box(9, WRONG, 0.8), box(9, RIGHT, 0.5)]
    found = federated_metrics(truth, predictions, {3: "r", 9: "f"})
    assert (found["APr"], found["APc"], found["APf"]) == pytest.approx((1.0, -1.0, 0.5))
    assert federated_metrics(truth, predictions, {3: "r", 9: "f"}, top=2)["APf"] == 0
    assert set(federated_metrics(picture(), []).values()) == {-1.0}
