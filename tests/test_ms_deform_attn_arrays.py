"""ms_deform_attn on arrays by DLPack: NumPy, read-only or not, torch, and a library that has nothing else."""

from __future__ import annotations

import mmap
import subprocess
import sys

import numpy as np
import pytest
import torch

from visionllm import _core, arrays
from visionllm.ops import ms_deform_attn
from visionllm.ops.ms_deform_attn import sample_inputs


def numpy_inputs(**options) -> list[np.ndarray]:
    return [t.numpy() for t in sample_inputs(**options).args()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_numpy_gives_what_torch_gives(dtype: torch.dtype) -> None:
    inputs = sample_inputs(dtype=dtype)
    output = arrays.ms_deform_attn(*(t.numpy() for t in inputs.args()))
    assert isinstance(output, np.ndarray)
    assert np.array_equal(output, ms_deform_attn(*inputs.args()).numpy())


def test_writes_the_output_and_nothing_beside_it() -> None:
    inputs = numpy_inputs(batch=1, heads=3, channels=5, queries=7)
    memory = np.full(3 * 7 * 15, np.nan, np.float32)
    output = memory[105:210].reshape(1, 7, 15)
    assert arrays.ms_deform_attn(*inputs, output=output) is output
    assert np.isfinite(output).all()
    assert np.isnan(memory[:105]).all() and np.isnan(memory[210:]).all()


class OnlyDLPack:
    """An array of some library: all that can be done with it is to ask for its DLPack capsule."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (1, 0)) -> None:
        self._array = array
        self._device = device

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device


WAYS = {"numpy": lambda a: a, "dlpack": OnlyDLPack, "torch": torch.from_numpy}


@pytest.mark.parametrize("way", WAYS)
def test_forward_and_backward_of_any_library(way: str) -> None:
    inputs = sample_inputs(queries=9, heads=3, channels=5)
    grad_output = np.random.default_rng(0).standard_normal((2, 9, 15), np.float32)
    output = ms_deform_attn(*inputs.args()).numpy()
    grads = torch.ops.visionllm.ms_deform_attn_backward(torch.from_numpy(grad_output), *inputs.args())

    args = [WAYS[way](t.numpy()) for t in inputs.args()]
    got = arrays.ms_deform_attn(*args)
    assert isinstance(got, np.ndarray) and np.array_equal(got, output)
    for array, expected in zip(
        arrays.ms_deform_attn_backward(WAYS[way](grad_output), *args), grads, strict=True
    ):
        assert isinstance(array, np.ndarray) and np.array_equal(array, expected.numpy())

    memory = np.full(output.shape, np.nan, np.float32)
    outputs = [np.full(grad.shape, np.nan, np.float32) for grad in grads]
    names = ("grad_value", "grad_sampling_locations", "grad_attention_weights")
    given = {name: WAYS[way](array) for name, array in zip(names, outputs, strict=True)}
    arrays.ms_deform_attn(*args, output=WAYS[way](memory))
    returned = arrays.ms_deform_attn_backward(WAYS[way](grad_output), *args, **given)
    assert np.array_equal(memory, output)
    for array, back, name, expected in zip(outputs, returned, names, grads, strict=True):
        assert back is given[name]
        assert np.array_equal(array, expected.numpy()), f"{name} was not written"


def test_backward_in_low_precision_keeps_the_types() -> None:
    inputs = sample_inputs(dtype=torch.float16, queries=9)
    grad_output = np.ones((2, 9, 256), np.float16)
    expected = torch.ops.visionllm.ms_deform_attn_backward(torch.from_numpy(grad_output), *inputs.args())
    got = arrays.ms_deform_attn_backward(grad_output, *(t.numpy() for t in inputs.args()))
    assert [a.dtype.name for a in got] == ["float16", "float32", "float16"]
    for array, tensor in zip(got, expected, strict=True):
        assert np.array_equal(array, tensor.numpy())


def test_workspace_that_cuda_needs() -> None:
    """Sums of 16-bit gradients in float32; and a list of points and bounds where the order is fixed."""
    inputs = sample_inputs(queries=33, heads=3, channels=5)
    value, locations = inputs.value.numpy(), inputs.sampling_locations.numpy()
    assert arrays.ms_deform_attn_backward_workspace(value, locations) == 0
    low = value.astype(np.float16)
    sums = -(-value.size // 4) * 4
    assert arrays.ms_deform_attn_backward_workspace(low, locations) == sums
    fixed = arrays.ms_deform_attn_backward_workspace(low, locations, deterministic=True)
    assert fixed == sums + 3 * (locations.size // 2) + 4 * (2 * 3 * 4 * 2)
    with pytest.raises(ValueError, match="value must be an array that speaks DLPack, got list"):
        arrays.ms_deform_attn_backward_workspace(value.tolist(), locations)


def test_torch_bfloat16_with_an_output() -> None:
    inputs = sample_inputs(dtype=torch.bfloat16)
    output = torch.full((2, 17, 256), float("nan"), dtype=torch.bfloat16)
    assert arrays.ms_deform_attn(*inputs.args(), output=output) is output
    assert torch.equal(output, ms_deform_attn(*inputs.args()))


def test_reached_from_the_package() -> None:
    code = (
        "import sys, visionllm\n"
        "visionllm.arrays.ms_deform_attn, visionllm.arrays.ms_deform_attn_backward\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.tolist(), "value must be an array that speaks DLPack, got list"),
        (lambda a: a[0], r"value must have shape \[B, S, H, D\], got \[165, 8, 32\]"),
        (lambda a: a.astype(np.float64), "value must be float32, bfloat16 or float16, got float64"),
        (lambda a: a.astype(object), "value must be an array of numbers, got object"),
        (
            lambda a: torch.from_numpy(a).bfloat16(),
            "(output|grad_value) must be given where NumPy has no type like value's, got None with torch",
        ),
        (
            lambda a: torch.from_numpy(a).requires_grad_(),
            "value must be an array that DLPack can hand over, got torch.*Tensor: .*grad",
        ),
        (
            lambda a: OnlyDLPack(a, device=(2, 0)),
            r"(output|grad_value) must be given where value is not in CPU memory, .* device \(2, 0\)",
        ),
    ],
    ids=["list", "rank", "float64", "object", "bfloat16", "requires_grad", "cuda"],
)
def test_value_that_has_no_output_is_named(change, message: str) -> None:
    inputs = numpy_inputs()
    inputs[0] = change(inputs[0])
    with pytest.raises(ValueError, match=f"^ms_deform_attn: {message}"):
        arrays.ms_deform_attn(*inputs)
    with pytest.raises(ValueError, match=f"^ms_deform_attn_backward: {message}"):
        arrays.ms_deform_attn_backward(np.zeros((2, 17, 256), np.float32), *inputs)


NAMES = ("value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights")


@pytest.mark.parametrize("argument", range(5), ids=NAMES)
def test_list_is_named(argument: int) -> None:
    inputs = numpy_inputs()
    outputs = {"output": np.zeros((2, 17, 256), np.float32)}
    grads = {"grad_" + NAMES[i]: np.zeros_like(inputs[i]) for i in (0, 3, 4)}
    inputs[argument] = inputs[argument].tolist()
    message = f"{NAMES[argument]} must be an array that speaks DLPack, got list"
    for options in ({}, outputs):
        with pytest.raises(ValueError, match=f"^ms_deform_attn: {message}"):
            arrays.ms_deform_attn(*inputs, **options)
    for options in ({}, grads):
        with pytest.raises(ValueError, match=f"^ms_deform_attn_backward: {message}"):
            arrays.ms_deform_attn_backward(np.zeros((2, 17, 256), np.float32), *inputs, **options)


def test_read_only_arrays() -> None:
    inputs = numpy_inputs()
    for array in inputs:
        array.flags.writeable = False
    output = arrays.ms_deform_attn(*inputs)
    assert np.isfinite(output).all()
    output.flags.writeable = False
    for grad in arrays.ms_deform_attn_backward(output, *inputs):
        assert np.isfinite(grad).all()
    with pytest.raises(ValueError, match="ms_deform_attn: output must be writable, got a read-only array"):
        arrays.ms_deform_attn(*inputs, output=output)
    grad_value = np.zeros_like(inputs[0])
    grad_value.flags.writeable = False
    with pytest.raises(ValueError, match="ms_deform_attn_backward: grad_value must be writable"):
        arrays.ms_deform_attn_backward(output, *inputs, grad_value=grad_value)


def test_jax_arrays() -> None:
    """The same path as ``OnlyDLPack``; JAX is no requirement of the tests."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    inputs = numpy_inputs()
    expected = arrays.ms_deform_attn(*inputs)
    with jax.enable_x64(True):  # the shapes are int64
        converted = [jax.numpy.asarray(a) for a in inputs]
        assert np.array_equal(arrays.ms_deform_attn(*converted), expected)


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        (
            0,
            lambda a: a.astype(np.float64),
            "value must be float32, bfloat16, float16, int64, .* got .* 64 bits",
        ),
        (1, lambda a: a.astype(np.int32), "spatial_shapes must be int64, got int32"),
        (1, lambda a: a.astype(np.float32), "spatial_shapes must be int64, got float32"),
        (3, lambda a: a.astype(np.float16), "sampling_locations must be float32, got float16"),
        (
            4,
            lambda a: a.astype(np.float16),
            "attention_weights must be float32 or of value's type float32, got",
        ),
        (0, lambda a: a[..., ::2], "sampling_locations|value must be contiguous in its last 1 dimension"),
        (3, lambda a: np.flip(a, 4), "sampling_locations must be contiguous in its last 3 dimension"),
        (4, lambda a: np.asfortranarray(a), "attention_weights must be contiguous in its last 2 dimension"),
    ],
)
def test_nothing_is_converted(argument: int, change, message: str) -> None:
    inputs = numpy_inputs()
    output = np.zeros((2, 17, inputs[0].shape[2] * inputs[0].shape[3]), np.float32)
    inputs[argument] = change(inputs[argument])
    if inputs[argument].shape[-1] != numpy_inputs()[argument].shape[-1]:
        output = np.zeros((2, 17, output.shape[2] // 2), np.float32)
    with pytest.raises(ValueError, match=f"ms_deform_attn: ({message})"):
        arrays.ms_deform_attn(*inputs, output=output)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            np.zeros((2, 17, 255), np.float32),
            r"output must have shape .* = \[2, 17, 256\], got \[2, 17, 255\]",
        ),
        (np.zeros((2, 17, 256), np.float16), "output must be float32, got float16"),
        (np.zeros((2, 256, 17), np.float32).transpose(0, 2, 1), "output must be contiguous"),
    ],
)
def test_output_that_does_not_fit(output: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arrays.ms_deform_attn(*numpy_inputs(), output=output)


@pytest.mark.parametrize("suffix", ["", "_raw"])
@pytest.mark.parametrize("operator", ["ms_deform_attn", "ms_deform_attn_backward"])
def test_bindings_show_their_signature(operator: str, suffix: str) -> None:
    shown = getattr(_core, operator + suffix).__doc__.splitlines()[0]
    kind = "tuple[int, int, int, tuple[int, ...], tuple[int, ...]]" if suffix else "object"
    assert shown.startswith(
        f"{operator}{suffix}({'output' if operator == 'ms_deform_attn' else 'grad_value'}: "
    )
    assert f"value: {kind}, spatial_shapes: {kind}, level_start_index: {kind}, " in shown
    assert shown.endswith("*, threads: int = 1, stream: int = 0) -> None")


def test_stream_is_an_argument() -> None:
    inputs = numpy_inputs()
    assert np.array_equal(arrays.ms_deform_attn(*inputs, stream=0), arrays.ms_deform_attn(*inputs))
    with pytest.raises(TypeError):
        arrays.ms_deform_attn(*inputs, stream="default")


@pytest.mark.parametrize("copied", [False, True], ids=["in_place", "copied"])
def test_more_than_2_to_31_elements(isa: str, copied: bool) -> None:
    """Only the last pixel of 2.2e9 value elements is not zero; it takes address space, but no memory."""
    height, width, heads, channels = 1050, 1024, 64, 32
    pixels = height * width  # x 2048 = 2.2e9 elements
    assert pixels * heads * channels > 2**31
    if copied:  # copying a head's rows reads one head of each pixel: few pixels, far apart
        height, width, pixels = 2, 3, 6
    try:
        memory = mmap.mmap(
            -1,
            1050 * 1024 * 2048 * 4,
            mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0),
        )
    except OSError as error:
        pytest.skip(f"no address space of 9 GB: {error}")
    everything = np.frombuffer(memory, np.float32)
    if copied:
        stride = (everything.size - heads * channels) // (pixels - 1)
        value = np.lib.stride_tricks.as_strided(
            everything, (1, pixels, heads, channels), (0, stride * 4, channels * 4, 4)
        )
    else:
        value = everything.reshape(1, pixels, heads, channels)
    value[0, -1] = 7.0
    queries = 50 if copied else 2
    corner = [(width - 0.5) / width, (height - 0.5) / height]
    locations = np.broadcast_to(np.array(corner, np.float32), (1, queries, heads, 1, 2, 2)).copy()
    weights = np.full((1, queries, heads, 1, 2), 0.5, np.float32)
    output = arrays.ms_deform_attn(
        value, np.array([[height, width]]), np.array([0]), locations, weights, threads=1
    )
    # 1050 rows: the last pixel's centre is exact to 1e-4 of a pixel in float32.
    np.testing.assert_allclose(output, 7.0, rtol=2e-3)


def test_works_without_torch() -> None:
    """NumPy is enough, for several threads too: same bits as on one."""
    code = (
        "import sys; import numpy as np; from visionllm import arrays\n"
        "random = np.random.default_rng(0)\n"
        "value = random.standard_normal((2, 12, 4, 16), np.float32)\n"
        "locations = random.random((2, 7000, 4, 1, 4, 2), np.float32)\n"
        "weights = random.random((2, 7000, 4, 1, 4), np.float32)\n"
        "inputs = (value, np.array([[3, 4]]), np.array([0]), locations, weights)\n"
        "results = [arrays.ms_deform_attn(*inputs, threads=n) for n in (1, 2, 3)]\n"
        "assert 'torch' not in sys.modules\n"
        "assert all(np.array_equal(results[0], other) for other in results), 'threads change the result'\n"
        "assert np.isfinite(results[0]).all()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
