"""The CUDA kernels of fusion_attention against the float64 reference: emulated, and on a GPU if any."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from emulation import Emulation, emulated
from fusion_attention_cases import CASES as COMMON_CASES
from fusion_attention_cases import (
    DTYPES,
    GRADIENTS,
    assert_gradients_match,
    assert_output_matches,
    gradient_of_output,
)

from visionllm.ops import fusion_attention_reference
from visionllm.ops.fusion_attention import SampleInputs, sample_inputs
from visionllm.ops.fusion_attention_reference import fusion_attention_backward_reference

kernels = sys.modules[SampleInputs.__module__]  # visionllm.ops.fusion_attention names the function
# A tile has 64 rows of 16-bit elements, 32 of float32; 64, 32 or 16 tokens are in shared memory at a time, of
# 2 or 4 heads; slices of the sums over rows are multiples of 64 rows.
CASES = COMMON_CASES | {
    "paper": dict(batch=1, positions=33, channels=256, heads=8, tokens=17),
    "head_of_8": dict(batch=1, positions=40, channels=48, heads=6, tokens=21),
    "head_of_40": dict(batch=1, positions=20, channels=80, heads=2, tokens=34),
    "head_of_64": dict(batch=1, positions=129, channels=64, heads=1, tokens=50),
    "three_heads": dict(batch=3, positions=5, channels=96, heads=3, tokens=6, texts=(6, 1, 3)),
    "two_squares": dict(batch=1, positions=3, channels=144, heads=9, tokens=3),
    "no_text_in_one": dict(batch=3, positions=18, channels=32, heads=2, tokens=5, texts=(5, 0, 2)),
}


@pytest.fixture(params=["emulated", "device"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the kernels run; tensors are made there."""
    if request.param == "emulated":
        with emulated():
            yield "cpu"
    elif not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    else:
        yield "cuda"


def assert_matches_reference(inputs: SampleInputs, backward: bool = True) -> None:
    assert_output_matches(kernels._forward_cuda(*inputs.args()), inputs)
    if backward:
        gradients = kernels._backward_cuda(gradient_of_output(inputs), *inputs.args())
        assert_gradients_match(gradients, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case: str, dtype: torch.dtype, device: str) -> None:
    assert_matches_reference(sample_inputs(device, dtype, **CASES[case]))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_512_tokens(dtype: torch.dtype, device: str) -> None:
    """As many as there may be; the last chunks have no text."""
    sizes = dict(batch=1, positions=4, channels=16, heads=2, tokens=512, texts=(500,))
    assert_matches_reference(sample_inputs(device, dtype, **sizes))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_one_token(dtype: torch.dtype, device: str) -> None:
    """Its weight is 1 whatever its score, whose gradient is what rounding leaves of 0."""
    inputs = sample_inputs(device, dtype, batch=1, positions=3, channels=16, heads=1, tokens=1, texts=(1,))
    assert_matches_reference(inputs, backward=False)
    grad_output = gradient_of_output(inputs)
    got = kernels._backward_cuda(grad_output, *inputs.args())
    expected = fusion_attention_backward_reference(grad_output.double(), *inputs.double().args())
    absolute = {torch.float32: 1e-5, torch.bfloat16: 0.2}[dtype]
    for name, a, b in zip(GRADIENTS, got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=absolute, msg=name)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_large_scores_do_not_overflow(dtype: torch.dtype, device: str) -> None:
    """Scores of some hundreds, whose exponentials are no float, and a maximum that grows with the chunks."""
    inputs = sample_inputs(device, dtype, batch=1, positions=8, channels=16, heads=1, tokens=80, texts=(80,))
    growing = torch.linspace(0, 60, 80, device=device, dtype=dtype)[None, :, None, None]
    inputs = SampleInputs(*inputs.args()[:5], inputs.key * growing, *inputs.args()[6:])
    output = kernels._forward_cuda(*inputs.args())
    assert output.isfinite().all()
    if dtype == torch.float32:  # in 16 bits the rounding of the query decides which token wins
        expected = fusion_attention_reference(*inputs.double().args())
        torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=1e-3)


def test_mask_may_have_holes_and_bytes_other_than_1(device: str) -> None:
    inputs = sample_inputs(device, batch=2, positions=6, channels=32, heads=2, tokens=40, texts=(40, 40))
    mask = (torch.rand(2, 40, generator=torch.Generator().manual_seed(4)) < 0.4).to(device)
    mask[0, :33] = False  # a first chunk without text
    holes = SampleInputs(*inputs.args()[:7], mask.to(torch.uint8) * 7, *inputs.args()[8:])
    assert_matches_reference(holes)


def test_layouts_that_the_kernels_do_not_take_are_copied(device: str) -> None:
    sizes = dict(batch=2, positions=5, channels=32, heads=2, tokens=4)
    inputs = sample_inputs(device, torch.bfloat16, **sizes)
    x, key = inputs.x, inputs.key
    wide = torch.zeros(2, 5, 33, device=device, dtype=x.dtype)
    wide[..., 1:] = x
    strided = torch.zeros(2, 4, 2, 19, device=device, dtype=x.dtype)
    strided[..., 2:18] = key
    others = SampleInputs(wide[..., 1:], *inputs.args()[1:5], strided[..., 2:18], *inputs.args()[6:])
    assert torch.equal(kernels._forward_cuda(*others.args()), kernels._forward_cuda(*inputs.args()))
    grad_output = gradient_of_output(inputs)
    transposed = grad_output.transpose(0, 1).contiguous().transpose(0, 1)
    for a, b in zip(
        kernels._backward_cuda(transposed, *others.args()),
        kernels._backward_cuda(grad_output, *inputs.args()),
        strict=True,
    ):
        assert torch.equal(a, b) and a.is_contiguous()


def test_one_launch_forward() -> None:
    inputs = sample_inputs(**CASES["three_heads"])
    with emulated() as device:
        kernels._forward_cuda(*inputs.args())
        assert [launch.name for launch in device.launches] == ["fusion_attention_kernel"]
        assert device.launches[0].grid == (3, 1, 1)  # a tile for each batch entry


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_paper_size_fits_any_gpu(dtype: torch.dtype) -> None:
    """The launches of the largest sizes stay within 99 KiB of shared memory, which the emulator enforces."""
    inputs = sample_inputs(dtype=dtype, batch=1, positions=1, channels=256, heads=4, tokens=512, texts=(3,))
    with emulated() as device:
        kernels._forward_cuda(*inputs.args())
        kernels._backward_cuda(inputs.x, *inputs.args())
    assert len(device.launches) == 4


def run_both(inputs: SampleInputs) -> list[torch.Tensor]:
    output = kernels._forward_cuda(*inputs.args())
    return [output, *kernels._backward_cuda(gradient_of_output(inputs), *inputs.args())]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_order_of_blocks_and_threads_changes_nothing(dtype: torch.dtype) -> None:
    inputs = sample_inputs(dtype=dtype, batch=2, positions=70, channels=32, heads=2, tokens=20, texts=(20, 7))
    results = []
    for block_order, thread_order, seed in (
        ("forward", "forward", 0),
        ("reversed", "reversed", 0),
        ("seeded", "seeded", 1),
        ("seeded", "seeded", 2),
    ):
        with emulated(block_order=block_order, thread_order=thread_order, seed=seed):
            results.append(run_both(inputs))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_are_equal_on_a_gpu(dtype: torch.dtype) -> None:
    inputs = sample_inputs("cuda", dtype, batch=2, positions=1000, channels=256, heads=8, tokens=40)
    first = run_both(inputs)
    for _ in range(5):
        for a, b in zip(first, run_both(inputs), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["head_of_24", "no_text_in_one", "one_row", "no_tokens", "no_rows"])
def test_sanitized(case: str, dtype: torch.dtype) -> None:
    with emulated(sanitize=True):
        assert_matches_reference(sample_inputs(dtype=dtype, **CASES[case]))


@pytest.fixture
def emulation() -> Iterator[Emulation]:
    with emulated() as device:
        yield device


# Sizes that the kernels do not take, and the message without the operator's name.
LIMITS = {
    "channels": (dict(channels=272, heads=17), "C up to 256 that is a multiple of 16, got 272"),
    "tail": (dict(channels=40, heads=5), "C up to 256 that is a multiple of 16, got 40"),
    "wide_head": (dict(channels=144, heads=2), "D up to 64 that is a multiple of 8, got 72"),
    "odd_head": (dict(channels=64, heads=16), "D up to 64 that is a multiple of 8, got 4"),
    "tokens": (dict(channels=16, heads=2, tokens=513), "T up to 512, got 513"),
}


@pytest.mark.parametrize("case", LIMITS)
def test_what_the_kernels_do_not_take_is_said(case: str, emulation: Emulation) -> None:
    sizes, message = LIMITS[case]
    inputs = sample_inputs(batch=1, positions=2, **sizes)
    backward: Callable = lambda *args: kernels._backward_cuda(inputs.x, *args)  # noqa: E731
    for operator, call in (
        ("fusion_attention", kernels._forward_cuda),
        ("fusion_attention_backward", backward),
    ):
        with pytest.raises(RuntimeError) as caught:
            call(*inputs.args())
        assert str(caught.value) == f"{operator}: the CUDA kernels take {message}"


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "argument, change, message",
    [
        (0, lambda t: t[0], "x must have shape [B, N, C], got [3, 16]"),
        (1, lambda t: t[:8], "norm_weight must have shape [C] = [16], got [8]"),
        (2, lambda t: t.half(), "norm_bias must be float32, got float16"),
        (3, lambda t: t[:8], "query_weight must have shape [C, C] = [16, 16], got [8, 16]"),
        (5, lambda t: t[:, :, :1], "key must have H * D = C = 16 channels, got 1 heads of 8"),
        (6, lambda t: t[:1], "value must have shape [B, T, H, D] = [2, 4, 2, 8], got [1, 4, 2, 8]"),
        (7, lambda t: t[:, :3], "mask must have shape [B, T] = [2, 4], got [2, 3]"),
        (7, lambda t: t.long(), "mask must be uint8 or boolean, got int64"),
        (10, lambda t: t[None], "gate must have shape [C] = [16], got [1, 16]"),
    ],
)
def test_bad_argument_is_named(
    argument: int, change: Callable, message: str, backward: bool, emulation: Emulation
) -> None:
    args = list(sample_inputs(batch=2, positions=3, channels=16, heads=2, tokens=4).args())
    grad_output = args[0]
    args[argument] = change(args[argument])
    with pytest.raises(ValueError) as caught:
        if backward:
            kernels._backward_cuda(grad_output, *args)
        else:
            kernels._forward_cuda(*args)
    operator = "fusion_attention_backward" if backward else "fusion_attention"
    assert str(caught.value) == f"{operator}: {message}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_in_a_cuda_graph(dtype: torch.dtype) -> None:
    inputs = sample_inputs("cuda", dtype, batch=1, positions=200, channels=64, heads=2, tokens=20)
    expected = torch.ops.visionllm.fusion_attention(*inputs.args())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = torch.ops.visionllm.fusion_attention(*inputs.args())
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected)
