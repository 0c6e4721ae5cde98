"""Language fusion: x + γ · (softmax(LN(x) W_q Kᵀ / √d) V) W_o, K and V from the text (VisionLLM, 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionllm.model.attention import attention
from visionllm.ops import fusion_attention
from visionllm.ops.choice import autocast, uses_operators


class LanguageFusion(nn.Module):
    """Every position of every scale looks at the text's tokens."""

    def __init__(self, dim: int, text_dim: int, heads: int, gate: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(text_dim, 2 * dim)
        self.output = nn.Linear(dim, dim)
        self.gate = nn.Parameter(torch.full((dim,), gate))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """x: [B, N, C]; text: [B, T, C_text]; mask: [B, T], True where there is text. Returns [B, N, C]."""
        b, n, c = x.shape
        key, value = self.key_value(text).view(b, text.shape[1], 2, self.heads, -1).unbind(2)
        if uses_operators(x):
            y = fusion_attention(
                autocast(x),
                autocast(self.norm.weight),
                autocast(self.norm.bias),
                autocast(self.query.weight),
                autocast(self.query.bias),
                key,
                value,
                mask,
                autocast(self.output.weight),
                autocast(self.output.bias),
                autocast(self.gate),
                self.norm.eps,
            )
            return y.to(x.dtype)
        q = self.query(self.norm(x)).view(b, n, self.heads, -1).transpose(1, 2)
        y = attention(q, key.transpose(1, 2), value.transpose(1, 2), mask[:, None, None])
        return x + self.gate * self.output(y.transpose(1, 2).reshape(b, n, c))
