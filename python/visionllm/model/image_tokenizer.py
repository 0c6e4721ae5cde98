"""Language-guided image tokenizer: four scales, language fusion, encoder and decoder → M image tokens.

An image token is (e_i, l_i): a feature and the centre of what it stands for (VisionLLM, 3.3). Queries are
learned; where they look first is chosen from the encoder's output (two-stage, as in Deformable DETR), which
learns far faster than positions learned with the queries. A box is refined layer by layer beside the centre;
its centre is l_i.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionllm.model.backbone import OUTPUT_CHANNELS, EfficientNetLite, normalised
from visionllm.model.boxes import inverse_sigmoid
from visionllm.model.config import GROUPS, STRIDES, ModelConfig
from visionllm.model.convolution import Convolution
from visionllm.model.deformable import DeformableDecoderLayer, DeformableEncoderLayer
from visionllm.model.fusion import LanguageFusion
from visionllm.model.photo_classifier import PhotoClassifier
from visionllm.model.position_encoding import sine_encoding

LEVELS = len(STRIDES)
# Share of the training drawings that the pretrained stages must do alone, so that a drawing mistaken for a
# photo is not lost; and of the pretrained channels that are dropped: a few photos are soon learned by heart.
TRAINED_DROPOUT, PRETRAINED_DROPOUT = 0.15, 0.2
ANCHOR_SIDE = 0.08  # the finest scale's first guess of a box's side; doubled with every scale


@dataclass
class DenoisingQueries:
    """Extra training queries placed near known boxes (DINO, 2203.03605): boxes [B, N, 4] cxcywh."""

    boxes: Tensor


@dataclass
class ImageTokens:
    """What the decoder says of the M queries and then the denoising ones (N in all), last layer last.

    Attributes:
        features: [B, N, C], e_i.
        boxes: per decoder layer, [B, N, 4] cxcywh in 0..1; the last one's centres are l_i.
        objectness: per decoder layer, [B, N] logits.
        memory: [B, S, C], the encoder's output.
        proposal_boxes, proposal_objectness: [B, S, 4], [B, S] of its positions; None where queries have
            places of their own.
        drawing: [B] logits of the picture being a drawing; None without pretrained stages of its own.
        pretrained_c5: [B, C, h, w], for the photo classifier; None without one, in training, or where it is
            known that no picture is a photo.
        called: [B, M, names + 1], what it calls the last boxes of the M queries (`call_boxes`).
    """

    features: Tensor
    boxes: list[Tensor]
    objectness: list[Tensor]
    memory: Tensor
    proposal_boxes: Tensor | None = None
    proposal_objectness: Tensor | None = None
    drawing: Tensor | None = None
    pretrained_c5: Tensor | None = None
    called: Tensor | None = None

    def of(self, rows: Tensor) -> ImageTokens:
        """Of the pictures [n] alone."""
        boxes, objectness = ([one[rows] for one in layers] for layers in (self.boxes, self.objectness))
        one_each = self.drawing, self.pretrained_c5, self.called
        others = (
            None if one is None else one[rows]
            for one in (self.proposal_boxes, self.proposal_objectness, *one_each)
        )
        return ImageTokens(self.features[rows], boxes, objectness, self.memory[rows], *others)

    def of_last_layer(self) -> ImageTokens:
        """The features, last boxes and last objectness alone, to be kept."""
        nothing = self.memory[:, :0].clone()
        features = self.features.clone()
        return ImageTokens(
            features, self.boxes[-1:], self.objectness[-1:], nothing, nothing[..., :4], nothing[..., 0]
        )


class BoxHead(nn.Sequential):
    """Three-layer perceptron to a box's change in logit space; starts at no change."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))
        last = self[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


def objectness_head(dim: int) -> nn.Linear:
    """Linear to one logit that starts at a probability of 1 % (focal loss's prior)."""
    head = nn.Linear(dim, 1)
    nn.init.constant_(head.bias, -math.log(99.0))
    return head


class ImageTokenizer(nn.Module):
    """uint8 pictures [B, H, W, 3] and text features → ImageTokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_queries = config.num_queries
        self.pooling = config.image_tokens == "pooling"
        self.guidance = config.text_guidance
        self.backbone = EfficientNetLite(
            config.frozen_stages, config.freeze_depthwise, config.keep_pretrained
        )
        self.lateral = nn.ModuleList(
            nn.Sequential(Convolution(channels, dim, 1), nn.GroupNorm(GROUPS, dim))
            for channels in OUTPUT_CHANNELS
        )
        self.coarsest = nn.Sequential(
            Convolution(OUTPUT_CHANNELS[-1], dim, 3, stride=2, padding=1), nn.GroupNorm(GROUPS, dim)
        )
        # Of the pretrained C4 and C5, for the scales of strides 16, 32 and 64; at first they add nothing.
        self.pretrained_lateral = nn.ModuleList()
        if config.keep_pretrained:
            c4, c5 = OUTPUT_CHANNELS[1:]
            for convolution in (
                Convolution(c4, dim, 1, bias=False),
                Convolution(c5, dim, 1, bias=False),
                Convolution(c5, dim, 3, stride=2, padding=1, bias=False),
            ):
                nn.init.zeros_(convolution.weight)
                self.pretrained_lateral.append(convolution)
            self.router = nn.Linear(c5, 1)
            nn.init.zeros_(self.router.weight)
            nn.init.zeros_(self.router.bias)
        self.classifier = PhotoClassifier(len(config.classifier_names)) if config.classifier_names else None
        self.level = nn.Parameter(torch.empty(LEVELS, dim).normal_(std=0.1))
        self.fusion = LanguageFusion(dim, config.text_dim, config.fusion_heads, config.fusion_gate)
        layer = (dim, config.heads, LEVELS, config.points, config.ffn_dim)
        self.encoder = nn.ModuleList(DeformableEncoderLayer(*layer) for _ in range(config.encoder_layers))
        self.encoder_norm = nn.LayerNorm(dim)
        self.proposal_objectness = objectness_head(dim)
        self.proposal_box = BoxHead(dim)
        self.queries = nn.Parameter(torch.empty(config.num_queries, dim).normal_())
        self.denoising_query = nn.Parameter(torch.empty(dim).normal_())
        self.box_position = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.decoder = nn.ModuleList(DeformableDecoderLayer(*layer) for _ in range(config.decoder_layers))
        self.decoder_norm = nn.LayerNorm(dim)
        self.objectness = nn.ModuleList(objectness_head(dim) for _ in range(config.decoder_layers))
        self.box = nn.ModuleList(BoxHead(dim) for _ in range(config.decoder_layers))

    def pyramid(
        self, images: Tensor, drawings: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """Four scales, of features that suit the kind of picture.

        With pretrained stages beside the trained ones, photos are seen through the pretrained ones alone, and
        a router, which knows photos from drawings, adds the trained ones to all others. Why: of few photos
        the trained stages learn the photos themselves. At known boxes they named 98 % of the large objects of
        the 238 training photos and 44 % of others' (26 % without people); the pretrained ones alone 88 and
        53 % (39 %).

        Args:
            images: uint8 [B, H, W, 3].
            drawings: bool [B], where it is known what the pictures are; None asks the router.

        Returns:
            the scales [B, C, H / stride, W / stride], the router's logits [B] of "drawing", and
            `ImageTokens.pretrained_c5`.
        """
        x = normalised(images)
        c3 = self.backbone.first_stages(x)
        drawing: Tensor | None = None
        kept: Tensor | None = None
        own: list[Tensor] = []
        if self.backbone.pretrained is None:
            c4, c5 = self.backbone.late_stages(c3)
        else:
            pretrained = self.backbone.late_stages(c3, pretrained=True)
            drawing = self.router(pretrained[1].mean((2, 3))).squeeze(-1).float()
            share = (drawing > 0 if drawings is None else drawings).float()
            if not (self.classifier is None or self.training or (self.waits_for_router(x) and share.all())):
                kept = pretrained[1]
            if self.training:
                share = share * (torch.rand_like(share) >= TRAINED_DROPOUT)
                pretrained = [F.dropout2d(c, PRETRAINED_DROPOUT) for c in pretrained]
            if self.waits_for_router(x) and not share.any():
                c4, c5 = (torch.zeros_like(c) for c in pretrained)  # photos alone: a sixth of the work saved
            else:
                factor = share.to(c3.dtype)[:, None, None, None]
                c4, c5 = (c * factor for c in self.backbone.late_stages(c3))
            own = [pretrained[0], pretrained[1], pretrained[1]]
        # A convolution and a norm each.
        projections = cast(list[nn.Sequential], [*self.lateral, self.coarsest])
        scales = [p[0](c) for p, c in zip(projections, (c3, c4, c5, c5), strict=True)]
        for i, (convolution, c) in enumerate(zip(self.pretrained_lateral, own, strict=True), 1):
            scales[i] = convolution(c, shortcut=scales[i])
        return [p[1](scale) for p, scale in zip(projections, scales, strict=True)], drawing, kept

    def waits_for_router(self, x: Tensor) -> bool:
        """Whether to read the router at once: not in training, nor where that means waiting for a device."""
        return not self.training and x.device.type == "cpu" and not torch.compiler.is_compiling()

    def flatten(self, scales: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The pyramid as one sequence: its shapes [L, 2], first positions [L], and features [B, S, C]."""
        grid = grid_of(scales)
        flat = [s.flatten(2).transpose(1, 2) + self.level[i] for i, s in enumerate(scales)]
        return grid.shapes, grid.starts, torch.cat(flat, 1)

    def forward(
        self,
        images: Tensor,
        text: Tensor,
        text_mask: Tensor,
        denoising: DenoisingQueries | None = None,
        drawings: Tensor | None = None,
        sizes: None = None,
    ) -> ImageTokens:
        """images: uint8 [B, H, W, 3]; text: [B, T, C_text]; text_mask: [B, T]; drawings: as in `pyramid`.

        sizes: of pictures without their padding; there must be none.
        """
        if sizes is not None:
            raise ValueError("ImageTokenizer: sizes must be None: it knows no padding")
        scales, drawing, pretrained_c5 = self.pyramid(images, drawings)
        shapes, starts, x = self.flatten(scales)
        dim = x.shape[-1]
        if self.guidance:
            x = self.fusion(x, text, text_mask)

        grid = grid_of(scales)
        centres = grid.anchors[None, :, :2].expand(len(x), -1, -1)
        position = grid.position.to(x.dtype)
        for layer in self.encoder:
            x = layer(x, position, centres, shapes, starts)
        memory = self.encoder_norm(x)

        proposal_objectness = self.proposal_objectness(memory).squeeze(-1).float()  # [B, S]
        proposal_boxes = (self.proposal_box(memory).float() + grid.anchor_logits).sigmoid()
        if self.pooling:
            features, boxes = pooled(memory, shapes, math.isqrt(self.num_queries))
            features = self.decoder_norm(features)
            objectness_logits = self.objectness[-1](features).squeeze(-1).float()
            proposals = (proposal_boxes, proposal_objectness)
            return ImageTokens(
                features, [boxes], [objectness_logits], memory, *proposals, drawing, pretrained_c5
            )
        best = proposal_objectness.topk(min(self.num_queries, x.shape[1]), dim=1).indices
        boxes = proposal_boxes.detach().gather(1, best[..., None].expand(-1, -1, 4))  # [B, M, 4]
        q = self.queries[: boxes.shape[1]].expand(len(x), -1, -1)
        mask = None
        if denoising is not None:
            extra = denoising.boxes.shape[1]
            # Denoising queries know the answer: no other query may see them, nor they each other.
            mask = torch.eye(boxes.shape[1] + extra, dtype=torch.bool, device=x.device)
            mask[: boxes.shape[1], : boxes.shape[1]] = True
            boxes = torch.cat([boxes, denoising.boxes], 1)
            q = torch.cat([q, self.denoising_query.expand(len(x), extra, -1)], 1)

        layer_boxes, layer_objectness = [], []
        for layer, objectness, box in zip(self.decoder, self.objectness, self.box, strict=True):
            position = self.box_position(sine_encoding(boxes, dim).to(q.dtype))
            q = layer(q, position, boxes, memory, shapes, starts, mask)
            features = self.decoder_norm(q)
            refined = (box(features).float() + inverse_sigmoid(boxes)).sigmoid()
            layer_boxes.append(refined)
            layer_objectness.append(objectness(features).squeeze(-1).float())
            boxes = refined.detach()
        proposals = (proposal_boxes, proposal_objectness)
        return ImageTokens(
            features, layer_boxes, layer_objectness, memory, *proposals, drawing, pretrained_c5
        )


def two_stage(tokenizer: nn.Module, where: str) -> ImageTokenizer:
    """The network's image tokenizer, for what another detector cannot do; where: who asks, for the error.

    Raises:
        ValueError: it is another.
    """
    if not isinstance(tokenizer, ImageTokenizer):
        raise ValueError(f"{where}: the detector must be 'two-stage', got {type(tokenizer).__name__}")
    return tokenizer


def pooled(memory: Tensor, shapes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Average pooling instead of queries (VisionLLM, table 3b).

    Args:
        memory: [B, S, C], the encoder's output; shapes: int64 [L, 2], of its scales.
        side: of the grid of M = side² cells.

    Returns:
        features [B, M, C], each scale averaged over the cells and then the scales; and the cells [B, M, 4].
    """
    levels = memory.split([int(height * width) for height, width in shapes.tolist()], 1)
    grids = [
        F.adaptive_avg_pool2d(level.transpose(1, 2).unflatten(2, (int(h), int(w))), side)
        for level, (h, w) in zip(levels, shapes.tolist(), strict=True)
    ]
    features = torch.stack(grids).mean(0).flatten(2).transpose(1, 2)
    centre = (torch.arange(side, device=memory.device) + 0.5) / side
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    extent = torch.full_like(x, 1 / side)
    boxes = torch.stack([x, y, extent, extent], -1).view(1, -1, 4)
    return features, boxes.expand(len(memory), -1, -1)


@dataclass(frozen=True)
class Grid:
    """What the scales' shapes alone decide. Shared between calls: not to be changed.

    Attributes:
        shapes: int64 [L, 2], heights and widths, and starts: [L], first positions; both on the CPU, where the
            operators read them without waiting for a device.
        anchors: [S, 4], of `anchor_boxes`; anchor_logits: [S, 4], their inverse sigmoid.
        position: [S, C], sine encoding of their centres.
    """

    shapes: Tensor
    starts: Tensor
    anchors: Tensor
    anchor_logits: Tensor
    position: Tensor


def grid_of(scales: list[Tensor]) -> Grid:
    """Of feature maps [B, C, H, W]."""
    shapes = tuple((int(s.shape[-2]), int(s.shape[-1])) for s in scales)
    return _grid(shapes, scales[0].shape[1], scales[0].device)


@lru_cache(maxsize=16)
def _grid(sizes: tuple[tuple[int, int], ...], dim: int, device: torch.device) -> Grid:
    with torch.inference_mode(False), torch.no_grad():  # a tensor made in inference could not train later
        shapes = torch.tensor(sizes)
        starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
        anchors = anchor_boxes(shapes).to(device)
        return Grid(shapes, starts, anchors, inverse_sigmoid(anchors), sine_encoding(anchors[:, :2], dim))


def anchor_boxes(shapes: Tensor) -> Tensor:
    """[L, 2] heights and widths → one cxcywh box per position, [S, 4]: cell centres, sides that double."""
    rows = []
    for level, (height, width) in enumerate(shapes.tolist()):
        y = (torch.arange(height, device=shapes.device) + 0.5) / height
        x = (torch.arange(width, device=shapes.device) + 0.5) / width
        y, x = torch.meshgrid(y, x, indexing="ij")
        side = torch.full_like(x, ANCHOR_SIDE * 2**level)
        rows.append(torch.stack([x, y, side, side], -1).view(-1, 4))
    return torch.cat(rows)
