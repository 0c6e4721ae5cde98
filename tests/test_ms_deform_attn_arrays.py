"""ms_deform_attn on arrays by DLPack: NumPy, read-only or not, and JAX where it is installed."""

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


def test_backward_writes_every_gradient() -> None:
    inputs = sample_inputs(queries=9, heads=3, channels=5)
    args = [t.numpy() for t in inputs.args()]
    grad_output = np.random.default_rng(0).standard_normal((2, 9, 15), np.float32)
    grads = [np.full_like(args[i], np.nan) for i in (0, 3, 4)]
    _core.ms_deform_attn_backward(*grads, grad_output, *args)
    expected = torch.ops.visionllm.ms_deform_attn_backward(torch.from_numpy(grad_output), *inputs.args())
    for got, tensor in zip(grads, expected, strict=True):
        assert np.array_equal(got, tensor.numpy())


def test_read_only_inputs() -> None:
    inputs = numpy_inputs()
    for array in inputs:
        array.flags.writeable = False
    assert np.isfinite(arrays.ms_deform_attn(*inputs)).all()
    output = arrays.ms_deform_attn(*inputs)
    output.flags.writeable = False
    with pytest.raises(TypeError):
        arrays.ms_deform_attn(*inputs, output=output)


def test_jax_arrays() -> None:
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
            "value must be float32, bfloat16, float16 or int64, got .* 64 bits",
        ),
        (1, lambda a: a.astype(np.int32), "spatial_shapes must be .* got DLPack type code 0 of 32 bits"),
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


def test_stream_is_an_argument() -> None:
    inputs = numpy_inputs()
    assert np.array_equal(arrays.ms_deform_attn(*inputs, stream=0), arrays.ms_deform_attn(*inputs))
    with pytest.raises(TypeError):
        arrays.ms_deform_attn(*inputs, stream="default")


@pytest.mark.parametrize("isa", _core.available_isas())
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
    _core.set_isa(isa)
    try:
        output = arrays.ms_deform_attn(
            value, np.array([[height, width]]), np.array([0]), locations, weights, threads=1
        )
    finally:
        _core.set_isa("")
    # 1050 rows: the last pixel's centre is exact to 1e-4 of a pixel in float32.
    np.testing.assert_allclose(output, 7.0, rtol=2e-3)


def test_works_without_torch() -> None:
    """On threads of our own, where the process has no OpenMP library: same bits as on one thread."""
    code = (
        "import sys; import numpy as np; from visionllm import arrays\n"
        "random = np.random.default_rng(0)\n"
        "value = random.standard_normal((2, 12, 4, 16), np.float32)\n"
        "locations = random.random((2, 700, 4, 1, 4, 2), np.float32)\n"
        "weights = random.random((2, 700, 4, 1, 4), np.float32)\n"
        "inputs = (value, np.array([[3, 4]]), np.array([0]), locations, weights)\n"
        "results = [arrays.ms_deform_attn(*inputs, threads=n) for n in (1, 2, 3)]\n"
        "assert 'torch' not in sys.modules\n"
        "assert all(np.array_equal(results[0], other) for other in results), 'threads change the result'\n"
        "assert np.isfinite(results[0]).all()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
