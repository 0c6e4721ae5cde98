"""Which implementation the model's layers run: this package's operators, or plain torch.

``VISIONLLM_OPS`` says it for a process, `use_operators` for a block of code:

    kernels    every operator that has a kernel for the tensors' device and type (the default)
    reference  plain torch only: slower, and what to compare with when a result looks wrong

Results are equal within the tolerances of ``tests/comparison.py``. Measured at the packaged model's sizes on
one CPU core (AVX-512), plain torch and the operator:

                      prediction, float32     training of 4 pictures, float32     bfloat16
    query_attention      2.29 / 0.63 ms              13.5 /  6.0 ms
    fusion_attention     1.82 / 1.03 ms              22.1 / 16.1 ms            15.7 / 10.8 ms
    slot_head            2.93 / 1.10 ms              10.0 / 10.4 ms             6.1 /  6.3 ms
    lora_linear          0.47 / 0.44 ms               6.1 /  4.9 ms             2.8 /  2.9 ms

In a whole training step all five take 364 ms, without the last two 374 ms.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from visionllm.ops import native

__all__ = ["CHOICES", "autocast", "chosen", "use_operators", "uses_operators"]

CHOICES = ("kernels", "reference")
VARIABLE = "VISIONLLM_OPS"


def _checked(choice: str, where: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{where}: expected one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


_choice = _checked(os.environ.get(VARIABLE) or CHOICES[0], VARIABLE)


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


def uses_operators(tensor: Tensor) -> bool:
    """Whether layers are to run operators on tensors of this one's device and type."""
    if _choice == "reference" or tensor.dtype == torch.float64:
        return False
    if tensor.device.type == "cuda":
        return native.has_cuda_kernels()
    return tensor.device.type == "cpu"


def autocast(tensor: Tensor) -> Tensor:
    """In autocast's type, where autocast is on: what it does for torch's own products, not for operators."""
    if not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
