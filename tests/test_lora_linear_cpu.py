"""The CPU kernels of lora_linear, each instruction set in turn, against the float64 reference."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from lora_linear_cases import CASES as COMMON_CASES
from lora_linear_cases import DTYPES, MIXED, NAMES, check, expected_results, gradient
from torch import Tensor

from visionllm.ops import native
from visionllm.ops.lora_linear import SampleInputs, sample_inputs

# visionllm.ops.lora_linear names the function.
module = sys.modules[SampleInputs.__module__]

# Up to 64 rows: tiles of 2 or 4 rows and 4 columns over the weights as they lie. More: blocks of 480 rows,
# 256 columns and 256 words of depth (512 bfloat16), in panels of up to 64 columns.
CASES = COMMON_CASES | {
    "64_rows": dict(rows=64, inputs=308, outputs=260, rank=9),
    "block": dict(rows=65, inputs=48, outputs=40, rank=8),
    "block_plain": dict(rows=80, inputs=40, outputs=24, adapters=0, bias=False),
    "block_odd": dict(rows=90, inputs=45, outputs=131, rank=17, **MIXED),
    "block_int8": dict(rows=70, inputs=80, outputs=144, rank=16, int8=True, **MIXED),
    "block_int8_odd": dict(rows=75, inputs=41, outputs=37, rank=5, int8=True, adapters=0),
    "deep": dict(rows=66, inputs=1027, outputs=24, rank=4, **MIXED),
    "deep_backward": dict(rows=66, inputs=24, outputs=1027, rank=4, int8=True),
    "strides_that_collide": dict(rows=67, inputs=2048, outputs=20, rank=3),
    "rank_128": dict(rows=70, inputs=36, outputs=36, rank=128, **MIXED),
    "several_blocks": dict(rows=490, inputs=10, outputs=270, rank=3, **MIXED),
    "many_adapters": dict(rows=100, inputs=16, outputs=24, rank=4, adapters=30, indexed=True),
    "no_rows": dict(rows=0, inputs=16, outputs=8, rank=2, **MIXED),
    "no_inputs": dict(rows=70, inputs=0, outputs=8, rank=2),
    "no_outputs": dict(rows=70, inputs=8, outputs=0, rank=2, **MIXED),
}


def results(inputs: SampleInputs, grad_output: Tensor | None = None) -> dict[str, Tensor]:
    """What the kernels give, by name."""
    args = inputs.operator_args()
    grad = gradient(inputs) if grad_output is None else grad_output
    output, low_rank = torch.ops.visionllm.lora_linear(*args)
    backward = (*args[:3], *args[4:8], low_rank, args[8], True, True, True)
    grads = torch.ops.visionllm.lora_linear_backward(grad, *backward)
    return dict(zip(NAMES, (output, low_rank, *grads), strict=True))


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: str, dtype: torch.dtype, isa: str) -> None:
    inputs = sample_inputs(dtype=dtype, **CASES[case])
    check(results(inputs), expected_results(inputs), inputs)


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
@pytest.mark.parametrize("rows", [7, 70])
def test_rows_may_lie_apart(rows: int, dtype: torch.dtype, isa: str) -> None:
    inputs = sample_inputs(dtype=dtype, rows=rows, inputs=70, outputs=37, rank=6, **MIXED)
    assert inputs.lora_a is not None and inputs.lora_b is not None

    def apart(tensor: Tensor, gap: int) -> Tensor:
        """The same with NaN between the rows."""
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + gap), torch.nan, dtype=tensor.dtype)
        wide[..., : tensor.shape[-1]] = tensor
        return wide[..., : tensor.shape[-1]]

    spread = replace(
        inputs,
        x=apart(inputs.x, 3),
        weight=apart(inputs.weight, 5),
        lora_a=inputs.lora_a.mT.contiguous().mT,
        lora_b=apart(inputs.lora_b, 1),
    )
    for grad in (apart(gradient(inputs), 7), gradient(inputs).T.contiguous().T):
        check(results(spread, grad), expected_results(inputs), inputs)


def test_output_rows_may_lie_apart_and_nothing_between_is_written(isa: str) -> None:
    for rows in (3, 70):
        inputs = sample_inputs(rows=rows, inputs=20, outputs=21, adapters=0)
        memory = torch.full((rows, 33), 7.0)
        arguments = (inputs.x, inputs.weight, None, inputs.bias, None, None, None, None, 1.0)
        native.call("lora_linear", memory[:, :21], None, None, *arguments)
        check({**results(inputs), "output": memory[:, :21]}, expected_results(inputs), inputs)
        assert (memory[:, 21:] == 7.0).all()


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
@pytest.mark.parametrize("case", ["few_rows_int8", "block_odd", "rank_128", "several_blocks"])
def test_thread_counts_give_the_same(case: str, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    inputs = sample_inputs(dtype=dtype, **{**CASES[case], "inputs": 900, "outputs": 700})
    threads(1)
    alone = results(inputs)
    for count in (2, 3, 1):
        threads(count)
        for name, value in results(inputs).items():
            assert torch.equal(value, alone[name]), f"{name} with {count} threads"


@pytest.mark.parametrize("rows", [9, 100])
def test_rows_do_not_see_the_adapters_of_others(rows: int, isa: str) -> None:
    inputs = sample_inputs(rows=rows, inputs=33, outputs=29, rank=5, **MIXED)
    assert inputs.lora_a is not None and inputs.lora_b is not None and inputs.adapter_index is not None
    broken = replace(inputs, lora_a=inputs.lora_a.clone(), lora_b=inputs.lora_b.clone())
    assert broken.lora_a is not None and broken.lora_b is not None
    broken.lora_a[1], broken.lora_b[2] = torch.nan, torch.inf
    sound = (inputs.adapter_index != 1) & (inputs.adapter_index != 2)
    expected, got = results(inputs), results(broken)
    assert sound.any() and not sound.all()
    for name in ("output", "low_rank", "grad_x"):
        assert torch.equal(got[name][sound], expected[name][sound]), name
    for name in ("grad_a", "grad_b"):
        assert torch.equal(got[name][0], expected[name][0]), name


def test_only_wanted_gradients_are_computed(isa: str) -> None:
    inputs = sample_inputs(**{**CASES["block_odd"], "rows": 30})
    args = inputs.operator_args()
    everything = results(inputs)
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        grads = torch.ops.visionllm.lora_linear_backward(
            gradient(inputs), *args[:3], *args[4:8], everything["low_rank"], args[8], *wanted
        )
        for name, grad, want in zip(NAMES[2:], grads, wanted, strict=True):
            assert torch.equal(grad, everything[name]) if want else grad.numel() == 0, name
