"""CPU kernels of query_attention, each instruction set in turn, against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from comparison import TOLERANCES, assert_close
from query_attention_cases import (
    DTYPES,
    NAMES,
    ONE_HEAD,
    assert_matches,
    expected_results,
    output_gradient,
)
from torch import Tensor

from visionllm.ops import native, query_attention
from visionllm.ops.query_attention import SampleInputs, rope_table, sample_inputs

# Blocks have 4 to 64 query rows, tiles of the prefix 96 keys.
CASES = {
    "smallest": dict(groups=1, slots=1, prefix=0, lengths=(0,), channels=8, **ONE_HEAD),
    "boxes": dict(groups=7, slots=5, prefix=100, lengths=(97,), heads=6, kv_heads=3, channels=32),
    "one_slot": dict(groups=70, slots=1, prefix=97, lengths=(97,), channels=8, **ONE_HEAD),
    "whole_tiles": dict(groups=16, slots=4, prefix=192, lengths=(192, 96), channels=64, **ONE_HEAD),
    "points": dict(groups=2, slots=49, prefix=3, lengths=(3, 0), **ONE_HEAD),
    "longest_groups": dict(groups=3, slots=64, prefix=0, lengths=(0,), **ONE_HEAD),
    "lengths": dict(
        groups=7, slots=5, prefix=65, lengths=(65, 0, 1, 64, 33), channels=8, heads=2, kv_heads=2
    ),
    "shared_by_three": dict(groups=9, slots=5, prefix=20, lengths=(20, 7), heads=3, kv_heads=1, channels=24),
    "wide_head": dict(groups=3, slots=5, prefix=65, lengths=(65,), channels=128, heads=2, kv_heads=2),
    "odd_width": dict(groups=3, slots=5, prefix=17, lengths=(9,), channels=72, heads=2, kv_heads=1),
    "many_heads": dict(groups=3, slots=2, prefix=9, lengths=(9, 8), channels=16, heads=10, kv_heads=5),
    "not_rotated": dict(rope=False, channels=40),
    "one_projection": dict(one_projection=True),
}


def forward_and_backward(inputs: SampleInputs) -> dict[str, Tensor]:
    """All results of the kernels by name; where one is not written stands NaN."""
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        arguments = inputs.operator_args()
        output, logsumexp = torch.ops.visionllm.query_attention(*arguments)
        grads = torch.ops.visionllm.query_attention_backward(
            output_gradient(inputs), output, logsumexp, *arguments
        )
    finally:
        torch.use_deterministic_algorithms(False)
    return dict(zip(NAMES, (output, logsumexp, *grads), strict=True))


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], why: str) -> None:
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), f"{name} {why}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case: str, dtype: str, isa: str) -> None:
    inputs = sample_inputs(dtype=DTYPES[dtype], **CASES[case])
    assert_matches(forward_and_backward(inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(dtype: str, isa: str) -> None:
    """Softmax that is nearly one key's, found in the last tile of the prefix, or in the first."""
    inputs = sample_inputs(dtype=DTYPES[dtype], groups=5, prefix=200, lengths=(200, 150), rope=False)
    for b, key in ((0, 199), (1, 3)):
        inputs.prefix_k[b, key] = 8 * inputs.q[b].mean((0, 1))[:2].sign()
    q = inputs.q + 4 * inputs.q.mean((1, 2), keepdim=True).sign()
    given = SampleInputs(q, *inputs.args()[1:])
    weights = expected_results(given)
    assert weights["output"].isfinite().all()
    got = forward_and_backward(given)
    tolerance = TOLERANCES["query_attention", given.q.dtype]
    assert_close("output", got["output"], weights["output"], tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ["one_head", "heads"])
def test_same_bits_on_any_number_of_threads(size: str, dtype: str, threads: Callable[[int], None]) -> None:
    heads = dict(heads=2, kv_heads=1) if size == "one_head" else dict(heads=12, kv_heads=12)
    inputs = sample_inputs(
        dtype=DTYPES[dtype], groups=150, slots=3, channels=64, prefix=300, lengths=(300,), **heads
    )
    threads(1)
    expected = forward_and_backward(inputs)
    for count in (1, 2, 3):
        threads(count)
        assert_same(forward_and_backward(inputs), expected, f"depends on the threads: {count}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slot_does_not_depend_on_how_many_others_there_are(dtype: str, isa: str) -> None:
    inputs = sample_inputs(dtype=DTYPES[dtype], groups=40, channels=32, prefix=130, lengths=(130,))
    few = SampleInputs(*(t[:, 30:33] for t in inputs.args()[:3]), *inputs.args()[3:])
    got, expected = (query_attention(*i.args()) for i in (few, inputs))
    assert torch.equal(got, expected[:, 30:33])


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_do_not_see_each_other(dtype: str, isa: str) -> None:
    """Not even NaN and infinity of another group, slot or KV head."""
    inputs = sample_inputs(dtype=DTYPES[dtype], groups=9, slots=5, channels=8)
    before = forward_and_backward(inputs)
    k, v = inputs.k.clone(), inputs.v.clone()
    k[:, 4, 2:, 0] = math.nan
    v[:, 4, 2:, 0] = math.inf
    after = forward_and_backward(SampleInputs(inputs.q, k, v, *inputs.args()[3:]))
    for name in ("output", "grad_q"):
        differs = (before[name] != after[name]).any(-1).any(0)  # [M, S, H]
        assert differs[4, 2:, :2].all() and differs.sum() == 6, f"{name} of another slot has changed"


def test_nothing_behind_the_prefix_is_read(isa: str) -> None:
    """NaN stands there in sample_inputs; here so do other numbers."""
    inputs = sample_inputs()
    other = SampleInputs(
        *inputs.args()[:3], *(torch.nan_to_num(t, 1e30) for t in inputs.args()[3:5]), *inputs.args()[5:]
    )
    assert_same(forward_and_backward(other), forward_and_backward(inputs), "has read it")


@pytest.mark.parametrize("length", [-3, 12])
def test_length_outside_the_prefix_is_clamped(length: int, isa: str) -> None:
    inputs = sample_inputs(groups=2, channels=8, lengths=(11,), **ONE_HEAD)
    inside, outside = (
        SampleInputs(*inputs.args()[:5], torch.tensor([n]), inputs.rope)
        for n in (min(max(length, 0), 11), length)
    )
    assert_same(forward_and_backward(outside), forward_and_backward(inside), "is not the clamped length's")


def test_without_groups_the_prefix_has_no_gradient(isa: str) -> None:
    got = forward_and_backward(sample_inputs(groups=0))
    assert got["output"].shape == (2, 0, 5, 4, 16)
    assert (got["grad_prefix_k"] == 0).all() and (got["grad_prefix_v"] == 0).all()


@pytest.mark.parametrize("empty", [dict(lengths=()), dict(slots=0), dict(prefix=0, lengths=(0, 0), groups=0)])
def test_empty(empty: dict, isa: str) -> None:
    inputs = sample_inputs(**empty)
    got = forward_and_backward(inputs)
    assert got["output"].numel() == 0 and got["grad_q"].shape == inputs.q.shape
    assert (got["grad_prefix_k"] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_views(dtype: str, isa: str) -> None:
    """Strides that are multiples of 16 bytes are read in place, others copied; gradients come expanded."""
    inputs = sample_inputs(dtype=DTYPES[dtype], groups=3, channels=8)
    turned = (
        inputs.q.permute(4, 3, 1, 2, 0).contiguous().permute(4, 2, 3, 1, 0)
    )  # D is not the last in memory
    wide = torch.nn.functional.pad(inputs.k, (1, 0))[..., 1:]
    heads = torch.nn.functional.pad(inputs.prefix_k, (0, 8))[..., :8]
    views = SampleInputs(turned, wide, inputs.v, heads, *inputs.args()[4:])
    assert_same(forward_and_backward(views), forward_and_backward(inputs), "depends on strides")

    leaf = inputs.v.detach().requires_grad_()
    output = query_attention(inputs.q, inputs.k, leaf, *inputs.args()[3:])
    expanded = torch.autograd.grad(output, leaf, output.new_ones(()).expand(output.shape))[0]
    output = query_attention(inputs.q, inputs.k, leaf, *inputs.args()[3:])
    assert torch.equal(expanded, torch.autograd.grad(output, leaf, torch.ones_like(output))[0])


@pytest.mark.parametrize(
    "sizes",
    [dict(channels=12), dict(channels=136), dict(slots=65, groups=1), dict(prefix=8200, lengths=(3,))],
)
def test_sizes_beyond_the_kernels_run_the_reference(sizes: dict) -> None:
    inputs = sample_inputs(**{"channels": 8, **ONE_HEAD, **sizes})
    assert_matches(forward_and_backward(inputs), inputs)


def test_the_longest_prefix(isa: str) -> None:
    inputs = sample_inputs(groups=1, slots=2, channels=8, prefix=8192, lengths=(8192,), **ONE_HEAD)
    assert_matches(forward_and_backward(inputs), inputs)


def test_longer_tables_serve_shorter_prefixes(isa: str) -> None:
    inputs = sample_inputs(groups=2, channels=8)
    longer = SampleInputs(*inputs.args()[:6], rope_table(100, 8))
    assert_same(forward_and_backward(longer), forward_and_backward(inputs), "depends on the table's length")


def test_workspace_of_the_contract_is_accepted() -> None:
    inputs = sample_inputs()
    expected = forward_and_backward(inputs)
    output, logsumexp = torch.empty(inputs.q.shape), torch.empty(inputs.q.shape[:4])
    workspace = torch.empty(2, logsumexp.numel() * (inputs.q.shape[4] + 1))
    native.call("query_attention", output, logsumexp, workspace, *inputs.operator_args())
    assert torch.equal(output, expected["output"]) and torch.equal(logsumexp, expected["logsumexp"])
