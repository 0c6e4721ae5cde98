"""Bidirectional text encoder (BERT's role): the description as one sequence, every class name as its own.

Names are encoded apart from each other, so that a name's features depend neither on the other names nor on
their order or number, and a name that several prompts share is encoded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionllm.model.attention import attention


class TextEncoderLayer(nn.Module):
    """Pre-norm self-attention and GELU feed-forward."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn_in = nn.Linear(dim, 2 * dim)
        self.ffn_out = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: [N, T, C]; mask: [N, 1, 1, T], True where there is text."""
        n, t, c = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(n, t, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [N, heads, T, C / heads]
        y = attention(q, k, v, mask)
        x = x + self.output(y.transpose(1, 2).reshape(n, t, c))
        return x + self.ffn_out(F.gelu(self.ffn_in(self.ffn_norm(x))))


class TextEncoder(nn.Module):
    """Token ids [N, T] (padded with −1) to features [N, T, C]; padded rows are zero."""

    def __init__(self, vocab_size: int, dim: int, layers: int, heads: int, max_length: int = 512) -> None:
        super().__init__()
        self.max_length = max_length
        self.embedding = nn.Embedding(vocab_size, dim)
        self.position = nn.Parameter(torch.empty(max_length, dim))
        self.layers = nn.ModuleList(TextEncoderLayer(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.normal_(self.position, std=0.05)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > self.max_length:
            raise ValueError(f"TextEncoder: at most {self.max_length} tokens a text, got {ids.shape[1]}")
        present = ids >= 0
        # A text without tokens looks at its first place: attention to nothing at all would be NaN.
        seen = present | (torch.arange(ids.shape[1], device=ids.device) == 0)
        x = self.embedding(ids.clamp(min=0)) + self.position[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, seen[:, None, None])
        return self.norm(x) * present[..., None]


def mean_pool(features: Tensor, ids: Tensor) -> Tensor:
    """Mean of the unpadded positions: [N, T, C], [N, T] → [N, C]."""
    return features.sum(1) / (ids >= 0).sum(1, keepdim=True).clamp(min=1)
