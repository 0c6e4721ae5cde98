"""What the tests of lora_linear's kernels share, wherever these run."""

from __future__ import annotations

import torch
from comparison import TOLERANCES, assert_close
from torch import Tensor

from visionllm.ops.lora_linear import SampleInputs
from visionllm.ops.lora_linear_reference import lora_linear_backward_reference, lora_linear_reference

NAMES = ("output", "low_rank", "grad_x", "grad_a", "grad_b")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MIXED = dict(adapters=3, indexed=True)
# Sizes that every kernel meets; each has more of its own.
CASES = {
    "one_row": dict(rows=1, inputs=40, outputs=17, rank=16),
    "one_row_long": dict(rows=1, inputs=1096, outputs=17, rank=1, bias=False),
    "eight_rows": dict(rows=8, inputs=72, outputs=33, rank=9, **MIXED),
    "few_rows_odd": dict(rows=5, inputs=37, outputs=19, rank=5, **MIXED),
    "few_rows_int8": dict(rows=3, inputs=80, outputs=20, rank=8, int8=True, **MIXED),
    "few_rows_int8_odd": dict(rows=11, inputs=75, outputs=35, rank=7, int8=True),
    "few_rows_plain": dict(rows=4, inputs=24, outputs=16, adapters=0),
}


def gradient(inputs: SampleInputs) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randn(inputs.x.shape[0], inputs.weight.shape[0], generator=random).to(inputs.x.dtype)


def expected_results(inputs: SampleInputs) -> dict[str, Tensor]:
    """All results by name, by the reference in float64."""
    args = [
        t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs.operator_args()
    ]
    output, low_rank = lora_linear_reference(*args)
    grads = lora_linear_backward_reference(
        gradient(inputs).double(), *args[:3], *args[4:8], low_rank, args[8], True, True, True
    )
    return dict(zip(NAMES, (output, low_rank, *grads), strict=True))


def check(
    got: dict[str, Tensor], expected: dict[str, Tensor], inputs: SampleInputs, rounds_int8: bool = False
) -> None:
    """``rounds_int8``: the kernels round an int8 base to 16 bits for the gradient of x."""
    for name, want in expected.items():
        rounded = rounds_int8 and name == "grad_x" and inputs.weight_scale is not None
        operator = "lora_linear_int8_grad_x" if rounded else "lora_linear"
        dtype = torch.float32 if name == "low_rank" else inputs.x.dtype
        assert got[name].dtype == dtype and got[name].shape == want.shape, name
        assert_close(name, got[name], want, TOLERANCES[operator, dtype])
