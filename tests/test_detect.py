"""Network.detect: what a batch answers, each picture answers alone; sorted, bounded, checked."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_network import NAMES, SMALL, pictures, small_network

from visionllm.instruction import EVAL_TEMPLATES, Instruction

TOLERANCE = 1e-5  # scores and boxes of size 1: sums in another order


def instruction(classes: tuple[str, ...], template: int | None = None) -> Instruction:
    if template is None:
        return Instruction(classes=classes)
    wording = EVAL_TEMPLATES["detection"][template]
    made = Instruction(classes=classes, coordinates=wording.coordinates)
    return dataclasses.replace(made, text=made.render(wording))


def assert_same(a, b):
    torch.testing.assert_close(a.scores, b.scores, atol=TOLERANCE, rtol=0)
    clear = torch.ones(len(a.scores), dtype=torch.bool)  # equal scores may stand in another order
    near = a.scores.diff().abs() < 2 * TOLERANCE
    clear[1:] &= ~near
    clear[:-1] &= ~near
    assert clear.sum() > len(clear) / 3
    for field in ("boxes", "centers"):
        torch.testing.assert_close(getattr(a, field)[clear], getattr(b, field)[clear], atol=TOLERANCE, rtol=0)
    assert torch.equal(a.labels[clear], b.labels[clear])


def test_a_batch_equals_its_pictures_one_by_one(network):
    images = pictures(4)
    instructions = [
        instruction(NAMES),
        instruction(("cup",), 0),
        instruction(NAMES[::-1], 1),
        instruction(tuple(f"thing {i}" for i in range(8)), 2),
    ]
    together = network.find(images, instructions)
    assert [len(d.scores) for d in together] == [60, 12, 60, 96]
    for b, found in enumerate(together):
        assert_same(network.find(images[b : b + 1], instructions[b : b + 1])[0], found)


def test_shapes_order_and_bounds(network):
    for found, classes in zip(
        network.find(pictures(2), [instruction(NAMES), instruction(NAMES[:2])]), (5, 2), strict=True
    ):
        n = SMALL.num_queries * classes
        assert found.boxes.shape == (n, 4) and found.boxes.dtype == torch.float32
        assert found.scores.shape == found.labels.shape == (n,) and found.labels.dtype == torch.int64
        assert (
            found.centers.shape == (n, 2) and found.bins.shape == (n, 4) and found.bins.dtype == torch.int64
        )
        assert (found.scores.diff() <= 0).all() and 0 < found.scores.min() and found.scores.max() < 1
        assert found.boxes.min() >= 0 and found.boxes.max() <= 1
        assert (found.boxes[:, :2] <= found.boxes[:, 2:]).all()
        assert found.labels.unique().tolist() == list(range(classes))
        assert found.bins.abs().max() <= 512
        assert not found.scores.requires_grad


@pytest.mark.parametrize(("top", "expected"), [(0, 0), (1, 1), (7, 7), (1000, 60)])
def test_top(network, top, expected):
    everything = network.find(pictures(1), [instruction(NAMES)])[0]
    found = network.find(pictures(1), [instruction(NAMES)], top=top)[0]
    assert len(found.boxes) == len(found.scores) == len(found.bins) == expected
    assert torch.equal(found.scores, everything.scores[:expected])
    assert torch.equal(found.boxes, everything.boxes[:expected])


def test_scores_are_objectness_and_class_probability():
    network = small_network(objectness_power=0.25)
    prompt = [instruction(NAMES)]
    found = network.find(pictures(1), prompt)[0]
    with torch.no_grad():
        prompts = network.tokenizer.prompts(prompt, SMALL.num_queries)
        text = network.encode_text(prompts)
        tokens = network.image_tokens(pictures(1), text)
        logits = network.read_slots(prompts, text, tokens).logits
    objectness = tokens.objectness[-1][0].sigmoid()
    classes = logits.classes[0].softmax(-1)
    assert classes.shape[-1] == len(NAMES) + 1  # the last one is "no object"
    expected = objectness[:, None] ** 0.25 * classes[:, :-1] ** 0.75
    torch.testing.assert_close(
        found.scores, expected.flatten().sort(descending=True).values, atol=TOLERANCE, rtol=0
    )


def test_boxes_are_centres_and_offsets():
    network = small_network(coordinate_window=0)
    found = network.find(pictures(1), [instruction(NAMES)])[0]
    corners = found.centers.repeat(1, 2) + found.bins / 512
    torch.testing.assert_close(found.boxes, corners.clamp(0, 1), atol=1e-6, rtol=0)


def test_corners_said_in_the_wrong_order_change_places_with_their_tokens(monkeypatch):
    network = small_network(coordinate_window=0)
    instructions = [instruction(NAMES)]
    right = network.find(pictures(1), instructions)[0]
    read = network.read_slots

    def turned(*arguments, **more):
        reading = read(*arguments, **more)
        reading.states = reading.states.clone()
        reading.states[:, ::2, 1:] = reading.states[:, ::2][:, :, [3, 4, 1, 2]]  # of every second group
        return reading

    monkeypatch.setattr(network, "read_slots", turned)
    found = network.find(pictures(1), instructions)[0]
    assert_same(found, right)
    assert torch.equal(found.bins, right.bins)
    assert (right.bins[:, :2] <= right.bins[:, 2:]).all()


def test_the_wording_is_read(network):
    first, second = (network.find(pictures(1), [instruction(NAMES, i)])[0].scores for i in (0, 1))
    assert (first - second).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pictures(1).float(), r"uint8 \[B, 64, 64, 3\], got torch.float32 \[1, 64, 64, 3\]"),
        (pictures(1, 32), r"got torch.uint8 \[1, 32, 32, 3\]"),
        (pictures(1)[0], r"got torch.uint8 \[64, 64, 3\]"),
        (pictures(1).permute(0, 3, 1, 2), r"got torch.uint8 \[1, 3, 64, 64\]"),
        (pictures(1)[..., :1], r"got torch.uint8 \[1, 64, 64, 1\]"),
        (pictures(2), "2 images but 1 instructions"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(network, images, message):
    with pytest.raises(ValueError, match=message):
        network.find(images, [instruction(NAMES)])


def test_pictures_need_not_be_contiguous(network):
    images = pictures(2)
    strided = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not strided.is_contiguous()
    for a, b in zip(*(network.find(x, [instruction(NAMES)] * 2) for x in (images, strided)), strict=True):
        assert_same(a, b)  # the layout chooses the convolutions' kernels


def test_the_largest_class_set(network):
    classes = tuple(f"thing {i}" for i in range(512))
    found = network.find(pictures(1), [instruction(classes)])[0]
    assert len(found.scores) == 100 and torch.isfinite(found.scores).all()
