"""The low-rank adapter: y = x Wᵀ + s·(x Aᵀ) Bᵀ, and where the LLM has one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_network import SMALL

from visionllm.model.llm import LLM
from visionllm.model.lora import LoRALinear
from visionllm.ops import use_operators


@pytest.mark.parametrize("bias", [False, True])
def test_it_equals_the_merged_layer(bias):
    torch.manual_seed(0)
    layer = LoRALinear(12, 7, rank=3, alpha=6.0, bias=bias)
    torch.nn.init.normal_(layer.lora_b)
    merged = layer.weight.double() + 6.0 / 3 * layer.lora_b.double() @ layer.lora_a.double()
    x = torch.randn(4, 5, 12)
    expected = x.double() @ merged.T + (layer.bias.double() if bias else 0)
    torch.testing.assert_close(layer(x).double(), expected, atol=2e-6, rtol=1e-6)
    assert layer(x[:0]).shape == (0, 5, 7)


def test_it_adds_nothing_at_first():
    torch.manual_seed(0)
    layer = LoRALinear(12, 7, rank=3, alpha=16.0)
    x = torch.randn(5, 12)
    expected = torch.nn.functional.linear(x, layer.weight)
    with use_operators("reference"):
        assert torch.equal(layer(x), expected)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-6)  # the kernel sums in another order
    layer(x).sum().backward()
    assert layer.lora_b.grad.abs().sum() > 0  # but it learns from the first step


def test_gradients():
    torch.manual_seed(0)
    layer = LoRALinear(4, 3, rank=2, alpha=1.0).double()
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def forward(*_values):
        return layer(x)

    assert torch.autograd.gradcheck(forward, (x, layer.weight, layer.lora_a, layer.lora_b))


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank must be at least 1, got {rank}"):
        LoRALinear(4, 4, rank=rank, alpha=1.0)


@pytest.mark.parametrize("targets", [(), ("q", "v"), ("q", "k", "v", "o", "gate", "up", "down")])
def test_the_llm_has_adapters_where_asked(targets):
    llm = LLM(dataclasses.replace(SMALL, lora_targets=targets))
    for layer in llm.layers:
        adapted = {name for name, module in layer.named_children() if isinstance(module, LoRALinear)}
        assert adapted == set(targets)


def test_rank_zero_removes_the_adapters():
    assert not [
        name for name, _ in LLM(dataclasses.replace(SMALL, lora_rank=0)).named_parameters() if "lora" in name
    ]
