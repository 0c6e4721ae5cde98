"""Groups of slots and the head that reads them."""

from __future__ import annotations

import math

import pytest
import torch
from small_network import NAMES, SMALL, pictures, small_network

from visionllm.instruction import Instruction
from visionllm.model.network import pool_names
from visionllm.model.slots import SlotFormat, SlotHead, SlotQueries, expected_offsets, extent_of, points_of

BINS, HALF = 1025, 512


def peaked(*peaks: tuple[int, float]) -> torch.Tensor:
    """Location logits with these values at these bins, −4 elsewhere."""
    logits = torch.full((BINS,), -4.0)
    for bin_, value in peaks:
        logits[bin_] = value
    return logits


@pytest.mark.parametrize("bin_", [0, 1, 511, 512, 513, 1023, 1024])
def test_argmax_alone(bin_):
    assert expected_offsets(peaked((bin_, 1.0)), 0).item() == (bin_ - HALF) / HALF


@pytest.mark.parametrize("bin_", [0, 3, 512, 1022, 1024])
@pytest.mark.parametrize("window", [1, 6, 2000])
def test_expectation_within_the_window(bin_, window):
    logits = torch.randn(BINS, generator=torch.Generator().manual_seed(0))
    logits[bin_] = 6.0
    low, high = max(0, bin_ - window), min(BINS, bin_ + window + 1)
    p = logits[low:high].double().softmax(0)
    expected = (p * (torch.arange(low, high) - HALF)).sum() / HALF
    assert math.isclose(expected_offsets(logits, window).item(), expected.item(), abs_tol=1e-5)


def test_what_lies_outside_the_window_does_not_pull():
    near = expected_offsets(peaked((700, 10.0), (703, 9.0)), 3)
    assert torch.equal(near, expected_offsets(peaked((700, 10.0), (703, 9.0), (704, 9.9), (100, 9.9)), 3))
    assert 700 < near.item() * HALF + HALF < 703


def test_shapes_and_gradient():
    logits = torch.randn(2, 3, 4, BINS, requires_grad=True)
    offsets = expected_offsets(logits, 6)
    assert offsets.shape == (2, 3, 4) and offsets.dtype == torch.float32
    assert offsets.abs().max() <= 1
    offsets.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_a_slot_is_its_format_token_and_its_image_token():
    torch.manual_seed(0)
    queries = SlotQueries(SMALL)
    features, boxes = torch.randn(2, 3, SMALL.dim), torch.rand(2, 3, 4)
    slots = queries(features, boxes, SlotFormat())
    assert slots.shape == (2, 3, 5, SMALL.llm_dim)
    image = queries.image_tokens(features, boxes)
    torch.testing.assert_close(slots[:, :, 0] - queries.format.weight[0], image)
    torch.testing.assert_close(
        slots[:, :, 4] - slots[:, :, 1],
        (queries.format.weight[4] - queries.format.weight[1]).expand(2, 3, -1),
    )
    twelve, more = (queries(features, boxes, SlotFormat("outlines", n)) for n in (12, 24))
    assert torch.equal(more[:, :, 0], slots[:, :, 0]) and more.shape[2] == 49
    # A point is told by its place along the outline: the 3rd of 12 is the 5th of 24.
    torch.testing.assert_close(twelve[:, :, 1 + 4 : 1 + 6], more[:, :, 1 + 8 : 1 + 10], atol=1e-5, rtol=0)
    assert (more[:, :, 1] - more[:, :, 3]).abs().max() > 1e-3


@pytest.mark.parametrize("class_rows", ["names", "static"])
def test_class_logits(class_rows):
    torch.manual_seed(0)
    network = small_network(class_rows=class_rows)
    head, dim = network.slot_head, SMALL.llm_dim
    states, name_states = torch.randn(2, 3, dim), torch.randn(2, 4, dim)
    name_features, class_tokens = torch.randn(2, 4, SMALL.text_dim), torch.randn(512, dim)
    mask = torch.tensor([[True, True, True, True], [True, False, True, False]])
    with torch.no_grad():
        rows = head.rows(name_states, name_features, class_tokens)
        logits = head.class_logits(states, rows, mask)
    assert logits.shape == (2, 3, 5)
    for b in range(2):
        for g in range(3):
            query = head.class_query.weight @ states[b, g]
            for k in range(4):
                key = class_tokens[k]
                if class_rows == "names":
                    key = head.name_key.weight @ name_states[b, k]
                    key = key + head.text_key.weight @ name_features[b, k]
                expected = (query @ key).item() / dim**0.5 if mask[b, k] else -math.inf
                assert logits[b, g, k].item() == pytest.approx(expected, abs=1e-4)
            assert logits[b, g, 4].item() == pytest.approx(
                (query @ head.no_object).item() / dim**0.5, abs=1e-4
            )
    probabilities = logits.softmax(-1)
    assert (probabilities[1, :, [1, 3]] == 0).all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 3))


@torch.no_grad()
def test_static_rows_do_not_depend_on_the_prompt():
    network = small_network(class_rows="static")
    assert not any("name_key" in name or "text_key" in name for name, _ in network.named_parameters())
    rows = network.slot_head.rows(torch.randn(2, 3, 32), torch.randn(2, 3, 32), network.class_tokens.weight)
    assert torch.equal(rows[0], network.class_tokens.weight[:3]) and torch.equal(rows[0], rows[1])


def test_location_logits():
    torch.manual_seed(0)
    head = SlotHead(SMALL)
    states = torch.randn(2, 3, 4, SMALL.llm_dim)
    logits = head.location_logits(states)
    assert logits.shape == (2, 3, 4, BINS) and logits.dtype == torch.float32
    torch.testing.assert_close(logits[1, 2, 3, 7], states[1, 2, 3] @ head.locations[7])


def test_pooled_names():
    states = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[-1, 0, 0, 1, -1, -1], [2, 0, 2, -1, 2, -1]])
    pooled = pool_names(states, index, 3)
    torch.testing.assert_close(pooled[0, 0], states[0, 1:3].mean(0))
    torch.testing.assert_close(pooled[0, 1], states[0, 3])
    assert (pooled[0, 2] == 0).all() and (pooled[1, 1] == 0).all()  # names that a prompt does not list
    torch.testing.assert_close(pooled[1, 2], states[1, [0, 2, 4]].mean(0))


@torch.no_grad()
def test_chosen_groups_answer_as_among_all(network):
    prompts = network.tokenizer.prompts(
        [Instruction(classes=NAMES), Instruction(classes=NAMES[:2])], SMALL.num_queries
    )
    text = network.encode_text(prompts)
    tokens = network.image_tokens(pictures(2), text)
    reading = network.read_slots(prompts, text, tokens)
    everything, boxes = reading.logits, reading.boxes
    assert everything.classes.shape == (2, SMALL.num_queries, len(NAMES) + 1)
    assert everything.locations.shape == (2, SMALL.num_queries, 4, BINS)
    assert (everything.classes[1, :, 2:5] == -math.inf).all() and torch.isfinite(everything.classes[0]).all()
    groups = torch.tensor([[7, 0, 3], [1, 11, 2]])
    reading = network.read_slots(prompts, text, tokens, groups)
    some, chosen = reading.logits, reading.boxes
    at = torch.arange(2)[:, None], groups
    torch.testing.assert_close(some.classes, everything.classes[at], atol=1e-5, rtol=0)
    torch.testing.assert_close(some.locations, everything.locations[at], atol=1e-5, rtol=0)
    assert torch.equal(chosen, boxes[at])


@torch.no_grad()
def test_longer_formats(network):
    prompts = network.tokenizer.prompts([Instruction(classes=NAMES)], SMALL.num_queries)
    text = network.encode_text(prompts)
    tokens = network.image_tokens(pictures(1), text)
    outlines = network.read_slots(prompts, text, tokens, wanted=SlotFormat("outlines", 14))
    assert outlines.logits.locations.shape == (1, SMALL.num_queries, 28, BINS)
    names = network.encode_names(network.name_ids(NAMES[:3]))[None]
    named = network.read_slots(prompts, text, tokens, wanted=SlotFormat("keypoints", 3, names))
    assert named.logits.locations.shape == (1, SMALL.num_queries, 6, BINS)
    assert named.visibility_logits().shape == (1, SMALL.num_queries, 3, 3)
    boxes = network.read_slots(prompts, text, tokens)
    for reading in (outlines, named):
        # A causal group: its first slot does not know what follows.
        torch.testing.assert_close(reading.logits.classes, boxes.logits.classes, atol=1e-5, rtol=0)
        assert (reading.logits.locations[:, :, :4] - boxes.logits.locations).abs().max() > 1e-3


@torch.no_grad()
def test_the_spread_is_that_of_the_location_tokens(network):
    prompts = network.tokenizer.prompts([Instruction(classes=NAMES)], SMALL.num_queries)
    text = network.encode_text(prompts)
    reading = network.read_slots(prompts, text, network.image_tokens(pictures(1), text))
    reading.logits.locations[0, 0, 0] = peaked((100, 60.0))
    reading.logits.locations[0, 0, 1] = peaked((512 - 30, 60.0), (512 + 30, 60.0))
    spread = reading.spread()
    assert spread.shape == (1, SMALL.num_queries, 4)
    assert spread[0, 0, 0] < 1e-3 and math.isclose(spread[0, 0, 1], 30 / 512, rel_tol=1e-3)


def test_a_box_is_its_centre_and_its_offsets():
    locations = torch.stack([peaked((512 + d, 60.0)) for d in (-64, -32, 128, 256)])[None, None]
    points = points_of(expected_offsets(locations, 6), torch.tensor([[[0.5, 0.25, 0.9, 0.9]]]))
    corners = extent_of(points)
    torch.testing.assert_close(corners[0, 0], torch.tensor([0.375, 0.1875, 0.75, 0.75]), atol=1e-6, rtol=0)
