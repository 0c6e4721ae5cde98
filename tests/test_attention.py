"""Both forms of softmax(q kᵀ / √d) v against float64."""

from __future__ import annotations

import pytest
import torch

from visionllm.model.attention import attention

# Worst error of outputs of size 1: rounding of the result, and in bf16 of the weights too.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2}


def reference(q, k, v, mask):
    q, k, v = q.double(), k.double(), v.double()
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf")).softmax(-1)
    return weights @ v


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("training", [False, True])  # in bf16 the two take different forms
@pytest.mark.parametrize("kind", ["none", "causal", "keys", "pairs"])
def test_attention(dtype, training, kind):
    generator = torch.Generator().manual_seed(0)
    t_k = 7 if kind == "causal" else 9
    q = torch.randn(2, 3, 7, 8, generator=generator).to(dtype)
    k, v = torch.randn(2, 2, 3, t_k, 8, generator=generator).to(dtype)
    everything = torch.ones(2, 1, 7, t_k, dtype=torch.bool)
    mask = {
        "none": everything,
        "causal": everything.tril(),
        "keys": everything & (torch.arange(t_k) < torch.tensor([9, 4])[:, None])[:, None, None],
        "pairs": everything & (torch.rand(7, t_k, generator=generator) > 0.4),
    }[kind]
    mask[..., 0] = True  # nothing is left without a key
    q.requires_grad_(training)
    with torch.set_grad_enabled(training):
        found = attention(q, k, v, None if kind in ("none", "causal") else mask, causal=kind == "causal")
    assert found.dtype == dtype
    error = (found.detach().double() - reference(q.detach(), k, v, mask)).abs().max().item()
    assert error < TOLERANCE[dtype], error
    if training:
        found.float().sum().backward()
        assert torch.isfinite(q.grad).all()
