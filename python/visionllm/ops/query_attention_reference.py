"""The PyTorch reference of batched query decoding, forward and backward, and the check of its arguments.

The contract, with the meaning of the shape letters, is in ``cpp/include/visionllm/query_attention.h``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from visionllm.ops import fallback

__all__ = ["query_attention_backward_reference", "query_attention_reference"]


@dataclass(frozen=True)
class _Sizes:
    batch: int
    groups: int
    slots: int
    heads: int
    kv_heads: int
    channels: int
    prefix: int


def check_arguments(
    operator: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_length: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
) -> _Sizes:
    """What ``cpp/query_attention.cpp`` checks for the kernels, except their limits of size."""
    fallback.check_rank(operator, "q", q, "[B, M, S, H, D]")
    fallback.check_rank(operator, "k", k, "[B, M, S, Hkv, D]")
    fallback.check_rank(operator, "prefix_k", prefix_k, "[B, P, Hkv, D]")
    batch, groups, slots, heads, channels = q.shape
    kv_heads, prefix = k.shape[3], prefix_k.shape[1]
    own, shared = (batch, groups, slots, kv_heads, channels), (batch, prefix, kv_heads, channels)
    fallback.check_shape(operator, "k", k, "[B, M, S, Hkv, D]", own)
    fallback.check_shape(operator, "v", v, "[B, M, S, Hkv, D]", own)
    fallback.check_shape(operator, "prefix_k", prefix_k, "[B, P, Hkv, D]", shared)
    fallback.check_shape(operator, "prefix_v", prefix_v, "[B, P, Hkv, D]", shared)
    fallback.check_shape(operator, "prefix_length", prefix_length, "[B]", (batch,))
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{operator}: q must have a multiple of k's heads, got H = {heads} and Hkv = {kv_heads}"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v), ("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        fallback.check_real(operator, name, tensor, q.device)
        if tensor.dtype != q.dtype:
            raise ValueError(
                f"{operator}: {name} must be {fallback.type_name(q)}, got {fallback.type_name(tensor)}"
            )
    fallback.check_integer(operator, "prefix_length", prefix_length, q.device)
    if (cosine is None) != (sine is None):
        raise ValueError(f"{operator}: cosine and sine must be given together")
    for name, table in (("cosine", cosine), ("sine", sine)):
        if table is None:
            continue
        fallback.check_rank(operator, name, table, "[positions, D / 2]")
        if channels % 2 or table.shape[1] != channels // 2 or table.shape[0] < prefix + slots:
            raise ValueError(
                f"{operator}: {name} must have shape [positions >= P + S, D / 2] = "
                f"[>= {prefix + slots}, {channels // 2}], got {list(table.shape)}"
            )
        fallback.check_real(operator, name, table, q.device)
        if cosine is not None and table.shape != cosine.shape:
            raise ValueError(
                f"{operator}: sine must have cosine's shape {list(cosine.shape)}, got {list(table.shape)}"
            )
    return _Sizes(batch, groups, slots, heads, kv_heads, channels, prefix)


class _Reference:
    """Operands of the formula in the reference's own precision: float32, or more if the tensors have it.

    Letters of the products: b batch, m group, s and t slots, g KV head, r query head of that KV head,
    p prefix token, d channel.
    """

    def __init__(
        self,
        operator: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        prefix_length: Tensor,
        cosine: Tensor | None,
        sine: Tensor | None,
    ) -> None:
        arguments = (q, k, v, prefix_k, prefix_v, prefix_length, cosine, sine)
        self.sizes = n = check_arguments(operator, *arguments)
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        real = torch.arange(n.prefix, device=q.device) < prefix_length.to(q.device)[:, None]  # [B, P]
        self.hidden = ~real[:, None, None, None, None]  # against [b, g, m, r, s, p]
        self.table: tuple[Tensor, Tensor] | None = None
        if cosine is not None and sine is not None:
            own = torch.arange(n.slots, device=q.device)
            position = prefix_length.to(q.device).clamp(0, n.prefix)[:, None] + own  # [B, S]
            own_cosine, own_sine = (t[position].to(self.dtype)[:, None, :, None] for t in (cosine, sine))
            self.table = own_cosine, own_sine
        self.q = self.rotated(q.to(self.dtype), 1).unflatten(3, (n.kv_heads, n.heads // n.kv_heads))
        self.k, self.v = self.rotated(k.to(self.dtype), 1), v.to(self.dtype)
        # Selected, not multiplied by zero: NaN behind the prefix's end stays there.
        self.prefix_k, self.prefix_v = (
            torch.where(real[..., None, None], t.to(self.dtype), 0.0) for t in (prefix_k, prefix_v)
        )
        self.scale = 1 / math.sqrt(n.channels) if n.channels else 1.0

    def rotated(self, x: Tensor, direction: int) -> Tensor:
        """x [B, M, S, heads, D] turned by its slots' angles; direction -1 turns back."""
        if self.table is None:
            return x
        cosine, sine = self.table  # [B, 1, S, 1, D / 2]
        low, high = x.chunk(2, -1)
        return torch.cat([low * cosine - direction * high * sine, high * cosine + direction * low * sine], -1)

    def scores(self) -> Tensor:
        """Scaled, masked: [b, g, m, r, s, P + S]."""
        far = torch.einsum("bmsgrd,bpgd->bgmrsp", self.q, self.prefix_k).masked_fill(self.hidden, -math.inf)
        near = torch.einsum("bmsgrd,bmtgd->bgmrst", self.q, self.k)
        slots = self.sizes.slots
        future = torch.ones(slots, slots, dtype=torch.bool, device=far.device).triu(1)
        return torch.cat([far, near.masked_fill(future, -math.inf)], -1) * self.scale

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[…, P + S] → prefix and own group."""
        far, near = x.split([self.sizes.prefix, self.sizes.slots], -1)
        return far, near


def forward_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_length: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, M, S, H, D] and the scores' logsumexp [B, M, S, H]."""
    arguments = (q, k, v, prefix_k, prefix_v, prefix_length, cosine, sine)
    x = _Reference("query_attention", *arguments)
    scores = x.scores()
    far, near = x.halves(scores.softmax(-1))
    output = torch.einsum("bgmrsp,bpgd->bmsgrd", far, x.prefix_v)
    output = output + torch.einsum("bgmrst,bmtgd->bmsgrd", near, x.v)
    logsumexp = scores.logsumexp(-1).permute(0, 2, 4, 1, 3)  # [b, m, s, g, r]
    return output.flatten(3, 4).to(q.dtype).contiguous(), logsumexp.flatten(3).contiguous()


def query_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_length: Tensor,
    rope: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The formula in plain PyTorch on any device, in float32 or the tensors' higher precision.

    Every other implementation is held against this one in float64. Needs memory for all scores,
    [B, H, M, S, P + S].

    Raises:
        ValueError: a shape or type does not fit, with the compiled operator's message.
    """
    cosine, sine = rope if rope is not None else (None, None)
    arguments = (q, k, v, prefix_k, prefix_v, prefix_length, cosine, sine)
    return forward_reference(*arguments)[0]


def query_attention_backward_reference(
    grad_output: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_length: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, prefix_k and prefix_v in plain PyTorch.

    Raises:
        ValueError: as ``query_attention_reference``.
    """
    operator = "query_attention_backward"
    arguments = (q, k, v, prefix_k, prefix_v, prefix_length, cosine, sine)
    x = _Reference(operator, *arguments)
    fallback.check_shape(operator, "grad_output", grad_output, "[B, M, S, H, D]", q.shape)
    fallback.check_shape(operator, "output", output, "[B, M, S, H, D]", q.shape)
    fallback.check_shape(operator, "logsumexp", logsumexp, "[B, M, S, H]", q.shape[:4])
    fallback.check_real(operator, "grad_output", grad_output, q.device)
    n = x.sizes
    heads = (n.kv_heads, n.heads // n.kv_heads)
    grad, out = (t.to(x.dtype).unflatten(3, heads) for t in (grad_output, output))
    own_sum = logsumexp.to(x.dtype).unflatten(3, heads).permute(0, 3, 1, 4, 2)  # [b, g, m, r, s]
    weights = (x.scores() - own_sum[..., None]).exp()
    grad_weights = torch.cat(
        [
            torch.einsum("bmsgrd,bpgd->bgmrsp", grad, x.prefix_v),
            torch.einsum("bmsgrd,bmtgd->bgmrst", grad, x.v),
        ],
        -1,
    )
    mean = (grad * out).sum(-1).permute(0, 3, 1, 4, 2)  # what softmax takes off: [b, g, m, r, s]
    far_weights, near_weights = x.halves(weights)
    far, near = x.halves(weights * (grad_weights - mean[..., None]) * x.scale)
    grad_q = torch.einsum("bgmrsp,bpgd->bmsgrd", far, x.prefix_k)
    grad_q = grad_q + torch.einsum("bgmrst,bmtgd->bmsgrd", near, x.k)
    gradients = (
        x.rotated(grad_q.flatten(3, 4), -1),
        x.rotated(torch.einsum("bgmrst,bmsgrd->bmtgd", near, x.q), -1),
        torch.einsum("bgmrst,bmsgrd->bmtgd", near_weights, grad),
        torch.einsum("bgmrsp,bmsgrd->bpgd", far, x.q),
        torch.einsum("bgmrsp,bmsgrd->bpgd", far_weights, grad),
    )
    grad_q, grad_k, grad_v, grad_prefix_k, grad_prefix_v = (t.to(q.dtype).contiguous() for t in gradients)
    return grad_q, grad_k, grad_v, grad_prefix_k, grad_prefix_v
