"""Outlines as they are answered: what the location tokens say, without its noise.

Each point of an outline is said by tokens of its own, a few bins beside the boundary, this way or that; and
an outline's extent is said less well than a box, which the image token has too. So the points, as a closed
curve z_n, n = 0 … N − 1 in the complex plane, keep their low frequencies,

    ẑ_n = Σ_k exp(−(|k| / c)⁴ / 2) · Z_k · e^{2πi·kn/N} / N,    Z = DFT(z),  −N/2 ≤ k < N/2,

and each side of the extent moves a share of the way to the image token's box.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from visionllm.model.boxes import cxcywh_to_xyxy

# Chosen on 80 training scenes at 16 points, where mask AP was 38.8 as the tokens say it: 39.7 with the share
# alone, 40.9, 41.5, 42.2, 42.8, 43.1 and 42.0 with c = 5, 4, 3, 2.5, 2 and 1.5.
TURNS = 2.0  # c: turns per outline from which frequencies fade
BOX_SHARE = 0.5
SMALLEST = 1e-4  # of an extent that is stretched, in pictures


def settled(points: Tensor, boxes: Tensor) -> Tensor:
    """Outlines [..., N, 2], with their image tokens' boxes [..., 4] cxcywh → [..., N, 2]."""
    points = kept_frequencies(points.shape[-2], points.device) @ points.float()
    low, high = points.amin(-2, keepdim=True), points.amax(-2, keepdim=True)
    sides = cxcywh_to_xyxy(boxes)[..., None, :]
    new_low = low + BOX_SHARE * (sides[..., :2] - low)
    new_high = high + BOX_SHARE * (sides[..., 2:] - high)
    return (points - low) / (high - low).clamp(min=SMALLEST) * (new_high - new_low) + new_low


@lru_cache(maxsize=64)
def kept_frequencies(count: int, device: torch.device) -> Tensor:
    """[N, N], the sum above as a product with the points. Shared between calls: not to be changed."""
    with torch.inference_mode(False), torch.no_grad():  # a tensor made in inference could not be used outside
        turns = torch.fft.fftfreq(count, 1 / count, dtype=torch.float64)
        places = torch.arange(count, dtype=torch.float64) / count
        angles = 2 * torch.pi * turns * (places[:, None, None] - places[:, None])  # [N, N, k]
        return ((torch.exp(-((turns / TURNS) ** 4) / 2) * angles.cos()).mean(-1)).float().to(device)
