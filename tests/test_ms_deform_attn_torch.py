"""ms_deform_attn as a citizen of torch: autograd, opcheck, compile, autocast."""

from __future__ import annotations

import pytest
import torch

from visionllm.ops import ms_deform_attn, ms_deform_attn_reference
from visionllm.ops.ms_deform_attn import (
    SampleInputs,
    ms_deform_attn_backward_reference,
    sample_inputs,
)

SMALL = dict(batch=2, heads=2, channels=4, levels=((4, 5), (2, 3)), queries=3, points=2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def away_from_cell_edges(inputs: SampleInputs) -> SampleInputs:
    """The same inputs with every location in the middle half of its cell: there the function is smooth."""
    size = inputs.spatial_shapes.flip(-1)[:, None].to(inputs.sampling_locations.dtype)  # [L, 1, 2]
    pixel = inputs.sampling_locations.detach() * size - 0.5
    pixel = pixel.floor() + 0.25 + 0.5 * (pixel - pixel.floor())
    locations = ((pixel + 0.5) / size).requires_grad_()
    return SampleInputs(*inputs.args()[:3], locations, inputs.attention_weights)


def test_gradcheck_reference() -> None:
    inputs = away_from_cell_edges(sample_inputs(dtype=torch.float64, requires_grad=True, **SMALL))
    assert torch.autograd.gradcheck(ms_deform_attn_reference, inputs.args())


def test_backward_reference_is_the_derivative_of_the_reference() -> None:
    inputs = sample_inputs(dtype=torch.float64, requires_grad=True, **SMALL)
    output = ms_deform_attn_reference(*inputs.args())
    grad_output = torch.randn_like(output)
    leaves = [t for t in inputs.args() if t.requires_grad]
    expected = torch.autograd.grad(output, leaves, grad_output)
    for got, want in zip(
        ms_deform_attn_backward_reference(grad_output, *inputs.args()), expected, strict=True
    ):
        torch.testing.assert_close(got, want)


def test_gradcheck_operator_in_float64() -> None:
    inputs = away_from_cell_edges(sample_inputs(dtype=torch.float64, requires_grad=True, **SMALL))
    assert torch.autograd.gradcheck(ms_deform_attn, inputs.args())


def test_gradcheck_kernel_in_float32() -> None:
    """The compiled backward against differences of the compiled forward; float32 wants a large step."""
    inputs = away_from_cell_edges(sample_inputs(requires_grad=True, **SMALL))
    # Within a cell the function is linear in x and in y: a step of 1/64 of the image is exact.
    assert torch.autograd.gradcheck(
        ms_deform_attn, inputs.args(), eps=2**-6, atol=1e-3, rtol=1e-3, nondet_tol=0.0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dtype: torch.dtype, requires_grad: bool) -> None:
    inputs = sample_inputs(dtype=dtype, requires_grad=requires_grad, **SMALL)
    torch.library.opcheck(torch.ops.visionllm.ms_deform_attn.default, inputs.args())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_backward(dtype: torch.dtype) -> None:
    inputs = sample_inputs(dtype=dtype, **SMALL)
    grad_output = torch.randn_like(ms_deform_attn(*inputs.args()))
    torch.library.opcheck(torch.ops.visionllm.ms_deform_attn_backward.default, (grad_output, *inputs.args()))


def test_compiles_into_one_graph() -> None:
    def step(value, shapes, starts, locations, weights):
        return ms_deform_attn(value.sin(), shapes, starts, locations, weights.softmax(-1)).square().mean()

    compiled = torch.compile(step, fullgraph=True)
    results = []
    for function in (step, compiled):
        inputs = sample_inputs(requires_grad=True, **SMALL)
        loss = function(*inputs.args())
        loss.backward()
        results.append((loss.detach(), *(t.grad for t in inputs.args() if t.requires_grad)))
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager)


def test_fake_tensors_have_the_right_shapes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        output = ms_deform_attn(
            torch.empty(2, 26, 3, 5),
            torch.empty(2, 2, dtype=torch.int64),
            torch.empty(2, dtype=torch.int64),
            torch.empty(2, 7, 3, 2, 4, 2),
            torch.empty(2, 7, 3, 2, 4),
        )
    assert output.shape == (2, 7, 15)


def test_autocast() -> None:
    inputs = sample_inputs(requires_grad=True, **SMALL)
    project = torch.nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        output = ms_deform_attn(project(inputs.value), *inputs.args()[1:])
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert project.weight.grad is not None and project.weight.grad.isfinite().all()


def test_low_precision_locations_are_converted() -> None:
    inputs = sample_inputs(dtype=torch.bfloat16, **SMALL)
    low = inputs.sampling_locations.bfloat16().requires_grad_()
    args = inputs.args()
    output = ms_deform_attn(*args[:3], low, args[4])
    assert torch.equal(output, ms_deform_attn(*args[:3], low.detach().float(), args[4]))
    output.sum().backward()
    assert low.grad is not None and low.grad.dtype == torch.bfloat16


def test_second_derivative_is_refused() -> None:
    inputs = sample_inputs(requires_grad=True, **SMALL)
    grad = torch.autograd.grad(
        ms_deform_attn(*inputs.args()).square().sum(), inputs.value, create_graph=True
    )[0]
    with pytest.raises((NotImplementedError, RuntimeError), match="ms_deform_attn_backward"):
        grad.sum().backward()
