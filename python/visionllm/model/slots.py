"""Format queries in, answers out: one group of slots per image token, and the head that reads them.

A group is `<cls> <x1> <y1> … <xN> <yN>`. A slot may take only its own rows: `<cls>` one of the prompt's K
classes or "no object", a coordinate slot one of the 1025 location tokens, so nothing is computed for the rest
of a vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visionllm.instruction.instruction import MAX_CLASSES
from visionllm.model.config import LOCATION_BINS, MAX_BOUNDARY_POINTS, ModelConfig
from visionllm.model.position_encoding import sine_encoding

BINS_PER_UNIT = (LOCATION_BINS - 1) // 2  # a bin is 1/512 of the picture's height or width


@dataclass
class SlotLogits:
    """What the slots' states say.

    Attributes:
        classes: [B, G, K + 1], the last one "no object"; −inf at classes that a prompt does not list.
        locations: [B, G, 2N, 1025].
    """

    classes: Tensor
    locations: Tensor


class SlotQueries(nn.Module):
    """Inputs of the slots: E[format token j] + W_q e_i + W_l PE(box_i)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.format = nn.Embedding(1 + 2 * MAX_BOUNDARY_POINTS, config.llm_dim)
        self.feature = nn.Linear(config.dim, config.llm_dim)
        self.position = nn.Linear(config.dim, config.llm_dim)
        self.dim = config.dim
        nn.init.normal_(self.format.weight, std=0.5)

    def image_tokens(self, features: Tensor, boxes: Tensor) -> Tensor:
        """[B, M, C], [B, M, 4] → what stands in the prefix in place of <image>, [B, M, C_llm]."""
        return self.feature(features) + self.position(sine_encoding(boxes, self.dim).to(features.dtype))

    def forward(self, features: Tensor, boxes: Tensor, points: int) -> Tensor:
        """[B, G, C], [B, G, 4] → [B, G, 1 + 2·points, C_llm]."""
        return self.image_tokens(features, boxes)[:, :, None] + self.format.weight[: 1 + 2 * points]


class SlotHead(nn.Module):
    """States of the slots and of the prompt's names → logits over each slot's rows."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.llm_dim
        self.class_rows = config.class_rows
        self.class_query = nn.Linear(dim, dim, bias=False)
        if config.class_rows == "names":
            self.name_key = nn.Linear(dim, dim, bias=False)
            self.text_key = nn.Linear(config.text_dim, dim, bias=False)
        self.no_object = nn.Parameter(torch.empty(dim).normal_())
        self.locations = nn.Parameter(torch.empty(LOCATION_BINS, dim).normal_(std=0.02))
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
        return self.name_key(name_states) + self.text_key(name_features)

    def class_logits(self, states: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
        """states [B, G, C] of the <cls> slots, rows [B, K, C], mask bool [B, K] → [B, G, K + 1] in fp32."""
        query = self.class_query(states)
        logits = (
            (query @ rows.to(query.dtype).transpose(1, 2)).float().masked_fill(~mask[:, None], float("-inf"))
        )
        return (
            torch.cat([logits, (query @ self.no_object.to(query.dtype)).float()[..., None]], -1) * self.scale
        )

    def location_logits(self, states: Tensor) -> Tensor:
        """[..., C] → [..., 1025] in fp32."""
        return (states @ self.locations.to(states.dtype).T).float()


def class_token_embedding(dim: int) -> nn.Embedding:
    """Rows of <c0> … <c511>."""
    embedding = nn.Embedding(MAX_CLASSES, dim)
    nn.init.normal_(embedding.weight, std=0.5)
    return embedding


def expected_offsets(logits: Tensor, window: int) -> Tensor:
    """Location logits [..., 1025] → offsets in picture sizes [...]: expectation near the argmax.

    Args:
        window: how many bins on each side of the argmax count; 0 takes the argmax alone.
    """
    best = logits.argmax(-1, keepdim=True)
    if window == 0:
        return (best.squeeze(-1) - BINS_PER_UNIT).float() / BINS_PER_UNIT
    around = best + torch.arange(-window, window + 1, device=logits.device)
    inside = (around >= 0) & (around < LOCATION_BINS)
    near = logits.gather(-1, around.clamp(0, LOCATION_BINS - 1)).masked_fill(~inside, float("-inf"))
    return (near.softmax(-1) * (around - BINS_PER_UNIT)).sum(-1) / BINS_PER_UNIT
