"""What the tests of query_attention's kernels share, wherever these run."""

from __future__ import annotations

import torch
from comparison import TOLERANCES, assert_close
from torch import Tensor

from visionllm.ops.query_attention import SampleInputs
from visionllm.ops.query_attention_reference import forward_reference

NAMES = ("output", "logsumexp", "grad_q", "grad_k", "grad_v", "grad_prefix_k", "grad_prefix_v")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ONE_HEAD = dict(heads=1, kv_heads=1)


def output_gradient(inputs: SampleInputs) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randn(inputs.q.shape, generator=random).to(inputs.q.dtype)


def expected_results(inputs: SampleInputs) -> dict[str, Tensor]:
    """All results by name, by the reference in float64."""
    tensors = [t.double().requires_grad_() for t in inputs.args()[:5]]
    cosine, sine = inputs.rope if inputs.rope is not None else (None, None)
    output, logsumexp = forward_reference(*tensors, inputs.prefix_length, cosine, sine)
    grads = torch.autograd.grad(output, tensors, output_gradient(inputs).double())
    return dict(zip(NAMES, (output, logsumexp, *grads), strict=True))


def assert_matches(got: dict[str, Tensor], inputs: SampleInputs) -> None:
    for name, expected in expected_results(inputs).items():
        assert got[name].dtype == (torch.float32 if name == "logsumexp" else inputs.q.dtype)
        assert_close(name, got[name], expected, TOLERANCES["query_attention", inputs.q.dtype])
