"""ms_deform_attn on CUDA, plain and fused, against the float64 reference.

Without a GPU the kernels run under emulation (docs/emulation.md); with one, on it too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from comparison import TOLERANCES, assert_close
from emulation import Emulation, emulated
from ms_deform_attn_cases import with_strange_locations
from torch import Tensor

from visionllm.ops import ms_deform_attn_fused_reference, ms_deform_attn_reference, native
from visionllm.ops.ms_deform_attn import SampleInputs, backward_workspace, sample_inputs
from visionllm.ops.ms_deform_attn_fused import FusedInputs
from visionllm.ops.ms_deform_attn_fused import sample_inputs as fused_sample_inputs

plain = sys.modules["visionllm.ops.ms_deform_attn"]  # the package's attributes of these names are functions
fused = sys.modules["visionllm.ops.ms_deform_attn_fused"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WAYS = ["emulated", "device"] if torch.cuda.is_available() else ["emulated"]
Inputs = SampleInputs | FusedInputs

# Heads of 8, 16, 32 ... channels have groups of 1, 2, 4 ... lanes; sizes that are no multiple of 16 bytes go
# channel by channel.
CASES = {
    "two_heads_a_line": dict(queries=5, heads=3, batch=1),
    "batch": dict(batch=3, queries=4, heads=2, channels=16),
    "encoder": dict(encoder=True, levels=((6, 9), (3, 5)), heads=3, batch=1),
    "encoder_batch": dict(encoder=True, levels=((5, 3), (2, 2), (1, 1)), heads=2, batch=2, channels=8),
    "odd": dict(batch=3, heads=3, channels=5, queries=7, points=3, levels=((3, 5), (2, 1))),
    "lanes_idle": dict(batch=1, heads=2, channels=40, queries=3, levels=((5, 4),)),
    "narrow": dict(batch=1, heads=5, channels=8, queries=9, levels=((4, 4), (3, 2))),
    "wide": dict(batch=1, heads=2, channels=128, queries=3, levels=((4, 4), (3, 2))),
    "rounds": dict(batch=1, heads=1, channels=77, queries=3, levels=((4, 4),)),
    "too_wide_for_one_group": dict(batch=1, heads=1, channels=264, queries=2, levels=((3, 3),), points=2),
    "many_points": dict(batch=1, heads=1, channels=8, queries=3, levels=((3, 3),) * 8, points=16),
    "one_channel": dict(batch=1, heads=5, channels=1, queries=9, points=1),
    "one_pixel_levels": dict(levels=((1, 1), (1, 1), (1, 1)), queries=5, heads=2),
    "line_levels": dict(levels=((1, 40), (40, 1)), queries=5, heads=2, channels=24, batch=1),
    "no_queries": dict(queries=0, heads=2),
    "no_batch": dict(batch=0, heads=2),
    "no_points": dict(points=0, heads=2, queries=3),
    "no_channels": dict(channels=0, heads=2, queries=3),
}
FUSED = (
    "two_heads_a_line", "encoder_batch", "odd", "wide", "too_wide_for_one_group", "many_points", "no_queries",
    "no_points", "no_channels",
)  # fmt: skip
SANITIZED = ("two_heads_a_line", "encoder_batch", "odd", "many_points", "no_channels")


@contextmanager
def kernels(way: str, levels: str = "host", **options: object) -> Iterator[Emulation | None]:
    """Where the kernels run; ``levels``: whether their sizes are in "host" or "device" memory."""
    if way == "device":
        yield None
        return
    with emulated(**options) as emulation:
        if levels == "host":
            call = native.call
            native.call = lambda name, *arguments: call(name + "_host_levels", *arguments)
        yield emulation


def placed(inputs: Inputs, way: str, levels: str) -> list[Tensor]:
    """The arguments where the kernels want them."""
    if way == "emulated":
        return list(inputs.args())
    return [t.cpu() if i in (1, 2) and levels == "host" else t.cuda() for i, t in enumerate(inputs.args())]


def gradient_like(inputs: Inputs) -> Tensor:
    value, points = inputs.args()[0], inputs.args()[-1]
    shape = (value.shape[0], points.shape[1], value.shape[2] * value.shape[3])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(value.dtype)


def forward(inputs: Inputs, way: str, levels: str = "host", **options: object) -> Tensor:
    with kernels(way, levels, **options):
        run = fused._forward_kernel if isinstance(inputs, FusedInputs) else plain._forward_cuda
        return run(*placed(inputs, way, levels)).cpu()


def backward(
    inputs: Inputs,
    grad_output: Tensor,
    way: str,
    levels: str = "host",
    *,
    deterministic: bool = False,
    reference_gradient: bool = True,
    **options: object,
) -> list[Tensor]:
    """Gradients of all inputs but the levels; with repeats, deterministic ones must agree in every bit."""
    extra = [reference_gradient] if isinstance(inputs, FusedInputs) else []
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        with kernels(way, levels, deterministic=deterministic, **options):
            grad_output = grad_output if way == "emulated" else grad_output.cuda()
            run = fused._backward_kernel if isinstance(inputs, FusedInputs) else plain._backward_cuda
            grads = run(grad_output, *placed(inputs, way, levels), *extra)
    finally:
        torch.use_deterministic_algorithms(before)
    return [grad.cpu() for grad in grads]


def exact(inputs: Inputs) -> Inputs:
    return type(inputs)(*(t.double() if t.is_floating_point() else t for t in inputs.args()))


def expected_results(inputs: Inputs, grad_output: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of all inputs but the levels, in float64."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in exact(inputs).args()]
    reference: Callable[..., Tensor] = (
        ms_deform_attn_fused_reference if isinstance(inputs, FusedInputs) else ms_deform_attn_reference
    )
    output = reference(*leaves)
    grads = torch.autograd.grad(output, [t for t in leaves if t.requires_grad], grad_output.double())
    return output.detach(), list(grads)


def tolerance(inputs: Inputs, dtype: torch.dtype):
    return TOLERANCES["ms_deform_attn_fused" if isinstance(inputs, FusedInputs) else "ms_deform_attn", dtype]


def assert_grads_close(inputs: Inputs, got: list[Tensor], expected: list[Tensor]) -> None:
    names = (
        ("value", "reference_points", "sampling_offsets", "attention_logits")
        if isinstance(inputs, FusedInputs)
        else ("value", "sampling_locations", "attention_weights")
    )
    for name, a, b in zip(names, got, expected, strict=True):
        assert a.dtype == getattr(inputs, name).dtype, f"grad_{name} is {a.dtype}"
        assert_close("grad_" + name, a, b, tolerance(inputs, a.dtype))


def assert_matches_reference(inputs: Inputs, way: str, levels: str = "host", **options: object) -> None:
    """Forward, and backward by atomics and in fixed order."""
    grad_output = gradient_like(inputs)
    expected, expected_grads = expected_results(inputs, grad_output)
    output = forward(inputs, way, levels, **options)
    assert output.dtype == inputs.value.dtype
    assert_close("output", output, expected, tolerance(inputs, output.dtype))
    for deterministic in (False, True):
        grads = backward(inputs, grad_output, way, levels, deterministic=deterministic, **options)
        assert_grads_close(inputs, grads, expected_grads)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case: str, dtype: torch.dtype, way: str) -> None:
    assert_matches_reference(sample_inputs(dtype=dtype, **CASES[case]), way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("boxes", [False, True], ids=["points", "boxes"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FUSED)
def test_fused_matches_reference(case: str, dtype: torch.dtype, boxes: bool, way: str) -> None:
    assert_matches_reference(fused_sample_inputs(dtype=dtype, boxes=boxes, **CASES[case]), way)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SANITIZED)
def test_sanitized(case: str, dtype: torch.dtype) -> None:
    assert_matches_reference(sample_inputs(dtype=dtype, **CASES[case]), "emulated", sanitize=True)
    inputs = fused_sample_inputs(dtype=dtype, boxes=dtype == torch.float32, **CASES[case])
    assert_matches_reference(inputs, "emulated", sanitize=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ["encoder", "odd", "two_heads_a_line"])
def test_levels_in_device_memory(case: str, way: str) -> None:
    """The same points in blocks of other queries: the same bits."""
    for inputs in (sample_inputs(**CASES[case]), fused_sample_inputs(**CASES[case])):
        grad_output = gradient_like(inputs)
        assert torch.equal(forward(inputs, way, "device"), forward(inputs, way, "host"))
        for a, b in zip(
            backward(inputs, grad_output, way, "device", deterministic=True),
            backward(inputs, grad_output, way, "host", deterministic=True),
            strict=True,
        ):
            assert torch.equal(a, b)
    assert_matches_reference(sample_inputs(**CASES[case]), way, "device")


BAD_LEVELS = {
    "too large": ((8, 9), 0),
    "no rows": ((0, 9), 0),
    "negative": ((-3, -9), 0),
    "starts before": ((6, 9), -1),
    "starts late": ((6, 9), 16),
    "overflows": ((2**32, 2**32), 0),
    "wide": ((1, 2**31 + 9), 0),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", BAD_LEVELS)
def test_bad_levels_in_device_memory_contribute_nothing(bad: str, way: str) -> None:
    good = sample_inputs(levels=((6, 9), (3, 5)), queries=4, heads=2, batch=1)
    (height, width), start = BAD_LEVELS[bad]
    shapes, starts = good.spatial_shapes.clone(), good.level_start_index.clone()
    shapes[0], starts[0] = torch.tensor([height, width]), start
    inputs = SampleInputs(good.value, shapes, starts, *good.args()[3:])
    nowhere = good.sampling_locations.clone()
    nowhere[:, :, :, 0] = float("nan")
    same = SampleInputs(*good.args()[:3], nowhere, good.attention_weights)
    grad_output = gradient_like(good)
    expected, expected_grads = expected_results(same, grad_output)
    assert_close("output", forward(inputs, way, "device"), expected, tolerance(inputs, torch.float32))
    for deterministic in (False, True):
        grads = backward(inputs, grad_output, way, "device", deterministic=deterministic)
        assert_grads_close(inputs, grads, expected_grads)
    with pytest.raises(ValueError, match="ms_deform_attn: level 0 must be at least 1 x 1 and lie within"):
        forward(inputs, way, "host")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_in_any_order(dtype: torch.dtype, way: str) -> None:
    """Many points on few pixels, in several orders of blocks and threads: the same bits."""
    options = dict(levels=((9, 7), (2, 3)), queries=40, heads=2, batch=1, channels=8)
    for inputs in (sample_inputs(dtype=dtype, **options), fused_sample_inputs(dtype=dtype, **options)):
        grad_output = gradient_like(inputs)
        results = []
        for order in ("seeded", "forward", "reversed"):
            repeats = {} if way == "device" else dict(repeats=2, block_order=order, thread_order=order)
            output = forward(inputs, way, deterministic=True, **repeats)
            results.append([output, *backward(inputs, grad_output, way, deterministic=True, **repeats)])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("way", WAYS)
def test_levels_that_share_pixels(way: str) -> None:
    """Nothing forbids it; and pixels of no level get a zero gradient."""
    good = sample_inputs(levels=((6, 9), (3, 5)), queries=6, heads=2, batch=1)
    starts = torch.tensor([3, 0])
    assert_matches_reference(SampleInputs(*good.args()[:2], starts, *good.args()[3:]), way)


@pytest.mark.parametrize("way", WAYS)
def test_large_blocks(way: str) -> None:
    """Two blocks for each multiprocessor make blocks large; most of the tests above have 64 threads."""
    inputs = sample_inputs(batch=1, heads=3, channels=128, queries=21, points=3, levels=((3, 5),))
    few = {} if way == "device" else dict(multiprocessors=1)
    assert_matches_reference(inputs, way, **few)
    if way == "emulated":
        with kernels(way, **few) as emulation:
            plain._forward_cuda(*inputs.args())
            assert emulation is not None and emulation.launches[0].block[0] == 512


def test_fused_backward_in_little_shared_memory() -> None:
    """It keeps L P numbers for each item, and a block of narrow heads has many items."""
    inputs = fused_sample_inputs(
        dtype=torch.bfloat16, batch=1, heads=4, channels=8, queries=65, points=16, levels=((2, 3),) * 8
    )
    assert_matches_reference(inputs, "emulated", multiprocessors=1)


@pytest.mark.parametrize("way", WAYS)
def test_float32_attention_with_bfloat16_values(way: str) -> None:
    inputs = sample_inputs(dtype=torch.bfloat16, queries=3, heads=2)
    assert_matches_reference(SampleInputs(*inputs.args()[:4], inputs.attention_weights.float()), way)
    half = fused_sample_inputs(dtype=torch.float16, queries=3, heads=2)
    assert_matches_reference(FusedInputs(*half.args()[:5], half.attention_logits.float()), way)


@pytest.mark.parametrize("way", WAYS)
def test_locations_outside_and_not_finite_contribute_nothing(way: str) -> None:
    plain = sample_inputs(queries=6, heads=2, channels=16)
    inputs, is_strange = with_strange_locations(plain)
    assert_matches_reference(inputs, way)
    for deterministic in (False, True):
        grads = backward(inputs, gradient_like(inputs), way, deterministic=deterministic)
        assert grads[0].isfinite().all(), "grad_value is not finite"
        assert (grads[1][is_strange] == 0).all() and (grads[2][is_strange] == 0).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("boxes", [False, True], ids=["points", "boxes"])
def test_fused_offsets_not_finite(boxes: bool, way: str) -> None:
    """Such a point has its share in the softmax, and no gradient of its own."""
    inputs = fused_sample_inputs(queries=4, heads=2, channels=16, batch=1, boxes=boxes)
    random = torch.Generator().manual_seed(3)
    is_strange = torch.rand(inputs.sampling_offsets.shape, generator=random) < 0.2
    infinite = torch.where(is_strange, float("inf"), inputs.sampling_offsets)
    far = torch.where(is_strange, 1e6, inputs.sampling_offsets)  # the same to the formula
    inputs = FusedInputs(*inputs.args()[:4], infinite, inputs.attention_logits)
    grad_output = gradient_like(inputs)
    same = FusedInputs(*inputs.args()[:4], far, inputs.attention_logits)
    expected, expected_grads = expected_results(same, grad_output)
    assert_close("output", forward(inputs, way), expected, tolerance(inputs, torch.float32))
    assert_grads_close(inputs, backward(inputs, grad_output, way), expected_grads)


@pytest.mark.parametrize("way", WAYS)
def test_fused_extreme_logits(way: str) -> None:
    inputs = fused_sample_inputs(queries=3, heads=2, channels=16, batch=1)
    logits = inputs.attention_logits * 1e3
    logits[0, 0, 0, 1] = -float("inf")
    logits[0, 1, 0, 0, 0] = 1e30
    assert_matches_reference(FusedInputs(*inputs.args()[:5], logits), way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("boxes", [False, True], ids=["points", "boxes"])
def test_fused_without_gradient_of_the_reference(boxes: bool, way: str) -> None:
    inputs = fused_sample_inputs(queries=3, heads=2, batch=1, boxes=boxes)
    grad_output = gradient_like(inputs)
    expected = backward(inputs, grad_output, way, deterministic=True)
    got = backward(inputs, grad_output, way, deterministic=True, reference_gradient=False)
    assert got[1].numel() == 0
    for i in (0, 2, 3):
        torch.testing.assert_close(got[i], expected[i], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("way", WAYS)
def test_strided_inputs(way: str) -> None:
    inputs = sample_inputs(queries=4, heads=2, dtype=torch.bfloat16)
    value = inputs.value
    grad = gradient_like(inputs)
    expected = [forward(inputs, way), *backward(inputs, grad, way, deterministic=True)]
    wide = torch.cat([value, value], -1)[..., :32]  # rows 16-byte aligned, with gaps
    by_head = value.transpose(1, 2).contiguous().transpose(1, 2)  # [B, H, S, D] in memory
    shifted = torch.cat([value.flatten()[:1], value.flatten()])[1:].view(value.shape)  # 2 bytes off
    odd = torch.cat([value, value], -1)[..., 31:63]  # neither: other numbers
    odd.copy_(value)
    locations = inputs.sampling_locations.transpose(0, 1).contiguous().transpose(0, 1)
    for variant in (wide, by_head, shifted, odd):
        strided = SampleInputs(variant, *inputs.args()[1:3], locations, inputs.attention_weights)
        for a, b in zip(
            [forward(strided, way), *backward(strided, grad, way, deterministic=True)], expected, strict=True
        ):
            assert_close("strided", a, b, tolerance(inputs, a.dtype))


@pytest.mark.parametrize("way", WAYS)
def test_expanded_inputs(way: str) -> None:
    """Stride 0: one picture and one reference for all."""
    inputs = sample_inputs(batch=1, queries=3, heads=2)
    expanded = SampleInputs(
        inputs.value.expand(3, -1, -1, -1), *inputs.args()[1:3],
        inputs.sampling_locations.expand(3, -1, -1, -1, -1, -1),
        inputs.attention_weights.expand(3, -1, -1, -1, -1),
    )  # fmt: skip
    assert torch.equal(forward(expanded, way), forward(inputs, way).expand(3, -1, -1))
    boxes = fused_sample_inputs(batch=1, queries=3, heads=2, boxes=True)
    reference = boxes.reference_points[:, :, :1].expand(-1, -1, 4, -1)
    same = FusedInputs(*boxes.args()[:3], reference.contiguous(), *boxes.args()[4:])
    one = FusedInputs(*boxes.args()[:3], reference, *boxes.args()[4:])
    assert torch.equal(forward(one, way), forward(same, way))
    assert_matches_reference(one, way)


def test_offsets_beyond_two_to_the_31() -> None:
    """Only the last picture's last pixel is in memory; the strides before it are 2^33 elements.

    The other points are NaN and must not be read; an offset that lost its upper half would read elsewhere.
    """
    inputs = sample_inputs(batch=2, levels=((1, 1), (1, 1)), queries=3, heads=2, dtype=torch.bfloat16)
    locations = inputs.sampling_locations.clone()
    locations[0] = float("nan")
    locations[:, :, :, 0] = float("nan")
    near = SampleInputs(*inputs.args()[:3], locations, inputs.attention_weights)
    expected = forward(near, "emulated")
    assert (expected[1] != 0).any()
    for stride in (2**33, -(2**33)):
        output = torch.empty_like(expected)
        with emulated() as emulation:
            native.call(
                "ms_deform_attn_far", output, inputs.value[1:, 1:], *near.args()[1:], 2, 2, stride, 3 * stride
            )
        assert emulation.launches and torch.equal(output, expected)


def test_blocks_have_neighbouring_pixels() -> None:
    """64 threads have 8 queries of two heads of 32 bfloat16 channels: 4 x 2 where queries are pixels."""
    inputs = sample_inputs(
        encoder=True, levels=((5, 6), (3, 3)), heads=2, batch=1, points=1, dtype=torch.bfloat16
    )
    for levels, blocks in (("host", 2 * 3 + 1 * 2), ("device", -(-39 // 8))):
        with kernels("emulated", levels, multiprocessors=1000) as emulation:
            plain._forward_cuda(*inputs.args())
        assert emulation is not None
        assert [(n.grid[0], n.block[0]) for n in emulation.launches] == [(blocks, 64)]


def test_refusals() -> None:
    good = sample_inputs(queries=2, heads=1, channels=8, batch=1)
    many_levels = sample_inputs(queries=2, heads=1, channels=8, batch=1, levels=((1, 1),) * 9)
    with pytest.raises(ValueError, match="ms_deform_attn: on CUDA L must be at most 8 .*got L = 9, P = 4"):
        forward(many_levels, "emulated")
    many_points = sample_inputs(queries=1, heads=1, channels=8, batch=1, points=65)
    with pytest.raises(ValueError, match="P at most 64, got L = 4, P = 65"):
        forward(many_points, "emulated")
    fused_points = fused_sample_inputs(queries=1, heads=1, channels=8, batch=1, points=33)
    with pytest.raises(ValueError, match=r"ms_deform_attn_fused: L \* P must be at most 128, got 132"):
        forward(fused_points, "emulated")
    wide = SampleInputs(
        torch.zeros(1, 1, 1, 1).expand(1, 2**27 + 1, 1, 1),
        torch.tensor([[1, 2**27 + 1]]),
        torch.tensor([0]),
        torch.zeros(1, 1, 1, 1, 1, 2),
        torch.zeros(1, 1, 1, 1, 1),
    )
    with pytest.raises(ValueError, match="a level must be at most 134217728 pixels wide"):
        forward(wide, "emulated")
    boxes = fused_sample_inputs(queries=2, heads=1, channels=8, batch=1)
    bad = FusedInputs(*boxes.args()[:3], boxes.reference_points[..., :1], *boxes.args()[4:])
    with pytest.raises(ValueError, match="ms_deform_attn_fused: reference_points must have shape"):
        forward(bad, "emulated")
    size = backward_workspace(good.value.bfloat16(), good.sampling_locations, True)
    assert size is not None
    value = good.value.bfloat16()
    grads = [torch.empty_like(t) for t in (value, good.sampling_locations, good.attention_weights)]
    for workspace, message in (
        (size[1:], f"workspace must have at least {size.numel()} elements"),
        (size.double(), "got torch.float64"),
        (None, "workspace must have shape"),
    ):
        with emulated(), pytest.raises(ValueError, match=message):
            native.call(
                "ms_deform_attn_backward", *grads, workspace, gradient_like(good).bfloat16(), value,
                *good.args()[1:], True,
            )  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_graph_capture() -> None:
    """No launch allocates, copies or waits, so a graph can hold them."""
    inputs = fused_sample_inputs("cuda", torch.bfloat16, queries=50)
    args = [t.cpu() if i in (1, 2) else t for i, t in enumerate(inputs.args())]
    grad_output = gradient_like(inputs).cuda()

    def step() -> tuple[Tensor, ...]:
        output = torch.ops.visionllm.ms_deform_attn_fused(*args)
        return output, *torch.ops.visionllm.ms_deform_attn_fused_backward(grad_output, *args, True)

    expected = [t.clone() for t in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_arrays_on_the_device() -> None:
    from visionllm import arrays

    inputs = sample_inputs("cuda", queries=9, heads=3)
    args = list(inputs.args())
    output = torch.full((2, 9, 96), float("nan"), device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    arrays.ms_deform_attn(*args, output=output, stream=stream)
    assert torch.equal(output, plain._forward_cuda(*args))
