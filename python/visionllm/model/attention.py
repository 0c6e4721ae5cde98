"""softmax(q kᵀ / √d) v, by whichever of two equal forms is faster."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU does: on others torch's bf16 products take tens of times as long as those in fp32."""
    from visionllm.ops.precision import use_autocast

    return use_autocast("auto", torch.device("cpu"))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention over [B, H, T, D].

    Args:
        mask: bool, broadcastable to [B, H, T_q, T_k], True where a query may look.
        causal: query i looks at keys 0 … i; takes the place of a mask.
    """
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and not multiplies_bfloat16():
        with torch.autocast("cpu", enabled=False):
            return attention(q.float(), k.float(), v.float(), mask, causal).to(q.dtype)
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled():
        # In bf16 on a CPU this, with its backward pass, took half of the time of SDPA, or a ninth if short.
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if causal:
            future = torch.ones(weights.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            weights = weights.masked_fill(future, float("-inf"))
        elif mask is not None:
            weights = weights.masked_fill(~mask, float("-inf"))
        return weights.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
