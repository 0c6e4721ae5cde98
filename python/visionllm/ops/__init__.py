"""Operators with compiled kernels, as torch operators.

``ms_deform_attn`` is multi-scale deformable attention; ``accelerate_hugging_face`` makes the Deformable-DETR family of
``transformers`` use it.
"""

from __future__ import annotations

from visionllm.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_reference

__all__ = ["ms_deform_attn", "ms_deform_attn_reference"]
