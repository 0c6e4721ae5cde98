"""CUDA kernels of lora_linear against the float64 reference: emulated, and on a GPU if there is one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from comparison import TOLERANCES, assert_close
from emulation import Emulation, emulated
from lora_linear_cases import CASES as COMMON_CASES
from lora_linear_cases import DTYPES, MIXED, NAMES, expected_results, gradient
from lora_linear_cases import check as check_results
from torch import Tensor

from visionllm.ops import native
from visionllm.ops.lora_linear import SampleInputs, sample_inputs

# visionllm.ops.lora_linear names the function.
module = sys.modules[SampleInputs.__module__]

# Few rows: blocks of 16 (up to 8 rows of x) or 32 outputs, steps of 32 terms (int8: 64), of which each of
# eight warps has three or four in flight. More rows: tiles of 64 x 128 or 128 x 128, stages of 32. Under
# emulation four tiles are many, so that larger ones come early.
CASES = COMMON_CASES | {
    "nine_rows": dict(rows=9, inputs=808, outputs=33, rank=9),
    "32_rows": dict(rows=32, inputs=64, outputs=40, rank=3),
    "tile": dict(rows=33, inputs=48, outputs=40, rank=8),
    "tile_plain": dict(rows=40, inputs=40, outputs=24, adapters=0, bias=False),
    "tile_odd": dict(rows=70, inputs=45, outputs=131, rank=17, **MIXED),
    "tile_int8": dict(rows=35, inputs=80, outputs=144, rank=16, int8=True, **MIXED),
    "tile_int8_odd": dict(rows=35, inputs=41, outputs=37, rank=5, int8=True, adapters=0),
    "rank_40": dict(rows=34, inputs=48, outputs=24, rank=40, **MIXED),
    "rank_128": dict(rows=33, inputs=136, outputs=136, rank=128),
    "splits": dict(rows=36, inputs=1060, outputs=24, rank=4),
    "splits_backward": dict(rows=36, inputs=24, outputs=1060, rank=4),
    "splits_int8": dict(rows=36, inputs=1056, outputs=9, rank=4, int8=True),
    "large_tiles": dict(rows=132, inputs=136, outputs=152, rank=8, **MIXED),
    "large_tiles_int8": dict(rows=130, inputs=144, outputs=136, rank=3, int8=True),
    "row_groups": dict(rows=1030, inputs=8, outputs=8, rank=2, bias=False),
}
# bfloat16 meets every case; the others those that bring out what is different for them.
RUNS = [(case, "bfloat16") for case in CASES] + [
    *((case, "float16") for case in ("eight_rows", "few_rows_int8_odd", "tile_odd", "tile_int8")),
    *(
        (case, "float32")
        for case in ("one_row", "few_rows_odd", "tile_odd", "tile_int8", "rank_40", "splits")
    ),
]


def run(
    inputs: SampleInputs, place: str, wanted: tuple[bool, bool, bool] = (True, True, True), **options: object
) -> tuple[dict[str, Tensor], list[str]]:
    """All results by name, on the CPU, and the kernels of forward and backward."""
    device = "cuda" if place == "device" else "cpu"
    x, weight, weight_scale, bias, *adapters, scaling = (
        t.to(device) if isinstance(t, Tensor) else t for t in inputs.operator_args()
    )
    grad = gradient(inputs).to(device)
    kernels: list[str] = []
    with emulated(**options) if place == "emulated" else nullcontext() as emulation:
        output, low_rank = module._forward_cuda(x, weight, weight_scale, bias, *adapters, scaling)
        kernels += [launch.name for launch in emulation.launches] if emulation else []
        grads = module._backward_cuda(grad, x, weight, weight_scale, *adapters, low_rank, scaling, *wanted)
        kernels += [launch.name for launch in emulation.launches] if emulation else []
    return {n: t.cpu() for n, t in zip(NAMES, (output, low_rank, *grads), strict=True)}, kernels


def check(results: dict[str, Tensor], expected: dict[str, Tensor], inputs: SampleInputs) -> None:
    check_results(results, expected, inputs, rounds_int8=True)


@pytest.mark.parametrize("case, dtype", RUNS)
def test_against_float64(case: str, dtype: str, place: str) -> None:
    inputs = sample_inputs(dtype=DTYPES[dtype], **CASES[case])
    results, kernels = run(inputs, place)
    check(results, expected_results(inputs), inputs)
    if place == "device":
        return
    few = inputs.x.shape[0] <= 32 and dtype != "float32"
    assert ("lora_linear stream" in kernels) == few
    assert ("lora_linear add partial" in kernels) == case.startswith("splits")
    assert ("lora_linear low rank" in " ".join(kernels)) == (inputs.lora_a is not None)


SANITIZED = (
    ("eight_rows", "bfloat16"),
    ("few_rows_odd", "float16"),
    ("few_rows_int8_odd", "bfloat16"),
    ("tile_odd", "bfloat16"),
    ("tile_int8", "float16"),
    ("few_rows_odd", "float32"),
)


@pytest.mark.parametrize("case, dtype", SANITIZED)
def test_sanitized(case: str, dtype: str) -> None:
    inputs = sample_inputs(dtype=DTYPES[dtype], **CASES[case])
    results, _ = run(inputs, "emulated", sanitize=True)
    check(results, expected_results(inputs), inputs)


@pytest.mark.parametrize(
    "case, dtype", [("nine_rows", "bfloat16"), ("tile_odd", "float16"), ("tile_odd", "float32")]
)
def test_every_order_of_blocks_and_threads_gives_the_same_bits(case: str, dtype: str) -> None:
    inputs = sample_inputs(dtype=DTYPES[dtype], **CASES[case])
    run(inputs, "emulated", repeats=3, deterministic=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("rows", [6, 40])
def test_rows_at_any_distance_and_address(rows: int, dtype: str, place: str) -> None:
    """Views into larger tensors: aligned to 16 bytes with rows apart, and aligned to nothing."""
    for int8 in (False, True):
        plain = sample_inputs(
            dtype=DTYPES[dtype], rows=rows, inputs=64, outputs=24, rank=8, int8=int8, adapters=2, indexed=True
        )
        expected = expected_results(plain)
        for left, width in ((16, 96), (1, 67)):

            def within(tensor: Tensor, left: int = left, width: int = width) -> Tensor:
                poison = 77 if tensor.dtype == torch.int8 else torch.nan
                whole = torch.full((tensor.shape[0], width), poison, dtype=tensor.dtype)
                return whole.narrow(1, left, tensor.shape[1]).copy_(tensor)

            inputs = replace(plain, x=within(plain.x), weight=within(plain.weight))
            results, _ = run(inputs, place)
            check(results, expected, inputs)


@pytest.mark.parametrize("rows, inputs, outputs", [(0, 9, 7), (3, 0, 7), (40, 0, 7), (3, 9, 0), (40, 9, 0)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_empty(rows: int, inputs: int, outputs: int, dtype: str, place: str) -> None:
    sizes = dict(rows=rows, inputs=inputs, outputs=outputs, rank=4, adapters=2)
    arguments = sample_inputs(dtype=DTYPES[dtype], **sizes, indexed=True)
    results, _ = run(arguments, place)
    check(results, expected_results(arguments), arguments)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("index", [[-1], [2], [-1, 5, -7, 2**40], [0, 1, 2]], ids=str)
def test_any_index_goes(index: list[int], dtype: str, place: str) -> None:
    """Nobody's adapter, everybody's the last, numbers of no adapter, and a change in every row."""
    for rows in (12, 36):
        inputs = sample_inputs(dtype=DTYPES[dtype], rows=rows, inputs=24, outputs=20, rank=4, **MIXED)
        inputs = replace(inputs, adapter_index=torch.tensor(index * rows)[:rows])
        results, _ = run(inputs, place)
        check(results, expected_results(inputs), inputs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_only_what_is_wanted_is_computed(dtype: str, place: str) -> None:
    inputs = sample_inputs(dtype=DTYPES[dtype], rows=5, inputs=24, outputs=20, rank=4)
    expected = expected_results(inputs)
    launched = []
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        results, kernels = run(inputs, place, wanted)
        for name, want in zip(("grad_x", "grad_a", "grad_b"), wanted, strict=True):
            if want:
                assert_close(name, results[name], expected[name], TOLERANCES["lora_linear", DTYPES[dtype]])
            else:
                assert results[name].numel() == 0
        launched.append(" ".join(kernels[2:]))
    if place == "emulated":
        assert "outer" not in launched[0] and "gemm" not in launched[1] and "low rank" not in launched[2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_low_rank_state_is_more_than_16_bits_wide(dtype: str, place: str) -> None:
    """Two ranks that all but cancel: rounded to the type, their difference would be noise."""
    inputs = sample_inputs(dtype=DTYPES[dtype], rows=40, inputs=32, outputs=32, rank=2, bias=False)
    lora_a, lora_b = inputs.lora_a, inputs.lora_b
    assert lora_a is not None and lora_b is not None
    lora_a[:, 1] = lora_a[:, 0]
    lora_a[:, 1, 5] *= 1.0625
    lora_b[:, :, 1] = -lora_b[:, :, 0]
    inputs = replace(inputs, weight=torch.zeros_like(inputs.weight))
    results, _ = run(inputs, place)
    expected = expected_results(inputs)
    for name, size in (("output", expected["low_rank"].abs().max()), ("grad_x", 1.0)):
        error = (results[name].double() - expected[name]).abs()
        # half a unit of the result's last place, and s to 16 bits
        allowed = expected[name].abs() * torch.finfo(DTYPES[dtype]).eps / 2 + 2.0**-15 * size
        assert (error <= allowed).all(), f"{name}: {float((error - allowed).max())} too much"


def core_arguments(**options: object) -> dict[str, Tensor | float | None]:
    """What the core's lora_linear takes, by name."""
    x, weight, weight_scale, bias, lora_a, lora_b, scale, index, scaling = sample_inputs(
        rows=5, inputs=6, outputs=4, rank=3, adapters=2, indexed=True
    ).operator_args()
    assert isinstance(x, Tensor)
    tensors = dict(output=torch.empty(5, 4), low_rank=torch.empty(5, 3), workspace=None, x=x, weight=weight)
    rest = dict(weight_scale=weight_scale, bias=bias, lora_a=lora_a, lora_b=lora_b, scale=scale)
    return {**tensors, **rest, "adapter_index": index, "scaling": scaling}


BAD_ARGUMENTS: dict[str, tuple[str, Callable[[Tensor], Tensor | None], str]] = {
    "x rank": ("x", lambda t: t[0], "x must have shape [T, K], got [6]"),
    "x type": ("x", lambda t: t.long(), "x must be float32, bfloat16 or float16, got int64"),
    "x columns": ("x", lambda t: t.T.contiguous().T, "x must be contiguous in its last 1 dimension(s)"),
    "weight inputs": ("weight", lambda t: t[:, 1:], "weight must have shape [N, K] = [4, 6], got [4, 5]"),
    "weight type": ("weight", lambda t: t.half(), "weight must be float32, got float16"),
    "int8 without scale": (
        "weight",
        lambda t: t.to(torch.int8),
        "weight_scale must be given with an int8 weight",
    ),
    "scale without int8": (
        "weight_scale",
        lambda t: torch.ones(4),
        "weight_scale must be absent unless weight is",
    ),
    "bias": ("bias", lambda t: t[1:], "bias must have shape [N] = [4], got [3]"),
    "A alone": ("lora_b", lambda t: None, "lora_a and lora_b must be given together, got one of them"),
    "A inputs": (
        "lora_a",
        lambda t: t[..., 1:],
        "lora_a must have shape [E, R, K] = [2, 3, 6], got [2, 3, 5]",
    ),
    "A type": ("lora_a", lambda t: t.half(), "lora_a must be float32, got float16"),
    "B shape": ("lora_b", lambda t: t[:1], "lora_b must have shape [E, N, R] = [2, 4, 3], got [1, 4, 3]"),
    "scale type": ("scale", lambda t: t.half(), "scale must be float32, got float16"),
    "index type": ("adapter_index", lambda t: t.int(), "adapter_index must be int64, got int32"),
    "index shape": ("adapter_index", lambda t: t[1:], "adapter_index must have shape [T] = [5], got [4]"),
    "output": ("output", lambda t: t[1:], "output must have shape [T, N] = [5, 4], got [4, 4]"),
    "low rank": ("low_rank", lambda t: None, "low_rank must have shape [T, R] = [5, 3], got none"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_the_core_names_a_bad_argument(case: str) -> None:
    arguments = core_arguments()
    name, change, message = BAD_ARGUMENTS[case]
    arguments[name] = change(arguments[name])  # type: ignore[arg-type]
    with emulated(), pytest.raises(ValueError) as caught:
        native.call("lora_linear", *arguments.values())
    assert str(caught.value).startswith("lora_linear: ") and message in str(caught.value)


def test_the_core_refuses_a_short_workspace() -> None:
    arguments = core_arguments()
    for name in ("output", "x", "weight", "bias", "lora_a", "lora_b"):
        tensor = arguments[name]
        assert isinstance(tensor, Tensor)
        arguments[name] = (
            tensor.bfloat16().repeat_interleave(7, 0) if name in ("output", "x") else tensor.bfloat16()
        )
    arguments |= {"low_rank": torch.empty(35, 3), "adapter_index": torch.zeros(35, dtype=torch.int64)}
    for workspace, message in ((None, "workspace must be uint8, got none"), (63, "at least 2240 bytes")):
        arguments["workspace"] = None if workspace is None else torch.empty(workspace, dtype=torch.uint8)
        with emulated(), pytest.raises(ValueError, match=message):
            native.call("lora_linear", *arguments.values())


def test_emulation_is_not_left_open() -> None:
    with emulated() as emulation:
        assert isinstance(emulation, Emulation)
    assert native.call.__module__ == "visionllm.ops.native"
