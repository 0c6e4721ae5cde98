"""ms_deform_attn against its float64 reference: every instruction set, element type and odd shape."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comparison import TOLERANCES, assert_close
from ms_deform_attn_cases import with_strange_locations
from torch import Tensor

from visionllm.ops import ms_deform_attn, ms_deform_attn_reference
from visionllm.ops.ms_deform_attn import SampleInputs, sample_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Few queries use value where it lies, or in 16 bits copies of the rows that are looked at; many queries copy
# each head's rows first: all ways are here.
CASES = {
    "few_queries": dict(queries=5),
    "many_queries": dict(queries=150, channels=16),
    "encoder": dict(encoder=True, channels=8, heads=4, batch=1),
    "odd": dict(batch=3, heads=3, channels=5, queries=7, points=3, levels=((3, 5), (2, 1))),
    "odd_many_queries": dict(batch=1, heads=3, channels=37, queries=61, points=5, levels=((3, 5),)),
    "wide_head": dict(heads=2, channels=200, queries=9),
    "one_channel": dict(heads=5, channels=1, queries=33),
    "one_row": dict(batch=1, heads=1, channels=32, queries=1, points=1, levels=((7, 9),)),
    "one_pixel_levels": dict(levels=((1, 1), (1, 1), (1, 1)), queries=20),
    "line_levels": dict(levels=((1, 40), (40, 1)), queries=30, channels=24),
    "many_points": dict(points=27, queries=11, channels=16),
    "large_picture": dict(levels=((40, 30), (20, 15)), queries=5, heads=3, channels=40),
    "large_picture_odd": dict(levels=((40, 31),), queries=9, points=3, heads=2, channels=5, offset=30.0),
    "large_picture_one_head": dict(levels=((40, 31),), batch=1, queries=20, heads=1, channels=16),
    "no_queries": dict(queries=0),
    "no_batch": dict(batch=0),
    "no_points": dict(points=0),
    "no_channels": dict(channels=0),
}


def gradients(function, inputs: SampleInputs, grad_output: Tensor) -> tuple[Tensor, ...]:
    """Output, and the gradients of value, locations and weights."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs.args()]
    output = function(*leaves)
    grads = torch.autograd.grad(output, [leaves[0], leaves[3], leaves[4]], grad_output.to(output.dtype))
    return output, *grads


def assert_matches_reference(inputs: SampleInputs) -> None:
    value = inputs.value
    shape = (value.shape[0], inputs.sampling_locations.shape[1], value.shape[2] * value.shape[3])
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(value.dtype)
    got = gradients(ms_deform_attn, inputs, grad_output)
    exact = SampleInputs(*(t.double() if t.is_floating_point() else t for t in inputs.args()))
    expected = gradients(ms_deform_attn_reference, exact, grad_output.double())
    names = ("output", "grad_value", "grad_sampling_locations", "grad_attention_weights")
    inputs_and_output = (value, value, inputs.sampling_locations, inputs.attention_weights)
    for name, a, b, like in zip(names, got, expected, inputs_and_output, strict=True):
        assert a.dtype == like.dtype, f"{name} is {a.dtype}, expected {like.dtype}"
        assert_close(name, a, b, TOLERANCES["ms_deform_attn", a.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case: str, dtype: torch.dtype, isa: str) -> None:
    assert_matches_reference(sample_inputs(dtype=dtype, **CASES[case]))


def test_reference_agrees_with_grid_sample() -> None:
    """The reference itself against PyTorch's own bilinear sampling."""
    inputs = sample_inputs(dtype=torch.float64, levels=((6, 9),), heads=2, channels=3)
    output = ms_deform_attn_reference(*inputs.args())
    value, _, _, locations, attention = inputs.args()
    batch, _, heads, channels = value.shape
    image = value.permute(0, 2, 3, 1).reshape(batch * heads, channels, 6, 9)
    grid = 2 * locations[:, :, :, 0].transpose(1, 2).flatten(0, 1) - 1  # [B * H, Q, P, 2]
    sampled = torch.nn.functional.grid_sample(image, grid, align_corners=False)  # [B * H, D, Q, P]
    expected = (sampled * attention[:, :, :, 0].transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
    expected = expected.view(batch, heads, channels, -1).permute(0, 3, 1, 2).flatten(2)
    torch.testing.assert_close(output, expected)


def test_float32_weights_with_bfloat16_values() -> None:
    """What autocast hands over: a projection in bfloat16, a softmax in float32."""
    inputs = sample_inputs(dtype=torch.bfloat16)
    mixed = SampleInputs(*inputs.args()[:4], inputs.attention_weights.float())
    assert_matches_reference(mixed)


@pytest.mark.parametrize("queries", [4, 200])
def test_locations_outside_and_not_finite_contribute_nothing(queries: int, isa: str) -> None:
    plain = sample_inputs(queries=queries, heads=2, channels=16)
    inputs, is_strange = with_strange_locations(plain)
    assert_matches_reference(inputs)
    output, grad_value, grad_locations, grad_attention = gradients(
        ms_deform_attn, inputs, torch.ones(2, queries, 32)
    )
    for name, tensor in (("output", output), ("grad_value", grad_value)):
        assert tensor.isfinite().all(), f"{name} is not finite"
    assert (grad_locations[is_strange] == 0).all()
    assert (grad_attention[is_strange] == 0).all()


# Places in a level of 5 rows and 7 columns, and the pixels (row, column) that the formula names there.
PLACES = {
    "inside": ((2.6, 1.7), [(1, 2), (1, 3), (2, 2), (2, 3)]),
    "left": ((-0.4, 2.3), [(2, 0), (3, 0)]),
    "right": ((6.4, 2.3), [(2, 6), (3, 6)]),
    "top": ((3.2, -0.4), [(0, 3), (0, 4)]),
    "bottom": ((3.2, 4.4), [(4, 3), (4, 4)]),
    "first corner": ((-0.4, -0.3), [(0, 0)]),
    "last corner": ((6.3, 4.2), [(4, 6)]),
}


@pytest.mark.parametrize("queries", [1, 200])
@pytest.mark.parametrize("place", PLACES)
def test_reads_only_the_pixels_that_the_formula_names(place: str, queries: int, isa: str) -> None:
    """All other pixels are NaN, in this level and in the two around it, whose points are NaN as well."""
    (x, y), named = PLACES[place]
    shapes, starts = torch.tensor([[2, 3], [5, 7], [2, 3]]), torch.tensor([0, 6, 41])
    value = torch.full((1, 47, 2, 16), float("nan"))
    for row, column in named:
        value[0, 6 + 7 * row + column] = 1.0
    locations = torch.full((1, queries, 2, 3, 3, 2), float("nan"))
    locations[:, :, :, 1] = torch.tensor([(x + 0.5) / 7, (y + 0.5) / 5])
    weights = torch.full((1, queries, 2, 3, 3), 1 / 3)
    inputs = SampleInputs(value, shapes, starts, locations, weights)
    names = ("output", "grad_value", "grad_sampling_locations", "grad_attention_weights")
    results = gradients(ms_deform_attn, inputs, torch.ones(1, queries, 32))
    for name, tensor in zip(names, results, strict=True):
        assert tensor.isfinite().all(), f"{name} is not finite"
    touched = results[1][0].abs().amax((1, 2)).nonzero().flatten().tolist()
    assert touched == sorted(6 + 7 * row + column for row, column in named)


def test_non_contiguous_inputs() -> None:
    inputs = sample_inputs(queries=30)
    value = inputs.value.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)  # D is the slowest
    by_head = inputs.value.transpose(1, 2).contiguous().transpose(1, 2)  # [B, H, S, D] in memory
    locations = inputs.sampling_locations.transpose(0, 1).contiguous().transpose(0, 1)
    weights = inputs.attention_weights.flip(-1).contiguous().flip(-1)
    wide = torch.stack([weights, weights], -1)[..., 0]  # stride 2 in the last dimension
    grad = torch.randn(30, 2, 256).transpose(0, 1)
    expected = gradients(ms_deform_attn, inputs, grad.contiguous())
    for variant in (value, by_head):
        assert not variant.is_contiguous() and not wide.is_contiguous()
        got = gradients(ms_deform_attn, SampleInputs(variant, *inputs.args()[1:3], locations, wide), grad)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_expanded_inputs_and_gradient() -> None:
    """Stride 0: one picture and one query for all, and the gradient of a sum."""
    inputs = sample_inputs(batch=1, queries=1)
    tensors = [
        inputs.value.expand(3, -1, -1, -1),
        *inputs.args()[1:3],
        inputs.sampling_locations.expand(3, 6, -1, -1, -1, -1),
        inputs.attention_weights.expand(3, 6, -1, -1, -1),
    ]
    leaves = [t.requires_grad_(t.is_floating_point()) for t in tensors]
    output = ms_deform_attn(*leaves)
    one = ms_deform_attn(*inputs.args())
    torch.testing.assert_close(output, one.expand(3, 6, -1), rtol=0, atol=0)
    grad = torch.autograd.grad(output.sum(), leaves[0])[0]
    exact = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors]
    expected = torch.autograd.grad(ms_deform_attn_reference(*exact).sum(), exact[0])[0]
    assert_close("grad_value", grad, expected, TOLERANCES["ms_deform_attn", torch.float32])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "queries, options", [(20, {}), (2000, {}), (150, dict(levels=((100, 90), (50, 45)) * 2))]
)
def test_same_bits_on_any_number_of_threads(
    queries: int, options: dict, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    inputs = sample_inputs(dtype=dtype, queries=queries, **options)
    grad_output = torch.randn(2, queries, 256, generator=torch.Generator().manual_seed(2)).to(dtype)
    threads(1)
    expected = gradients(ms_deform_attn, inputs, grad_output)
    for count in (1, 2, 3, 5):
        threads(count)
        for a, b in zip(gradients(ms_deform_attn, inputs, grad_output), expected, strict=True):
            assert torch.equal(a, b), f"{count} threads give other bits than one"


def replace(inputs: SampleInputs, **changes: Tensor) -> SampleInputs:
    return SampleInputs(**{**inputs.__dict__, **changes})


def bad_inputs() -> dict[str, tuple[SampleInputs, str]]:
    good = sample_inputs(batch=1, heads=2, channels=4, levels=((3, 4), (2, 2)), queries=3)
    return {
        "value rank": (
            replace(good, value=good.value[0]),
            r"value must have shape \[B, S, H, D\], got \[16, 2, 4\]",
        ),
        "locations rank": (
            replace(good, sampling_locations=good.sampling_locations[0]),
            r"sampling_locations must have shape \[B, Q, H, L, P, 2\], got \[3, 2, 2, 4, 2\]",
        ),
        "locations shape": (
            replace(good, sampling_locations=good.sampling_locations[:, :, :1]),
            r"sampling_locations must have shape .* = \[1, 3, 2, 2, 4, 2\], got \[1, 3, 1, 2, 4, 2\]",
        ),
        "weights shape": (
            replace(good, attention_weights=good.attention_weights[..., :3]),
            r"attention_weights must have shape .* = \[1, 3, 2, 2, 4\], got \[1, 3, 2, 2, 3\]",
        ),
        "shapes shape": (
            replace(good, spatial_shapes=good.spatial_shapes[:1]),
            r"spatial_shapes must have shape \[L, 2\] = \[2, 2\], got \[1, 2\]",
        ),
        "starts shape": (
            replace(good, level_start_index=good.level_start_index[:1]),
            r"level_start_index must have shape \[L\] = \[2\], got \[1\]",
        ),
        "level too large": (
            replace(good, spatial_shapes=torch.tensor([[3, 4], [2, 3]])),
            r"level 1 must .* within value's S = 16 pixels, got height 2, width 3, level_start_index 12",
        ),
        "level empty": (
            replace(good, spatial_shapes=torch.tensor([[3, 4], [0, 2]])),
            r"level 1 must be at least 1 x 1 .* got height 0",
        ),
        "level overflows": (
            replace(good, spatial_shapes=torch.tensor([[2**32, 2**32], [2, 2]])),
            r"level 0 must be at least 1 x 1 and lie within",
        ),
        "start negative": (
            replace(good, level_start_index=torch.tensor([0, -1])),
            r"level 1 must .* level_start_index -1",
        ),
        "value type": (
            replace(good, value=good.value.to(torch.int64)),
            r"value must be float32, bfloat16 or float16, got int64",
        ),
        "unknown type": (
            replace(good, value=good.value.to(torch.int32)),
            r"ms_deform_attn: value must be float32, bfloat16 or float16, got int32",
        ),
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_argument_is_named(case: str) -> None:
    inputs, message = bad_inputs()[case]
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(*inputs.args())
