"""The operators under pytest-benchmark, for a quick look and for `--benchmark-compare` between two commits.

    pytest bench/ --benchmark-only

One size that takes milliseconds, without peers: `bench/<op>.py` has the paper's sizes beside the peers.
"""

from __future__ import annotations

import pytest
import torch

from visionllm.ops import ms_deform_attn
from visionllm.ops.ms_deform_attn import sample_inputs

# A 224 x 224 picture at strides 8, 16, 32, 64.
TINY = dict(batch=1, levels=((28, 28), (14, 14), (7, 7), (4, 4)), heads=8, channels=16)
CASES = {"encoder": TINY | {"encoder": True}, "decoder": TINY | {"queries": 100}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_ms_deform_attn(benchmark, case: str, dtype: torch.dtype) -> None:
    inputs = sample_inputs(dtype=dtype, **CASES[case])
    output = benchmark(ms_deform_attn, *inputs.args())
    assert output.isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_ms_deform_attn_with_backward(benchmark, case: str) -> None:
    inputs = sample_inputs(requires_grad=True, **CASES[case])
    leaves = [t for t in inputs.args() if t.requires_grad]

    def step() -> tuple[torch.Tensor, ...]:
        output = ms_deform_attn(*inputs.args())
        return torch.autograd.grad(output, leaves, torch.ones_like(output))

    assert all(grad.isfinite().all() for grad in benchmark(step))
