"""Format queries in, answers out: one group of slots per image token, and the head that reads them.

A group is `<cls> <x1> <y1> … <xN> <yN>`, and the points are a box's corners, places along an object's outline
or keypoints, as the instruction's output format says. A slot may take only its own rows: `<cls>` one of the
prompt's K classes or "no object", a coordinate slot one of the 1025 location tokens, so nothing is computed
for the rest of a vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionllm.instruction.instruction import MAX_CLASSES
from visionllm.model.box_prior import BoxPrior
from visionllm.model.config import LOCATION_BINS, ModelConfig
from visionllm.model.position_encoding import sine_encoding
from visionllm.ops import SlotPrediction, slot_head_cross_entropy, slot_head_predict
from visionllm.ops.choice import autocast, uses_operators

BINS_PER_UNIT = (LOCATION_BINS - 1) // 2  # usually a bin is 1/512 of the picture's height or width
LOCATION_SIGMA = 1.5  # standard deviation, in 1/512, of the smoothed coordinate targets
TURNS = 16  # frequencies of the encoding of a place along an outline: its length once, twice, …
VISIBILITIES = 3  # COCO's: not labelled, labelled but hidden, visible


@dataclass(frozen=True)
class SlotFormat:
    """What stands behind `<cls>` in every group of a pass.

    Attributes:
        kind: "boxes" (the corners), "outlines" (equally spaced points along a boundary, clockwise from the
            topmost) or "keypoints".
        points: N.
        names: [B, N, C_text], the text encoder's features of the keypoints' names; only for keypoints.
    """

    kind: str = "boxes"
    points: int = 2
    names: Tensor | None = None


@dataclass
class SlotLogits:
    """What the slots' states say.

    Attributes:
        classes: [B, G, K + 1], the last one "no object"; −inf at classes that a prompt does not list.
        locations: [B, G, 2N, 1025].
    """

    classes: Tensor
    locations: Tensor


@dataclass
class SlotAnswers:
    """What the slots answer; no gradients.

    Attributes:
        probabilities: fp32 [B, G, K + 1] over the classes and, last, "no object"; 0 at unlisted classes.
        offsets: fp32 [B, G, 2N] in picture sizes, the expectation near the best location token.
        bins: int64 [B, G, 2N], the best location token, −512 … 512.
    """

    probabilities: Tensor
    offsets: Tensor
    bins: Tensor

    def of(self, groups: Tensor) -> SlotAnswers:
        """Of the groups [B, n] alone."""
        rows = torch.arange(len(groups), device=groups.device)[:, None]
        return SlotAnswers(
            self.probabilities[rows, groups], self.offsets[rows, groups], self.bins[rows, groups]
        )


class SlotQueries(nn.Module):
    """Inputs of the slots: E[format token j] + W_q e_i + W_l PE(box_i).

    The format tokens of a box's corners have rows of their own. An outline's point i of N is told by its axis
    and its place i / N along the boundary, so that one set of weights serves every N; a keypoint by its axis
    and its name.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.llm_dim
        self.format = nn.Embedding(5, dim)  # <cls> <x1> <y1> <x2> <y2>
        self.axis = nn.Embedding(4, dim)  # x and y of an outline's point, of a keypoint
        self.place = nn.Linear(2 * TURNS, dim, bias=False)
        self.point_name = nn.Linear(config.text_dim, dim, bias=False)
        self.feature = nn.Linear(config.dim, dim)
        self.position = nn.Linear(config.dim, dim)
        # How object-like an image token is, for the prefix: what counts objects needs it. At first it says
        # nothing.
        self.objectness = nn.Linear(1, dim, bias=False)
        self.dim = config.dim
        nn.init.normal_(self.format.weight, std=0.5)
        nn.init.normal_(self.axis.weight, std=0.5)
        nn.init.zeros_(self.objectness.weight)

    def image_tokens(self, features: Tensor, boxes: Tensor, objectness: Tensor | None = None) -> Tensor:
        """What stands in the prefix in place of <image>.

        Args:
            features: [B, M, C]; boxes: [B, M, 4]; objectness: [B, M] logits.

        Returns:
            [B, M, C_llm].
        """
        tokens = self.feature(features) + self.position(sine_encoding(boxes, self.dim).to(features.dtype))
        if objectness is None:
            return tokens
        return tokens + self.objectness(objectness.detach().sigmoid()[..., None].to(features.dtype))

    def format_tokens(self, wanted: SlotFormat) -> Tensor:
        """[1 + 2N, C_llm], or for keypoints [B, 1, 1 + 2N, C_llm]."""
        if wanted.kind == "boxes":
            return self.format.weight
        first = self.format.weight[:1]
        if wanted.kind == "outlines":
            tokens = self.axis.weight[None, :2] + self.place(places(wanted.points, first.device))[:, None]
            return torch.cat([first, tokens.flatten(0, 1).to(first.dtype)])
        assert wanted.names is not None
        tokens = self.axis.weight[2:] + self.point_name(wanted.names)[:, :, None]  # [B, N, 2, C]
        tokens = tokens.flatten(1, 2).to(first.dtype)
        return torch.cat([first.expand(len(tokens), 1, -1), tokens], 1)[:, None]

    def forward(self, features: Tensor, boxes: Tensor, wanted: SlotFormat) -> Tensor:
        """[B, G, C], [B, G, 4] → [B, G, 1 + 2N, C_llm]."""
        return self.image_tokens(features, boxes)[:, :, None] + self.format_tokens(wanted)


def places(points: int, device: torch.device) -> Tensor:
    """[N, 2 · TURNS]: cosine and sine of 1 … TURNS turns around the outline at its places 0, 1/N, …"""
    turn = torch.arange(points, device=device)[:, None] / points * torch.arange(1, TURNS + 1, device=device)
    angle = 2 * math.pi * turn
    return torch.cat([angle.cos(), angle.sin()], 1)


class SlotHead(nn.Module):
    """States of the slots and of the prompt's names → logits over each slot's rows."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.llm_dim
        self.class_rows = config.class_rows
        self.class_query = nn.Linear(dim, dim, bias=False)
        if config.class_rows == "names":
            self.name_key = nn.Linear(dim, dim, bias=False)
            if config.text_guidance:
                self.text_key = nn.Linear(config.text_dim, dim, bias=False)
        self.guidance = config.text_guidance
        self.bins_per_unit = units(config.location_bins)
        self.no_object = nn.Parameter(torch.empty(dim).normal_())
        self.locations = nn.Parameter(torch.empty(config.location_bins, dim).normal_(std=0.02))
        self.visibility = nn.Linear(dim, VISIBILITIES)  # of a keypoint, read at its x
        self.box_prior = BoxPrior(config.location_bins) if config.box_prior else None
        self.scale = dim**-0.5

    def rows(self, name_states: Tensor, name_features: Tensor, class_tokens: Tensor) -> Tensor:
        """What class slots are compared with.

        Args:
            name_states: [B, K, C], the LLM's states at each name.
            name_features: [B, K, C_text], the text encoder's of each name.
            class_tokens: [512, C], embeddings of <c0> … <c511>.
        """
        if self.class_rows == "static":
            return class_tokens[: name_states.shape[1]].expand(len(name_states), -1, -1)
        rows = self.name_key(name_states)
        return rows + self.text_key(name_features) if self.guidance else rows

    def class_logits(self, states: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
        """states [B, G, C] of the <cls> slots, rows [B, K, C], mask bool [B, K] → [B, G, K + 1] in fp32."""
        query = self.class_query(states)
        logits = (
            (query @ rows.to(query.dtype).transpose(1, 2)).float().masked_fill(~mask[:, None], float("-inf"))
        )
        return (
            torch.cat([logits, (query @ self.no_object.to(query.dtype)).float()[..., None]], -1) * self.scale
        )

    def location_logits(self, states: Tensor, rows: Tensor | None = None) -> Tensor:
        """[..., C] → [..., 1025] in fp32; rows: [1025, C], location tokens other than `locations`."""
        rows = self.locations if rows is None else rows
        return (states @ rows.to(states.dtype).T).float()


class SlotReading:
    """States of the slots of one pass, and what the head reads from them: by the operator, or from logits.

    Args:
        states: [B, G, 1 + 2N, C], the LLM's last.
        rows: [B, K, C], of `SlotHead.rows`; mask: bool [B, K], which of them a prompt lists.
        boxes: [B, G, 4] cxcywh, to whose centres the locations are relative.
        kind: of `SlotFormat`.
    """

    def __init__(
        self,
        head: SlotHead,
        states: Tensor,
        rows: Tensor,
        mask: Tensor,
        boxes: Tensor,
        kind: str = "boxes",
    ) -> None:
        self.head, self.states, self.rows, self.mask, self.boxes = head, states, rows, mask, boxes
        self.kind = kind
        self.by_operator = uses_operators(states)

    @cached_property
    def logits(self) -> SlotLogits:
        with torch.set_grad_enabled(self.states.requires_grad):  # answers ask first, without gradients
            return SlotLogits(
                self.head.class_logits(self.states[:, :, 0], self.rows, self.mask),
                self.head.location_logits(*self._location_operands()),
            )

    def answers(self, window: int, groups: int | None = None) -> SlotAnswers:
        """Of the first groups (None: all); window: as for `expected_offsets`."""
        with torch.no_grad():
            return self._read(window, groups) if self.by_operator else self._from_logits(window, groups)

    def _from_logits(self, window: int, groups: int | None) -> SlotAnswers:
        classes, locations = self.logits.classes[:, :groups], self.logits.locations[:, :groups]
        best = locations.argmax(-1)
        offsets = expected_offsets(locations, window, best)
        return SlotAnswers(classes.softmax(-1), offsets, best - self.head.bins_per_unit)

    def _read(self, window: int, groups: int | None) -> SlotAnswers:
        states, rows, valid = self._class_operands(groups)
        classes: SlotPrediction = slot_head_predict(
            states, rows, valid=valid, scale=self.head.scale, probabilities=True
        )
        half = self.head.bins_per_unit
        coordinates, locations = self._location_operands(groups)
        places: SlotPrediction = slot_head_predict(
            autocast(coordinates), locations, window=window, offset=half
        )
        assert classes.probabilities is not None and places.expectation is not None
        return SlotAnswers(classes.probabilities, places.expectation / half, places.best - half)

    def spread(self) -> Tensor:
        """Standard deviation of every coordinate's location tokens, in picture sizes: fp32 [B, G, 2N]."""
        weights = self.logits.locations.softmax(-1)
        half = self.head.bins_per_unit
        bins = (torch.arange(2 * half + 1, device=weights.device) - half) / half
        mean = weights @ bins
        return (weights @ bins.square() - mean.square()).clamp(min=0).sqrt()

    def visibility_logits(self) -> Tensor:
        """[B, G, N, 3], of every keypoint, in fp32."""
        return self.head.visibility(self.states[:, :, 1::2]).float()

    def class_loss(self, labels: Tensor) -> Tensor:
        """Cross-entropy of the classes: labels [B, G], K for "no object" → [B, G]."""
        if not self.by_operator:
            return F.cross_entropy(self.logits.classes.mT, labels, reduction="none")
        states, rows, valid = self._class_operands()
        return slot_head_cross_entropy(states, rows, labels, valid=valid, scale=self.head.scale)

    def location_loss(self, offsets: Tensor, weight: Tensor) -> Tensor:
        """Cross-entropy against a Gaussian around the true offsets, summed.

        Args:
            offsets: [B, G, 2N] in bins; weight: [B, G, 2N].
        """
        if not self.by_operator:
            counts = weight > 0
            return location_loss(self.logits.locations[counts], offsets[counts], weight[counts])
        states, locations = self._location_operands()
        return slot_head_cross_entropy(
            autocast(states),
            locations,
            offsets + self.head.bins_per_unit,
            weight=weight.to(offsets.dtype),
            sigma=LOCATION_SIGMA * self.head.bins_per_unit / BINS_PER_UNIT,
            reduction="sum",
        )

    def _location_operands(self, groups: int | None = None) -> tuple[Tensor, Tensor]:
        """States [B, G, 2N, C'] of the coordinate slots and location tokens [1025, C']."""
        states, rows = self.states[:, :groups, 1:], self.head.locations
        prior = self.head.box_prior
        if prior is None or self.kind != "boxes":
            return states, rows
        corners = prior.of_boxes(self.boxes[:, :groups])
        return torch.cat([states, corners.to(states.dtype)], -1), torch.cat([rows, prior.of_bins()], -1)

    def _class_operands(self, groups: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """States [B, G, C], rows [B, K + 1, C] and which of them each picture allows."""
        states = self.head.class_query(self.states[:, :groups, 0])
        no_object = self.head.no_object.to(self.rows.dtype).expand(len(self.rows), 1, -1)
        return states, torch.cat([self.rows, no_object], 1), F.pad(self.mask, (0, 1), value=True)


def location_loss(logits: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """As `SlotReading.location_loss`: logits [n, bins]; offsets [n] in bins around 0; weight [n]."""
    half = units(logits.shape[-1])
    bins = torch.arange(2 * half + 1, device=logits.device) - half
    centres = offsets.clamp(-half, half)[..., None]
    sigma = LOCATION_SIGMA * half / BINS_PER_UNIT
    wanted = (-((bins - centres) ** 2) / (2 * sigma**2)).softmax(-1)
    return -(weight * (wanted * logits.log_softmax(-1)).sum(-1)).sum()


def class_token_embedding(dim: int) -> nn.Embedding:
    """Rows of <c0> … <c511>."""
    embedding = nn.Embedding(MAX_CLASSES, dim)
    nn.init.normal_(embedding.weight, std=0.5)
    return embedding


def units(bins: int) -> int:
    """How many of the location tokens one picture size is: the last one's offset."""
    return (bins - 1) // 2


def expected_offsets(logits: Tensor, window: int, best: Tensor | None = None) -> Tensor:
    """Location logits [..., bins] → offsets in picture sizes [...]: expectation near the argmax.

    Args:
        window: how many bins on each side of the argmax count; 0 takes the argmax alone.
        best: int64 [...], the argmax where it is known.
    """
    half = units(logits.shape[-1])
    best = (logits.argmax(-1) if best is None else best)[..., None]
    if window == 0:
        return (best.squeeze(-1) - half).float() / half
    around = best + torch.arange(-window, window + 1, device=logits.device)
    inside = (around >= 0) & (around <= 2 * half)
    near = logits.gather(-1, around.clamp(0, 2 * half)).masked_fill(~inside, float("-inf"))
    return (near.softmax(-1) * (around - half)).sum(-1) / half


def points_of(offsets: Tensor, boxes: Tensor) -> Tensor:
    """Offsets [B, G, 2N] from centres of boxes [B, G, 4] → points [B, G, N, 2], shares of the picture."""
    return offsets.unflatten(-1, (-1, 2)) + boxes[..., None, :2]


def extent_of(points: Tensor) -> Tensor:
    """Points [..., N, 2] → the box around them [..., 4], x1 y1 x2 y2."""
    return torch.cat([points.amin(-2), points.amax(-2)], -1)
