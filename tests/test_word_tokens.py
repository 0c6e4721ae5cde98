"""Layers for words: what they are told of image tokens, and that nothing else changes by them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from small_network import SMALL, pictures, small_network, text_batch

from visionllm.data.train_batch import RepeatedBatches
from visionllm.instruction import Instruction
from visionllm.instruction.instruction import TASKS
from visionllm.model.llm import apply_rope, rope_table
from visionllm.model.network import build_network
from visionllm.model.told import known_words, name_chances, told_of
from visionllm.model.word_tokens import COLOUR_GRID, COLOUR_SHARE, MEASURES, colours_at, measures_of
from visionllm.tokenizer import IMAGE, PADDING
from visionllm.train.build import freeze, with_parts
from visionllm.train.text_loss import text_weights

SMALL_WORDS = dataclasses.replace(SMALL, llm_dim=128, llm_heads=4, llm_kv_heads=2, word_layers=1)
INSTRUCTIONS = [Instruction("vqa", question="What is it?"), Instruction("captioning")]
WORDS_ALONE = [
    *("image_tokenizer.*", "text_encoder.*", "embedding.*", "slot_queries.*", "slot_head.*", "alignment.*"),
    *("class_tokens.*", "llm.layers.*", "llm.norm.*"),
]


def seen_by(network, count=2):
    ids = network.tokenizer.prompts(INSTRUCTIONS[:count], network.config.num_queries)
    return ids, network.image_tokens(pictures(count), network.encode_text(ids))


def test_colours_are_the_pictures_at_a_grid_in_the_box():
    """Beside a bilinear reading in float64; places outside take the nearest pixel."""
    images = pictures(2, size=20)
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.6], [0.02, 0.9, 0.3, 0.4]], [[0.25, 0.75, 1e-3, 1e-3]] * 2])
    found = colours_at(images, boxes)
    assert found.shape == (2, 2, 3 * COLOUR_GRID**2)
    for b in range(2):
        pixels = images[b].double().numpy() / 127.5 - 1
        for m in range(2):
            cx, cy, w, h = boxes[b, m].double().tolist()
            for g in range(COLOUR_GRID**2):
                row, column = divmod(g, COLOUR_GRID)
                step = COLOUR_SHARE / COLOUR_GRID
                x = (cx + w * (step * (column + 0.5) - COLOUR_SHARE / 2)) * 20 - 0.5
                y = (cy + h * (step * (row + 0.5) - COLOUR_SHARE / 2)) * 20 - 0.5
                x, y = min(max(x, 0), 19), min(max(y, 0), 19)
                left, top = min(math.floor(x), 18), min(math.floor(y), 18)
                a, c = x - left, y - top
                wanted = (
                    (1 - c) * ((1 - a) * pixels[top, left] + a * pixels[top, left + 1])
                    + c * ((1 - a) * pixels[top + 1, left] + a * pixels[top + 1, left + 1])
                )  # fmt: skip
                np.testing.assert_allclose(found[b, m, 3 * g : 3 * g + 3].numpy(), wanted, atol=1e-5)


def test_measures_of_extreme_boxes_are_finite():
    boxes = torch.tensor([[[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]]])
    found = measures_of(boxes, torch.tensor([[-100.0, 100.0]]))
    assert found.shape == (1, 2, MEASURES) and found.isfinite().all()


@torch.no_grad()
def test_likely_names_are_weighted_words():
    """Word by word as their description says."""
    network = small_network(tasks=TASKS)
    network.known_names = ("cat", "fire extinguisher", "red heart")
    _, tokens = seen_by(network)
    features = tokens.features[:, : network.config.num_queries]
    names = network.encode_names(network.name_ids(network.known_names)).double()
    expected = torch.zeros(*features.shape[:2], network.config.llm_dim, dtype=torch.float64)
    for b in range(2):
        for i in range(features.shape[1]):
            seen = network.alignment["decoder"](features[b, i]).double()
            chances = (names @ seen / names.shape[-1] ** 0.5).softmax(0)
            for name, chance in zip(network.known_names, chances, strict=True):
                pieces = network.tokenizer.encode_name(name)
                words = network.embedding.weight[list(pieces)].double().sum(0) / len(pieces) ** 0.5
                expected[b, i] += chance * words
    torch.testing.assert_close(
        (name_chances(network, tokens) @ known_words(network)).double(), expected, rtol=1e-4, atol=1e-4
    )
    network.known_names = ("dog",)  # what was kept of the others is not used for it
    assert not torch.allclose(
        (name_chances(network, tokens) @ known_words(network)).double(), expected, atol=1e-3
    )


@torch.no_grad()
def test_they_are_told_of_image_tokens_alone():
    network = small_network(tasks=TASKS, word_layers=1)
    ids, tokens = seen_by(network)
    colours = colours_at(pictures(2), tokens.boxes[-1])
    is_image = ids.ids == IMAGE
    told = told_of(network, ids, tokens, colours).places
    assert not told[~is_image].any() and (told[is_image] != 0).any(-1).all()
    network.known_names = ("cat", "dog")
    assert not torch.equal(told_of(network, ids, tokens, colours).places, told)
    assert told_of(small_network(tasks=TASKS), ids, tokens, colours) is None


@torch.no_grad()
def test_at_first_they_change_nothing():
    network = small_network(tasks=TASKS)
    wider = with_parts(network, {"word_layers": 3}, None).eval()
    assert wider.config.word_layers == 3 and len(wider.llm.word_layers) == 3
    assert wider.write(pictures(2), INSTRUCTIONS) == network.write(pictures(2), INSTRUCTIONS)
    asked = ["Give me the corners."]
    assert wider.write_format(asked) == network.write_format(asked)


@torch.no_grad()
def test_they_start_by_matching_words():
    """Of forty tokens' keys, a query mostly goes best with that of the same words, near or far."""
    layer = build_network(SMALL_WORDS, small_network().tokenizer).llm.word_layers[0]
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(40, SMALL_WORDS.llm_dim, generator=generator)
    q, k, _ = layer.project(words[None], None)  # [1, T, H, D]
    for distance, least in ((0, 0.6), (30, 0.6), (100, 0.4)):
        table = rope_table(torch.tensor([distance]), layer.head_dim, 10000.0)
        turned = apply_rope(k[:, :, :1], tuple(t[None] for t in table))
        scores = q[0, :, 0] @ turned[0, :, 0].T
        share = (scores.argmax(1) == torch.arange(40)).float().mean()
        assert share > least, (distance, share)


@torch.no_grad()
def test_sets_of_objects_are_the_same_to_the_bit():
    """Whatever the layers for words have learned."""
    network = small_network(tasks=TASKS)
    wider = with_parts(network, {"word_layers": 2}, None).eval()
    for name, parameter in wider.named_parameters():
        if "word_" in name:
            parameter.add_(torch.randn_like(parameter))
    asked = [Instruction("detection", classes=("dog", "cat")), Instruction("grounding", classes=("a cup",))]
    for one, other in zip(network.find(pictures(2), asked), wider.find(pictures(2), asked), strict=True):
        for field in ("boxes", "scores", "labels", "points"):
            assert torch.equal(getattr(one, field), getattr(other, field)), field
    assert wider.write(pictures(2), INSTRUCTIONS) != network.write(pictures(2), INSTRUCTIONS)


def test_pieces_of_a_text_weigh_by_its_length():
    wanted = torch.tensor([[5, 6, 7, 8, PADDING, PADDING, 9], [PADDING, 4, 4, PADDING, PADDING, PADDING, 3]])
    expected = torch.tensor([[0.5] * 4 + [0, 0, 1], [0, 2**-0.5, 2**-0.5, 0, 0, 0, 1]])
    torch.testing.assert_close(text_weights(wanted), expected)
    assert not text_weights(torch.full((2, 3), PADDING)).any()


class ManyTurns:
    """Batches with two further questions a picture; counts how often one is made."""

    def __init__(self):
        self.made = 0

    def __getitem__(self, step):
        self.made += 1
        batch = text_batch()
        batch.turns = [[("where?", "left"), ("why?", "no"), (f"how many {step}?", "2")] for _ in range(2)]
        return batch


def test_batches_come_again_and_what_is_seen_of_them_is_kept():
    network = small_network(tasks=TASKS, word_layers=1).train()
    freeze(network, WORDS_ALONE)
    source = ManyTurns()
    batches = RepeatedBatches(source, 2, seed=0)
    first = batches[0]
    with torch.no_grad():
        loss = network.loss(first)["total"]
    assert first.seen is not None
    seen, turns = first.seen, first.turns
    batches[1]
    again = batches[2]
    assert source.made == 2 and again is first and again.seen is seen and len(again.images) == 0
    assert sorted(again.turns[0]) == sorted(turns[0])
    again.turns = turns
    with torch.no_grad():
        assert torch.equal(network.loss(again)["total"], loss)


@pytest.mark.parametrize("step", [0, 3, 8])
def test_their_order_is_a_function_of_the_step(step):
    """As resuming needs: whatever came before."""
    one, other = RepeatedBatches(ManyTurns(), 2, seed=1), RepeatedBatches(ManyTurns(), 2, seed=1)
    for earlier in range(step):
        one[earlier]
    assert one[step].turns == other[step].turns


def test_what_is_trained_is_not_kept():
    network = small_network(tasks=TASKS, word_layers=1).train()
    batch = RepeatedBatches(ManyTurns(), 1, seed=0)[0]
    network.loss(batch)["total"].backward()
    assert batch.seen is None
    assert network.image_tokenizer.queries.grad.abs().max() > 0


def test_colours_beside_padding_are_those_without():
    images = pictures(2, size=24)
    boxes = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1)) * 0.3 + 0.3
    boxes = torch.cat(
        [boxes, torch.tensor([[[0.9, 0.1, 0.4, 0.4], [0.05, 0.97, 0.3, 0.2]]] * 2)], 1
    )  # beyond
    sizes = torch.tensor([[16, 24], [24, 10]])
    found = colours_at(images, boxes, sizes)
    for b, (height, width) in enumerate(sizes.tolist()):
        alone = colours_at(images[b : b + 1, :height, :width], boxes[b : b + 1])
        torch.testing.assert_close(found[b : b + 1], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_lists_nothing_is_guided_by_all_known_names():
    network = small_network(tasks=TASKS)
    listing = [Instruction("detection", classes=("dog", "cat"))]
    unguided = [network.asked(asked)[1] for asked in (INSTRUCTIONS[1:], listing)]
    network.known_names = ("cat", "dog", "red heart")
    words, detection = (network.asked(asked)[1] for asked in (INSTRUCTIONS[1:], listing))
    known = network.encode_names(network.name_ids(network.known_names))
    assert words.mask.all() and torch.equal(words.tokens[0, -3:], known)
    assert torch.equal(words.tokens[:, :-3], unguided[0].tokens[:, : words.tokens.shape[1] - 3])
    assert torch.equal(detection.tokens, unguided[1].tokens)
