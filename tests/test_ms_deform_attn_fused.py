"""ms_deform_attn_fused on the CPU: kernels of every instruction set, reference, gradients, torch.compile.

CUDA's kernels are in test_ms_deform_attn_cuda.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from comparison import TOLERANCES, assert_close, assert_compiles
from torch import Tensor

from visionllm.ops import ms_deform_attn_fused, ms_deform_attn_fused_reference, ms_deform_attn_reference
from visionllm.ops.ms_deform_attn_fused import FusedInputs, sample_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = dict(levels=((4, 5), (3, 2)), heads=2, channels=4, queries=3, points=2)
KINDS = pytest.mark.parametrize("boxes", [False, True], ids=["points", "boxes"])


NAMES = ("output", "value", "reference_points", "sampling_offsets", "attention_logits")


def gradients(function: Callable, args: Sequence[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    """Output, and the gradients of all that has one: NAMES."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in args]
    output = function(*leaves)
    wanted = [t for t in leaves if t.requires_grad]
    return output.detach(), *torch.autograd.grad(output, wanted, grad_output.to(output.dtype))


def assert_matches_reference(
    args: Sequence[Tensor], reference: Callable = ms_deform_attn_fused_reference
) -> tuple[Tensor, ...]:
    """Holds output and gradients against the reference in float64, and returns them."""
    value, offsets = args[0], args[4]
    shape = (value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(value.dtype)
    got = gradients(ms_deform_attn_fused, args, grad_output)
    exact = [t.double() if t.is_floating_point() else t for t in args]
    expected = gradients(reference, exact, grad_output.double())
    for name, a, b, like in zip(NAMES, got, expected, (value, value, *args[3:]), strict=True):
        assert a.dtype == like.dtype, f"{name} is {a.dtype}, expected {like.dtype}"
        assert_close(name, a, b, TOLERANCES["ms_deform_attn_fused", a.dtype])
    return got


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


# Few queries use value where it lies, or in 16 bits copies of the rows that are looked at; many queries copy
# each head's rows first: all ways are here.
CASES = {
    "odd": dict(heads=3, channels=5, queries=7, points=3),
    "many_queries": dict(queries=150, channels=16),
    "encoder": dict(encoder=True, channels=8, heads=4, batch=1),
    "one_level": dict(batch=1, heads=3, channels=37, queries=61, points=5, levels=((3, 5),)),
    "many_points": dict(points=27, queries=11, channels=16, heads=2),
    "large_picture": dict(levels=((40, 31), (20, 15)), queries=5, heads=3, channels=20),
    "one_row": dict(batch=1, heads=1, channels=32, queries=1, points=1, levels=((7, 9),)),
    "no_queries": dict(queries=0),
    "no_batch": dict(batch=0),
    "no_points": dict(points=0),
    "no_channels": dict(channels=0),
}


@KINDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case: str, dtype: torch.dtype, boxes: bool, isa: str) -> None:
    assert_matches_reference(sample_inputs(dtype=dtype, boxes=boxes, **CASES[case]).args())


def test_float32_logits_with_bfloat16_values(isa: str) -> None:
    """What autocast hands over where the logits' projection stays in float32."""
    inputs = sample_inputs(dtype=torch.bfloat16, queries=40)
    assert_matches_reference((*inputs.args()[:5], inputs.attention_logits.float()))


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

    assert_compiles(step, sample_inputs(requires_grad=True, **SMALL).args())


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


def test_same_bits_on_any_number_of_threads(threads: Callable[[int], None]) -> None:
    inputs = sample_inputs(queries=300, boxes=True)
    grad_output = torch.randn(2, 300, 256, generator=torch.Generator().manual_seed(2))
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(gradients(ms_deform_attn_fused, inputs.args(), grad_output))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert torch.equal(a, b), "another number of threads gives other bits"


@KINDS
@pytest.mark.parametrize("queries", [4, 200])
def test_strange_offsets_contribute_nothing(queries: int, boxes: bool, isa: str) -> None:
    """Not finite or far outside: no output, no gradient, but a share in the softmax."""
    inputs = sample_inputs(queries=queries, heads=2, channels=16, boxes=boxes)
    random = torch.Generator().manual_seed(3)
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
    strange = torch.rand(inputs.sampling_offsets.shape[:-1], generator=random) < 0.3
    choice = torch.randint(0, len(values), inputs.sampling_offsets.shape, generator=random)
    offsets = torch.where(strange[..., None], values[choice], inputs.sampling_offsets)
    args = (*inputs.args()[:4], offsets, inputs.attention_logits)
    # In float64 the operator is the reference, with gradients that select instead of multiplying NaN by 0.
    results = assert_matches_reference(args, ms_deform_attn_fused)
    for name, tensor in zip(NAMES, results, strict=True):
        assert tensor.isfinite().all(), f"{name} is not finite"
    assert (results[NAMES.index("sampling_offsets")][strange] == 0).all()
    assert (results[NAMES.index("attention_logits")][strange] != 0).any()


def test_large_logits_do_not_overflow(isa: str) -> None:
    inputs = sample_inputs(**SMALL)
    for shift in (-1e4, 1e4):
        logits = inputs.attention_logits + shift
        assert_matches_reference((*inputs.args()[:5], logits))


@KINDS
def test_non_contiguous_inputs(boxes: bool, isa: str) -> None:
    inputs = sample_inputs(queries=30, boxes=boxes)
    value, shapes, starts, reference, offsets, logits = inputs.args()
    wide = torch.stack([reference, reference], 2)[:, :, 1]  # a stride of its own
    odd = reference.transpose(2, 3).contiguous().transpose(2, 3)  # its last dimension is not contiguous
    assert not wide.is_contiguous() and odd.stride(-1) != 1
    expected = gradients(ms_deform_attn_fused, inputs.args(), torch.ones(2, 30, 256))
    by_head = value.transpose(1, 2).contiguous().transpose(1, 2)
    swapped = offsets.transpose(0, 1).contiguous().transpose(0, 1)
    flipped = logits.flip(-1).contiguous().flip(-1)
    for variant in (wide, odd):
        args = (by_head, shapes, starts, variant, swapped, flipped)
        grad_output = torch.ones(1, 1, 1).expand(2, 30, 256)
        for a, b in zip(gradients(ms_deform_attn_fused, args, grad_output), expected, strict=True):
            assert torch.equal(a, b)


def test_one_reference_for_all_levels_and_pictures(isa: str) -> None:
    """Stride 0, as the encoder and the decoder have it."""
    inputs = sample_inputs(queries=20, boxes=True)
    reference = inputs.reference_points[:1, :, :1].expand(2, -1, 4, -1)
    args = (*inputs.args()[:3], reference, *inputs.args()[4:])
    same = (*inputs.args()[:3], reference.contiguous(), *inputs.args()[4:])
    grad_output = torch.randn(2, 20, 256, generator=torch.Generator().manual_seed(4))
    for a, b in zip(
        gradients(ms_deform_attn_fused, args, grad_output),
        gradients(ms_deform_attn_fused, same, grad_output),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_second_derivative_is_refused() -> None:
    inputs = sample_inputs(requires_grad=True, **SMALL)
    output = ms_deform_attn_fused(*inputs.args()).square().sum()
    grad = torch.autograd.grad(output, inputs.value, create_graph=True)[0]
    with pytest.raises((NotImplementedError, RuntimeError), match="ms_deform_attn_fused_backward"):
        grad.sum().backward()
