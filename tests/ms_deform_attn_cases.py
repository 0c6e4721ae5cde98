"""What the tests of ms_deform_attn's kernels share, wherever these run."""

from __future__ import annotations

import torch
from torch import Tensor

from visionllm.ops.ms_deform_attn import SampleInputs


def with_strange_locations(inputs: SampleInputs) -> tuple[SampleInputs, Tensor]:
    """Some locations not finite or far outside, and which [B, Q, H, L, P]: none of them contributes."""
    strange = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0, -1.0])
    random = torch.Generator().manual_seed(3)
    choice = torch.randint(0, len(strange), inputs.sampling_locations.shape, generator=random)
    is_strange = torch.rand(inputs.sampling_locations.shape[:-1], generator=random) < 0.3
    locations = torch.where(is_strange[..., None], strange[choice], inputs.sampling_locations)
    # Whatever weight such a point has, NaN included, it is not used.
    attention = torch.where(is_strange, torch.tensor(float("nan")), inputs.attention_weights)
    return SampleInputs(*inputs.args()[:3], locations, attention), is_strange
