"""y = x Wᵀ + b + s·(x Aᵀ) Bᵀ: a linear layer with a low-rank adapter (Hu et al., LoRA, 2106.09685)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionllm.model.linear import Linear, finish
from visionllm.ops import lora_linear
from visionllm.ops.choice import uses_operators


class LoRALinear(Linear):
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

    def forward(self, x: Tensor, activation: str = "", shortcut: Tensor | None = None) -> Tensor:
        return finish(self.adapted(x), activation, shortcut)

    def adapted(self, x: Tensor) -> Tensor:
        if uses_operators(x):
            bias = None if self.bias is None else self.bias.detach()
            y = lora_linear(x, self.weight.detach(), bias, self.lora_a, self.lora_b, self.scale)
            if torch.is_grad_enabled() and self.weight.requires_grad:
                y = _BaseGradient.apply(y, x, self.weight, self.bias)
            return y
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale


class _BaseGradient(torch.autograd.Function):
    """y as it is; its gradient also goes to the base, which the operator takes as frozen."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bias = None if bias is None or not bias.requires_grad else bias.dtype
        ctx.weight = weight.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        weight = (rows.T @ x.flatten(0, -2).to(rows.dtype)).to(ctx.weight)
        bias = None if ctx.bias is None else rows.sum(0).to(ctx.bias)
        return grad, None, weight, bias
