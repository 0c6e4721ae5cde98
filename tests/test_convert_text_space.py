"""A detector between text encoders: what image tokens are named by stays the same for known names."""

from __future__ import annotations

import copy

import pytest
import torch
from small_network import small_network

from visionllm.convert.text_space import carry_names

KNOWN = tuple(
    "dog,cat,red car,teddy bear,person,cup,sheep,bear,fire,wine glass,cupcake,tree,house,boat".split(",")
)


def networks():
    old, new = small_network(seed=1), small_network(seed=2, text_dim=48)
    old.known_names = KNOWN
    new.image_tokenizer.load_state_dict(
        {
            name: value
            for name, value in copy.deepcopy(old.image_tokenizer.state_dict()).items()
            if "fusion.key_value" not in name
        },
        strict=False,
    )
    return old, new


@torch.no_grad()
def chances(network, features):
    names = network.encode_names(network.name_ids(KNOWN))
    return {
        part: (network.alignment[part](features) @ names.T / names.shape[1] ** 0.5).softmax(-1)
        for part in network.alignment
    }


def test_known_names_keep_their_likeness():
    old, new = networks()
    features = 3 * torch.randn(40, old.config.dim, generator=torch.Generator().manual_seed(0))
    before = chances(new, features)
    explained = carry_names(old, new)
    assert 0.5 < explained <= 1 and new.known_names == KNOWN
    wanted, found = chances(old, features), chances(new, features)
    for part in wanted:
        far = (before[part] - wanted[part]).abs().mean()
        near = (found[part] - wanted[part]).abs().mean()
        assert near < far / 3, (part, near, far)
        same = (found[part].argmax(1) == wanted[part].argmax(1)).float().mean()
        assert same > 0.8, (part, same)


@torch.no_grad()
def test_the_fusion_reads_names_as_before():
    old, new = networks()
    x = torch.randn(1, 20, old.config.dim, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, len(KNOWN), dtype=torch.bool)

    def fused(network):
        names = network.encode_names(network.name_ids(KNOWN))
        return network.image_tokenizer.fusion(x, names[None], mask) - x

    carry_names(old, new)
    wanted, found = fused(old), fused(new)
    assert (found - wanted).norm() < 0.4 * wanted.norm()


def test_without_known_names_there_is_nothing_to_carry():
    old, new = networks()
    old.known_names = ()
    with pytest.raises(ValueError, match="known names"):
        carry_names(old, new)
