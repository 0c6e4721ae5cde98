"""fusion_attention in PyTorch: formula, the form the model has, gradients, opcheck, compile, arguments."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from comparison import TOLERANCES, assert_close, assert_compiles

from visionllm.model.fusion import LanguageFusion
from visionllm.ops import fallback, fusion_attention, fusion_attention_reference
from visionllm.ops.fusion_attention import SampleInputs, sample_inputs
from visionllm.ops.fusion_attention_reference import fusion_attention_backward_reference

SMALL = dict(batch=2, positions=3, channels=8, heads=2, tokens=4, texts=(3, 2))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def test_one_number_after_another() -> None:
    """The formula of the header, written out."""
    inputs = sample_inputs(dtype=torch.float64, **SMALL)
    values = [t.tolist() if isinstance(t, torch.Tensor) else t for t in inputs.args()]
    x, norm_w, norm_b, query_w, query_b, key, value, mask, output_w, output_b, gate, epsilon = values
    output = fusion_attention_reference(*inputs.args())
    channels, heads = 8, 2
    width = channels // heads
    for b in range(2):
        for n in range(3):
            row = x[b][n]
            mean = sum(row) / channels
            deviation = math.sqrt(sum((v - mean) ** 2 for v in row) / channels + epsilon)
            normed = [(row[c] - mean) / deviation * norm_w[c] + norm_b[c] for c in range(channels)]
            query = [
                sum(query_w[o][c] * normed[c] for c in range(channels)) + query_b[o] for o in range(channels)
            ]
            attended = []
            for h in range(heads):
                tokens = [t for t in range(4) if mask[b][t]]
                mine = query[h * width : (h + 1) * width]
                scores = [
                    math.exp(sum(q * k for q, k in zip(mine, key[b][t][h], strict=True)) / math.sqrt(width))
                    for t in tokens
                ]
                for d in range(width):
                    gathered = sum(s * value[b][t][h][d] for s, t in zip(scores, tokens, strict=True))
                    attended.append(gathered / sum(scores))
            for c in range(channels):
                projected = sum(output_w[c][i] * attended[i] for i in range(channels)) + output_b[c]
                assert float(output[b, n, c]) == pytest.approx(row[c] + gate[c] * projected, rel=1e-12)


def test_equals_the_models_layer() -> None:
    torch.manual_seed(0)
    layer = LanguageFusion(dim=32, text_dim=12, heads=4, gate=0.3).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    x, text = torch.randn(2, 9, 32).double(), torch.randn(2, 6, 12).double()
    mask = torch.arange(6) < torch.tensor([[6], [2]])
    key, value = layer.key_value(text).view(2, 6, 2, 4, 8).unbind(2)
    output = fusion_attention(
        x,
        layer.norm.weight,
        layer.norm.bias,
        layer.query.weight,
        layer.query.bias,
        key,
        value,
        mask,
        layer.output.weight,
        layer.output.bias,
        layer.gate,
        layer.norm.eps,
    )
    expected = layer(x, text, mask)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    grad_output = torch.randn_like(output)
    parameters = list(layer.parameters())
    for got, want in zip(
        torch.autograd.grad(output, parameters, grad_output),
        torch.autograd.grad(expected, parameters, grad_output),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_without_text_the_output_bias_remains() -> None:
    for tokens in (0, 4):
        inputs = sample_inputs(dtype=torch.float64, **SMALL | dict(tokens=tokens, texts=(0, 0)))
        output = fusion_attention(*inputs.args())
        torch.testing.assert_close(output, inputs.x + inputs.gate * inputs.output_bias)


def test_what_is_no_text_changes_nothing() -> None:
    inputs = sample_inputs(**SMALL)
    keep = inputs.mask[..., None, None]
    others = SampleInputs(
        *inputs.args()[:5],
        torch.where(keep, inputs.key, 1e30),
        torch.where(keep, inputs.value, float("inf")),
        *inputs.args()[7:],
    )
    assert inputs.key.isnan().any()
    assert torch.equal(fusion_attention(*inputs.args()), fusion_attention(*others.args()))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [SMALL, dict(positions=0), dict(batch=0), dict(positions=1, tokens=70, channels=48, heads=2)],
    ids=str,
)
def test_matches_float64(sizes: dict, dtype: torch.dtype) -> None:
    inputs = sample_inputs(dtype=dtype, **sizes)
    output = fusion_attention(*inputs.args())
    assert output.dtype == dtype and output.is_contiguous()
    expected = fusion_attention_reference(*inputs.double().args())
    assert_close("output", output, expected, TOLERANCES["fusion_attention", dtype])


@pytest.mark.parametrize("texts", [(3, 2), (4, 0)], ids=str)
def test_backward_reference_is_the_derivative_of_the_reference(texts: tuple[int, ...]) -> None:
    inputs = sample_inputs(dtype=torch.float64, requires_grad=True, **SMALL | dict(texts=texts))
    output = fusion_attention_reference(*inputs.args())
    grad_output = torch.randn_like(output)
    expected = torch.autograd.grad(output, inputs.leaves(), grad_output)
    got = fusion_attention_backward_reference(grad_output, *inputs.args())
    for mine, want in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-10, atol=1e-10)


def test_gradcheck() -> None:
    inputs = sample_inputs(dtype=torch.float64, requires_grad=True, **SMALL | dict(tokens=3, texts=(3, 3)))
    assert torch.autograd.gradcheck(fusion_attention, inputs.args())


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_opcheck(dtype: torch.dtype, requires_grad: bool) -> None:
    inputs = sample_inputs(dtype=dtype, requires_grad=requires_grad, **SMALL | dict(texts=(4, 4)))
    torch.library.opcheck(torch.ops.visionllm.fusion_attention.default, inputs.args())


def test_opcheck_backward() -> None:
    inputs = sample_inputs(**SMALL | dict(texts=(4, 4)))
    grad_output = torch.randn_like(inputs.x)
    torch.library.opcheck(
        torch.ops.visionllm.fusion_attention_backward.default, (grad_output, *inputs.args())
    )


def test_compiles_into_one_graph() -> None:
    def step(x, *others):
        return fusion_attention(x.sin(), *others).square().mean()

    assert_compiles(step, sample_inputs(requires_grad=True, **SMALL | dict(texts=(4, 4))).args())


def test_second_derivative_is_refused() -> None:
    inputs = sample_inputs(requires_grad=True, **SMALL)
    output = fusion_attention(*inputs.args())
    grad = torch.autograd.grad(output.square().sum(), inputs.x, create_graph=True)[0]
    with pytest.raises((NotImplementedError, RuntimeError), match="fusion_attention_backward"):
        grad.sum().backward()


# Which argument, what is wrong with it, and the message without the operator's name.
BAD_ARGUMENTS = {
    "x rank": (0, lambda t: t[0], "x must have shape [B, N, C], got [3, 8]"),
    "x type": (0, lambda t: t.long(), "x must be float32, bfloat16 or float16, got int64"),
    "norm weight": (1, lambda t: t[:4], "norm_weight must have shape [C] = [8], got [4]"),
    "norm bias": (2, lambda t: t.double(), "norm_bias must be float32, got float64"),
    "query weight": (3, lambda t: t[:, :4], "query_weight must have shape [C, C] = [8, 8], got [8, 4]"),
    "query bias": (4, lambda t: t[None], "query_bias must have shape [C] = [8], got [1, 8]"),
    "key rank": (5, lambda t: t.flatten(2), "key must have shape [B, T, H, D], got [2, 4, 8]"),
    "key channels": (5, lambda t: t[..., :3], "key must have H * D = C = 8 channels, got 2 heads of 3"),
    "key batch": (5, lambda t: t[:1], "key must have shape [B, T, H, D] = [2, 4, 2, 4], got [1, 4, 2, 4]"),
    "value tokens": (6, lambda t: t[:, :3], "value must have shape [B, T, H, D] = [2, 4, 2, 4], got [2, 3"),
    "mask tokens": (7, lambda t: t[:, :3], "mask must have shape [B, T] = [2, 4], got [2, 3]"),
    "mask type": (7, lambda t: t.float(), "mask must be uint8 or boolean, got float32"),
    "output weight": (8, lambda t: t[:4], "output_weight must have shape [C, C] = [8, 8], got [4, 8]"),
    "output bias": (9, lambda t: t.half(), "output_bias must be float32, got float16"),
    "gate": (10, lambda t: t[0], "gate must have shape [C] = [8], got []"),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_argument_is_named(case: str, backward: bool) -> None:
    args = list(sample_inputs(**SMALL).args())
    grad_output = torch.randn_like(args[0])
    argument, change, message = BAD_ARGUMENTS[case]
    args[argument] = change(args[argument])
    with pytest.raises(ValueError) as caught:
        if backward:
            torch.ops.visionllm.fusion_attention_backward(grad_output, *args)
        else:
            fusion_attention(*args)
    assert str(caught.value).startswith("fusion_attention_backward: " if backward else "fusion_attention: ")
    assert message in str(caught.value)


def test_bad_gradient_is_named() -> None:
    inputs = sample_inputs(**SMALL)
    with pytest.raises(ValueError) as caught:
        torch.ops.visionllm.fusion_attention_backward(torch.zeros(2, 8), *inputs.args())
    assert str(caught.value) == (
        "fusion_attention_backward: grad_output must have shape [B, N, C] = [2, 3, 8], got [2, 8]"
    )


@pytest.fixture
def first_call() -> Iterator[None]:
    """As in a process that has warned of nothing yet."""
    fallback.warn_of_reference.cache_clear()
    yield
    fallback.warn_of_reference.cache_clear()


def test_other_devices_warn_once(first_call: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch calls for a device without kernels, with the reference's arithmetic left out."""
    module = sys.modules[SampleInputs.__module__]  # visionllm.ops.fusion_attention names the function
    monkeypatch.setattr(module, "fusion_attention_reference", lambda x, *_: x)
    args = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in sample_inputs(**SMALL).args()]
    with pytest.warns(UserWarning, match="fusion_attention: META kernels are not part of this build"):
        assert module._forward_elsewhere(*args) is args[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module._forward_elsewhere(*args)


def test_the_cpu_does_not_warn(first_call: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in DTYPES:
            inputs = sample_inputs(dtype=dtype, requires_grad=True, **SMALL | dict(texts=(4, 4)))
            fusion_attention(*inputs.args()).float().sum().backward()
