"""ms_deform_attn as a citizen of torch: autograd, opcheck, compile, autocast, arguments, other devices."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from comparison import assert_compiles

from visionllm.ops import fallback, ms_deform_attn, ms_deform_attn_reference, native
from visionllm.ops.ms_deform_attn import SampleInputs, sample_inputs
from visionllm.ops.ms_deform_attn_reference import ms_deform_attn_backward_reference

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

    assert_compiles(step, sample_inputs(requires_grad=True, **SMALL).args())


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


# Which argument, what is wrong with it, and the message without the operator's name.
BAD_ARGUMENTS = {
    "value rank": (0, lambda t: t[0], r"value must have shape [B, S, H, D], got [26, 2, 4]"),
    "locations rank": (3, lambda t: t[0], "sampling_locations must have shape [B, Q, H, L, P, 2], got [3, "),
    "locations batch": (
        3,
        lambda t: t[:1],
        "sampling_locations must have shape [B, Q, H, L, P, 2] = [2, 3, 2, 2, 2, 2], got [1, 3, 2, 2, 2, 2]",
    ),
    "locations heads": (3, lambda t: t[:, :, :1], "= [2, 3, 2, 2, 2, 2], got [2, 3, 1, 2, 2, 2]"),
    "locations pair": (3, lambda t: t[..., :1], "= [2, 3, 2, 2, 2, 2], got [2, 3, 2, 2, 2, 1]"),
    "weights queries": (
        4,
        lambda t: t[:, :1],
        "attention_weights must have shape [B, Q, H, L, P] = [2, 3, 2, 2, 2], got [2, 1, 2, 2, 2]",
    ),
    "weights rank": (4, lambda t: t.flatten(3), "attention_weights must have shape [B, Q, H, L, P] = "),
    "shapes levels": (1, lambda t: t[:1], "spatial_shapes must have shape [L, 2] = [2, 2], got [1, 2]"),
    "starts rank": (2, lambda t: t[None], "level_start_index must have shape [L] = [2], got [1, 2]"),
    "shapes type": (1, lambda t: t.double(), "spatial_shapes must be int64, got float64"),
    "starts type": (2, lambda t: t.bool(), "level_start_index must be int64, got bool"),
    "locations type": (3, lambda t: t.long(), "sampling_locations must be f"),
    "weights type": (4, lambda t: t.long(), "attention_weights must be f"),
    "level too large": (
        1,
        lambda t: t + 1,
        "level 0 must be at least 1 x 1 and lie within value's S = 26 pixels, got height 5, width 6, "
        "level_start_index 0",
    ),
    "level empty": (1, lambda t: t * 0, "level 0 must be at least 1 x 1"),
    "level overflows": (1, lambda t: t * 2**32, "level 0 must be at least 1 x 1"),
    "start negative": (2, lambda t: t - 1, "got height 4, width 5, level_start_index -1"),
    "start too late": (2, lambda t: t + 1, "level 1 must be at least 1 x 1"),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_argument_is_named(case: str, dtype: torch.dtype, backward: bool) -> None:
    """float32 is refused by the core, float64 by the reference: with the same words."""
    inputs = sample_inputs(dtype=dtype, **SMALL)
    args = list(inputs.args())
    grad_output = torch.randn_like(ms_deform_attn(*args))
    argument, change, message = BAD_ARGUMENTS[case]
    args[argument] = change(args[argument])
    with pytest.raises(ValueError) as caught:
        if backward:
            torch.ops.visionllm.ms_deform_attn_backward(grad_output, *args)
        else:
            ms_deform_attn(*args)
    assert str(caught.value).startswith("ms_deform_attn_backward: " if backward else "ms_deform_attn: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bad_gradient_is_named(dtype: torch.dtype) -> None:
    inputs = sample_inputs(dtype=dtype, **SMALL)
    for grad_output, got in ((torch.zeros(2, 1, 8, dtype=dtype), "[2, 1, 8]"), (torch.zeros(48), "[48]")):
        with pytest.raises(ValueError) as caught:
            torch.ops.visionllm.ms_deform_attn_backward(grad_output.to(dtype), *inputs.args())
        assert str(caught.value) == (
            f"ms_deform_attn_backward: grad_output must have shape [B, Q, H * D] = [2, 3, 8], got {got}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_integers_are_converted(dtype: torch.dtype) -> None:
    value, shapes, starts, locations, weights = sample_inputs(dtype=dtype, **SMALL).args()
    expected = ms_deform_attn(value, shapes, starts, locations, weights)
    assert torch.equal(ms_deform_attn(value, shapes.int(), starts.int(), locations, weights), expected)


@pytest.fixture
def first_call() -> Iterator[None]:
    """As in a process that has warned of nothing yet."""
    fallback.warn_of_reference.cache_clear()
    yield
    fallback.warn_of_reference.cache_clear()


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_other_devices_warn_once(first_call: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch calls for a device without kernels, with the reference's arithmetic left out."""
    module = sys.modules[SampleInputs.__module__]  # visionllm.ops.ms_deform_attn names the function
    monkeypatch.setattr(module, "ms_deform_attn_reference", lambda value, *_: value)
    inputs = [t.to("meta") for t in sample_inputs(**SMALL).args()]
    with pytest.warns(UserWarning, match="ms_deform_attn: META kernels are not part of this build") as caught:
        assert module._forward_elsewhere(*inputs) is inputs[0]
    assert len(caught) == 1 and "PyTorch reference is used" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module._forward_elsewhere(*inputs)


@pytest.mark.skipif(
    not torch.cuda.is_available() or native.has_cuda_kernels(), reason="no CUDA device, or kernels for it"
)
def test_cuda_takes_the_reference_and_says_so(first_call: None) -> None:
    expected = ms_deform_attn(*sample_inputs(**SMALL).args())
    with pytest.warns(UserWarning, match="CUDA kernels are not part of this build"):
        output = ms_deform_attn(*sample_inputs("cuda", **SMALL).args())
    torch.testing.assert_close(output.cpu(), expected)


def test_the_cpu_does_not_warn(first_call: None, deterministic: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in DTYPES:
            inputs = sample_inputs(dtype=dtype, requires_grad=True, **SMALL)
            ms_deform_attn(*inputs.args()).float().sum().backward()


def test_deterministic_backward_is_refused_elsewhere(deterministic: None) -> None:
    inputs = [t.to("meta") for t in sample_inputs(**SMALL).args()]
    grad_output = torch.empty(2, 3, 8, device="meta")
    with pytest.raises(
        RuntimeError, match="ms_deform_attn_backward: expected a CPU tensor .* got one on meta"
    ):
        ms_deform_attn_backward_reference(grad_output, *inputs)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.warns(UserWarning, match="ms_deform_attn_backward: expected a CPU tensor"):
        fallback.alert_not_deterministic("ms_deform_attn_backward", torch.device("cuda"))
