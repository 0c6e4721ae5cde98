"""y = x Wᵀ + b + s·(x Aᵀ) Bᵀ: a linear layer with a low-rank adapter (Hu et al., LoRA, 2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visionllm.model.base_linear import BaseLinear


@dataclass(frozen=True)
class Adapter:
    """Low-rank additions to an LLM's linear layers.

    Attributes:
        layers: A [R, K] and B [N, R] by the layer's name in the LLM, such as "layers.0.q"; R may differ.
        scales: s of each, usually alpha / R.
    """

    layers: Mapping[str, tuple[Tensor, Tensor]]
    scales: Mapping[str, float]

    def check(self, linears: Mapping[str, BaseLinear], where: str) -> None:
        """Raises ValueError listing what does not fit an LLM's linear layers (the first 20)."""
        problems = [f"{name}: no such layer" for name in self.layers.keys() - linears.keys()]
        problems += [f"{name}: a scale is missing" for name in self.layers.keys() - self.scales.keys()]
        for name in self.layers.keys() & linears.keys():
            a, b = self.layers[name]
            linear = linears[name]
            k, n = linear.in_features, linear.out_features
            if a.ndim != 2 or b.ndim != 2 or a.shape[1] != k or b.shape[0] != n or len(a) != b.shape[1]:
                problems.append(
                    f"{name}: expected A [R, {k}] and B [{n}, R], got {list(a.shape)} and {list(b.shape)}"
                )
            elif len(a) < 1:
                problems.append(f"{name}: expected a rank of at least 1, got 0")
            elif not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                problems.append(f"{name}: not finite")
        if not self.layers:
            problems.append("it has no layers")
        if problems:
            shown = "\n  ".join(sorted(problems)[:20])
            raise ValueError(f"{where}: {len(problems)} differences from the LLM:\n  {shown}")


class LoRALinear(BaseLinear):
    """Linear layer with an adapter of the given rank; B starts at zero, so the adapter adds nothing at first.

    Args:
        rank: of the adapter; at least 1.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: of what the adapter reads, in training.
        dtype: of the base, see `BaseLinear`; the adapter is fp32.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rank: int,
        alpha: float,
        bias: bool = False,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(inputs, outputs, bias=bias, dtype=dtype)
        if rank < 1:
            raise ValueError(f"LoRALinear: rank must be at least 1, got {rank}")
        self.scale, self.dropout = alpha / rank, dropout
        self.lora_a = nn.Parameter(torch.empty(rank, inputs))
        self.lora_b = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)
