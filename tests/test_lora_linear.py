"""lora_linear: the reference against its formula, and the operator as a citizen of torch."""

from __future__ import annotations

import pytest
import torch
from comparison import TOLERANCES, assert_close, assert_compiles
from torch import Tensor

from visionllm.ops import lora_linear, lora_linear_reference
from visionllm.ops.lora_linear import SampleInputs, sample_inputs
from visionllm.ops.lora_linear_reference import lora_linear_backward_reference

SMALL = dict(rows=7, inputs=6, outputs=5, rank=3)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASES = {
    "plain": dict(adapters=0, bias=False),
    "bias": dict(adapters=0),
    "one": dict(),
    "indexed": dict(adapters=3, indexed=True),
    "int8": dict(adapters=2, indexed=True, int8=True),
}


def by_loops(inputs: SampleInputs) -> Tensor:
    """The formula, row by row."""
    rows = []
    for t, x in enumerate(inputs.x.detach()):
        weight = inputs.weight.to(x.dtype)
        if inputs.weight_scale is not None:
            weight = weight * inputs.weight_scale[:, None]
        y = weight @ x
        if inputs.bias is not None:
            y = y + inputs.bias
        adapter = 0 if inputs.adapter_index is None else int(inputs.adapter_index[t])
        if inputs.lora_a is not None and inputs.lora_b is not None and adapter >= 0:
            scale = inputs.scale[adapter] if isinstance(inputs.scale, Tensor) else inputs.scale
            y = y + scale * (inputs.lora_b[adapter] @ (inputs.lora_a[adapter] @ x))
        rows.append(y)
    return torch.stack(rows).detach()


@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_formula(case: str) -> None:
    inputs = sample_inputs(dtype=torch.float64, **SMALL, **CASES[case])
    torch.testing.assert_close(lora_linear(*inputs.args()), by_loops(inputs))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_operator_against_float64(case: str, dtype: torch.dtype) -> None:
    inputs = sample_inputs(dtype=dtype, **SMALL, **CASES[case])
    exact = [
        t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs.operator_args()
    ]
    expected, low_rank = lora_linear_reference(*exact)
    output, got_low_rank = torch.ops.visionllm.lora_linear(*inputs.operator_args())
    assert output.dtype == dtype and got_low_rank.dtype == torch.float32
    assert_close("output", output, expected, TOLERANCES["lora_linear", dtype])
    assert_close("low_rank", got_low_rank, low_rank, TOLERANCES["lora_linear", torch.float32])


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case: str) -> None:
    inputs = sample_inputs(dtype=torch.float64, requires_grad=True, **SMALL, **CASES[case])
    assert torch.autograd.gradcheck(lora_linear, inputs.args())


@pytest.mark.parametrize("case", CASES)
def test_backward_reference_is_the_derivative_of_the_reference(case: str) -> None:
    inputs = sample_inputs(dtype=torch.float64, requires_grad=True, **SMALL, **CASES[case])
    output, low_rank = lora_linear_reference(*inputs.operator_args())
    grad_output = torch.randn_like(output)
    leaves = [t for t in (inputs.x, inputs.lora_a, inputs.lora_b) if t is not None]
    expected = torch.autograd.grad(output, leaves, grad_output)
    x, weight, weight_scale, _, *adapters, scaling = inputs.operator_args()
    grads = lora_linear_backward_reference(
        grad_output, x, weight, weight_scale, *adapters, low_rank, scaling, True, True, True
    )
    for got, want in zip(grads, expected, strict=False):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str, dtype: torch.dtype) -> None:
    inputs = sample_inputs(dtype=dtype, requires_grad=True, **SMALL, **CASES[case])
    torch.library.opcheck(torch.ops.visionllm.lora_linear.default, inputs.operator_args())


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False), (True, False, True)])
@pytest.mark.parametrize("case", CASES)
def test_opcheck_backward(case: str, wanted: tuple[bool, bool, bool]) -> None:
    inputs = sample_inputs(**SMALL, **CASES[case])
    output, low_rank = torch.ops.visionllm.lora_linear(*inputs.operator_args())
    x, weight, weight_scale, _, *adapters, scaling = inputs.operator_args()
    args = (torch.randn_like(output), x, weight, weight_scale, *adapters, low_rank, scaling, *wanted)
    torch.library.opcheck(torch.ops.visionllm.lora_linear_backward.default, args)


def test_compiles_into_one_graph() -> None:
    inputs = sample_inputs(requires_grad=True, **SMALL, **CASES["indexed"])

    def step(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        args = (inputs.weight, inputs.bias, lora_a, lora_b, inputs.scale, inputs.adapter_index)
        return lora_linear(x.sin(), *args).square().mean()

    assert_compiles(step, (inputs.x, inputs.lora_a, inputs.lora_b))


def test_leading_dimensions_and_single_adapters_without_their_dimension() -> None:
    inputs = sample_inputs(**{**SMALL, "rows": 6})
    x, weight, bias, lora_a, lora_b, scale, *_ = inputs.args()
    assert lora_a is not None and lora_b is not None
    expected = lora_linear(x, weight, bias, lora_a, lora_b, scale)
    shaped = lora_linear(x.view(2, 3, -1), weight, bias, lora_a[0], lora_b[0], scale)
    assert torch.equal(shaped, expected.view(2, 3, -1))
    assert torch.equal(lora_linear(x[0], weight, bias, lora_a, lora_b, scale), expected[0])
    index = torch.tensor([[0, -1, 0], [0, 0, -1]])
    mixed = lora_linear(x.view(2, 3, -1), weight, bias, lora_a, lora_b, scale, index)
    plain = lora_linear(x, weight, bias)
    torch.testing.assert_close(mixed.view(6, -1), torch.where(index.view(6, 1) == 0, expected, plain))


@pytest.mark.parametrize("rows, inputs, outputs", [(0, 4, 3), (3, 0, 4), (2, 4, 0)])
def test_empty(rows: int, inputs: int, outputs: int) -> None:
    args = sample_inputs(rows=rows, inputs=inputs, outputs=outputs, rank=2, requires_grad=True)
    output = lora_linear(*args.args())
    assert output.shape == (rows, outputs)
    output.sum().backward()
    assert args.lora_b is not None and args.lora_b.grad is not None
    if inputs == 0:
        assert args.bias is not None
        assert torch.equal(output, args.bias.expand(rows, outputs))


def test_rows_without_adapter_and_other_adapters_do_not_see_nan() -> None:
    inputs = sample_inputs(dtype=torch.float32, requires_grad=True, **SMALL, **CASES["indexed"])
    x, weight, bias, lora_a, lora_b, scale, _, _ = inputs.args()
    assert lora_a is not None and lora_b is not None
    index = torch.tensor([0, 1, -1, 2, 7, 1, -3])  # 7 and -3: no such adapter
    with torch.no_grad():
        lora_a[1] = torch.nan
        lora_b[2] = torch.nan
    output = lora_linear(x, weight, bias, lora_a, lora_b, scale, index)
    assert output.isnan().any(-1).tolist() == [False, True, False, True, False, True, False]
    plain = lora_linear(x, weight, bias)
    torch.testing.assert_close(output[[2, 4, 6]], plain[[2, 4, 6]])
    output[[0, 2]].sum().backward()
    assert x.grad is not None and lora_a.grad is not None and lora_b.grad is not None
    assert not x.grad[[0, 2]].isnan().any() and not lora_a.grad[0].isnan().any()


def test_autocast() -> None:
    inputs = sample_inputs(requires_grad=True, **SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        output = lora_linear(*inputs.args())
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert inputs.lora_a is not None and inputs.lora_a.grad is not None
    assert inputs.lora_a.grad.dtype == torch.float32 and inputs.lora_a.grad.isfinite().all()


@pytest.mark.parametrize("name", ["weight", "bias", "scale"])
def test_the_base_is_frozen(name: str) -> None:
    inputs = sample_inputs(**SMALL, **CASES["indexed"])
    getattr(inputs, name).requires_grad_()
    with pytest.raises(ValueError, match=f"lora_linear: {name} must not require gradients"):
        lora_linear(*inputs.args())
    with torch.no_grad():
        assert lora_linear(*inputs.args()).isfinite().all()


def test_second_derivative_is_refused() -> None:
    inputs = sample_inputs(requires_grad=True, **SMALL)
    grad = torch.autograd.grad(lora_linear(*inputs.args()).square().sum(), inputs.x, create_graph=True)[0]
    with pytest.raises((NotImplementedError, RuntimeError), match="lora_linear_backward"):
        grad.sum().backward()


# Which argument of the operator, what becomes of it, and the message.
BAD_ARGUMENTS = {
    "x rank": ("x", lambda t: t[0], "x must have shape [T, K], got [6]"),
    "x type": ("x", lambda t: t.long(), "x must be float32, bfloat16 or float16, got int64"),
    "weight rank": ("weight", lambda t: t[0], "weight must have shape [N, K], got [6]"),
    "weight inputs": ("weight", lambda t: t[:, 1:], "weight must have shape [N, K] = [5, 6], got [5, 5]"),
    "weight type": ("weight", lambda t: t.half(), "weight must be float32, got float16"),
    "int8 without scale": (
        "weight",
        lambda t: t.to(torch.int8),
        "weight_scale must be given with an int8 weight",
    ),
    "scale without int8": (
        "weight_scale",
        lambda t: torch.ones(5),
        "weight_scale must be absent unless weight is int8, got weight of type float32",
    ),
    "bias shape": ("bias", lambda t: t[1:], "bias must have shape [N] = [5], got [4]"),
    "bias type": ("bias", lambda t: t.half(), "bias must be float32, got float16"),
    "A alone": ("lora_b", lambda t: None, "lora_a and lora_b must be given together, got one of them"),
    "A rank": ("lora_a", lambda t: t[0], "lora_a must have shape [E, R, K], got [3, 6]"),
    "A inputs": (
        "lora_a",
        lambda t: t[..., 1:],
        "lora_a must have shape [E, R, K] = [3, 3, 6], got [3, 3, 5]",
    ),
    "A type": ("lora_a", lambda t: t.half(), "lora_a must be float32, got float16"),
    "B shape": ("lora_b", lambda t: t[:2], "lora_b must have shape [E, N, R] = [3, 5, 3], got [2, 5, 3]"),
    "scale shape": ("scale", lambda t: t[:2], "scale must have shape [E] = [3], got [2]"),
    "index shape": ("adapter_index", lambda t: t[1:], "adapter_index must have shape [T] = [7], got [6]"),
    "index type": ("adapter_index", lambda t: t.int(), "adapter_index must be int64, got int32"),
}
ARGUMENTS = ("x", "weight", "weight_scale", "bias", "lora_a", "lora_b", "scale", "adapter_index")


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_argument_is_named(case: str) -> None:
    args = list(sample_inputs(**SMALL, **CASES["indexed"]).operator_args())
    name, change, message = BAD_ARGUMENTS[case]
    place = ARGUMENTS.index(name)
    args[place] = change(args[place])
    with pytest.raises(ValueError) as caught:
        torch.ops.visionllm.lora_linear(*args)
    assert str(caught.value).startswith("lora_linear: ") and message in str(caught.value)


def test_rank_out_of_range() -> None:
    for rank in (0, 129):
        inputs = sample_inputs(rows=2, inputs=3, outputs=2, rank=rank)
        with pytest.raises(ValueError, match=f"the rank R must be 1 to 128, got {rank}"):
            lora_linear(*inputs.args())
