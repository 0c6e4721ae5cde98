"""Linear layer with an activation or a shortcut as part of it, and its form for prediction on a CPU.

One core of an AVX-512 machine took 2.46 ms for 1045 rows × 128 → 384 with GELU by torch.nn.functional, where
GELU alone is 1.4 ms, and takes 1.09 ms with packed weights; without an activation the product saves 8 %.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionllm.model.packed_weights import PackedWeights, can_pack
from visionllm.ops.choice import autocast

# Below so many rows torch.nn.functional was as fast (64 rows: 25 us by it, 34 us packed).
PACKED_ROWS = 128
ROWS_HINT = 1024  # what the order is chosen for; it was the same for 256 to 2048 rows
ONEDNN_NAMES = {"": ("none", ""), "relu": ("relu", ""), "gelu": ("gelu", "none"), "silu": ("swish", "")}


class Linear(nn.Linear):
    """torch's, and then an activation ("relu", "gelu", "silu") or the addition of a shortcut."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._packed = PackedLinear(self)

    def forward(self, x: Tensor, activation: str = "", shortcut: Tensor | None = None) -> Tensor:
        if x.numel() >= PACKED_ROWS * self.in_features and can_pack(x):
            return self._packed(x, activation, shortcut)
        return finish(F.linear(x, self.weight, self.bias), activation, shortcut)


def finish(y: Tensor, activation: str, shortcut: Tensor | None) -> Tensor:
    """What follows the product."""
    if activation == "gelu":
        y = F.gelu(y)
    elif activation == "silu":
        y = F.silu(y)
    elif activation == "relu":
        y = F.relu(y)
    return y if shortcut is None else shortcut + y


class PackedLinear(PackedWeights):
    def __call__(self, x: Tensor, activation: str, shortcut: Tensor | None) -> Tensor:
        x = autocast(x)
        weight, bias = self.packed(x.dtype)
        if shortcut is not None and shortcut.dtype == x.dtype and not activation:
            return torch.ops.mkldnn._linear_pointwise.binary(x, shortcut, weight, bias, "add")
        name, algorithm = ONEDNN_NAMES[activation]
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)
        return y if shortcut is None else shortcut + y

    def pack(self, weight: Tensor, *how: Any) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)
