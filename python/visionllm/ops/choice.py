"""Which implementation the model's layers run: this package's operators, or plain torch.

``VISIONLLM_OPS`` says it for a process, `use_operators` for a block of code:

    auto       every operator where it is at least as fast as plain torch (the default)
    all        every operator that has a kernel for the tensors' device and type
    reference  plain torch only: slower, and what to compare with when a result looks wrong

Results are equal within the tolerances of ``tests/comparison.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from visionllm.ops import native

__all__ = ["CHOICES", "autocast", "chosen", "use_operators", "uses_operator"]

CHOICES = ("auto", "all", "reference")
VARIABLE = "VISIONLLM_OPS"

# What "auto" runs on the CPU, measured at the packaged model's sizes on one core (AVX-512), plain / operator:
#                        prediction, fp32   training step of the layer, batch 4: fp32        bfloat16
#   query_attention      2292 /  630 us     13.5 /  6.0 ms
#   fusion_attention     1824 / 1034 us     22.1 / 16.1 ms                       15.7 / 10.8 ms
#   slot_head            2932 / 1101 us     10.0 / 10.4 ms                        6.1 /  6.3 ms
#   lora_linear           466 /  438 us      6.1 /  4.9 ms                        2.8 /  2.9 ms
CPU_PREDICTION = frozenset(
    {"fusion_attention", "lora_linear", "ms_deform_attn_fused", "query_attention", "slot_head"}
)
CPU_TRAINING = frozenset({"fusion_attention", "ms_deform_attn_fused", "query_attention"})


def _checked(choice: str, where: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{where}: expected one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


_choice = _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)


def chosen() -> str:
    """The choice in force, one of CHOICES."""
    return _choice


@contextmanager
def use_operators(choice: str) -> Iterator[None]:
    """Within the block, in all threads, layers run as ``choice`` says.

    Raises:
        ValueError: not one of CHOICES.
    """
    global _choice
    before, _choice = _choice, _checked(choice, "use_operators")
    try:
        yield
    finally:
        _choice = before


def uses_operator(operator: str, tensor: Tensor) -> bool:
    """Whether a layer is to run ``operator`` on tensors of this one's device and type."""
    if _choice == "reference" or tensor.dtype == torch.float64:
        return False
    if tensor.device.type == "cuda":
        return native.has_cuda_kernels()
    if tensor.device.type != "cpu":
        return False
    if _choice == "all":
        return True
    return operator in (CPU_TRAINING if torch.is_grad_enabled() else CPU_PREDICTION)


def autocast(tensor: Tensor) -> Tensor:
    """In autocast's type, where autocast is on: what it does for torch's own products, not for operators."""
    if not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
