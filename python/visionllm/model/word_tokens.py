"""What the LLM's layers for words are told of every image token, where it stands in the prefix.

Boxes need little of what words need: an image token that has learned to be found and named by its class slot
need not show an LLM of a few layers its name, colour or size. So captions and answers read, beside the
prefix, the names that the token looks like, its place and size, how object-like it is, and the picture's
colours within its box.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionllm.model.boxes import inverse_sigmoid
from visionllm.model.config import ModelConfig
from visionllm.model.position_encoding import sine_encoding

COLOUR_GRID = 5  # a box's colours are read at so many places along each side
COLOUR_SHARE = 0.8  # of the box, around its centre
COLOUR_HIDDEN = 96
MEASURES = 10  # of a box and its objectness, as plain numbers


class WordTokens(nn.Module):
    """Image tokens [B, M] → [B, M, C_llm], added to the LLM's states before its layers for words."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.llm_dim
        self.dim = config.dim
        self.names = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.names.weight)  # words as they are
        self.feature = nn.Linear(config.dim, dim)
        self.position = nn.Linear(config.dim, dim, bias=False)
        self.measures = nn.Linear(MEASURES, dim, bias=False)
        self.colours = nn.Sequential(
            nn.Linear(3 * COLOUR_GRID**2, COLOUR_HIDDEN), nn.GELU(), nn.Linear(COLOUR_HIDDEN, dim)
        )

    def forward(
        self, features: Tensor, boxes: Tensor, measures: Tensor, colours: Tensor, names: Tensor | None
    ) -> Tensor:
        """What is told.

        Args:
            features: [B, M, C]; boxes: [B, M, 4] cxcywh in 0..1; measures: of `measures_of`.
            colours: [B, M, 3 · COLOUR_GRID²], of `colours_at`.
            names: [B, M, C_llm], the words of the likely names; None: none are known.
        """
        kind = features.dtype
        told = self.feature(features) + self.position(sine_encoding(boxes, self.dim).to(kind))
        told = told + self.measures(measures.to(kind))
        told = told + self.colours(colours.to(kind))
        return told if names is None else told + self.names(names.to(kind))


def measures_of(boxes: Tensor, objectness: Tensor) -> Tensor:
    """Boxes [B, M, 4] and logits [B, M] → [B, M, MEASURES]: what comparing and counting start from."""
    area = boxes[..., 2] * boxes[..., 3]
    plain = torch.cat([2 * boxes - 1, inverse_sigmoid(boxes) / 2], -1)
    more = torch.stack([area.clamp(min=1e-6).log() / 4 + 1, 2 * objectness.sigmoid() - 1], -1)
    return torch.cat([plain, more], -1)


def colours_at(images: Tensor, boxes: Tensor, sizes: Tensor | None = None) -> Tensor:
    """The picture's colours within boxes, at a grid of places.

    Args:
        images: uint8 [B, H, W, 3]; boxes: [B, M, 4] cxcywh in 0..1 of the part that is no padding.
        sizes: int64 [B, 2], that part's height and width; None: all of it.

    Returns:
        [B, M, 3 · COLOUR_GRID²] in -1..1.
    """
    steps = ((torch.arange(COLOUR_GRID, device=boxes.device) + 0.5) / COLOUR_GRID - 0.5) * COLOUR_SHARE
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    places = torch.stack([x, y], -1).view(-1, 2)  # [G², 2]
    where = boxes[..., None, :2] + places * boxes[..., None, 2:]  # [B, M, G², 2]
    if sizes is not None:
        width_height = sizes.flip(1).to(where)[:, None, None]
        where = (where * width_height).clamp(min=0.5).minimum(width_height - 0.5)  # not of the padding
        where = where / torch.tensor(images.shape[1:3]).flip(0).to(where)
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    found = F.grid_sample(
        pixels, 2 * where - 1, mode="bilinear", padding_mode="border", align_corners=False
    )  # [B, 3, M, G²]
    return found.permute(0, 2, 3, 1).flatten(2)
