"""CUDA kernels of query_attention against the float64 reference: emulated, and on a GPU if there is one."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch
from emulation import Emulation, emulated
from query_attention_cases import DTYPES, NAMES, ONE_HEAD, assert_matches, output_gradient
from torch import Tensor

import visionllm._core as _core
from visionllm.ops import native
from visionllm.ops.query_attention import SampleInputs, rope_table, sample_inputs

# visionllm.ops.query_attention names the function.
module = sys.modules[SampleInputs.__module__]

# Blocks have 128 query rows (float32: 64), tiles of 64 keys (32); backward: 64 keys, tiles of 32 rows (16).
CASES = {
    "smallest": dict(groups=1, slots=2, prefix=0, lengths=(0,), channels=8, **ONE_HEAD),
    "one_slot": dict(groups=100, slots=1, prefix=65, lengths=(65,), **ONE_HEAD),
    "boxes": dict(groups=7, slots=5, prefix=300, lengths=(300,), heads=2, kv_heads=1),
    "many_groups": dict(groups=100, slots=5, prefix=1, lengths=(1,), **ONE_HEAD),
    "points": dict(groups=1, slots=49, prefix=1, lengths=(1, 0), **ONE_HEAD),
    "longest_groups": dict(groups=7, slots=64, prefix=0, lengths=(0,), **ONE_HEAD),
    "lengths": dict(
        groups=7, slots=5, prefix=65, lengths=(65, 0, 1, 64, 33), channels=8, heads=2, kv_heads=2
    ),
    "tokens_across_tiles": dict(
        groups=9, slots=5, prefix=20, lengths=(20, 7), heads=3, kv_heads=1, channels=24
    ),
    "wide_head": dict(groups=3, slots=5, prefix=65, lengths=(65,), channels=128, **ONE_HEAD),
    "odd_width": dict(groups=3, slots=5, prefix=17, lengths=(9,), channels=72, heads=2, kv_heads=1),
    "not_rotated": dict(rope=False, channels=8),
    "one_projection": dict(one_projection=True, channels=8),
}
# bfloat16 meets every case; the others those that bring out what is different for them.
RUNS = [(case, "bfloat16") for case in CASES] + [
    (case, dtype)
    for case in ("boxes", "lengths", "tokens_across_tiles", "odd_width", "one_projection")
    for dtype in ("float16", "float32")
    if not (case == "boxes" and dtype == "float16")
]


def forward_and_backward(
    inputs: SampleInputs, place: str, splits: int | None = None, **options: object
) -> tuple[dict[str, Tensor], list[str]]:
    """All results by name, on the CPU, and the kernels of the forward."""
    device = "cuda" if place == "device" else "cpu"
    arguments = [t if t is None else t.to(device) for t in inputs.operator_args()]
    grad = output_gradient(inputs).to(device)
    kernels: list[str] = []
    with emulated(**options) if place == "emulated" else nullcontext() as emulation:
        output, logsumexp = module._forward_kernel(*arguments, splits=splits)
        if isinstance(emulation, Emulation):
            kernels = [launch.name for launch in emulation.launches]
        grads = module._backward_kernel(grad, output, logsumexp, *arguments)
    return {n: t.cpu() for n, t in zip(NAMES, (output, logsumexp, *grads), strict=True)}, kernels


@pytest.mark.parametrize(("case", "dtype"), RUNS)
def test_matches_reference(case: str, dtype: str, place: str) -> None:
    inputs = sample_inputs(dtype=DTYPES[dtype], **CASES[case])
    got, kernels = forward_and_backward(inputs, place)
    assert_matches(got, inputs)
    if place == "emulated":
        assert kernels == ["query_attention_kernel"], "one launch"


@pytest.mark.parametrize(
    ("case", "dtype"),
    [("tokens_across_tiles", "bfloat16"), ("odd_width", "float16"), ("smallest", "float32")],
)
def test_sanitized(case: str, dtype: str) -> None:
    inputs = sample_inputs(dtype=DTYPES[dtype], **CASES[case])
    got, _ = forward_and_backward(inputs, "emulated", sanitize=True)
    assert_matches(got, inputs)


def test_sanitized_splits() -> None:
    inputs = sample_inputs(dtype=torch.bfloat16, groups=2, prefix=70, lengths=(70, 0), channels=8)
    got, _ = forward_and_backward(inputs, "emulated", splits=3, sanitize=True)
    assert_matches(got, inputs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_same_bits_in_any_order(dtype: str) -> None:
    """Seeds permute blocks and threads; forwards and backwards is what schedulers may do."""
    sizes = dict(groups=45, slots=3, channels=8, prefix=70, lengths=(70,), **ONE_HEAD)
    inputs = sample_inputs(dtype=DTYPES[dtype], **sizes)
    expected, _ = forward_and_backward(inputs, "emulated", repeats=2, deterministic=True)
    for order in ("forward", "reversed"):
        got, _ = forward_and_backward(inputs, "emulated", block_order=order, thread_order=order)
        for name in expected:
            assert torch.equal(got[name], expected[name]), f"{name} depends on the order"


@pytest.mark.parametrize(
    ("splits", "dtype"), [(2, "bfloat16"), (5, "float16"), (7, "float32")], ids=["2", "5", "7"]
)
def test_splits(splits: int, dtype: str, place: str) -> None:
    """Some splits have no key at all, some none that a row sees."""
    inputs = sample_inputs(
        dtype=DTYPES[dtype], groups=9, slots=5, channels=24, prefix=140, lengths=(140, 0, 65), **ONE_HEAD
    )
    got, kernels = forward_and_backward(inputs, place, splits=splits)
    assert_matches(got, inputs)
    if place == "emulated":
        assert kernels == ["query_attention_kernel", "query_attention_merge_kernel"]


def test_long_prefix_is_split(place: str) -> None:
    inputs = sample_inputs(
        dtype=torch.bfloat16, groups=1, slots=3, channels=8, prefix=2100, lengths=(2100,), **ONE_HEAD
    )
    assert _core.query_attention_splits(1, 1, 3, 1, 1, 2100) == 3
    got, kernels = forward_and_backward(inputs, place)
    assert_matches(got, inputs)
    if place == "emulated":
        assert kernels == ["query_attention_kernel", "query_attention_merge_kernel"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_groups_do_not_see_each_other(dtype: str, place: str) -> None:
    inputs = sample_inputs(dtype=DTYPES[dtype], groups=9, slots=5, channels=8, **ONE_HEAD)
    before, _ = forward_and_backward(inputs, place)
    k, v = inputs.k.clone(), inputs.v.clone()
    k[:, 4, 2:] += 1
    v[:, 4, 2:] -= 3
    changed = SampleInputs(inputs.q, k, v, *inputs.args()[3:])
    after, _ = forward_and_backward(changed, place)
    differs = (before["output"] != after["output"]).any(-1).any(-1).any(0)  # [M, S]
    assert differs[4, 2:].all() and differs.sum() == 3, "another slot's output has changed"
    differs = (before["grad_q"] != after["grad_q"]).any(-1).any(-1).any(0)
    assert differs[4, 2:].all() and differs.sum() == 3, "another slot's gradient has changed"


def test_without_groups_the_prefix_has_no_gradient(place: str) -> None:
    inputs = sample_inputs(groups=0, dtype=torch.bfloat16)
    got, _ = forward_and_backward(inputs, place)
    assert got["output"].shape == (2, 0, 5, 4, 16)
    assert (got["grad_prefix_k"] == 0).all() and (got["grad_prefix_v"] == 0).all()


@pytest.mark.parametrize("length", [-3, 12])
def test_length_outside_the_prefix_is_clamped(length: int, place: str) -> None:
    inputs = sample_inputs(dtype=torch.float16, groups=2, channels=8, lengths=(11,), **ONE_HEAD)
    inside = SampleInputs(*inputs.args()[:5], torch.tensor([min(max(length, 0), 11)]), inputs.rope)
    outside = SampleInputs(*inputs.args()[:5], torch.tensor([length]), inputs.rope)
    expected, _ = forward_and_backward(inside, place)
    got, _ = forward_and_backward(outside, place)
    for name in expected:
        assert torch.equal(got[name], expected[name])


def test_unaligned_views_are_copied() -> None:
    """Rows of 9 elements, and an address that is no multiple of 16 bytes."""
    inputs = sample_inputs(dtype=torch.bfloat16, groups=2, channels=8)
    wide = torch.nn.functional.pad(inputs.q, (1, 0))[..., 1:]
    prefix_k = torch.nn.functional.pad(inputs.prefix_k, (1, 7))[..., 1:9]
    views = SampleInputs(wide, inputs.k, inputs.v, prefix_k, *inputs.args()[4:])
    expected, _ = forward_and_backward(inputs, "emulated")
    got, _ = forward_and_backward(views, "emulated")
    for name in expected:
        assert torch.equal(got[name], expected[name])


def core_arguments(inputs: SampleInputs) -> dict[str, Tensor | None]:
    """What the C++ function takes, without the preparation of the torch operator."""
    names = ("q", "k", "v", "prefix_k", "prefix_v", "prefix_length", "cosine", "sine")
    output, logsumexp = torch.empty(inputs.q.shape, dtype=inputs.q.dtype), torch.empty(inputs.q.shape[:4])
    arguments = dict(zip(names, inputs.operator_args(), strict=True))
    return {"output": output, "logsumexp": logsumexp, "workspace": None, **arguments}


REFUSED = {
    "channels": (dict(channels=12), {}, "q must have D a multiple of 8 from 8 to 128, got D = 12"),
    "wide": (dict(channels=136), {}, "q must have D a multiple of 8 from 8 to 128, got D = 136"),
    "slots": (dict(slots=65, groups=1), {}, "q must have at most 64 slots in a group, got S = 65"),
    "prefix": (
        dict(prefix=8193, lengths=(1,), channels=8, **ONE_HEAD),
        {},
        "prefix_k must have at most 8192 tokens, got P = 8193",
    ),
    "heads": (dict(heads=3), {}, "q must have a multiple of k's heads, got H = 3 and Hkv = 2"),
    "inner stride": (
        {},
        {"q": lambda t: torch.stack([t, t], -1)[..., 0]},
        "q must be contiguous in its last 1 dimension(s), got stride 2",
    ),
    "stride": (
        {},
        {"v": lambda t: torch.nn.functional.pad(t, (0, 2))[..., :16]},
        "v must have strides that are multiples of 16 bytes (8 elements), got ",
    ),
    "address": (
        {},
        {"prefix_v": lambda t: torch.nn.functional.pad(t, (4, 4))[..., 4:20]},
        "prefix_v must start at a multiple of 16 bytes",
    ),
    "type": ({}, {"k": lambda t: t.float()}, "k must be bfloat16, got float32"),
    "length type": ({}, {"prefix_length": lambda t: t.int()}, "prefix_length must be int64, got int32"),
    "table type": ({}, {"cosine": lambda t: t.bfloat16()}, "cosine must be float32, got bfloat16"),
    "short table": (
        {},
        {"sine": lambda t: t[:15]},
        "sine must have shape [positions >= P + S, D / 2] = [>= 16, 8], got [15, 8]",
    ),
    "one table": ({}, {"sine": lambda t: None}, "cosine and sine must be given together"),
    "logsumexp type": ({}, {"logsumexp": lambda t: t.bfloat16()}, "logsumexp must be float32, got bfloat16"),
    "output": (
        {},
        {"output": lambda t: t[:, :1]},
        "output must have shape [B, M, S, H, D] = [2, 7, 5, 4, 16]",
    ),
    "workspace": (
        {},
        {"workspace": lambda _: torch.empty(2, 5)},
        "workspace must have shape [splits, B * M * S * H * (D + 1)] = [2, 4760], got [2, 5]",
    ),
    "splits": (
        {},
        {"workspace": lambda _: torch.empty(65, 4760)},
        "workspace must be for 1 to 64 splits, got 65",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    sizes, changes, message = REFUSED[case]
    arguments = core_arguments(sample_inputs(dtype=torch.bfloat16, **sizes))
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    with emulated(), pytest.raises(ValueError) as caught:
        native.call("query_attention", *arguments.values())
    assert str(caught.value).startswith("query_attention: ") and message in str(caught.value)


def test_longer_tables_serve_shorter_prefixes(place: str) -> None:
    inputs = sample_inputs(dtype=torch.float16, groups=2, channels=8)
    longer = SampleInputs(*inputs.args()[:6], rope_table(100, 8))
    expected, _ = forward_and_backward(inputs, place)
    got, _ = forward_and_backward(longer, place)
    for name in expected:
        assert torch.equal(got[name], expected[name])
