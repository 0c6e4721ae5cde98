"""Compiled operators for torch.

``ms_deform_attn`` is multi-scale deformable attention; ``accelerate_hugging_face`` makes the Deformable-DETR
family of ``transformers`` use it. Importing this package registers ``torch.ops.visionllm``.
"""

from __future__ import annotations

from visionllm.ops.hugging_face import MultiScaleDeformableAttention, accelerate_hugging_face
from visionllm.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_reference

__all__ = [
    "MultiScaleDeformableAttention",
    "accelerate_hugging_face",
    "ms_deform_attn",
    "ms_deform_attn_reference",
]
