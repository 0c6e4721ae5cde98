"""What is left of the scores of boxes that say the same thing again."""

from __future__ import annotations

import torch

from visionllm.model.boxes import repeats_lowered


def test_the_second_box_of_one_thing_counts_half():
    boxes = torch.tensor([[0.0, 0, 1, 1], [0.0, 0, 1, 0.9], [0.5, 0.5, 0.6, 0.6]])
    scores, order = repeats_lowered(boxes, torch.tensor([0.9, 0.8, 0.5]), torch.tensor([3, 3, 3]))
    assert order.tolist() == [0, 2, 1]  # what it falls behind goes before it
    assert torch.equal(scores, torch.tensor([0.9, 0.5, 0.4]))


def test_other_classes_and_neighbours_keep_theirs():
    boxes = torch.tensor([[0.0, 0, 1, 1], [0.0, 0, 1, 1], [0.0, 0, 1, 0.59]])
    given = torch.tensor([0.9, 0.8, 0.7])
    scores, order = repeats_lowered(boxes, given, torch.tensor([0, 1, 0]))
    assert torch.equal(scores, given) and order.tolist() == [0, 1, 2]


def test_the_more_it_overlaps_the_less_it_counts():
    """No step: boxes that are rounded differently have nearly the same scores."""
    given, labels = torch.tensor([0.9, 0.8]), torch.tensor([0, 0])
    heights = torch.linspace(0.55, 0.85, 61)
    second = torch.stack(
        [
            repeats_lowered(torch.tensor([[0.0, 0, 1, 1], [0.0, 0, 1, h]]), given, labels)[0][1]
            for h in heights
        ]
    )
    assert second[0] == 0.8 and second[-1] == 0.4
    assert (second.diff() <= 0).all() and second.diff().abs().max() < 0.0101


def test_a_third_one_counts_half_not_a_quarter():
    scores, _ = repeats_lowered(
        torch.tensor([[0.1, 0.1, 0.5, 0.5]] * 3), torch.tensor([0.8, 0.6, 0.4]), torch.tensor([1, 1, 1])
    )
    assert torch.equal(scores, torch.tensor([0.8, 0.3, 0.2]))


def test_equal_scores_stay_as_they_stand():
    scores, order = repeats_lowered(
        torch.tensor([[0.1, 0.1, 0.2, 0.2], [0.5, 0.5, 0.6, 0.6], [0.1, 0.1, 0.2, 0.2]]),
        torch.tensor([0.5, 0.25, 0.5]).sort(descending=True).values,
        torch.tensor([0, 0, 0]),
    )
    assert torch.equal(scores, torch.tensor([0.5, 0.5, 0.125])) and order.tolist() == [0, 1, 2]


def test_nothing_found_and_boxes_without_area():
    scores, order = repeats_lowered(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert scores.shape == order.shape == (0,)
    scores, _ = repeats_lowered(torch.zeros(2, 4), torch.tensor([0.5, 0.4]), torch.tensor([0, 0]))
    assert torch.equal(scores, torch.tensor([0.5, 0.4]))  # their IoU is 0
