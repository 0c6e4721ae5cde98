"""Corners that start from the image token's own box."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from small_network import SMALL, pictures, small_network

from visionllm.instruction import Instruction
from visionllm.instruction.instruction import TASKS
from visionllm.model.box_prior import HARMONICS, SPREAD, BoxPrior
from visionllm.ops.choice import CHOICES, use_operators

BINS = 1025


@torch.no_grad()
def test_the_bump_beside_its_formula():
    prior = BoxPrior(BINS)
    prior.strength.fill_(7.0)
    boxes = torch.tensor([[[0.4, 0.5, 0.3, 0.62], [0.5, 0.5, 1.0, 1.0], [0.1, 0.1, 0.0, 1e-4]]])
    logits = (prior.of_boxes(boxes) @ prior.of_bins().T).double().numpy()
    assert logits.shape == (1, 3, 4, BINS)
    bins = np.arange(BINS) - 512
    k = np.arange(1, HARMONICS + 1)
    g = np.exp(-((k / SPREAD) ** 2))
    for i, (_, _, w, h) in enumerate(boxes[0].double().tolist()):
        for j, corner in enumerate((-w / 2, -h / 2, w / 2, h / 2)):
            waves = np.cos(2 * math.pi * k * (bins[:, None] - 512 * corner) / 2048)
            np.testing.assert_allclose(logits[0, i, j], 7 * waves @ g / g.sum(), atol=1e-3)


def reading_of(network, boxes_kind="detection", **fields):
    instructions = [Instruction(boxes_kind, classes=("dog", "cat"), **fields)] * 2
    prompts = network.tokenizer.prompts(instructions, network.config.num_queries)
    text = network.encode_text(prompts)
    tokens = network.image_tokens(pictures(2), text)
    return tokens, network.read_slots(prompts, text, tokens, wanted=network.slot_format(instructions))


@pytest.mark.parametrize("choice", CHOICES)
@torch.no_grad()
def test_a_head_that_says_nothing_answers_the_tokens_own_boxes(choice):
    network = small_network(box_prior=True)
    network.slot_head.locations.zero_()
    with use_operators(choice):
        tokens, reading = reading_of(network)
        offsets = reading.answers(network.config.coordinate_window).offsets
    half = tokens.boxes[-1][..., 2:] / 2
    torch.testing.assert_close(offsets, torch.cat([-half, half], -1), atol=0.5 / 512, rtol=0)


def test_it_learns_with_the_head():
    network = small_network(box_prior=True)
    tokens, reading = reading_of(network)
    half = tokens.boxes[-1][..., 2:].detach() * 256
    offsets = torch.cat([-half, half], -1)
    reading.location_loss(offsets, torch.ones_like(offsets)).backward()
    assert network.slot_head.box_prior.strength.grad.abs() > 0
    assert network.slot_head.locations.grad.abs().max() > 0


@torch.no_grad()
def test_outlines_and_keypoints_know_no_corners():
    with_prior, without = small_network(tasks=TASKS, box_prior=True), small_network(tasks=TASKS)
    state = {k: v for k, v in with_prior.state_dict().items() if "box_prior" not in k}
    without.load_state_dict(state)
    for task, fields in (("segmentation", {"points": 5}), ("keypoints", {"keypoints": ("tip", "end")})):
        found, expected = (reading_of(network, task, **fields)[1] for network in (with_prior, without))
        assert torch.equal(found.logits.locations, expected.logits.locations)


def test_it_is_off_by_default():
    assert small_network().slot_head.box_prior is None
    assert dataclasses.replace(SMALL, box_prior=True).box_prior
