"""What experiments switch: image tokens, location tokens, text, frozen parameters, randomness, silence."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from small_network import NAMES, pictures, small_network, two_pictures

from visionllm.data.mixture import Source, TrainingBatches
from visionllm.data.scenes import SceneDataset
from visionllm.instruction import Instruction
from visionllm.model.image_tokenizer import pooled
from visionllm.model.slots import expected_offsets, location_loss
from visionllm.train.build import freeze
from visionllm.train.losses import UnmatchedWeights, set_loss


@pytest.mark.parametrize(
    "changes",
    [
        {"image_tokens": "pooling", "num_queries": 9},
        {"location_bins": 257},
        {"location_bins": 2049},
        {"text_guidance": False},
        {"text_guidance": False, "class_rows": "static"},
    ],
)
def test_every_switch_trains_and_predicts(changes):
    network = small_network(**changes)
    losses = set_loss(network, two_pictures())
    assert all(value.isfinite().all() for value in losses.values())
    losses["total"].backward()
    found = network.eval().find(pictures(2), [Instruction(classes=NAMES)] * 2, spread=True)
    half = (network.config.location_bins - 1) // 2
    for one in found:
        assert one.boxes.isfinite().all() and one.bins.abs().max() <= half


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_tokens": "patches"}, "image_tokens must be"),
        ({"image_tokens": "pooling", "num_queries": 10}, "must be a square"),
        ({"location_bins": 512}, "must be odd"),
    ],
)
def test_values_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        small_network(**changes)


def test_pooling_is_the_mean_over_each_cell():
    """Two scales, of 4 × 4 and 2 × 2 positions, on a grid of 2 × 2 cells."""
    shapes = torch.tensor([[4, 4], [2, 2]])
    memory = torch.randn(1, 20, 3)
    features, boxes = pooled(memory, shapes, 2)
    fine, coarse = memory[0, :16].view(4, 4, 3), memory[0, 16:].view(2, 2, 3)
    expected = (fine[2:, :2].mean((0, 1)) + coarse[1, 0]) / 2
    torch.testing.assert_close(features[0, 2], expected)
    assert boxes[0, 2].tolist() == [0.25, 0.75, 0.5, 0.5]


def test_text_reaches_the_image_tokenizer_only_with_guidance():
    images = pictures(1)
    for guidance in (True, False):
        network = small_network(text_guidance=guidance)
        seen = []
        with torch.inference_mode():
            for names in (NAMES, NAMES[::-1]):
                _, _, tokens = network.see("find", images, [Instruction(classes=names[:2])], ("detection",))
                seen.append(tokens.memory)
        assert torch.equal(*seen) == (not guidance)


@pytest.mark.parametrize("bins", [257, 1025, 2049])
def test_location_tokens_mean_shares_of_the_picture(bins):
    half = (bins - 1) // 2
    logits = torch.full((1, bins), -50.0)
    logits[0, half + half // 4] = 50.0
    assert expected_offsets(logits, 6).item() == pytest.approx(0.25)
    assert expected_offsets(logits, 0).item() == pytest.approx(0.25)
    right = location_loss(logits / 10, torch.tensor([0.25 * half]), torch.ones(1))
    wrong = location_loss(logits / 10, torch.tensor([0.5 * half]), torch.ones(1))
    assert right < wrong


def test_frozen_parameters_get_no_gradient():
    network = small_network()
    freeze(network, ["llm.*.weight", "text_encoder.*"])
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert "llm.layers.0.q.weight" in frozen and "text_encoder.position" in frozen
    assert not any("lora" in name for name in frozen)
    set_loss(network, two_pictures())["total"].backward()
    assert network.llm.layers[0].q.lora_b.grad is not None
    with pytest.raises(ValueError, match=r"got 'lm\.\*', which fits none"):
        freeze(network, ["lm.*"])


def test_silence_that_weighs_nothing_is_not_taught():
    """Without matched groups and with weight 0, the class loss is 0."""
    network = small_network()
    batch = two_pictures()
    batch.boxes = [rows[:0] for rows in batch.boxes]
    batch.labels = [rows[:0] for rows in batch.labels]
    assert set_loss(network, batch, UnmatchedWeights(0.0, 0.0))["class"].item() == 0
    assert set_loss(network, batch)["class"].item() > 0


def batches(**changes):
    source = Source(SceneDataset("train", size=64), name="scenes")
    return TrainingBatches([source], seed=0, batch_size=2, image_size=64, **changes)


def test_prompts_without_randomness():
    fixed = batches(descriptions=1, prompts={"random_classes": False, "other_range": 0.0})
    asked = {one.text for step in range(3) for one in fixed[step].instructions}
    assert len(asked) == 1
    batch = fixed[0]
    names = SceneDataset("train", size=64).names
    assert batch.instructions[0].classes == names and not any(batch.unlisted_names)
    sample_names = {batch.instructions[0].classes[label] for label in np.concatenate(batch.labels)}
    assert sample_names <= set(names)
    usual = batches()
    assert len({one.text for step in range(3) for one in usual[step].instructions}) > 3
    assert len({one.classes for one in batches(descriptions=1)[0].instructions}) == 2


def test_too_many_names_to_list_them_all():
    source = SceneDataset("train", size=64)
    many = dataclasses.replace(Source(source, name="many"))
    source.names = tuple(map(str, range(600)))
    with pytest.raises(ValueError, match="random_classes: without it a source may have 512 names, got 600"):
        TrainingBatches([many], seed=0, batch_size=1, image_size=64, prompts={"random_classes": False})
