"""Names in texts: where they stand, and what is told there."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from small_network import SMALL, pictures, small_network, text_batch

from visionllm.english import plural
from visionllm.instruction import Instruction
from visionllm.instruction.instruction import TASKS
from visionllm.model.mentions import (
    AMOUNTS,
    MOST,
    NOUN_FLOOR,
    RELATIONS,
    STEEPNESS,
    THRESHOLDS,
    MentionFinder,
    NameLookup,
    amounts_of,
    counts_of,
    noun_factor,
    relation_of,
)
from visionllm.model.scores import token_scores
from visionllm.model.told import name_chances, told_of
from visionllm.model.word_tokens import MEASURES, colours_at
from visionllm.tokenizer import PADDING, pad

KNOWN = (
    "cat",
    "cat face",
    "red circle",
    "blue circle",
    "person",
    "teddy bear",
    "bear",
    "wine glass",
    "glasses",
)


def names_in(finder, tokenizer, text):
    """[(last word, names)] of a text's mentions."""
    ids = tokenizer.encode(text)
    found = []
    for mention in finder.find(torch.tensor([ids])):
        assert mention.row == 0
        words = tokenizer.decode(ids[: mention.column + 1]).split(" ")
        names = finder.fits[mention.phrase].nonzero().flatten().tolist()
        found.append((words[-1], {KNOWN[v] for v in names}))
    return found


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (" Where is the cat?", [("cat", {"cat"})]),
        (" Is the cat face on the left?", [("cat", {"cat"}), ("face", {"cat face"})]),
        (" How many circles are there?", [("circles", {"red circle", "blue circle"})]),
        (" How many red circles?", [("circles", {"red circle"})]),
        (" Do you see people or a person?", [("people", {"person"}), ("person", {"person"})]),
        (" Is the bear larger than the teddy bear?", [("bear", {"bear"}), ("bear", {"teddy bear"})]),
        (" What colour are the glasses?", [("glasses", {"glasses"})]),
        (" Is there a catalogue of bearings, or a cat's?", [("cat", {"cat"})]),
        (" Cats? cats, cats", [("cats", {"cat"}), ("cats", {"cat"})]),
        (" Nothing at all.", []),
        ("", []),
    ],
)
def test_a_mention_is_the_longest_phrase_that_ends_there(tokenizer, text, wanted):
    finder = MentionFinder(KNOWN, tokenizer)
    assert names_in(finder, tokenizer, text) == wanted


def test_anything_is_every_name(tokenizer):
    finder = MentionFinder(KNOWN, tokenizer)
    for word in ("object", "things"):
        assert names_in(finder, tokenizer, f" How many {word} are there?")[-1][1] == set(KNOWN)


def test_every_known_name_is_found_alone_and_in_the_plural():
    network = small_network()
    names = ("dog", "fire hydrant", "maple leaf", "ballet shoes", "pile of poo", "volcano")
    finder = MentionFinder(names, network.tokenizer)
    for v, name in enumerate(names):
        for text in (name, plural(name)):
            ids = network.tokenizer.encode(f" two {text}.")
            *_, last = finder.find(torch.tensor([ids]))
            assert finder.fits[last.phrase].nonzero().flatten().tolist() == [v]


def test_no_known_names(tokenizer):
    finder = MentionFinder((), tokenizer)
    assert finder.find(torch.tensor([tokenizer.encode(" a cat")])) == []
    assert finder.find(torch.full((2, 1), PADDING)) == []


def test_amounts_beside_their_description():
    weight = torch.rand(7, 11, generator=torch.Generator().manual_seed(0))
    found = amounts_of(weight, counts_of(weight)).double().numpy()
    assert found.shape == (7, AMOUNTS)
    w = weight.double().numpy()
    for n in range(7):
        counts = [(1 / (1 + np.exp(-(w[n] - t) * STEEPNESS))).sum() for t in THRESHOLDS]
        wanted = [max(0.0, 1 - abs(c - k)) for c in counts for k in range(MOST + 1)]
        wanted += [c / MOST for c in counts] + [w[n].sum() / MOST, w[n].max()]
        np.testing.assert_allclose(found[n], wanted, atol=1e-5)
    none = torch.zeros(0, 5)
    assert amounts_of(none, counts_of(none)).shape == (0, AMOUNTS)
    assert amounts_of(none.T, counts_of(none.T)).isfinite().all()


def test_what_came_before_a_mention(tokenizer):
    """Not a name within the same name; and PADDING ends a text."""
    finder = MentionFinder(KNOWN, tokenizer)
    ids = tokenizer.encode(" Is the cat face left of the person or below the bear?")
    found = finder.find(torch.tensor([ids]))
    assert [[KNOWN[v] for v in finder.fits[one.phrase].nonzero()] for one in found] == [
        ["cat"], ["cat face"], ["person"], ["bear"],
    ]  # fmt: skip
    assert [one.previous for one in found] == [-1, -1, 1, 2]
    two = torch.tensor([[*ids, PADDING, *ids], [*ids, *[PADDING] * (len(ids) + 1)]])
    assert [one.previous for one in finder.find(two)] == [-1, -1, 1, 2, -1, -1, 5, 6, -1, -1, 9, 10]


def test_what_an_expression_is_about(tokenizer):
    finder = MentionFinder(KNOWN, tokenizer)
    texts = [
        "the cat face left of the person",
        "leftmost red circle",
        "the biggest thing",
        "the catalogue",
        "",
    ]
    nouns = finder.nouns(pad([tokenizer.encode_name(text) for text in texts], PADDING))
    found = [{KNOWN[v] for v in finder.fits[noun].nonzero()} if noun >= 0 else None for noun in nouns]
    assert found == [{"cat face"}, {"red circle"}, set(KNOWN), None, None]


def test_the_factor_of_nouns_beside_its_description():
    generator = torch.Generator().manual_seed(0)
    names = torch.randn(2, 6, 4, generator=generator).softmax(-1)
    fits = torch.tensor([[True, False, False, False], [False, True, True, False]])
    nouns = torch.tensor([[0, 1, -1], [1, -1, -1]])
    found = noun_factor(names, fits, nouns, 0.5)
    for b in range(2):
        for k in range(3):
            chance = torch.ones(6)
            if nouns[b, k] >= 0:
                chance = names[b, :, fits[nouns[b, k]]].sum(-1) + NOUN_FLOOR
            torch.testing.assert_close(found[b, :, k], (chance / chance.max()).sqrt())
    assert noun_factor(names, fits[:0], nouns[:, :0], 0.5).shape == (2, 6, 0)


@torch.no_grad()
def test_expressions_are_scored_by_their_nouns_and_names_are_not():
    network = small_network(tasks=TASKS)
    network.known_names = KNOWN
    asked = [
        Instruction("grounding", classes=("the bear on the left", "what barks")),
        Instruction(classes=KNOWN[:2]),
    ]

    def scores(power):
        network.config = dataclasses.replace(network.config, noun_power=power)
        prompts, text, tokens = network.see("find", pictures(2), asked, ("grounding", "detection"))
        probabilities = network.read_slots(prompts, text, tokens).answers(6).probabilities
        return token_scores(network, prompts, text, tokens, asked, probabilities), tokens

    (plain, tokens), (found, _) = scores(0.0), scores(0.7)
    names = name_chances(network, tokens)
    chance = names[0, :, KNOWN.index("bear")] + NOUN_FLOOR
    torch.testing.assert_close(found[0, :, 0], plain[0, :, 0] * (chance / chance.max()) ** 0.7)
    assert torch.equal(found[0, :, 1:], plain[0, :, 1:]) and torch.equal(found[1], plain[1])


def test_relations_beside_their_description():
    generator = torch.Generator().manual_seed(0)
    measures = torch.randn(3, MEASURES, generator=generator)
    counts = torch.rand(3, len(THRESHOLDS), generator=generator) * 4
    found = relation_of(measures, counts, torch.tensor([-1, 0, 1])).double().numpy()
    assert found.shape == (3, RELATIONS)
    m, c = measures.double().numpy(), counts.double().numpy()
    for n in range(3):
        before, counted = (m[n - 1], c[n] - c[n - 1]) if n else (np.zeros(MEASURES), np.zeros(len(c[n])))
        step = m[n] - before if n else before
        wanted = [m[n], before, step, np.tanh(8 * step), counted / 2, np.tanh(2 * counted), [float(n > 0)]]
        np.testing.assert_allclose(found[n], np.concatenate(wanted), atol=1e-5)
    assert relation_of(measures[:0], counts[:0], torch.zeros(0).long()).shape == (0, RELATIONS)


def test_what_is_found_is_the_likely_tokens():
    lookup = NameLookup(dataclasses.replace(SMALL, word_layers=1))
    told = torch.randn(1, 6, SMALL.llm_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        lookup.found.weight.copy_(torch.eye(SMALL.llm_dim))
        likeness = torch.tensor([[0.01, 0.01, 0.9, 0.01, 0.01, 0.01]])
        nothing_before = torch.tensor([-1])
        found = lookup(
            torch.randn(1, SMALL.llm_dim), told, torch.zeros(1, 6, MEASURES), likeness, nothing_before
        )
    torch.testing.assert_close(found, told[:, 2], atol=0.05, rtol=0.02)


def asked(network, *questions):
    instructions = [Instruction("vqa", question=question) for question in questions]
    prompts = network.tokenizer.prompts(instructions, network.config.num_queries)
    images = pictures(len(questions))
    tokens = network.image_tokens(images, network.encode_text(prompts))
    return prompts, tokens, colours_at(images, tokens.boxes[-1])


def stirred_network():
    network = small_network(tasks=TASKS, word_layers=2)
    network.known_names = ("cat", "dog")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.name_lookup.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network


@torch.no_grad()
def test_likeness_is_that_a_token_is_an_object_of_the_name():
    network = stirred_network()
    prompts, tokens, colours = asked(network, "Is there a dog?", "Where?")
    told = told_of(network, prompts, tokens, colours)
    (row,), (column,) = told.rows.tolist(), told.columns.tolist()
    assert row == 0 and network.tokenizer.decode(prompts.ids[0, : column + 1].tolist()).endswith("dog")
    features = network.alignment["decoder"](tokens.features[0, : network.config.num_queries])
    names = network.encode_names(network.name_ids(("cat", "dog")))
    chance = (features @ names.T / names.shape[1] ** 0.5).softmax(-1)[:, 1]
    objectness = tokens.objectness[-1][0, : network.config.num_queries].sigmoid()
    torch.testing.assert_close(told.likeness[0], chance * objectness, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_mention_changes_what_follows_it_alone():
    network = stirred_network()
    prompts, tokens, colours = asked(network, "Left of the dog or of the cat?")
    told = told_of(network, prompts, tokens, colours)
    first = min(told.columns.tolist())
    x, mask = network.embed(prompts, tokens), prompts.ids != PADDING
    none = x.new_zeros(1, 0, 1, x.shape[-1])
    with_names, _ = network.llm(x, mask, none, words=True, seen=told)
    without, _ = network.llm(x, mask, none, words=True, seen=dataclasses.replace(told, lookup=None))
    assert torch.equal(with_names[:, :first], without[:, :first])
    assert not torch.allclose(with_names[:, first:], without[:, first:], atol=1e-3)


@torch.no_grad()
def test_reading_with_a_cache_is_the_pass_of_training():
    from visionllm.model.llm import KVCache

    network = stirred_network()
    prompts, tokens, colours = asked(network, "Left of the dog or of the cat?", "How many dogs are there?")
    told = told_of(network, prompts, tokens, colours)
    x, mask = network.embed(prompts, tokens), prompts.ids != PADDING
    states, _ = network.llm(x, mask, x.new_zeros(2, 0, 1, x.shape[-1]), words=True, seen=told)
    cache = KVCache(2, x.shape[1], network.device)
    read = network.llm.read(x, mask, cache, words=True, seen=told)
    torch.testing.assert_close(read[mask], states[mask], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_further_questions_are_looked_up_and_answers_are_not():
    """Where a question stands in a training text, as if it were a prompt's."""
    network = stirred_network()
    prompts, tokens, colours = asked(network, "What is it?", "Who is it?")
    assert len(told_of(network, prompts, tokens, colours).rows) == 0
    further = pad([network.tokenizer.encode(" Where is the cat?"), ()], PADDING)
    told = told_of(network, prompts, tokens, colours, further)
    length = int((prompts.ids[0] != PADDING).sum())
    assert told.rows.tolist() == [0]
    assert told.columns.tolist() == [length + network.tokenizer.encode(" Where is the cat").__len__() - 1]


def test_training_reaches_the_lookup_through_questions_alone():
    network = stirred_network().train()
    batch = text_batch("captioning")
    batch.turns = [[("Where is the cat?", "left")], []]
    network.loss(batch)["total"].backward()
    assert network.name_lookup.found.weight.grad.abs().max() > 0
    network.zero_grad()
    batch.turns = [[("Where is it?", "on the cat")], []]
    network.loss(batch)["total"].backward()
    grad = network.name_lookup.found.weight.grad
    assert grad is None or not grad.any()
