"""The parallel pass against an ordinary causal decoder that reads every group alone, in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_network import SMALL

from visionllm.model.llm import LLM, RMSNorm, apply_rope, rope_table

TOLERANCE = 2e-6  # of states of size 1, computed in fp32


def make_llm(**changes) -> LLM:
    torch.manual_seed(0)
    llm = LLM(dataclasses.replace(SMALL, **changes))
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return llm.eval()


def rotate(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """RoPE of one token in float64, by complex numbers: x [H, D]."""
    half = x.shape[-1] // 2
    frequency = torch.tensor([theta ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=torch.float64)
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(
        torch.ones(half).double(), position * frequency
    )
    return torch.cat([turned.real, turned.imag], -1)


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()


def weight_of(linear: torch.nn.Linear) -> torch.Tensor:
    """W, with the adapter folded in."""
    weight = linear.weight.double()
    if linear.lora_a is not None:
        weight = weight + linear.scale * linear.lora_b.double() @ linear.lora_a.double()
    return weight


@torch.no_grad()
def decode(llm: LLM, x: torch.Tensor) -> torch.Tensor:
    """A causal decoder over one sequence at positions 0, 1, …, token by token and head by head: x [T, C]."""
    x = x.double()
    for layer in llm.layers:
        q, k, v = (
            (norm(x, layer.attention_norm.weight) @ weight_of(linear).T).view(len(x), -1, llm.head_dim)
            for linear in (layer.q, layer.k, layer.v)
        )
        q = torch.stack([rotate(t, i, llm.theta) for i, t in enumerate(q)])
        k = torch.stack([rotate(t, i, llm.theta) for i, t in enumerate(k)])
        out = torch.empty_like(q)
        for i in range(len(x)):
            for head in range(layer.heads):
                shared = head * layer.kv_heads // layer.heads
                scores = (k[: i + 1, shared] @ q[i, head]) / llm.head_dim**0.5
                out[i, head] = scores.softmax(0) @ v[: i + 1, shared]
        x = x + out.flatten(1) @ weight_of(layer.o).T
        y = norm(x, layer.ffn_norm.weight)
        gate = y @ weight_of(layer.gate).T
        x = x + (gate * gate.sigmoid() * (y @ weight_of(layer.up).T)) @ weight_of(layer.down).T
    return norm(x, llm.norm.weight)


def inputs(lengths=(6, 3), groups=3, slots=5, seed=1):
    """prefix [B, P, C] with rubbish in its padding, mask [B, P], slots [B, G, S, C]"""
    generator = torch.Generator().manual_seed(seed)
    prefix = torch.randn(len(lengths), max(lengths), SMALL.llm_dim, generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    prefix[~mask] = 1e3
    return prefix, mask, torch.randn(len(lengths), groups, slots, SMALL.llm_dim, generator=generator)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"llm_kv_heads": 1},
        {"llm_kv_heads": 4},
        {"lora_targets": ("q", "k", "v", "o", "gate", "up", "down")},
        {"lora_rank": 0, "rope_theta": 100.0},
    ],
    ids=str,
)
@torch.no_grad()
def test_groups_decode_as_if_each_were_alone(changes):
    llm = make_llm(**changes)
    prefix, mask, slots = inputs()
    prefix_states, states = llm(prefix, mask, slots)
    assert states.shape == slots.shape and prefix_states.shape == prefix.shape
    for b in range(len(prefix)):
        length = int(mask[b].sum())
        for g in range(slots.shape[1]):
            alone = decode(llm, torch.cat([prefix[b, :length], slots[b, g]]))
            torch.testing.assert_close(
                prefix_states[b, :length].double(), alone[:length], atol=TOLERANCE, rtol=1e-5
            )
            torch.testing.assert_close(states[b, g].double(), alone[length:], atol=TOLERANCE, rtol=1e-5)


@torch.no_grad()
def test_groups_are_exchangeable():
    llm = make_llm()
    prefix, mask, slots = inputs(groups=4)
    order = torch.tensor([2, 0, 3, 1])
    _, states = llm(prefix, mask, slots)
    _, permuted = llm(prefix, mask, slots[:, order])
    torch.testing.assert_close(permuted, states[:, order], atol=TOLERANCE, rtol=0)
    changed = slots.clone()
    changed[:, 1] = 7.0
    _, other = llm(prefix, mask, changed)
    torch.testing.assert_close(other[:, [0, 2, 3]], states[:, [0, 2, 3]], atol=TOLERANCE, rtol=0)
    assert (other[:, 1] - states[:, 1]).abs().max() > 0.1


@torch.no_grad()
def test_slots_see_only_what_came_before():
    llm = make_llm()
    prefix, mask, slots = inputs()
    prefix_states, states = llm(prefix, mask, slots)
    changed = slots.clone()
    changed[:, :, 3] = 7.0
    prefix_after, after = llm(prefix, mask, changed)
    torch.testing.assert_close(after[:, :, :3], states[:, :, :3], atol=TOLERANCE, rtol=0)
    assert (after[:, :, 3:] - states[:, :, 3:]).abs().amax((0, 1, 3)).min() > 0.01
    assert torch.equal(prefix_after, prefix_states)  # the prefix sees no slot


@torch.no_grad()
def test_padding_of_the_prefix_does_not_matter():
    llm = make_llm()
    prefix, mask, slots = inputs(lengths=(4, 4))
    _, states = llm(prefix, mask, slots)
    longer = torch.cat([prefix, torch.full((2, 6, SMALL.llm_dim), -50.0)], 1)
    _, padded = llm(longer, torch.cat([mask, torch.zeros(2, 6, dtype=torch.bool)], 1), slots)
    torch.testing.assert_close(padded, states, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_a_prefix_alone():
    llm = make_llm()
    prefix, mask, slots = inputs()
    states, none = llm(prefix, mask, slots[:, :0])
    assert none.shape == slots[:, :0].shape
    expected, _ = llm(prefix, mask, slots)
    torch.testing.assert_close(states[mask], expected[mask], atol=TOLERANCE, rtol=0)


def test_bf16_training_is_near():
    llm = make_llm()
    prefix, mask, slots = inputs()
    with torch.no_grad():
        _, expected = llm(prefix, mask, slots)
    slots.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        _, states = llm(prefix, mask, slots)
    assert (states.float() - expected).abs().max() < 0.1  # bf16 has 8 bits; states reach 4
    states.float().sum().backward()
    assert torch.isfinite(slots.grad).all()


@pytest.mark.parametrize("position", [0, 1, 63, 700, 4095])
def test_rope_against_float64(position):
    x = torch.randn(1, 1, 3, 32, generator=torch.Generator().manual_seed(2))
    found = apply_rope(x, rope_table(torch.tensor([[position]]), 32, 10000.0))
    expected = rotate(x[0, 0].double(), position, 10000.0)
    # An fp32 angle of n radians is off by n / 2^24.
    torch.testing.assert_close(found[0, 0].double(), expected, atol=5e-6 + position * 2e-7, rtol=0)


def test_rope_knows_only_distances():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(3))
    products = []
    for start in (0, 5, 300):
        table_q, table_k = (rope_table(torch.tensor([[start + i]]), 16, 10000.0) for i in (4, 1))
        products.append((apply_rope(q, table_q) * apply_rope(k, table_k)).sum())
    torch.testing.assert_close(torch.stack(products), products[0].expand(3), atol=2e-5, rtol=0)


def test_rms_norm_against_float64():
    layer = RMSNorm(32)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(4)) * torch.tensor([[1e-4], [1.0], [1e4]])
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 2, 32))
        found = layer(x)
    torch.testing.assert_close(found.double(), norm(x.double(), layer.weight.detach()), atol=1e-6, rtol=1e-5)
