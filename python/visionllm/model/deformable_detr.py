"""Deformable DETR as published (Zhu et al., 2010.04159), with language fusion between scales and encoder.

Post-norm layers with ReLU; learned queries, each a position and a content; a query's reference point is a
linear layer of its position; boxes are offsets to it in logit space, refined from layer to layer if
`box_refine`. Single-stage. While the gate of the language fusion is 0, published weights give here what they
give where they come from. Dropout, which the published training has at 0.1, is left out.

Pictures may be padded at the right and the bottom. Coordinates are then shares of the picture without its
padding, and nothing of the padding is seen: its values count as zero, and its positions in the encoder are
computed for nobody.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionllm.model.attention import attention
from visionllm.model.boxes import inverse_sigmoid
from visionllm.model.config import STRIDES, ModelConfig
from visionllm.model.convolution import Convolution
from visionllm.model.deformable import MSDeformAttention
from visionllm.model.fusion import LanguageFusion
from visionllm.model.image_tokenizer import BoxHead, DenoisingQueries, ImageTokens, objectness_head
from visionllm.model.linear import Linear
from visionllm.model.resnet import OUTPUT_CHANNELS, ResNet50, normalised

LEVELS = len(STRIDES)
GROUPS = 32  # of the group norms
REFERENCE_EPSILON = 1e-5  # reference points are kept so far away from 0 and 1 in logit space
FIRST_SIZE = -2.0  # logit of a box's first sides: an eighth of the picture


class PostNormFeedForward(nn.Module):
    """Linear → ReLU → linear, added to the input, then the norm."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(dim, hidden)
        self.down = Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down(self.up(x, "relu"), shortcut=x))


def xavier(*layers: nn.Linear | nn.Conv2d) -> None:
    """Weights by Glorot & Bengio, biases zero."""
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


@dataclass(frozen=True)
class Scales:
    """Where the positions of the flattened scales are.

    Attributes:
        shapes: int64 [L, 2], heights and widths, and starts: [L], first positions; both on the CPU, where the
            operators read them without waiting for a device.
        position: [B, S, C], sine encoding; B is 1 without padding, here and below.
        reference: [B, S, L, 2], each position as a point of every scale.
        ratios: [B, L, 2], the shares of width and height that are picture; None: all of it.
        padding: bool [B, S]; None: nowhere.
    """

    shapes: Tensor
    starts: Tensor
    position: Tensor
    reference: Tensor
    ratios: Tensor | None
    padding: Tensor | None

    def in_scales(self, boxes: Tensor) -> Tensor:
        """Points or boxes [B, M, 2 or 4] of the pictures → of every scale, [B, M, L, 2 or 4]."""
        if self.ratios is None:
            return boxes[:, :, None].expand(-1, -1, LEVELS, -1)
        return boxes[:, :, None] * self.ratios.repeat(1, 1, boxes.shape[-1] // 2)[:, None]


class EncoderLayer(nn.Module):
    """Every position of every scale samples all scales around itself."""

    def __init__(self, dim: int, heads: int, points: int, ffn_dim: int) -> None:
        super().__init__()
        self.attention = MSDeformAttention(dim, heads, LEVELS, points)
        self.norm = nn.LayerNorm(dim)
        self.ffn = PostNormFeedForward(dim, ffn_dim)

    def forward(self, x: Tensor, position: Tensor, scales: Scales) -> Tensor:
        """x: [B, S, C]; position: [B, S, C]."""
        reference = scales.reference.expand(len(x), -1, -1, -1)
        y = self.attention(
            x + position, reference, x, scales.shapes, scales.starts, shortcut=x, padding=scales.padding
        )
        return self.ffn(self.norm(y))


class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable cross-attention into the encoder's output, feed-forward."""

    def __init__(self, dim: int, heads: int, points: int, ffn_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.self_norm = nn.LayerNorm(dim)
        self.attention = MSDeformAttention(dim, heads, LEVELS, points)
        self.cross_norm = nn.LayerNorm(dim)
        self.ffn = PostNormFeedForward(dim, ffn_dim)

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor, memory: Tensor, scales: Scales
    ) -> Tensor:
        """x, position: [B, M, C]; reference: [B, M, L, 2 or 4]; memory: [B, S, C]."""
        placed = x + position
        q, k, v = (
            projection(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, y in ((self.query, placed), (self.key, placed), (self.value, x))
        )
        x = self.self_norm(x + self.output(attention(q, k, v).transpose(1, 2).flatten(2)))
        y = self.attention(
            x + position, reference, memory, scales.shapes, scales.starts, shortcut=x, padding=scales.padding
        )
        return self.ffn(self.cross_norm(y))


class DeformableDetr(nn.Module):
    """uint8 pictures [B, H, W, 3] and text features → ImageTokens.

    What is not published with it starts here as: the language fusion at random behind `config.fusion_gate`,
    and objectness, one logit for all categories, at a probability of 1 %.

    Raises:
        ValueError: `config.dim` does not divide into the group norms' groups, or image tokens are pooled.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        if dim % GROUPS:
            raise ValueError(f"DeformableDetr: dim must be a multiple of {GROUPS}, got {dim}")
        if config.image_tokens != "queries":
            raise ValueError(f"DeformableDetr: image_tokens must be 'queries', got {config.image_tokens!r}")
        self.guidance = config.text_guidance
        self.box_refine = config.box_refine
        self.backbone = ResNet50(config.frozen_stages)
        self.projections = nn.ModuleList(
            nn.Sequential(Convolution(channels, dim, 1), nn.GroupNorm(GROUPS, dim))
            for channels in OUTPUT_CHANNELS
        )
        coarsest = Convolution(OUTPUT_CHANNELS[-1], dim, 3, stride=2, padding=1)
        self.projections.append(nn.Sequential(coarsest, nn.GroupNorm(GROUPS, dim)))
        self.level = nn.Parameter(torch.empty(LEVELS, dim).normal_())
        self.fusion = LanguageFusion(dim, config.text_dim, config.fusion_heads, config.fusion_gate)
        layer = (dim, config.heads, config.points, config.ffn_dim)
        self.encoder = nn.ModuleList(EncoderLayer(*layer) for _ in range(config.encoder_layers))
        self.query_position = nn.Parameter(torch.empty(config.num_queries, dim).normal_())
        self.query_content = nn.Parameter(torch.empty(config.num_queries, dim).normal_())
        self.reference = nn.Linear(dim, 2)
        self.decoder = nn.ModuleList(DecoderLayer(*layer) for _ in range(config.decoder_layers))
        # Without refinement all layers share their heads.
        heads = config.decoder_layers if config.box_refine else 1
        self.objectness = nn.ModuleList(objectness_head(dim) for _ in range(heads))
        self.box = nn.ModuleList(BoxHead(dim) for _ in range(heads))
        self._start()

    def _start(self) -> None:
        """Initial values after the published ones, where torch's are others."""
        for module in self.modules():
            if isinstance(module, MSDeformAttention):
                xavier(module.value, module.output)
            elif isinstance(module, DecoderLayer):
                xavier(module.query, module.key, module.value, module.output)
            elif isinstance(module, PostNormFeedForward):
                xavier(module.up, module.down)
        xavier(*(m for m in self.projections.modules() if isinstance(m, Convolution)), self.reference)
        # The first box's sides; refined boxes start from the ones before.
        last = self.box[0].get_submodule("4")
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias[2:], FIRST_SIZE)

    def pyramid(self, images: Tensor, sizes: Tensor | None = None) -> list[Tensor]:
        """The four scales [B, C, H / stride, W / stride]."""
        x = normalised(images)
        if sizes is not None:  # the published padding: of the mean colour
            rows, columns = (inside(sizes[:, i], n) for i, n in enumerate(images.shape[1:3]))
            x = x * (rows[:, :, None] & columns[:, None])[:, None]
        c3, c4, c5 = self.backbone(x.to(self.backbone.stem.weight.dtype))
        return [p(c) for p, c in zip(self.projections, (c3, c4, c5, c5), strict=True)]

    def forward(
        self,
        images: Tensor,
        text: Tensor,
        text_mask: Tensor,
        denoising: DenoisingQueries | None = None,
        drawings: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> ImageTokens:
        """What is seen, in shares of the pictures without their padding.

        Args:
            images: uint8 [B, H, W, 3].
            text: [B, T, C_text]; text_mask: [B, T], True where there is text.
            denoising: must be None: every query has a learned position.
            drawings: not used: one trunk sees pictures of all kinds.
            sizes: int64 [B, 2], height and width of the part of each picture that is not padding; None: all.

        Raises:
            ValueError: there are denoising queries.
        """
        if denoising is not None:
            raise ValueError("DeformableDetr: denoising must be None: its queries have learned positions")
        maps = self.pyramid(images, sizes)
        x = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)  # [B, S, C]
        if self.guidance:
            x = self.fusion(x, text, text_mask)
        shapes = [(int(m.shape[2]), int(m.shape[3])) for m in maps]
        scales = scales_of(shapes, x.shape[-1], x.device, sizes, (images.shape[1], images.shape[2]))
        lengths = [height * width for height, width in shapes]
        levels = self.level.repeat_interleave(
            torch.tensor(lengths, device=x.device), 0, output_size=sum(lengths)
        )
        position = scales.position + levels
        for layer in self.encoder:
            x = layer(x, position, scales)
        memory = x if scales.padding is None else x.masked_fill(scales.padding[..., None], 0.0)

        query_position = self.query_position.expand(len(x), -1, -1)
        q = self.query_content.expand(len(x), -1, -1)
        reference = self.reference(query_position).float().sigmoid()  # [B, M, 2]
        boxes, objectness = [], []
        for i, layer in enumerate(self.decoder):
            q = layer(q, query_position, scales.in_scales(reference), memory, scales)
            head = i if self.box_refine else 0
            change = self.box[head](q).float()
            start = inverse_sigmoid(reference, REFERENCE_EPSILON)
            change = change + F.pad(start, (0, 4 - start.shape[-1]))  # a point says nothing of a size
            boxes.append(change.sigmoid())
            objectness.append(self.objectness[head](q).squeeze(-1).float())
            if self.box_refine:
                reference = boxes[-1].detach()
        return ImageTokens(q, boxes, objectness, memory)


def inside(sizes: Tensor, length: int) -> Tensor:
    """sizes [B] → bool [B, length], True at the first `sizes`."""
    return torch.arange(length, device=sizes.device) < sizes[:, None]


def scales_of(
    shapes: list[tuple[int, int]],
    dim: int,
    device: torch.device,
    sizes: Tensor | None,
    padded: tuple[int, int],
) -> Scales:
    """Of scales with these heights and widths.

    Args:
        dim: C of the sine encoding.
        sizes: int64 [B, 2], heights and widths of the pictures, of `padded` pixels with their padding; None:
            there is none.
    """
    sides = torch.tensor(shapes)  # [L, 2]
    starts = torch.cat([sides.new_zeros(1), sides.prod(1).cumsum(0)[:-1]])
    count = 1 if sizes is None else len(sizes)
    positions, centres, masks, ratios = [], [], [], []
    for height, width in shapes:
        # Rows and columns that are picture, [B, H] and [B, W], as torch's nearest interpolation has them.
        rows, columns = (
            torch.ones(count, n, dtype=torch.bool, device=device)
            if sizes is None
            else F.interpolate(inside(sizes[:, i], padded[i])[:, None].float(), n)[:, 0].bool()
            for i, n in enumerate((height, width))
        )
        encoded = [side_encoding(side, dim // 2) for side in (rows, columns)]  # [B, H or W, C / 2]
        y = encoded[0][:, :, None].expand(-1, -1, width, -1)
        x = encoded[1][:, None].expand(-1, height, -1, -1)
        positions.append(torch.cat([y, x], -1).flatten(1, 2))
        # As shares of the picture: beyond 1 in the padding.
        y, x = ((torch.arange(n.shape[1], device=device) + 0.5) / n.sum(1)[:, None] for n in (rows, columns))
        y, x = y[:, :, None].expand(-1, -1, width), x[:, None].expand(-1, height, -1)
        centres.append(torch.stack([x, y], -1).flatten(1, 2))
        masks.append((rows[:, :, None] & columns[:, None]).flatten(1))
        ratios.append(torch.stack([columns.float().mean(1), rows.float().mean(1)], -1))
    reference = torch.cat(centres, 1)[:, :, None]  # [B, S, 1, 2]
    position = torch.cat(positions, 1)
    if sizes is None:
        return Scales(sides, starts, position, reference.expand(-1, -1, LEVELS, -1), None, None)
    ratio = torch.stack(ratios, 1)
    return Scales(sides, starts, position, reference * ratio[:, None], ratio, ~torch.cat(masks, 1))


def side_encoding(side: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """bool [B, N], True at a side's first cells → [B, N, dim]: sine and cosine in turn of the cells' centres.

    A centre is (n − 1/2) / (number of cells that are picture) of a whole turn at the highest frequency.
    """
    count = side.float().cumsum(1)
    angle = (count - 0.5) / (count[:, -1:] + 1e-6) * (2 * math.pi)
    exponent = 2 * torch.arange(dim // 2, device=side.device, dtype=torch.float32) / dim
    angle = angle[..., None] / temperature**exponent
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)
