"""What is left of the scores of boxes that say the same thing again."""

from __future__ import annotations

import pytest
import torch

from visionllm.model.boxes import distinct, doubtful_lowered
from visionllm.model.config import ModelConfig


def lowered(boxes, scores, labels):
    return doubtful_lowered(boxes, scores, labels, repeat_factor=0.5, part_factor=0.8)


def test_the_second_box_of_one_thing_counts_half():
    boxes = torch.tensor([[0.0, 0, 0.8, 0.5], [0.05, 0, 0.85, 0.5], [0.5, 0.6, 0.6, 0.7]])
    scores, order = lowered(boxes, torch.tensor([0.9, 0.8, 0.5]), torch.tensor([3, 3, 3]))
    assert order.tolist() == [0, 2, 1]  # what it falls behind goes before it
    assert torch.equal(scores, torch.tensor([0.9, 0.5, 0.4]))


def test_other_classes_and_neighbours_keep_theirs():
    boxes = torch.tensor([[0.0, 0, 0.8, 0.8], [0.0, 0, 0.8, 0.8], [0.2, 0, 1, 0.8]])  # IoU 0.6
    given = torch.tensor([0.9, 0.8, 0.7])
    scores, order = lowered(boxes, given, torch.tensor([0, 1, 0]))
    assert torch.equal(scores, given) and order.tolist() == [0, 1, 2]


def test_the_more_it_overlaps_the_less_it_counts():
    """No step: boxes that are rounded differently have nearly the same scores."""
    given, labels = torch.tensor([0.9, 0.8]), torch.tensor([0, 0])
    shifts = torch.linspace(0.3, 0.08, 89)  # IoU 0.54 to 0.85
    second = torch.stack(
        [lowered(torch.tensor([[0.0, 0, 1, 1], [d, 0, 1 + d, 1]]), given, labels)[0][1] for d in shifts]
    )
    assert second[0] == 0.8 and second[-1] == 0.4
    assert (second.diff() <= 0).all() and second.diff().abs().max() < 0.0101


def test_a_third_one_counts_half_not_a_quarter():
    scores, _ = lowered(
        torch.tensor([[0.1, 0.1, 0.5, 0.5]] * 3), torch.tensor([0.8, 0.6, 0.4]), torch.tensor([1, 1, 1])
    )
    assert torch.equal(scores, torch.tensor([0.8, 0.3, 0.2]))


WHOLE, HEAD = [0.1, 0.1, 0.9, 0.9], [0.3, 0.1, 0.6, 0.4]


@pytest.mark.parametrize(
    ("whole", "head"), [(0.76, 0.64), (0.9, 0.64), (0.64, 0.8)], ids=["equally sure", "surer", "less sure"]
)
def test_a_part_gives_way_to_a_whole_that_is_about_as_sure(whole, head):
    boxes, given = torch.tensor([HEAD, WHOLE]), torch.tensor([0.8, whole])
    given, stood = given.sort(descending=True)
    scores, order = lowered(boxes[stood], given, torch.tensor([0, 0]))
    found = dict(zip(stood[order].tolist(), scores.tolist(), strict=True))
    assert found == pytest.approx({0: head, 1: whole})


def test_a_neighbour_and_another_class_within_it_keep_theirs():
    given = torch.tensor([0.8, 0.79, 0.78])
    boxes = torch.tensor([WHOLE, HEAD, [0.3, 0.0, 0.6, 0.2]])  # half of the last one is outside
    scores, _ = lowered(boxes, given, torch.tensor([0, 1, 0]))
    assert torch.equal(scores, given)


def test_equal_scores_stay_as_they_stand():
    scores, order = lowered(
        torch.tensor([[0.1, 0.1, 0.2, 0.2], [0.5, 0.5, 0.6, 0.6], [0.1, 0.1, 0.2, 0.2]]),
        torch.tensor([0.5, 0.25, 0.5]).sort(descending=True).values,
        torch.tensor([0, 0, 0]),
    )
    assert torch.equal(scores, torch.tensor([0.5, 0.5, 0.125])) and order.tolist() == [0, 1, 2]


def test_nothing_found_and_boxes_without_area():
    scores, order = lowered(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert scores.shape == order.shape == (0,)
    scores, _ = lowered(torch.zeros(2, 4), torch.tensor([0.5, 0.4]), torch.tensor([0, 0]))
    assert torch.equal(scores, torch.tensor([0.5, 0.4]))  # their IoU is 0


def test_factors_of_one_change_nothing():
    boxes, given = torch.tensor([[0.1, 0.1, 0.5, 0.5]] * 3), torch.tensor([0.8, 0.6, 0.4])
    scores, order = doubtful_lowered(boxes, given, torch.tensor([1, 1, 1]), 1.0, 1.0)
    assert torch.equal(scores, given) and order.tolist() == [0, 1, 2]


@pytest.mark.parametrize("changes", [{"repeat_factor": 1.5}, {"part_factor": -0.1}])
def test_factors_are_shares(changes):
    with pytest.raises(ValueError, match=rf"{next(iter(changes))} must be in \[0, 1\]"):
        ModelConfig(**changes)


def test_the_best_boxes_that_repeat_no_better_one():
    boxes = torch.tensor(
        [
            [0.3, 0.3, 0.2, 0.2],
            [0.3, 0.31, 0.2, 0.2],  # repeats the first, which is worse
            [0.7, 0.7, 0.2, 0.2],
            [0.7, 0.7, 0.1, 0.2],  # half of it
            [0.1, 0.9, 0.0, 0.0],  # without extent
            [0.9, 0.1, 0.1, 0.1],
        ]
    )
    scores = torch.tensor([0.5, 0.9, 0.4, 0.6, 0.3, 0.1])
    chosen, which = distinct(boxes, scores, most=4, same=0.8)
    assert chosen.tolist() == [1, 3, 2, 4] and which.tolist() == [0, 0, 2, 1, 3, -1]
    chosen, which = distinct(boxes, scores, most=1, same=0.8)
    assert chosen.tolist() == [1] and which.tolist() == [0, 0, -1, -1, -1, -1]
    chosen, which = distinct(boxes, scores, most=10, same=0.8)
    assert chosen.tolist() == [1, 3, 2, 4, 5] and (which >= 0).all()
    chosen, which = distinct(boxes[:0], scores[:0], most=3, same=0.8)
    assert chosen.tolist() == which.tolist() == []
    assert chosen.dtype == which.dtype == torch.int64
