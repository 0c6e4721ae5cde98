"""A tiny run that pins some logits and ten training losses (the idea is llm.c's `test_gpt2.c`).

What changes these numbers changes what trained weights mean, or how they are trained. When that is intended:
`PYTHONPATH=python python tests/test_network_golden.py` prints the new ones.
"""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from small_network import NAMES, SMALL, pictures, small_network, two_pictures

from visionllm.instruction import Instruction
from visionllm.model.network import Network

# Another CPU sums in another order. With weights off by a millionth, and with AVX-512, AVX2 and neither,
# logits came out within 1e-5 and losses within 2e-5 of these. Small plain steps keep it so: with AdamW or
# larger steps the choice of proposals, a matter of rank, turns such differences into several per cent.
LOGIT_TOLERANCE, LOSS_TOLERANCE = 1e-4, 5e-4
LOGITS = {
    "text": [0.1817, 0.90664, -1.35137, -0.13089],
    "proposals": [0.73156, -0.48348, 0.00109, -0.61733, -0.37398],
    "boxes": [0.40062, 0.12617, 0.22003, 0.16322],
    "objectness": [-0.55912, -0.39446, -0.42453, -0.48595],
    "classes": [0.52671, 0.54563, 0.62228, 0.65945, 0.6387, -0.1378],
    "locations": [-0.2369, -0.16204, 1.13869, -0.1419, 0.71214],
}
LOSSES = [39.8389, 39.0681, 39.8766, 40.5428, 40.4387, 40.2304, 39.1733, 38.8788, 39.778, 38.3132]


def golden_network() -> Network:
    """Weights from NumPy's frozen generator, by name: no order of construction and no initialiser matters."""
    network = small_network()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(parameter.shape))
            fan_in = np.prod(parameter.shape[1:])
            if parameter.ndim > 1:
                values *= (2 / fan_in) ** 0.5 if ".backbone." in name else 0.5 / fan_in**0.5
            else:
                values = 0.1 * values + (name.endswith("norm.weight") or name.endswith("1.weight"))
            parameter.copy_(torch.from_numpy(values))
    return network


@torch.no_grad()
def logits() -> dict[str, list[float]]:
    network = golden_network()
    prompts = network.tokenizer.prompts([Instruction(classes=NAMES)] * 2, SMALL.num_queries)
    text = network.encode_text(prompts)
    tokens = network.image_tokens(pictures(2), text)
    reading = network.read_slots(prompts, text, tokens)
    found, boxes = reading.logits, reading.boxes
    return {
        "text": text.tokens[0, 3, :4].tolist(),
        "proposals": tokens.proposal_objectness[1, ::20].tolist(),
        "boxes": boxes[1, 2].tolist(),
        "objectness": tokens.objectness[-1][0, ::3].tolist(),
        "classes": found.classes[1, 3].tolist(),
        "locations": found.locations[0, 4, 2, ::205].tolist(),
    }


def training_losses() -> list[float]:
    network = golden_network().train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.004)
    batch, totals = two_pictures(), []
    for step in range(10):
        torch.manual_seed(step)
        total = network.loss(batch)["total"]
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        totals.append(total.item())
    return totals


def test_logits():
    found = logits()
    assert found.keys() == LOGITS.keys()
    for part, expected in LOGITS.items():
        assert found[part] == pytest.approx(expected, abs=LOGIT_TOLERANCE), part


def test_training_losses():
    found = training_losses()
    assert found == pytest.approx(LOSSES, rel=LOSS_TOLERANCE)


if __name__ == "__main__":
    for part, values in logits().items():
        print(f"    {part!r}: {[round(v, 5) for v in values]},")
    print(f"LOSSES = {[round(v, 4) for v in training_losses()]}")
