"""query_attention: the reference against the definition read token by token, and as a citizen of torch."""

from __future__ import annotations

import math

import pytest
import torch
from comparison import TOLERANCES, assert_close, assert_compiles
from torch import Tensor

import visionllm._core as _core
from visionllm.model import llm
from visionllm.ops import query_attention, query_attention_reference
from visionllm.ops.query_attention import (
    SampleInputs,
    query_attention_backward_reference,
    rope_table,
    sample_inputs,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SMALL = dict(groups=2, slots=3, heads=2, kv_heads=1, channels=8, prefix=5, lengths=(5, 2))

CASES = {
    "usual": dict(),
    "no_prefix": dict(prefix=0, lengths=(0, 0)),
    "one_has_no_prefix": dict(prefix=6, lengths=(0, 6, 3)),
    "one_slot": dict(slots=1, groups=5),
    "one_group": dict(slots=9, groups=1),
    "one_head": dict(heads=1, kv_heads=1),
    "no_sharing": dict(heads=3, kv_heads=3),
    "not_rotated": dict(rope=False),
    "one_projection": dict(one_projection=True),
}


def finite(inputs: SampleInputs) -> SampleInputs:
    """The same without NaN behind the prefix's end, for checks that touch every element."""
    k, v = (torch.nan_to_num(t.detach()).requires_grad_(t.requires_grad) for t in inputs.args()[3:5])
    return SampleInputs(inputs.q, inputs.k, inputs.v, k, v, inputs.prefix_length, inputs.rope)


def rotate(x: Tensor, position: int, theta: float = 10000.0) -> Tensor:
    """RoPE of one token in float64, by complex numbers: x [heads, D]."""
    half = x.shape[-1] // 2
    frequency = torch.tensor([theta ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=torch.float64)
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(
        torch.ones(half, dtype=torch.float64), position * frequency
    )
    return torch.cat([turned.real, turned.imag], -1)


def token_by_token(inputs: SampleInputs) -> Tensor:
    """The definition, one slot and head after the other, with angles of its own."""
    output = torch.zeros(inputs.q.shape, dtype=torch.float64)
    shared = inputs.q.shape[3] // inputs.k.shape[3]
    for b, length in enumerate(inputs.prefix_length.tolist()):
        for m in range(inputs.q.shape[1]):
            keys = list(inputs.prefix_k[b, :length].double())
            values = list(inputs.prefix_v[b, :length].double())
            for s in range(inputs.q.shape[2]):
                query, key = inputs.q[b, m, s].double(), inputs.k[b, m, s].double()
                if inputs.rope is not None:
                    query, key = rotate(query, length + s), rotate(key, length + s)
                keys.append(key)
                values.append(inputs.v[b, m, s].double())
                for h in range(query.shape[0]):
                    scores = torch.stack([k[h // shared] @ query[h] for k in keys]) / math.sqrt(len(query[h]))
                    weights = scores.softmax(0)
                    output[b, m, s, h] = sum(w * v[h // shared] for w, v in zip(weights, values, strict=True))
    return output


@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_definition(case: str) -> None:
    inputs = sample_inputs(dtype=torch.float64, **CASES[case])
    cosine, sine = rope_table(64, 16)
    assert cosine.dtype == torch.float32 and sine.shape == (64, 8)
    got = query_attention_reference(*inputs.args())
    # The tables of sample_inputs hold float32's angles.
    torch.testing.assert_close(got, token_by_token(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_models_attention(case: str) -> None:
    inputs = finite(sample_inputs(dtype=torch.float64, **CASES[case]))
    q, k, v, prefix_k, prefix_v, length, rope = inputs.args()
    if rope is not None:
        position = length[:, None] + torch.arange(q.shape[2])  # [B, S]
        table = tuple(t[position][:, None, :, None] for t in rope)
        q, k = llm.apply_rope(q, table), llm.apply_rope(k, table)
    mask = torch.arange(prefix_k.shape[1]) < length[:, None]
    expected = llm.grouped_attention(q, k, v, prefix_k, prefix_v, mask)
    torch.testing.assert_close(query_attention(*inputs.args()), expected)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case: str, dtype: torch.dtype) -> None:
    """Forward and backward of the operator on the CPU, in the tensors' own precision."""
    inputs = sample_inputs(dtype=dtype, requires_grad=True, **CASES[case])
    exact = SampleInputs(
        *(t.detach().double().requires_grad_() for t in inputs.args()[:5]), inputs.prefix_length, inputs.rope
    )
    results = []
    for function, given in ((query_attention, inputs), (query_attention_reference, exact)):
        output = function(*given.args())
        random = torch.Generator().manual_seed(1)
        grad = torch.randn(output.shape, generator=random).to(dtype).to(output.dtype)
        results.append((output, *torch.autograd.grad(output, given.args()[:5], grad)))
    names = ("output", "grad_q", "grad_k", "grad_v", "grad_prefix_k", "grad_prefix_v")
    for name, got, expected in zip(names, *results, strict=True):
        assert got.dtype == dtype
        assert_close(name, got, expected, TOLERANCES["query_attention", dtype])


def test_nothing_behind_the_prefix_has_a_gradient() -> None:
    inputs = sample_inputs(requires_grad=True)
    query_attention(*inputs.args()).square().sum().backward()
    for tensor in (inputs.prefix_k, inputs.prefix_v):
        assert (tensor.grad[1, 4:] == 0).all() and (tensor.grad[1, :4] != 0).all()


def test_gradcheck() -> None:
    inputs = finite(sample_inputs(dtype=torch.float64, requires_grad=True, **SMALL))

    def function(*tensors: Tensor) -> Tensor:
        return query_attention(*tensors, inputs.prefix_length, inputs.rope)

    assert torch.autograd.gradcheck(function, inputs.args()[:5])


def test_backward_reference_is_the_derivative_of_the_reference() -> None:
    inputs = sample_inputs(dtype=torch.float64, requires_grad=True)
    output, logsumexp = torch.ops.visionllm.query_attention(*inputs.operator_args())
    grad_output = torch.randn_like(output)
    expected = torch.autograd.grad(query_attention_reference(*inputs.args()), inputs.args()[:5], grad_output)
    got = query_attention_backward_reference(
        grad_output, output.detach(), logsumexp, *(t.detach() for t in inputs.operator_args())
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_logsumexp_is_not_differentiable() -> None:
    inputs = sample_inputs(requires_grad=True)
    output, logsumexp = torch.ops.visionllm.query_attention(*inputs.operator_args())
    assert output.requires_grad and not logsumexp.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("rope", [False, True])
def test_opcheck(dtype: torch.dtype, requires_grad: bool, rope: bool) -> None:
    inputs = finite(sample_inputs(dtype=dtype, requires_grad=requires_grad, rope=rope, **SMALL))
    torch.library.opcheck(torch.ops.visionllm.query_attention.default, inputs.operator_args())


def test_opcheck_backward() -> None:
    inputs = finite(sample_inputs(**SMALL))
    output, logsumexp = torch.ops.visionllm.query_attention(*inputs.operator_args())
    torch.library.opcheck(
        torch.ops.visionllm.query_attention_backward.default,
        (torch.randn_like(output), output, logsumexp, *inputs.operator_args()),
    )


def test_compiles_into_one_graph() -> None:
    def step(q, k, v, prefix_k, prefix_v, length, rope):
        return query_attention(q.sin(), k, v, prefix_k, prefix_v, length, rope).square().mean()

    assert_compiles(step, finite(sample_inputs(requires_grad=True, **SMALL)).args())


def test_second_derivative_is_refused() -> None:
    inputs = sample_inputs(requires_grad=True, **SMALL)
    loss = query_attention(*inputs.args()).square().sum()
    grad = torch.autograd.grad(loss, inputs.q, create_graph=True)[0]
    with pytest.raises((NotImplementedError, RuntimeError), match="query_attention_backward"):
        grad.sum().backward()


def test_other_integers_are_converted() -> None:
    inputs = sample_inputs()
    args = list(inputs.args())
    args[5] = args[5].int()
    assert torch.equal(query_attention(*args), query_attention(*inputs.args()))


# Which argument of the operator, what is wrong with it, and the message without the operator's name.
BAD_ARGUMENTS = {
    "q rank": (0, lambda t: t[0], "q must have shape [B, M, S, H, D], got [2, 3, 2, 8]"),
    "k slots": (
        1,
        lambda t: t[:, :, :2],
        "k must have shape [B, M, S, Hkv, D] = [2, 2, 3, 1, 8], got [2, 2, 2, 1, 8]",
    ),
    "v heads": (
        2,
        lambda t: t.repeat(1, 1, 1, 2, 1),
        "v must have shape [B, M, S, Hkv, D] = [2, 2, 3, 1, 8], g",
    ),
    "prefix channels": (
        3,
        lambda t: t[..., :4],
        "prefix_k must have shape [B, P, Hkv, D] = [2, 5, 1, 8], got [2, 5, 1, 4]",
    ),
    "prefix tokens": (4, lambda t: t[:, :4], "prefix_v must have shape [B, P, Hkv, D] = [2, 5, 1, 8], got"),
    "lengths": (5, lambda t: t[:1], "prefix_length must have shape [B] = [2], got [1]"),
    "length type": (5, lambda t: t.double(), "prefix_length must be int64, got float64"),
    "k type": (1, lambda t: t.half(), "k must be float32, got float16"),
    "prefix type": (4, lambda t: t.double(), "prefix_v must be float32, got float64"),
    "short table": (
        6,
        lambda t: t[:7],
        "cosine must have shape [positions >= P + S, D / 2] = [>= 8, 4], got [7, 4]",
    ),
    "narrow table": (7, lambda t: t[:, :3], "sine must have shape [positions >= P + S, D / 2] = [>= 8, 4]"),
    "one table": (6, lambda t: None, "cosine and sine must be given together"),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_argument_is_named(case: str, backward: bool) -> None:
    args = list(sample_inputs(**SMALL).operator_args())
    output, logsumexp = torch.ops.visionllm.query_attention(*args)
    argument, change, message = BAD_ARGUMENTS[case]
    args[argument] = change(args[argument])
    with pytest.raises(ValueError) as caught:
        if backward:
            torch.ops.visionllm.query_attention_backward(output, output, logsumexp, *args)
        else:
            torch.ops.visionllm.query_attention(*args)
    assert str(caught.value).startswith("query_attention_backward: " if backward else "query_attention: ")
    assert message in str(caught.value)


def test_heads_must_be_a_multiple() -> None:
    inputs = sample_inputs(heads=3, kv_heads=2)
    with pytest.raises(ValueError, match="multiple of k's heads, got H = 3 and Hkv = 2"):
        query_attention(*inputs.args())


@pytest.mark.parametrize(
    ("sizes", "splits"),
    [
        ((1, 100, 5, 32, 32, 2048), 1),  # never below 2049 tokens
        ((1, 100, 5, 32, 32, 8192), 1),  # 128 blocks already
        ((1, 10, 5, 32, 32, 4096), 4),  # 32 blocks
        ((1, 1, 5, 8, 2, 8192), 8),  # 2 blocks, 1024 keys each
        ((1, 0, 5, 8, 2, 8192), 1),
    ],
    ids=str,
)
def test_keys_are_divided_only_where_blocks_are_few(sizes: tuple[int, ...], splits: int) -> None:
    assert _core.query_attention_splits(*sizes) == splits
