"""Validation during training: prompts, boxes in the picture's own pixels, division among processes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from visionllm.data.sample import Sample
from visionllm.train.distributed import Processes
from visionllm.train.validation import Validation, ValidationSet, listed_names

VOCABULARY = tuple(f"thing {i}" for i in range(30))


def sample(index):
    """A picture of 60 × 40 pixels with three objects of two classes; the last object is a crowd."""
    boxes = np.array([[3, 4, 33, 24], [10 + index, 2, 50, 30], [0, 0, 9, 9]], np.float32)
    return Sample(
        image=np.full((40, 60, 3), index, np.uint8),
        boxes=boxes,
        names=[VOCABULARY[index], VOCABULARY[index + 1], VOCABULARY[index]],
        area=np.array([600, 500, 81], np.float32),
        iscrowd=np.array([False, False, True]),
        image_id=index,
        vocabulary=VOCABULARY,
    )


SAMPLES = [sample(index) for index in range(5)]


class Oracle(nn.Module):
    """Answers with the true boxes, found by the picture's grey value; every label shifted by ``shift``."""

    def __init__(self, shift=0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.shift = shift
        self.seen = []

    def find(self, images, instructions, top):
        answers = []
        for image, instruction in zip(images, instructions, strict=True):
            assert image.shape == (32, 32, 3) and image.dtype == torch.uint8
            index = int(image[0, 0, 0])
            self.seen.append(index)
            objects = SAMPLES[index]
            boxes = torch.from_numpy(objects.boxes) / torch.tensor([60.0, 40.0, 60.0, 40.0])
            labels = [
                (instruction.classes.index(n) + self.shift) % len(instruction.classes)
                for n in objects.names
                if n in instruction.classes
            ]
            listed = torch.tensor([name in instruction.classes for name in objects.names])
            keep = ~torch.from_numpy(objects.iscrowd)
            answers.append(
                SimpleNamespace(
                    boxes=boxes[keep & listed],
                    scores=torch.tensor([0.9, 0.8, 0.7])[keep & listed],
                    labels=torch.tensor(labels)[keep[listed]],
                )
            )
        return answers


ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("names", [20, None])
def test_true_boxes_reach_100(names):
    validation = Validation([ValidationSet("scenes", SAMPLES, 5, names, 32)], ALONE, batch_size=2, top=100)
    metrics = validation(Oracle())
    assert metrics == pytest.approx({"scenes/AP": 100.0, "scenes/AP50": 100.0, "scenes/AP75": 100.0})
    assert validation(Oracle(shift=1))["scenes/AP"] < 60


def test_prompts_are_fixed_and_mixed():
    one, two = (ValidationSet("scenes", SAMPLES, 4, 20, 32) for _ in range(2))
    assert [p.asked for p in one.pictures] == [p.asked for p in two.pictures]
    assert len(one.pictures) == 4
    for index, picture in enumerate(one.pictures):
        classes = picture.asked.classes
        assert len(set(classes)) == 20
        assert set(SAMPLES[index].names) <= set(classes) <= set(VOCABULARY)
    places = [p.asked.classes.index(SAMPLES[i].names[0]) for i, p in enumerate(one.pictures)]
    assert len(set(places)) > 1
    assert ValidationSet("photos", SAMPLES, 1, None, 32).pictures[0].asked.classes == VOCABULARY


@pytest.mark.parametrize("top", [2, 1])
def test_more_names_than_an_instruction_lists_are_asked_in_groups(top):
    """Objects of the first, of the last and of both groups, in pictures beside one with a short prompt."""
    many = VOCABULARY + tuple(f"other thing {i}" for i in range(1000))
    order = {0: many[::-1], 1: (*many[1:], many[0]), 2: (many[2], *many[4:], many[3]), 3: VOCABULARY, 4: many}
    samples = [replace(entry, vocabulary=order[index]) for index, entry in enumerate(SAMPLES)]
    one, network = ValidationSet("photos", samples, 5, None, 32), Oracle()
    assert [len(picture.asked.instructions) for picture in one.pictures] == [3, 3, 3, 1, 3]
    found = one.predictions(network, range(5), 5, top)
    assert len(found) == 5 * top
    assert [network.seen.count(index) for index in range(5)] == [3, 3, 3, 1, 3]
    numbers = Validation([one], ALONE, batch_size=2, top=100)(Oracle())
    assert numbers["photos/AP"] == pytest.approx(100.0)


def test_few_names_drop_present_ones():
    listed = listed_names(SAMPLES[0], 1, np.random.default_rng(0))
    assert len(listed) == 1 and listed[0] in SAMPLES[0].names
    everything = listed_names(SAMPLES[0], 100, np.random.default_rng(0))
    assert sorted(everything) == sorted(VOCABULARY)


def test_processes_divide_the_pictures(monkeypatch):
    networks = [Oracle(), Oracle()]
    one = ValidationSet("scenes", SAMPLES, 5, 20, 32)
    parts = [one.predictions(networks[rank], range(rank, 5, 2), 2, 100) for rank in range(2)]
    assert sorted(networks[0].seen + networks[1].seen) == [0, 1, 2, 3, 4]
    processes = Processes(0, 2, torch.device("cpu"))
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, parts[1]])
    assert Validation([one], processes, 2, 100)(Oracle())["scenes/AP"] == pytest.approx(100.0)


def test_an_empty_set_is_an_error():
    with pytest.raises(ValueError, match="'photos' is empty"):
        ValidationSet("photos", [], 5, None, 32)
