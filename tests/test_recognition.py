"""The recognition objective: which names at which objects, what it trains, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from small_network import NAMES, small_network, train_batch, two_pictures

from visionllm.train.recognition import recognition_loss

ALL_NAMES = tuple(sorted({*NAMES, "truck", "bicycle"}))


def test_it_trains_the_backbone_the_pyramid_and_the_text_encoder_alone():
    network = small_network()
    losses = recognition_loss(network, two_pictures(), ALL_NAMES)
    losses["total"].backward()
    reached = {
        name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    for part in ("image_tokenizer.lateral", "image_tokenizer.coarsest", "text_encoder", "alignment.encoder"):
        assert any(name.startswith(part) for name in reached), part
    assert any(".backbone." in name for name in reached)
    for part in (
        "llm.",
        "slot_head.",
        "image_tokenizer.decoder.",
        "image_tokenizer.encoder.",
        "alignment.decoder",
    ):
        assert not any(name.startswith(part) for name in reached), part


def test_names_are_learned_at_their_objects():
    torch.manual_seed(0)
    network = small_network()
    batch = two_pictures()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 3e-3)
    first = recognition_loss(network, batch, ALL_NAMES)["total"].item()
    for _ in range(30):
        losses = recognition_loss(network, batch, ALL_NAMES)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
    assert losses["total"].item() < first / 2
    assert losses["metric/name_accuracy"] == 1.0  # three listed objects and the unlisted one


def test_only_what_lies_at_the_object_counts():
    network = small_network()
    batch = train_batch(boxes=[[[0.25, 0.25, 0.1, 0.1]]], labels=[[0]])
    here = recognition_loss(network, batch, ALL_NAMES)["total"].item()
    batch.boxes[0] = batch.boxes[0] + 0.5
    batch.boxes[0][:, 2:] -= 0.5
    assert recognition_loss(network, batch, ALL_NAMES)["total"].item() != here


def test_a_batch_without_objects_has_a_loss_of_zero_and_gradients():
    network = small_network()
    losses = recognition_loss(network, train_batch(boxes=[[], []], labels=[[], []]), ALL_NAMES)
    losses["total"].backward()
    assert losses["total"].item() == 0
    assert losses["metric/name_accuracy"].item() == 0


def test_an_unknown_name_is_named():
    with pytest.raises(ValueError, match="'truck'"):
        recognition_loss(small_network(), two_pictures(), NAMES)


def test_the_router_learns_which_pictures_are_photos():
    torch.manual_seed(0)
    network = small_network(keep_pretrained=True)
    with torch.no_grad():  # a random trunk's features are too small to learn from
        for parameter in network.image_tokenizer.backbone.parameters():  # with those that both trunks share
            parameter.mul_(2.0)
    batch = two_pictures()
    assert batch.photo == [False, True]
    first = recognition_loss(network, batch, ALL_NAMES)
    assert first["total"].item() == pytest.approx((first["recognition"] + first["router"]).item())
    optimizer = torch.optim.AdamW(network.image_tokenizer.router.parameters(), 0.3)
    for _ in range(60):
        loss = recognition_loss(network, batch, ALL_NAMES)["router"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _, drawing, _ = network.image_tokenizer.pyramid(torch.from_numpy(batch.images))
    assert loss.item() < 0.3 < first["router"].item()
    assert (drawing > 0).tolist() == [True, False]
