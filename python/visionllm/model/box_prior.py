"""Corner slots of a published LLM start from the box that the image token already has.

Between a detector and an LLM that were trained apart, corners would have to be learned anew through all its
blocks. So each corner's location logits get a bump at the image token's own corner:

    logits[bin] = slot state · location token + strength · Σ_k g_k cos(2π k (bin − corner) / P)

with Gaussian g_k of sum 1. As cos(a − b) = cos a cos b + sin a sin b it is a product of features of the
corner with features of the bin: both are appended, to states and to location tokens, and operators see rows
like any others. The slots say what to change.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

HARMONICS = 64
SPREAD = 40.0  # harmonics at which g_k is e⁻¹ of the first: a bump of 12 bins
STRENGTH = 12.0  # at the start: a softmax of 3 bins around the corner


class BoxPrior(nn.Module):
    """Boxes [B, G, 4] → what is appended to their corner slots' states and to the location tokens."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.last_bin = (bins - 1) // 2
        self.strength = nn.Parameter(torch.tensor([STRENGTH]))  # of a dimension: FSDP shards no scalars

    def of_boxes(self, boxes: Tensor) -> Tensor:
        """boxes: [B, G, 4] cxcywh → [B, G, 4, 2 · HARMONICS], of x1, y1, x2, y2 relative to the centre."""
        side = boxes[..., 2:].float() * (self.last_bin / 2)  # half a side in bins
        weight = (-((self._harmonics(boxes) / SPREAD) ** 2)).exp()
        weight = weight / weight.sum() * self.strength
        return self._waves(torch.cat([-side, side], -1)) * weight.repeat(2)

    def of_bins(self) -> Tensor:
        """[bins, 2 · HARMONICS]"""
        return self._waves(
            torch.arange(-self.last_bin, self.last_bin + 1, device=self.strength.device).float()
        )

    def _waves(self, offsets: Tensor) -> Tensor:
        """Offsets in bins [...] → [..., 2 · HARMONICS]; the longest wave spans twice the offsets."""
        angle = offsets[..., None] * (2 * math.pi / (4 * self.last_bin)) * self._harmonics(offsets)
        return torch.cat([angle.cos(), angle.sin()], -1)

    def _harmonics(self, like: Tensor) -> Tensor:
        return torch.arange(1, HARMONICS + 1, device=like.device, dtype=torch.float32)
