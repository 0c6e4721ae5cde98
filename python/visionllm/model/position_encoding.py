"""Sine encoding of coordinates in 0..1 (Deformable DETR's, one block of frequencies per coordinate)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sine_encoding(coordinates: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """coordinates [..., n] in 0..1 → [..., dim]; dim must be a multiple of 2 n."""
    n = coordinates.shape[-1]
    half = dim // (2 * n)
    exponent = torch.arange(half, device=coordinates.device, dtype=torch.float32) / half
    angles = coordinates.float()[..., None] * (2 * math.pi) * (temperature**-exponent) * 20
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)
