"""Language fusion: x + γ · (softmax(LN(x) W_q Kᵀ / √d) V) W_o, K and V from the text (VisionLLM, 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionllm.model.attention import attention


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
        q = self.query(self.norm(x)).view(b, n, self.heads, -1).transpose(1, 2)
        k, v = self.key_value(text).view(b, text.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = attention(q, k, v, mask[:, None, None])
        return x + self.gate * self.output(y.transpose(1, 2).reshape(b, n, c))
