"""Deformable DETR's encoder and decoder layers (Zhu et al., 2010.04159), pre-norm, over flattened scales."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from visionllm.model.attention import attention
from visionllm.model.linear import Linear
from visionllm.ops import ms_deform_attn_fused, ms_deform_attn_fused_reference
from visionllm.ops.choice import uses_operators


class MSDeformAttention(nn.Module):
    """Projections around the operator: value, sampling offsets, attention weights, output.

    A query's samples lie at its reference: for points [.., 2], offsets are in cells of the sampled scale; for
    boxes [.., 4], in halves of the box's size over the number of points.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.value = Linear(dim, dim)
        self.sampling_offsets = Linear(dim, heads * levels * points * 2)
        self.attention_weights = Linear(dim, heads * levels * points)
        self.output = Linear(dim, dim)
        # One direction per head, growing with the point's index: Deformable DETR's initial fan of offsets.
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(heads) * (2 * math.pi / heads)
        fan = torch.stack([angle.cos(), angle.sin()], -1)
        fan = fan / fan.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, points + 1)
        with torch.no_grad():
            offsets = fan[:, None, None] * steps[None, None, :, None]
            self.sampling_offsets.bias.copy_(offsets.expand(heads, levels, points, 2).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        value: Tensor,
        shapes: Tensor,
        starts: Tensor,
        shortcut: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """One query may sample every scale.

        Args:
            query: [B, Q, C]; value: [B, S, C].
            reference: [B, Q, 2 or 4] in 0..1, or one for every scale, [B, Q, L, 2 or 4].
            padding: bool [B, S], True where there is nothing to see.
            shortcut: [B, Q, C], added to the result.
            shapes: int64 [L, 2], heights and widths; starts: int64 [L], first row of every scale.

        Returns:
            [B, Q, C].
        """
        b, q, c = query.shape
        value = self.value(value)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        value = value.view(b, -1, self.heads, c // self.heads)
        offsets = self.sampling_offsets(query).view(b, q, self.heads, self.levels, self.points, 2)
        logits = self.attention_weights(query).view(b, q, self.heads, self.levels, self.points)
        if reference.ndim == 3:
            reference = reference[:, :, None].expand(-1, -1, self.levels, -1)
        if uses_operators(value):
            y = ms_deform_attn_fused(value, shapes, starts, reference, offsets, logits)
        else:
            y = ms_deform_attn_fused_reference(
                value.float(), shapes, starts, reference, offsets.float(), logits.float()
            )
        return self.output(y.to(query.dtype), shortcut=shortcut)


class FeedForward(nn.Module):
    """LN → linear → GELU → linear, added to the input."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = Linear(dim, hidden)
        self.down = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x), "gelu"), shortcut=x)


class DeformableEncoderLayer(nn.Module):
    """Every position of every scale samples all scales around itself."""

    def __init__(self, dim: int, heads: int, levels: int, points: int, ffn_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = MSDeformAttention(dim, heads, levels, points)
        self.ffn = FeedForward(dim, ffn_dim)

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor, shapes: Tensor, starts: Tensor
    ) -> Tensor:
        normed = self.norm(x)
        return self.ffn(self.attention(normed + position, reference, normed, shapes, starts, shortcut=x))


class DeformableDecoderLayer(nn.Module):
    """Self-attention among queries, deformable cross-attention into the encoder's output, feed-forward."""

    def __init__(self, dim: int, heads: int, levels: int, points: int, ffn_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.self_norm = nn.LayerNorm(dim)
        self.query_key = nn.Linear(dim, 2 * dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.cross_norm = nn.LayerNorm(dim)
        self.attention = MSDeformAttention(dim, heads, levels, points)
        self.ffn = FeedForward(dim, ffn_dim)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: Tensor,
        starts: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """x, position: [B, Q, C]; reference: [B, Q, 4]; memory: [B, S, C]; mask: [Q, Q], True = may see."""
        b, n, c = x.shape
        normed = self.self_norm(x)
        q, k = self.query_key(normed + position).view(b, n, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        v = self.value(normed).view(b, n, self.heads, -1).transpose(1, 2)
        y = attention(q, k, v, mask)
        x = x + self.output(y.transpose(1, 2).reshape(b, n, c))
        query = self.cross_norm(x) + position
        x = self.attention(query, reference, memory, shapes, starts, shortcut=x)
        return self.ffn(x)
