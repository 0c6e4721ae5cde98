"""Comparison of an operator with its float64 reference, and the one table of tolerances.

A result passes where |got - expected| <= relative * |expected| + absolute * max|expected|.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    relative: float
    absolute: float
    reason: str


TOLERANCES: dict[tuple[str, torch.dtype], Tolerance] = {
    ("ms_deform_attn", torch.float32): Tolerance(
        1e-5, 2e-6, "float32 sums of 4 L P products; a location is exact to 1e-5 pixels at width 167"
    ),
    ("ms_deform_attn", torch.bfloat16): Tolerance(
        2**-8, 1e-4, "inputs are exact and sums float32: one rounding of the result, half an ulp of 8 bits"
    ),
    ("ms_deform_attn", torch.float16): Tolerance(
        2**-11, 1e-5, "inputs are exact and sums float32: one rounding of the result, half an ulp of 11 bits"
    ),
    ("ms_deform_attn_fused", torch.float32): Tolerance(
        1e-5, 5e-6, "as ms_deform_attn; the softmax's gradient is a difference of sums of L P terms"
    ),
    ("ms_deform_attn_fused", torch.bfloat16): Tolerance(
        2**-8, 1e-4, "inputs are exact and sums float32: one rounding of the result, half an ulp of 8 bits"
    ),
    ("ms_deform_attn_fused", torch.float16): Tolerance(
        2**-11, 1e-5, "inputs are exact and sums float32: one rounding of the result, half an ulp of 11 bits"
    ),
    ("fusion_attention", torch.float32): Tolerance(
        1e-5, 5e-6, "two projections and two sums of up to C or T float32 products, one after the other"
    ),
    ("fusion_attention", torch.bfloat16): Tolerance(
        2**-7, 1e-2, "normed, query, exponentials and attended are rounded to 8 bits on their way"
    ),
    ("fusion_attention", torch.float16): Tolerance(
        2**-10, 1.5e-3, "normed, query, exponentials and attended are rounded to 11 bits on their way"
    ),
    ("fusion_attention_backward", torch.float32): Tolerance(
        1e-5, 1e-5, "up to four products in a row, of up to C, T or N float32 terms each"
    ),
    ("fusion_attention_backward", torch.bfloat16): Tolerance(
        2**-6, 3e-2, "five tensors are rounded to 8 bits on their way, and gradients of scores cancel"
    ),
    ("fusion_attention_backward", torch.float16): Tolerance(
        2**-9, 4e-3, "five tensors are rounded to 11 bits on their way, and gradients of scores cancel"
    ),
    ("query_attention", torch.float32): Tolerance(
        1e-5, 5e-6, "float32 rotation, scores of size 5 and sums; the exponential takes on the scores' error"
    ),
    ("query_attention", torch.bfloat16): Tolerance(
        2**-7, 1e-2, "rotated q and k, weights and their gradients are rounded to 8 bits on their way"
    ),
    ("query_attention", torch.float16): Tolerance(
        2**-10, 1.5e-3, "rotated q and k, weights and their gradients are rounded to 11 bits on their way"
    ),
    ("lora_linear", torch.float32): Tolerance(
        1e-5, 2e-6, "float32 sums of K products and of R products, whose terms are larger than the result"
    ),
    ("lora_linear", torch.bfloat16): Tolerance(
        2**-8, 1e-4, "inputs are exact, sums float32 and s has 16 bits: one rounding of the result"
    ),
    ("lora_linear", torch.float16): Tolerance(
        2**-11, 2e-5, "inputs are exact, sums float32 and s has 22 bits: one rounding of the result"
    ),
    ("lora_linear_int8_grad_x", torch.float32): Tolerance(1e-5, 2e-6, "as lora_linear"),
    ("lora_linear_int8_grad_x", torch.bfloat16): Tolerance(
        2**-8, 2**-8, "the scaled int8 weight is rounded to 8 bits before it is multiplied"
    ),
    ("lora_linear_int8_grad_x", torch.float16): Tolerance(
        2**-11, 2**-11, "the scaled int8 weight is rounded to 11 bits before it is multiplied"
    ),
    ("slot_head", torch.float32): Tolerance(
        1e-5, 5e-6, "three tf32 products stand for one; sums of C products; exponentials take on their error"
    ),
    ("slot_head", torch.bfloat16): Tolerance(
        1e-4, 1e-3, "a normed state that lies between two numbers of 8 bits may be rounded to the other"
    ),
    ("slot_head", torch.float16): Tolerance(
        1e-4, 1e-3, "a normed state that lies between two numbers of 11 bits may be rounded to the other"
    ),
    ("slot_head_backward", torch.float32): Tolerance(
        1e-5, 1e-5, "two products, one after the other, and differences of probability and target"
    ),
    ("slot_head_backward", torch.bfloat16): Tolerance(
        2**-7, 1e-2, "normed states, the logits' gradient and the normed states' are rounded to 8 bits"
    ),
    ("slot_head_backward", torch.float16): Tolerance(
        2**-10, 1.5e-3, "normed states, the logits' gradient and the normed states' are rounded to 11 bits"
    ),
    ("network", torch.float32): Tolerance(
        1e-4, 2e-4, "layer after layer in float32, and sigmoids, ranks and boxes made of them in between"
    ),
    ("network_gradient", torch.float32): Tolerance(
        1e-3, 1e-3, "as the network, and back through it: sums of gradients of both signs"
    ),
}


def assert_close(name: str, got: Tensor, expected: Tensor, tolerance: Tolerance) -> None:
    """Raises AssertionError with the worst place, both values there and the error in tolerances."""
    assert got.shape == expected.shape, f"{name}: shape {list(got.shape)}, expected {list(expected.shape)}"
    if got.numel() == 0:
        return
    got, expected = got.detach().double(), expected.detach().double()
    finite = expected.isfinite()
    assert torch.equal(got.isnan(), expected.isnan()), f"{name}: NaN in other places than expected"
    scale = expected[finite].abs().max() if finite.any() else expected.new_tensor(0.0)
    error = (got - expected).abs()
    allowed = tolerance.relative * expected.abs() + tolerance.absolute * scale
    excess = torch.where(finite, error - allowed, torch.zeros_like(error))
    if (excess > 0).any():
        flat = int(excess.argmax())
        place = [int(i) for i in torch.unravel_index(torch.tensor(flat), got.shape)]
        raise AssertionError(
            f"{name}: {int((excess > 0).sum())} of {got.numel()} elements differ; worst at {place}: "
            f"got {float(got.flatten()[flat]):.9g}, expected {float(expected.flatten()[flat]):.9g}, "
            f"error {float(error.flatten()[flat]):.3g}, allowed {float(allowed.flatten()[flat]):.3g} "
            f"({tolerance.reason})"
        )


def assert_compiles(step: Callable[..., Tensor], arguments: Sequence[Any]) -> None:
    """torch.compile makes one graph of ``step``, with the same result and the same gradients as without.

    ``step`` gives a number; the gradients are those of the arguments that require one.
    """
    leaves = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]
    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        loss = function(*arguments)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
