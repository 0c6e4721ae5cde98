"""What the tests of fusion_attention's kernels share, wherever these run."""

from __future__ import annotations

import torch
from comparison import TOLERANCES, assert_close
from torch import Tensor

from visionllm.ops import fusion_attention_reference
from visionllm.ops.fusion_attention import SampleInputs
from visionllm.ops.fusion_attention_reference import fusion_attention_backward_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRADIENTS = (
    "grad_x",
    "grad_norm_weight",
    "grad_norm_bias",
    "grad_query_weight",
    "grad_query_bias",
    "grad_key",
    "grad_value",
    "grad_output_weight",
    "grad_output_bias",
    "grad_gate",
)
# Sizes that every kernel meets; each has more of its own.
CASES = {
    "one_row": dict(batch=1, positions=1, channels=16, heads=1, tokens=3),
    "packaged_model": dict(batch=2, positions=33, channels=128, heads=4, tokens=9, texts=(9, 4)),
    "head_of_24": dict(batch=1, positions=70, channels=48, heads=2, tokens=67, one_projection=False),
    "long_padding": dict(batch=2, positions=9, channels=32, heads=1, tokens=130, texts=(3, 100)),
    "no_tokens": dict(batch=2, positions=10, channels=32, heads=2, tokens=0),
    "no_rows": dict(batch=2, positions=0, channels=32, heads=2, tokens=3),
    "no_batch": dict(batch=0, positions=4, channels=32, heads=2, tokens=3),
}


def gradient_of_output(inputs: SampleInputs) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randn(inputs.x.shape, generator=random).to(inputs.x.device, inputs.x.dtype)


def assert_output_matches(output: Tensor, inputs: SampleInputs) -> None:
    """Holds the output against the reference in float64."""
    assert output.dtype == inputs.x.dtype and output.is_contiguous()
    expected = fusion_attention_reference(*inputs.double().args())
    assert_close("output", output, expected, TOLERANCES["fusion_attention", inputs.x.dtype])


def assert_gradients_match(gradients: tuple[Tensor, ...], inputs: SampleInputs) -> None:
    """Holds the gradients for `gradient_of_output` against the reference in float64."""
    grad_output = gradient_of_output(inputs).double()
    expected = fusion_attention_backward_reference(grad_output, *inputs.double().args())
    for name, got, want in zip(GRADIENTS, gradients, expected, strict=True):
        assert got.dtype == inputs.x.dtype and got.is_contiguous(), name
        assert_close(name, got, want, TOLERANCES["fusion_attention_backward", inputs.x.dtype])
