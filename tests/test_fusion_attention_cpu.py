"""The CPU kernels of fusion_attention against the float64 reference, for every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comparison import TOLERANCES, assert_close
from fusion_attention_cases import CASES as COMMON_CASES
from fusion_attention_cases import (
    DTYPES,
    GRADIENTS,
    assert_gradients_match,
    assert_output_matches,
    gradient_of_output,
)
from torch import Tensor

import visionllm._core as _core
from visionllm.ops import fusion_attention, fusion_attention_reference
from visionllm.ops.fusion_attention import SampleInputs, sample_inputs
from visionllm.ops.fusion_attention_reference import fusion_attention_backward_reference

# Weights are folded into the tokens where H * T <= C + T. A block has 64 positions with 16 lanes.
CASES = COMMON_CASES | {
    "paper_folded": dict(batch=1, positions=33, channels=256, heads=8, tokens=17),
    "paper": dict(batch=1, positions=70, channels=256, heads=8, tokens=45),
    "head_of_72": dict(batch=1, positions=40, channels=144, heads=2, tokens=150),
    "odd_folded": dict(batch=2, positions=70, channels=21, heads=3, tokens=6, texts=(6, 3)),
    "odd": dict(batch=2, positions=70, channels=21, heads=3, tokens=26, texts=(25, 12)),
    "one_channel": dict(batch=2, positions=7, channels=1, heads=1, tokens=5, texts=(5, 3)),
    "heads_of_one": dict(batch=1, positions=9, channels=6, heads=6, tokens=7, texts=(7,)),
    "no_text_in_one_folded": dict(batch=3, positions=18, channels=32, heads=2, tokens=5, texts=(5, 0, 2)),
    "no_text_in_one": dict(batch=3, positions=18, channels=32, heads=8, tokens=15, texts=(15, 0, 2)),
    "no_text": dict(batch=2, positions=5, channels=16, heads=2, tokens=4, texts=(0, 0)),
    "several_slices_folded": dict(batch=2, positions=530, channels=16, heads=2, tokens=5, texts=(5, 2)),
    "several_slices": dict(batch=2, positions=530, channels=16, heads=4, tokens=9, texts=(7, 9)),
    "many_tokens": dict(batch=1, positions=4, channels=16, heads=2, tokens=600, texts=(590,)),
}


def run_both(inputs: SampleInputs, grad_output: Tensor | None = None) -> tuple[Tensor, ...]:
    """The output and the gradients of all tensors but the mask."""
    if grad_output is None:
        grad_output = gradient_of_output(inputs)
    backward = torch.ops.visionllm.fusion_attention_backward
    return fusion_attention(*inputs.args()), *backward(grad_output, *inputs.args())


def assert_matches_reference(inputs: SampleInputs) -> None:
    output, *gradients = run_both(inputs)
    assert_output_matches(output, inputs)
    assert_gradients_match(tuple(gradients), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case: str, dtype: torch.dtype, isa: str) -> None:
    assert_matches_reference(sample_inputs(dtype=dtype, **CASES[case]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["several_slices_folded", "several_slices"])
def test_same_bits_on_any_number_of_threads(
    case: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    inputs = sample_inputs(dtype=dtype, **CASES[case] | dict(positions=3000))  # enough work for five
    threads(1)
    expected = run_both(inputs)
    for count in (1, 2, 3, 5):
        threads(count)
        for name, a, b in zip(("output", *GRADIENTS), run_both(inputs), expected, strict=True):
            assert torch.equal(a, b), f"{name}: {count} threads give other bits than one"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [5, 40])
def test_a_row_does_not_depend_on_the_others(tokens: int, dtype: torch.dtype) -> None:
    inputs = sample_inputs(dtype=dtype, batch=1, positions=130, channels=32, heads=4, tokens=tokens)
    output = fusion_attention(*inputs.args())
    for first, last in ((0, 1), (3, 100), (129, 130)):
        part = fusion_attention(inputs.x[:, first:last], *inputs.args()[1:])
        assert torch.equal(part, output[:, first:last])


@pytest.mark.parametrize("tokens", [5, 40])
def test_one_token_is_all_the_weight(tokens: int, isa: str) -> None:
    """Its weight is 1 whatever its score, so no gradient reaches the scores."""
    inputs = sample_inputs(batch=1, positions=3, channels=16, heads=4, tokens=tokens, texts=(1,))
    assert_close(
        "output",
        fusion_attention(*inputs.args()),
        fusion_attention_reference(*inputs.double().args()),
        TOLERANCES["fusion_attention", torch.float32],
    )
    gradients = dict(zip(GRADIENTS, run_both(inputs)[1:], strict=True))
    expected = fusion_attention_backward_reference(
        gradient_of_output(inputs).double(), *inputs.double().args()
    )
    for name, want in zip(GRADIENTS, expected, strict=True):
        torch.testing.assert_close(gradients[name].double(), want, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("heads", [1, 8])  # folded, and not
def test_large_scores_do_not_overflow(heads: int, isa: str) -> None:
    """Scores of some hundreds, whose exponentials are no float."""
    inputs = sample_inputs(batch=1, positions=8, channels=16, heads=heads, tokens=80, texts=(80,))
    growing = torch.linspace(0, 60, 80)[None, :, None, None]
    inputs = SampleInputs(*inputs.args()[:5], inputs.key * growing, *inputs.args()[6:])
    expected = fusion_attention_reference(*inputs.double().args())
    torch.testing.assert_close(fusion_attention(*inputs.args()).double(), expected, rtol=1e-3, atol=1e-3)
    assert all(gradient.isfinite().all() for gradient in run_both(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_may_have_holes_and_bytes_other_than_1(dtype: torch.dtype, isa: str) -> None:
    inputs = sample_inputs(dtype=dtype, batch=2, positions=6, channels=32, heads=2, tokens=40, texts=(40, 40))
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(4)) < 0.4
    mask[0, :33] = False
    hidden = ~mask[:, :, None, None]
    key, value = (t.masked_fill(hidden, float("nan")) for t in (inputs.key, inputs.value))
    holes = SampleInputs(*inputs.args()[:5], key, value, mask.to(torch.uint8) * 7, *inputs.args()[8:])
    assert_matches_reference(holes)


def test_strided_inputs() -> None:
    """x and grad_output are copied; key and value are read where they lie, at any address."""
    inputs = sample_inputs(dtype=torch.bfloat16, batch=2, positions=5, channels=32, heads=2, tokens=4)
    wide = torch.zeros(2, 5, 33, dtype=torch.bfloat16)
    wide[..., 1:] = inputs.x
    strided = torch.full((2, 4, 2, 19), float("nan"), dtype=torch.bfloat16)
    strided[..., 1:17] = inputs.key
    one_value = inputs.value[:, :, :1].expand(2, 4, 2, 16)
    others = SampleInputs(
        wide[..., 1:], *inputs.args()[1:5], strided[..., 1:17], one_value, *inputs.args()[7:]
    )
    plain = SampleInputs(*inputs.args()[:6], one_value.contiguous(), *inputs.args()[7:])
    grad_output = gradient_of_output(inputs)
    transposed = grad_output.transpose(0, 1).contiguous().transpose(0, 1)
    for got, want in zip(run_both(others, transposed), run_both(plain, grad_output), strict=True):
        assert torch.equal(got, want) and got.is_contiguous()


def test_core_takes_any_address_and_stride(isa: str) -> None:
    """The contract of the C++ function, without the copies that the torch operator may make."""
    inputs = sample_inputs(batch=2, positions=5, channels=21, heads=3, tokens=4)
    odd = torch.full((2, 4, 3, 9), float("nan"))
    odd[..., 1:8] = inputs.key
    output = torch.full_like(inputs.x, float("nan"))
    arrays = [t.numpy() if isinstance(t, Tensor) else t for t in inputs.args()]
    arrays[5] = odd[..., 1:8].numpy()
    _core.fusion_attention(output.numpy(), *arrays)
    assert torch.equal(output, fusion_attention(*inputs.args()))


@pytest.mark.parametrize("case", ["paper_folded", "several_slices"])
def test_gradients_through_autograd(case: str) -> None:
    inputs = sample_inputs(requires_grad=True, **CASES[case])
    grad_output = gradient_of_output(inputs)
    got = torch.autograd.grad(fusion_attention(*inputs.args()), inputs.leaves(), grad_output)
    detached = SampleInputs(*(t.detach() if isinstance(t, Tensor) else t for t in inputs.args()))
    for a, b in zip(got, run_both(detached, grad_output)[1:], strict=True):
        assert torch.equal(a, b)
