"""New rows beside published embeddings: of their mean and spread, the published ones untouched."""

from __future__ import annotations

import pytest
import torch
from published_files import published
from small_network import small_network

from visionllm.convert.gguf_file import GGUFFile
from visionllm.model.new_rows import fit_new_rows
from visionllm.model.slots import SlotFormat, class_token_embedding


def slot_inputs(network) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 12, network.config.dim, generator=generator)
    boxes = torch.rand(1, 12, 4, generator=generator)
    return network.slot_queries(features, boxes, SlotFormat())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_have_the_published_mean_and_spread(dtype):
    network = small_network()
    torch.manual_seed(0)
    rows = (0.02 * torch.randn(9000, network.config.llm_dim) + 0.01).to(dtype)
    kept = rows.clone()
    network.class_tokens = class_token_embedding(network.config.llm_dim)
    network.slot_queries.objectness.weight.fill_(1.0)
    before = slot_inputs(network) - network.slot_queries.format.weight
    factor = fit_new_rows(rows, network.class_tokens, network.slot_queries)
    assert factor == pytest.approx(0.04, rel=0.02)
    assert torch.equal(rows, kept)
    fitted = network.class_tokens.weight
    assert fitted.std().item() == pytest.approx(0.02, rel=0.05)
    assert fitted.mean().item() == pytest.approx(0.01, rel=0.1)
    # What is added to a format token keeps its share of it.
    after = slot_inputs(network) - network.slot_queries.format.weight
    torch.testing.assert_close(after, before * factor, rtol=1e-4, atol=1e-6)
    assert network.slot_queries.objectness.weight[0, 0].item() == pytest.approx(factor)


def test_the_same_draws_give_the_same_rows():
    rows = torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
    networks = [small_network(), small_network()]
    for network in networks:
        fit_new_rows(rows, network.class_tokens, network.slot_queries)
    first, second = (network.class_tokens.weight for network in networks)
    assert torch.equal(first, second) and len(first.unique(dim=0)) == len(first)


def test_smollm2_embeddings_are_smaller_than_the_default_models():
    rows = GGUFFile(published("smollm2")).read("token_embd.weight")
    network = small_network(llm_dim=576, llm_heads=9, llm_kv_heads=3)
    assert fit_new_rows(rows, network.class_tokens, network.slot_queries) == pytest.approx(0.2014, abs=1e-3)


@pytest.mark.parametrize(
    "rows, expected",
    [
        (torch.zeros(5, 31), r"must be \[V, 32\], got \[5, 31\]"),
        (torch.zeros(0, 32), r"must be \[V, 32\], got \[0, 32\]"),
        (torch.zeros(5, 32), "a standard deviation of 0.0"),
        (torch.full((5, 32), float("nan")), "a standard deviation of nan"),
    ],
)
def test_rows_that_tell_nothing_are_refused(rows, expected):
    network = small_network()
    with pytest.raises(ValueError, match=expected):
        fit_new_rows(rows, network.class_tokens, network.slot_queries)
