"""ms_deform_attn_fused as torch users meet it, on the CPU: reference, gradients, torch.compile.

CUDA's kernels are in test_ms_deform_attn_cuda.py.
"""

from __future__ import annotations

import pytest
import torch
from comparison import TOLERANCES, assert_close

from visionllm.ops import ms_deform_attn_fused, ms_deform_attn_fused_reference, ms_deform_attn_reference
from visionllm.ops.ms_deform_attn_fused import FusedInputs, sample_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = dict(levels=((4, 5), (3, 2)), heads=2, channels=4, queries=3, points=2)
KINDS = pytest.mark.parametrize("boxes", [False, True], ids=["points", "boxes"])


def away_from_cell_edges(inputs: FusedInputs) -> FusedInputs:
    """The same inputs with every location in the middle half of its cell: there the function is smooth."""
    size = inputs.spatial_shapes.flip(-1)[:, None].double()  # [L, 1, 2]
    reference, offsets = inputs.reference_points.detach(), inputs.sampling_offsets.detach()
    slope = 1 / size
    if reference.shape[-1] == 4:
        slope = reference[:, :, None, :, None, 2:] * (0.5 / offsets.shape[4])
    centre = reference[:, :, None, :, None, :2]
    pixel = (centre + offsets * slope) * size - 0.5
    pixel = pixel.floor() + 0.25 + 0.5 * (pixel - pixel.floor())
    offsets = ((pixel + 0.5) / size - centre) / slope
    return FusedInputs(*inputs.args()[:4], offsets.requires_grad_(), inputs.attention_logits)


@KINDS
def test_reference_by_hand(boxes: bool) -> None:
    """One query, its points computed one after the other."""
    inputs = sample_inputs(dtype=torch.float64, boxes=boxes, **SMALL | dict(queries=1, batch=1))
    reference, offsets, logits = (t[0, 0] for t in inputs.args()[3:])
    heads, levels, points, _ = offsets.shape
    locations = torch.zeros(1, 1, heads, levels, points, 2, dtype=torch.float64)
    weights = torch.zeros(1, 1, heads, levels, points, dtype=torch.float64)
    for head in range(heads):
        total = sum(
            float(logits[head].exp()[level, point]) for level in range(levels) for point in range(points)
        )
        for level, (height, width) in enumerate(inputs.spatial_shapes.tolist()):
            x, y = reference[level, :2].tolist()
            w, h = reference[level, 2:].tolist() if boxes else (2 * points / width, 2 * points / height)
            for point in range(points):
                dx, dy = offsets[head, level, point].tolist()
                place = torch.tensor([x + dx * w / 2 / points, y + dy * h / 2 / points])
                locations[0, 0, head, level, point] = place
                weights[0, 0, head, level, point] = float(logits[head, level, point].exp()) / total
    expected = ms_deform_attn_reference(*inputs.args()[:3], locations, weights)
    torch.testing.assert_close(ms_deform_attn_fused_reference(*inputs.args()), expected, rtol=1e-6, atol=1e-6)


@KINDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(dtype: torch.dtype, boxes: bool) -> None:
    inputs = sample_inputs(dtype=dtype, boxes=boxes, heads=3, channels=5, queries=7, points=3)
    results = []
    for function, args in (
        (ms_deform_attn_fused, inputs.args()),
        (ms_deform_attn_fused_reference, [t.double() if t.is_floating_point() else t for t in inputs.args()]),
    ):
        leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in args]
        output = function(*leaves)
        grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        grads = torch.autograd.grad(
            output, [t for t in leaves if t.requires_grad], grad_output.to(output.dtype)
        )
        results.append([output, *grads])
    names = ("output", "value", "reference_points", "sampling_offsets", "attention_logits")
    for name, got, expected in zip(names, *results, strict=True):
        like = inputs.value if name == "output" else getattr(inputs, name)
        assert got.dtype == like.dtype
        assert_close(name, got, expected, TOLERANCES["ms_deform_attn_fused", got.dtype])


@KINDS
def test_gradcheck(boxes: bool) -> None:
    inputs = sample_inputs(dtype=torch.float64, boxes=boxes, requires_grad=True, **SMALL)
    inputs = away_from_cell_edges(inputs)
    assert torch.autograd.gradcheck(ms_deform_attn_fused_reference, inputs.args())
    assert torch.autograd.gradcheck(ms_deform_attn_fused, inputs.args())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    # Points in one type, boxes in the other: a check takes seconds.
    boxes = dtype == torch.bfloat16
    inputs = sample_inputs(dtype=dtype, boxes=boxes, requires_grad=True, **SMALL)
    torch.library.opcheck(torch.ops.visionllm.ms_deform_attn_fused.default, inputs.args())
    plain = [t.detach() for t in inputs.args()]
    grad_output = torch.randn_like(ms_deform_attn_fused(*plain))
    torch.library.opcheck(
        torch.ops.visionllm.ms_deform_attn_fused_backward.default, (grad_output, *plain, boxes)
    )


def test_compiles_into_one_graph() -> None:
    def step(value, shapes, starts, reference, offsets, logits):
        return (
            ms_deform_attn_fused(value.sin(), shapes, starts, reference.cos(), offsets, logits)
            .square()
            .mean()
        )

    compiled = torch.compile(step, fullgraph=True)
    results = []
    for function in (step, compiled):
        inputs = sample_inputs(requires_grad=True, **SMALL)
        loss = function(*inputs.args())
        loss.backward()
        results.append((loss.detach(), *(t.grad for t in inputs.args() if t.requires_grad)))
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager)


def test_reference_points_without_gradient_or_level() -> None:
    """As the encoder has them: constant, and the same for all levels."""
    inputs = sample_inputs(requires_grad=True, **SMALL)
    one = inputs.reference_points.detach()[:, :, :1].expand(-1, -1, 2, -1)
    output = ms_deform_attn_fused(*inputs.args()[:3], one, *inputs.args()[4:])
    output.sum().backward()
    assert inputs.sampling_offsets.grad is not None and inputs.sampling_offsets.grad.abs().sum() > 0
    every = ms_deform_attn_fused(*inputs.args()[:3], one.contiguous(), *inputs.args()[4:])
    assert torch.equal(output, every)


def test_low_precision_offsets_are_converted() -> None:
    inputs = sample_inputs(dtype=torch.bfloat16, **SMALL)
    low = inputs.sampling_offsets.bfloat16().requires_grad_()
    output = ms_deform_attn_fused(*inputs.args()[:4], low, inputs.attention_logits)
    same = ms_deform_attn_fused(*inputs.args()[:4], low.detach().float(), inputs.attention_logits)
    assert torch.equal(output, same)
    output.float().sum().backward()
    assert low.grad is not None and low.grad.dtype == torch.bfloat16


BAD_ARGUMENTS = {
    "reference rank": (
        3,
        lambda t: t[0],
        "reference_points must have shape [B, Q, L, 2 or 4], got [3, 2, 2]",
    ),
    "reference size": (3, lambda t: t[..., :1], "[B, Q, L, 2 or 4] = [2, 3, 2, 2], got [2, 3, 2, 1]"),
    "reference levels": (3, lambda t: t[:, :, :1], "= [2, 3, 2, 2], got [2, 3, 1, 2]"),
    "reference type": (3, lambda t: t.long(), "reference_points must be floating point, got int64"),
    "offsets heads": (4, lambda t: t[:, :, :1], "sampling_offsets must have shape [B, Q, H, L, P, 2] = "),
    "logits points": (5, lambda t: t[..., :1], "attention_logits must have shape [B, Q, H, L, P] = "),
    "value rank": (0, lambda t: t[0], "value must have shape [B, S, H, D], got "),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_argument_is_named(case: str, dtype: torch.dtype) -> None:
    args = list(sample_inputs(dtype=dtype, **SMALL).args())
    argument, change, message = BAD_ARGUMENTS[case]
    grad_output = torch.zeros(2, 3, 8, dtype=dtype)
    args[argument] = change(args[argument])
    for operator, call in (
        ("ms_deform_attn_fused", lambda: ms_deform_attn_fused(*args)),
        (
            "ms_deform_attn_fused_backward",
            lambda: torch.ops.visionllm.ms_deform_attn_fused_backward(grad_output, *args, True),
        ),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value).startswith(operator + ": ")
        assert message in str(caught.value)


def test_the_core_has_no_cpu_kernel_and_says_so() -> None:
    from visionllm.ops import native

    inputs = sample_inputs(**SMALL)
    with pytest.raises(RuntimeError, match="ms_deform_attn_fused: no CPU kernel"):
        native.call("ms_deform_attn_fused", torch.empty(2, 3, 8), *inputs.args())


def test_second_derivative_is_refused() -> None:
    inputs = sample_inputs(requires_grad=True, **SMALL)
    output = ms_deform_attn_fused(*inputs.args()).square().sum()
    grad = torch.autograd.grad(output, inputs.value, create_graph=True)[0]
    with pytest.raises((NotImplementedError, RuntimeError), match="ms_deform_attn_fused_backward"):
        grad.sum().backward()
