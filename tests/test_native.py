"""How torch tensors, absent ones and numbers reach the compiled core."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from visionllm import _core
from visionllm.ops import native
from visionllm.ops.lora_linear import lora_linear_reference, sample_inputs

DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int64: 3,
    torch.int32: 4,
    torch.int8: 5,
    torch.uint8: 6,
    torch.bool: 6,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_raw_tensor(dtype: torch.dtype) -> None:
    tensor = torch.zeros(4, 6, dtype=dtype)[:, ::2]
    assert native.raw(tensor) == (tensor.data_ptr(), DTYPES[dtype], 0, (4, 3), (6, 2))


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.zeros(2, dtype=torch.float64), "got torch.float64 on cpu"),
        (torch.zeros(2, dtype=torch.complex64), "got torch.complex64 on cpu"),
        (torch.zeros(2, device="meta"), "got torch.float32 on meta"),
    ],
    ids=["float64", "complex64", "meta"],
)
def test_unknown_type_or_device_is_named_with_the_operator(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"lora_linear: expected .*{message}"):
        native.call("lora_linear", tensor)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list:
    """What the core's function `operator` is called with."""
    calls: list = []
    core = SimpleNamespace(operator_raw=lambda *values, **options: calls.append((values, options)))
    monkeypatch.setattr(native, "_core", core)
    return calls


def test_absent_tensors_and_numbers_pass_as_they_are(recorded: list) -> None:
    tensor = torch.zeros(3)
    native.call("operator", tensor, None, 5, 0.5, True)
    assert recorded == [
        ((native.raw(tensor), None, 5, 0.5, True), {"threads": torch.get_num_threads()}),
    ]


def on(device: str, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


def test_the_tensors_gpu_is_found() -> None:
    assert native._cuda_device([]) is None
    assert native._cuda_device([on("cpu"), on("cpu")]) is None
    assert native._cuda_device([on("cuda:1"), on("cuda:1")]) == torch.device("cuda:1")
    # A table of sizes may stay where the host reads it.
    assert native._cuda_device([on("cpu", torch.int64), on("cuda:1")]) == torch.device("cuda:1")
    with pytest.raises(ValueError, match="expected tensors on one GPU, got cuda:0, cuda:1"):
        native._cuda_device([on("cuda:1"), on("cuda:0")])
    with pytest.raises(ValueError, match="expected all tensors on one device, got some on cpu"):
        native._cuda_device([on("cpu"), on("cuda:0")])


@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="no CUDA device")
def test_current_stream_is_passed(recorded: list) -> None:
    tensor = torch.zeros(3, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        native.call("operator", tensor)
    (values, options), *_ = recorded
    assert values[0][2] == 1 and options["stream"] == stream.cuda_stream


def operator_arguments(suffix: str) -> list[str]:
    shown = inspect.getdoc(getattr(_core, "lora_linear" + suffix)) or ""
    return shown.splitlines()[0].partition("(")[2].rpartition(", *")[0].split(", ")


@pytest.mark.parametrize("suffix", ["", "_raw"])
def test_signatures_show_what_may_be_absent_and_what_is_a_number(suffix: str) -> None:
    text = ", ".join(operator_arguments(suffix))
    kind = "object" if suffix == "" else "tuple[int, int, int, tuple[int, ...], tuple[int, ...]]"
    assert f"x: {kind}, weight: {kind}, " in text
    assert f"bias: {kind} | None, " in text
    assert text.endswith("scaling: float")


def test_required_tensor_may_not_be_absent() -> None:
    inputs = sample_inputs(rows=3)
    for function, array in (
        (_core.lora_linear, inputs.x.detach()),
        (_core.lora_linear_raw, native.raw(inputs.x)),
    ):
        names = [part.partition(":")[0] for part in operator_arguments("")]
        required = names.index("x")
        arguments = [array if name != "scaling" else 1.0 for name in names]
        arguments[required] = None
        with pytest.raises(TypeError, match="lora_linear: x must be"):
            function(*arguments)


def test_number_of_the_wrong_kind_is_an_error() -> None:
    names = operator_arguments("_raw")
    with pytest.raises(TypeError):
        _core.lora_linear_raw(*[native.raw(torch.zeros(2, 2))] * (len(names) - 1), "1.0")


def test_reference_takes_the_cores_arguments() -> None:
    """What the C++ header lists after the outputs is what the reference is called with."""
    names = [part.partition(":")[0] for part in operator_arguments("")]
    expected = list(inspect.signature(lora_linear_reference).parameters)
    assert [name for name in names if name in expected] == expected
