"""y = x Wᵀ + b + s·(x Aᵀ) Bᵀ: a linear layer with a low-rank adapter (Hu et al., LoRA, 2106.09685)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Linear):
    """Linear layer with an adapter of the given rank; B starts at zero, so the adapter adds nothing at first.

    Args:
        rank: of the adapter; at least 1.
        alpha: the adapter's output is scaled by alpha / rank.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)
        if rank < 1:
            raise ValueError(f"LoRALinear: rank must be at least 1, got {rank}")
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(torch.empty(rank, inputs))
        self.lora_b = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale
