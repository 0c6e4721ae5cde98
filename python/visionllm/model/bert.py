"""BERT (Devlin et al., 2018) as text encoder: its last hidden states, without the pooler.

    x = LN(word + position + token type 0)
    x = LN(x + attention(x));  x = LN(x + ffn_out(GELU(ffn_in(x))))  for every layer

Published models: BERT-Base, MiniLM. What stands around a text ([CLS], [SEP]) is the tokenizer's to put there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionllm.model.attention import attention


class BertLayer(nn.Module):
    """Self-attention and GELU feed-forward, each with its norm behind the sum."""

    def __init__(self, dim: int, heads: int, ffn_dim: int, epsilon: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.attention_norm = nn.LayerNorm(dim, eps=epsilon)
        self.ffn_in = nn.Linear(dim, ffn_dim)
        self.ffn_out = nn.Linear(ffn_dim, dim)
        self.ffn_norm = nn.LayerNorm(dim, eps=epsilon)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: [N, T, C]; mask: [N, 1, 1, T], True where there is text."""
        n, t, c = x.shape
        q, k, v = (
            part(x).view(n, t, self.heads, c // self.heads).transpose(1, 2)  # [N, heads, T, C / heads]
            for part in (self.query, self.key, self.value)
        )
        y = attention(q, k, v, mask).transpose(1, 2).reshape(n, t, c)
        x = self.attention_norm(x + self.output(y))
        return self.ffn_norm(x + self.ffn_out(F.gelu(self.ffn_in(x))))


class Bert(nn.Module):
    """Token ids int64 [N, T] (padded with −1) to features [N, T, C]; padded rows are zero.

    Without dropout, and with the published initialisation.

    Args:
        positions: the longest text.
        epsilon: of the layer norms.

    Raises:
        ValueError: dim is no multiple of heads; in forward: a text is longer than that.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        layers: int,
        heads: int,
        ffn_dim: int,
        positions: int = 512,
        epsilon: float = 1e-12,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"Bert: dim must be a multiple of heads, got {dim} and {heads}")
        self.embedding = nn.Embedding(vocab_size, dim)
        self.position = nn.Parameter(torch.empty(positions, dim))
        self.token_type = nn.Parameter(torch.empty(dim))  # of the first of two texts; here there is but one
        self.norm = nn.LayerNorm(dim, eps=epsilon)
        self.layers = nn.ModuleList(BertLayer(dim, heads, ffn_dim, epsilon) for _ in range(layers))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > len(self.position):
            raise ValueError(f"Bert: at most {len(self.position)} tokens a text, got {ids.shape[1]}")
        present = ids >= 0
        # A text without tokens looks at its first place: attention to nothing at all would be NaN.
        seen = present | (torch.arange(ids.shape[1], device=ids.device) == 0)
        x = self.embedding(ids.clamp(min=0)) + self.token_type + self.position[: ids.shape[1]]
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, seen[:, None, None])
        return x * present[..., None]
