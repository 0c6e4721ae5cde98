"""Known names: rivals of the listed ones in the scores, kept in the weights folder, learned in training."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_network import NAMES, pictures, small_network, two_pictures

from visionllm.instruction import Instruction
from visionllm.model.known_names import FILE, probability_of_listed, read_names, rivals
from visionllm.model.network import Network
from visionllm.train.losses import set_loss

KNOWN = ("dog", "Teddy Bear", "truck", "spoon")


@pytest.fixture
def knowing():
    network = small_network(known_power=0.5)
    network.known_names = KNOWN
    return network


def test_rivals_are_the_known_names_that_a_prompt_does_not_list():
    mask = rivals(KNOWN, [("teddy bear", "cup"), (), ("DOG", "truck", "spoon", "teddy bear")])
    assert mask.tolist() == [[True, False, True, True], [True] * 4, [False] * 4]
    assert rivals((), [("dog",)]).shape == (1, 0)
    assert rivals(("Dog", "cat", "dog"), [("DOG",)]).tolist() == [[False, True, False]]


def test_probability_against_the_definition():
    generator = torch.Generator().manual_seed(0)
    features, listed, known = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 3, 8), (2, 4, 8), (5, 8))
    )
    listed_mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    rival_mask = torch.tensor([[True, False, True, True, True], [False, False, True, True, False]])
    found = probability_of_listed(features, listed, listed_mask, known, rival_mask)
    for b in range(2):
        rows = torch.cat([listed[b, listed_mask[b]], known[rival_mask[b]]])
        expected = (features[b] @ rows.T / 8**0.5).softmax(-1)[:, : listed_mask[b].sum()]
        torch.testing.assert_close(found[b][:, listed_mask[b]].double(), expected, rtol=1e-5, atol=1e-7)
        assert (found[b][:, ~listed_mask[b]] == 0).all()


def test_without_any_name_the_probability_is_zero():
    found = probability_of_listed(
        torch.randn(1, 2, 4), torch.randn(1, 3, 4), torch.zeros(1, 3, dtype=torch.bool), torch.zeros(0, 4),
        torch.zeros(1, 0, dtype=torch.bool),
    )  # fmt: skip
    assert found.tolist() == [[[0.0] * 3] * 2]


def test_scores_fall_by_the_probability_to_the_power(knowing):
    instruction = [Instruction(classes=NAMES)]
    with_rivals = knowing.find(pictures(1), instruction)[0]
    knowing.config = dataclasses.replace(knowing.config, known_power=0.0)
    without = knowing.find(pictures(1), instruction)[0]
    assert with_rivals.scores.sum() < without.scores.sum()
    knowing.config = dataclasses.replace(knowing.config, known_power=1.0)
    fully = knowing.find(pictures(1), instruction)[0]

    def by_place(found):
        rows = zip(found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True)
        return {(tuple(box), label): score for box, label, score in rows}

    plain, half, full = map(by_place, (without, with_rivals, fully))
    assert plain.keys() == half.keys() == full.keys()
    for place, score in plain.items():
        assert half[place] == pytest.approx((score * full[place]) ** 0.5, rel=1e-4)


def test_the_folder_keeps_the_names(knowing, tmp_path):
    knowing.save_pretrained(tmp_path)
    assert read_names(tmp_path / FILE) == KNOWN
    loaded = Network.from_pretrained(tmp_path)
    assert loaded.known_names == KNOWN
    found, expected = (n.find(pictures(1), [Instruction(classes=NAMES)])[0] for n in (loaded, knowing))
    assert torch.equal(found.scores, expected.scores)
    loaded.known_names = ()
    loaded.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize(("text", "line"), [("dog\n\ncat\n", 2), ("dog\ncat\ndog\n", 3)])
def test_a_broken_file_is_refused(tmp_path, text, line):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=rf"{FILE}, line {line}: expected a name that is new"):
        read_names(tmp_path / FILE)


@torch.no_grad()
def test_features_follow_the_weights(knowing):
    before = knowing.known_features()
    assert knowing.known_features() is before  # kept while nothing trains
    knowing.train()
    for parameter in knowing.text_encoder.parameters():
        parameter.mul_(1.5)
    knowing.eval()
    changed = knowing.known_features()
    assert not torch.equal(changed, before)
    knowing.text_encoder.norm.weight.mul_(1.5)  # in place, while nothing trains
    assert not torch.equal(knowing.known_features(), changed)


def test_a_loss_may_follow_a_prediction(knowing):
    """What prediction has kept is no obstacle to gradients."""
    knowing.find(pictures(1), [Instruction(classes=NAMES)])
    set_loss(knowing, two_pictures())["total"].backward()
    for parameter in knowing.text_encoder.parameters():
        parameter.requires_grad_(False)
    knowing.find(pictures(1), [Instruction(classes=NAMES)])
    set_loss(knowing, two_pictures())["total"].backward()


def test_training_holds_objects_against_known_names():
    """More names to tell apart: the loss is higher, and the names' encodings get gradients from it."""
    network = small_network().train()
    torch.manual_seed(0)
    few = set_loss(network, two_pictures())["alignment"]
    network.known_names = (*KNOWN, *(f"thing {i}" for i in range(40)))
    torch.manual_seed(0)
    many = set_loss(network, two_pictures())["alignment"]
    assert many > few
