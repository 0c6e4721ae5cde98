"""Detection token by token: the loss, and that decoding with a cache says what the whole pass says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_network import NAMES, pictures, small_network, train_batch, two_pictures

from visionllm.instruction import Instruction
from visionllm.train.sequence import (
    CENTRE,
    WRITTEN_OBJECTS,
    bins_per_unit,
    find_in_sequence,
    object_tokens,
    read_sequence,
    sequence_loss,
)


@pytest.fixture
def network():
    return small_network()


def test_the_loss_is_the_sum_of_its_terms_and_trains_the_llm(network):
    network.train()
    losses = sequence_loss(network, two_pictures())
    terms = {"class", "location", "tokens", "proposals", "alignment"}
    assert terms <= losses.keys()
    parts = [value for key, value in losses.items() if key != "total" and not key.startswith("metric/")]
    assert losses["total"].item() == pytest.approx(sum(part.item() for part in parts), rel=1e-5)
    (losses["class"] + losses["location"]).backward()
    moved = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"llm.layers.0.gate.weight", "slot_head.locations", "class_tokens.weight"} <= moved


def test_what_stands_behind_the_end_does_not_count(network):
    """A picture with one object beside one with none: two tokens and one, each as it would be alone."""

    def loss(boxes, labels, term):
        return sequence_loss(network, train_batch(boxes, labels))[term].item()

    one, none = ([[0.3, 0.3, 0.3, 0.4]], [1]), ([], [])
    alone = [loss([boxes], [labels], "class") for boxes, labels in (one, one)]
    assert alone[0] == pytest.approx(alone[1], rel=1e-6), "nothing is left to chance with one object"
    both = train_batch([one[0], none[0]], [one[1], none[1]])
    both.images[1] = both.images[0]
    empty = train_batch([none[0]], [none[1]])
    last = sequence_loss(network, empty)["class"].item()
    expected = (2 * alone[0] + last) / 3
    assert sequence_loss(network, both)["class"].item() == pytest.approx(expected, rel=1e-4)
    assert loss([one[0], none[0]], [one[1], none[1]], "location") == pytest.approx(
        loss([one[0]], [one[1]], "location"), rel=1e-4
    )


def test_several_unlisted_objects_say_nothing(network):
    unlisted = [[[0.8, 0.1, 0.2, 0.2], [0.1, 0.8, 0.2, 0.2]]]
    batch = train_batch([[[0.3, 0.3, 0.3, 0.4]]], [[1]], unlisted=unlisted)
    assert sequence_loss(network, batch)["total"].isfinite()


def test_a_picture_without_objects_is_taught_to_end(network):
    batch = two_pictures()
    batch.boxes = [rows[:0] for rows in batch.boxes]
    batch.labels = [rows[:0] for rows in batch.labels]
    losses = sequence_loss(network, batch)
    assert "location" not in losses and losses["class"].item() > 0


def test_the_cache_says_what_the_whole_pass_says(network):
    """Reading what was written once more, all at once, predicts the same tokens."""
    images = pictures(2)
    instructions = [Instruction(classes=NAMES), Instruction(classes=NAMES[::-1])]
    found = find_in_sequence(network, images, instructions)
    assert all(len(one.scores) == WRITTEN_OBJECTS for one in found)
    with torch.inference_mode():
        prompts, text, tokens = network.see("find", images, instructions, ("detection",))
        # Back in the order of writing: that of the class probabilities is lost, so the first object alone.
        before = torch.zeros(2, 1, network.config.llm_dim)
        states, rows = read_sequence(network, prompts, text, tokens, before)
        logits = network.slot_head.class_logits(states, rows, prompts.class_mask)
        score, label = logits[:, 0].softmax(-1)[:, :-1].max(-1)
        half = bins_per_unit(network)
        bins = torch.zeros(2, 1, 4, dtype=torch.int64)
        for k in range(4):
            written = object_tokens(network, label[:, None], bins).flatten(1, 2)
            whole = torch.cat([before, written[:, : k + 1]], 1)
            states, _ = read_sequence(network, prompts, text, tokens, whole)
            bins[:, 0, k] = network.slot_head.location_logits(states[:, -1]).argmax(-1) - half
    for b, one in enumerate(found):
        same = ((one.scores - score[b]).abs() < 1e-5) & (one.labels == label[b])
        assert any(torch.equal(one.bins[i], bins[b, 0]) for i in same.nonzero()[:, 0])


def test_boxes_are_where_the_bins_say(network):
    network.config = dataclasses.replace(network.config, coordinate_window=0)
    [one] = find_in_sequence(network, pictures(1), [Instruction(classes=NAMES)], top=5)
    places = (one.bins / bins_per_unit(network) + CENTRE).clamp(0, 1)
    low, high = torch.minimum(places[:, :2], places[:, 2:]), torch.maximum(places[:, :2], places[:, 2:])
    torch.testing.assert_close(one.boxes, torch.cat([low, high], 1))
    assert len(one.scores) == 5 and (one.scores.diff() <= 0).all()


def test_it_learns_one_picture_by_heart(network):
    """Steps on one batch lower the loss of the sequence."""
    network.train()
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    values = []
    for _ in range(25):
        losses = sequence_loss(network, two_pictures())
        values.append((losses["class"] + losses["location"]).item())
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
    assert values[-1] < 0.8 * values[0]


def test_spread_is_refused(network):
    with pytest.raises(ValueError, match="spread"):
        find_in_sequence(network, pictures(1), [Instruction(classes=NAMES)], spread=True)
