"""Losses of captions, answers and output formats: finite, felt by what writes, from the texts alone."""

from __future__ import annotations

import pytest
import torch
from small_network import small_network, text_batch

from visionllm.instruction.instruction import TASKS
from visionllm.train.text_loss import FORMAT_WEIGHT, joined


@pytest.fixture(scope="module")
def network():
    return small_network(tasks=TASKS).train()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("task", ["vqa", "captioning"])
def test_what_writes_learns(network, task, autocast):
    """No names are listed: their places in the text features must not carry anything into the gradients."""
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = network.loss(text_batch(task))
    losses["total"].backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
    for name in ("text_head.query.weight", "embedding.weight", "text_encoder.position"):
        assert gradients[name].abs().max() > 0, name


@torch.no_grad()
def test_formats_count_beside_the_answers(network):
    alone = network.loss(text_batch())
    pairs = [
        ("Give me the corners.", "(c, x1, y1, x2, y2)"),
        ("Three points each.", "(c, x1, y1, x2, y2, x3, y3)"),
    ]
    both = network.loss(text_batch(formats=pairs))
    torch.testing.assert_close(both["text"], alone["text"])
    torch.testing.assert_close(both["total"], both["text"] + both["format"])
    one = [network.loss(text_batch(formats=[pair]))["format"] for pair in pairs]
    weights = [(len(network.tokenizer.answer_ids(format)) - 1) ** 0.5 for _, format in pairs]
    mean = (one[0] * weights[0] + one[1] * weights[1]) / sum(weights)
    torch.testing.assert_close(both["format"], mean, rtol=1e-4, atol=1e-5)
    assert 0 < FORMAT_WEIGHT <= 1


def test_it_can_be_learned():
    """Two pictures, two answers: a few steps drive the loss down."""
    torch.manual_seed(0)
    network = small_network(tasks=TASKS).train()
    batch = text_batch()
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = network.loss(batch)["total"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_answers_stand_directly_behind_their_prompts():
    first = torch.tensor([[1, 2, 3], [4, -1, -1], [5, 6, -1]])
    second = torch.tensor([[10, 11], [12, 13], [14, -2]])
    lengths = torch.tensor([3, 1, 2])
    found = joined(first, second, lengths)
    assert found.tolist() == [[1, 2, 3, 10, 11], [4, 12, 13, -1, -1], [5, 6, 14, -2, -1]]
    wide = joined(first[..., None].expand(-1, -1, 4), second[..., None].expand(-1, -1, 4), lengths)
    assert torch.equal(wide, found[..., None].expand(-1, -1, 4))
    assert joined(first, second[:, :0], lengths).tolist() == first.tolist()
