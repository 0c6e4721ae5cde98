"""Compiled operators for torch.

``fusion_attention`` is language fusion, from the layer norm to the gated residual. ``ms_deform_attn`` is
multi-scale deformable attention; ``accelerate_hugging_face`` makes the Deformable-DETR family of
``transformers`` use it. ``query_attention`` is attention of groups of slots with a
shared prefix. ``slot_head_predict`` and ``slot_head_cross_entropy`` read the slots. Importing this package
registers ``torch.ops.visionllm``. ``use_operators("reference")``, or ``VISIONLLM_OPS=reference`` in the
environment, makes the model's layers run plain torch instead.
"""

from __future__ import annotations

from visionllm.ops.choice import use_operators
from visionllm.ops.fusion_attention import fusion_attention, fusion_attention_reference
from visionllm.ops.hugging_face import MultiScaleDeformableAttention, accelerate_hugging_face
from visionllm.ops.lora_linear import lora_linear, lora_linear_reference
from visionllm.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_reference
from visionllm.ops.ms_deform_attn_fused import ms_deform_attn_fused, ms_deform_attn_fused_reference
from visionllm.ops.query_attention import query_attention, query_attention_reference
from visionllm.ops.slot_head_cross_entropy import slot_head_cross_entropy
from visionllm.ops.slot_head_predict import SlotPrediction, slot_head_predict

__all__ = [
    "MultiScaleDeformableAttention",
    "SlotPrediction",
    "accelerate_hugging_face",
    "fusion_attention",
    "fusion_attention_reference",
    "lora_linear",
    "lora_linear_reference",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "ms_deform_attn_fused_reference",
    "ms_deform_attn_reference",
    "query_attention",
    "query_attention_reference",
    "slot_head_cross_entropy",
    "slot_head_predict",
    "use_operators",
]
