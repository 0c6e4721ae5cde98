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

# On the CPU, at the packaged model's sizes (bench/model.py): what "auto" runs in prediction and in training.
CPU_PREDICTION = frozenset({"ms_deform_attn_fused"})
CPU_TRAINING = frozenset({"ms_deform_attn_fused"})


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
