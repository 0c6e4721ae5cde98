"""The CUDA kernels of slot_head against the float64 reference: emulated, and on a GPU if there is one."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from comparison import TOLERANCES, assert_close
from emulation import emulated
from slot_head_cases import (
    assert_matches,
    assert_says_no_answer,
    expected_results,
    kernels,
    without_answers,
)

import visionllm._core as _core
from visionllm.ops import native
from visionllm.ops.slot_head import SampleInputs, aligned, sample_inputs, workspace

# visionllm.ops.slot_head_cross_entropy names the function.
prediction = sys.modules["visionllm.ops.slot_head_predict"]
cross_entropy = sys.modules["visionllm.ops.slot_head_cross_entropy"]

# Tiles have 64 slots and 64 rows; where there are more than 132 of them also 64 and 128 (wide) or 128 of each
# (large). A stage has 64 channels (float32: 32), a pipeline three or four of them.
CASES = {
    "smallest": dict(batch=1, groups=1, rows=1, channels=8, masked=False),
    "classes": dict(),
    "several_tiles": dict(batch=2, groups=70, rows=130, channels=72),
    "deep": dict(batch=1, groups=3, rows=9, channels=336, masked=False),
    "static_classes": dict(groups=9, rows=33, shared=True),
    "locations": dict(
        batch=3, groups=6, slots=4, rows=150, channels=24, shared=True, masked=False, located=True
    ),
    "locations_masked": dict(groups=5, slots=2, rows=70, channels=16, located=True, window=0),
    "wide_tiles": dict(batch=45, groups=1, rows=130, channels=8, window=31),
    "large_tiles": dict(batch=67, groups=65, rows=70, channels=8, weighted=False),
    "no_norm": dict(groups=5, slots=3, rows=70, channels=24, normed=False, weighted=False),
    "no_groups": dict(groups=0),
    "no_pictures": dict(batch=0, shared=True, masked=False),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# bfloat16 meets every case; the others those that bring out what is different for them.
RUNS = [(case, "bfloat16") for case in CASES] + [
    (case, dtype)
    for dtype, cases in (
        ("float32", ("classes", "several_tiles", "deep", "locations", "wide_tiles")),
        ("float16", ("several_tiles", "locations")),
    )
    for case in cases
]


@pytest.mark.parametrize(("case", "dtype"), RUNS)
def test_matches_reference(case: str, dtype: str, place: str) -> None:
    inputs = sample_inputs(dtype=DTYPES[dtype], **CASES[case])
    # Many blocks are seconds of emulation: the backward, whose other kernels know no tiles, once.
    assert_matches(inputs, place, backward=case != "wide_tiles")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("classes", "float16"),
        ("locations", "bfloat16"),
        ("several_tiles", "float32"),
        ("no_norm", "bfloat16"),
    ],
)
def test_sanitized(case: str, dtype: str) -> None:
    options = dict(CASES[case], **(dict(groups=65) if case == "several_tiles" else {}))
    assert_matches(sample_inputs(dtype=DTYPES[dtype], **options), "emulated", sanitize=True, seed=3)


@pytest.mark.parametrize("case", ["static_classes", "locations", "no_norm"])
def test_same_bits_whatever_the_order(case: str) -> None:
    inputs = sample_inputs(dtype=torch.bfloat16, **CASES[case])
    results = [
        kernels(inputs, "emulated", block_order="forward"),
        kernels(inputs, "emulated", block_order="reversed", thread_order="reversed"),
        kernels(inputs, "emulated", seed=11),
    ]
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name


def test_same_bits_on_every_run() -> None:
    if not (torch.cuda.is_available() and native.has_cuda_kernels()):
        pytest.skip("no GPU, or this build has no CUDA kernels")
    inputs = sample_inputs(dtype=torch.bfloat16, **CASES["several_tiles"])
    first = kernels(inputs, "device")
    for _ in range(3):
        for name, tensor in kernels(inputs, "device").items():
            assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize(("shared", "masked"), [(True, False), (True, True), (False, True)])
def test_chunks_of_slots_add_up(
    shared: bool, masked: bool, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward with its workspace for 128 slots of a set at a time: two chunks, the second not full."""
    options = dict(batch=2, groups=46, slots=3, rows=11, channels=16, shared=shared, masked=masked)
    inputs = sample_inputs(dtype=torch.bfloat16, **options)
    whole = kernels(inputs, place)
    monkeypatch.setattr(cross_entropy, "SLOTS_AT_ONCE", 100)
    parts = assert_matches(inputs, place)
    assert torch.equal(whole["grad_states"], parts["grad_states"])


def of_one_kind(first: int, last: int) -> SampleInputs:
    """Slots first, ..., last - 1 of groups of five, as a view; rows out of a wider table."""
    count = last - first
    options = dict(groups=5, rows=70, channels=24, slots=count, window=3)
    inputs = sample_inputs(dtype=torch.bfloat16, **options)
    states = torch.full((2, 5, 5, 24), float("nan"), dtype=torch.bfloat16)
    states[:, :, first:last] = inputs.states
    rows = torch.full((2, 70, 40), float("nan"), dtype=torch.bfloat16)
    rows[..., :24] = inputs.rows
    return replace(inputs, states=states[:, :, first:last], rows=rows[..., :24])


@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 5)])
@pytest.mark.parametrize("normed", [True, False])
def test_views_are_not_copied(first: int, last: int, normed: bool, place: str) -> None:
    inputs = of_one_kind(first, last)
    inputs = inputs if normed else replace(inputs, norm_weight=None)
    assert aligned(inputs.states, True) is inputs.states and aligned(inputs.rows, True) is inputs.rows
    assert_matches(inputs, place)


def test_one_set_over_views_of_pictures(place: str) -> None:
    """Shared rows and no mask: tiles go across pictures and groups that do not lie one after the other."""
    inputs = of_one_kind(1, 4)
    assert_matches(replace(inputs, rows=inputs.rows[:1], valid=None, norm_weight=None), place)


def test_expanded_rows_and_unaligned_states(place: str) -> None:
    inputs = sample_inputs(dtype=torch.float32, **CASES["static_classes"])
    shifted = torch.empty(inputs.states.numel() + 1)[1:].view(inputs.states.shape).copy_(inputs.states)
    expanded = inputs.rows.expand(2, -1, -1)
    got = assert_matches(replace(inputs, states=shifted, rows=expanded), place)
    assert got["grad_rows"].shape == (2, 33, 40)


def test_what_may_not_be_taken_is_not_looked_at(place: str) -> None:
    """NaN in rows that are not allowed and in states of ignored slots: the same bits as without."""
    inputs = sample_inputs(dtype=torch.bfloat16, **CASES["classes"])
    ignored = (inputs.target < 0) | (inputs.weight == 0)
    spoiled = replace(
        inputs,
        rows=inputs.rows.masked_fill(~inputs.valid[..., None], float("nan")),
        states=inputs.states.masked_fill(ignored[..., None], float("nan")),
    )
    clean, dirty = kernels(inputs, place), kernels(spoiled, place)
    assert ignored.any() and not inputs.valid.all()
    for name in ("loss", "grad_states", "grad_rows", "grad_norm_weight"):
        assert torch.equal(clean[name], dirty[name]), name
    assert torch.equal(clean["best"][~ignored], dirty["best"][~ignored])
    assert (dirty["best"][ignored] == -1).all() and (dirty["loss"][ignored] == 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("normed", [True, False])
def test_no_answer_is_visible(normed: bool, dtype: str, place: str) -> None:
    """States that are not finite and slots without an allowed row: -1 and NaN, as the reference says."""
    inputs, broken = without_answers(DTYPES[dtype], normed)
    found = kernels(replace(inputs, weight=None), place)
    assert_says_no_answer(found, broken)
    assert found["logsumexp"][2].eq(-float("inf")).all() and found["logsumexp"][0, 3].isnan()
    assert torch.equal(found["loss"].isfinite(), ~broken | (inputs.target < 0))
    # The other slots' answers are not touched.
    expected, _ = expected_results(inputs)
    assert_close(
        "probability",
        found["probability"][~broken],
        expected["probability"][~broken],
        TOLERANCES["slot_head", inputs.states.dtype],
    )


def test_targets_out_of_reach_are_visible(place: str) -> None:
    inputs = sample_inputs(dtype=torch.bfloat16, groups=4, rows=70, channels=16, weighted=False)
    inputs.valid[0, 1] = False
    inputs.target[0, :, 0] = torch.tensor([70, 1, -1, 69])
    found = kernels(inputs, place)
    assert found["loss"][0, 0].isnan() and found["loss"][0, 1].eq(float("inf"))
    assert found["loss"][0, 2] == 0 and found["loss"][0, 3].isfinite()
    assert found["grad_states"][0, 0].isnan().all() and found["grad_states"][0, 1:].isfinite().all()
    located = sample_inputs(
        dtype=torch.bfloat16, groups=4, rows=70, channels=16, located=True, weighted=False
    )
    located.target[0, 0] = float("nan")
    found = kernels(located, place)
    assert found["loss"][0, 0].isnan() and found["loss"][0, 1:].isfinite().all()


def test_first_of_equal_rows_wins(place: str) -> None:
    """Equal rows within a tile, in other lanes of a warp and in other tiles."""
    inputs = sample_inputs(
        dtype=torch.bfloat16, batch=1, groups=3, rows=200, channels=8, masked=False, normed=False
    )
    inputs.states.fill_(1.0)
    for first, equal in ((3, (3, 35, 150)), (63, (63, 64)), (130, (130, 131, 199))):
        inputs.rows.zero_()
        inputs.rows[0, list(equal)] = 1.0
        assert (kernels(inputs, place, backward=False)["best"] == first).all()


def test_window_reaches_into_the_neighbouring_tiles(place: str) -> None:
    """A flat top at every row near the tiles' edges: the expectation needs both tiles' logits."""
    for best in (0, 5, 58, 61, 63, 64, 66, 70, 127, 128, 129):
        inputs = sample_inputs(
            dtype=torch.float32, batch=1, groups=1, rows=130, channels=8, masked=False, normed=False
        )
        inputs.states.fill_(1.0)
        inputs.rows[..., 1:] = 0.0
        distance = (torch.arange(130) - best).abs()
        inputs.rows[0, :, 0] = torch.where(distance <= 6, 3.0 - distance % 3, 2.5)
        inputs.rows[0, best, 0] = 3.5
        assert_matches(inputs, place, backward=False)


def test_large_logits_keep_their_digits(place: str) -> None:
    """A certain and right slot's loss is small beside its logits."""
    inputs = sample_inputs(
        dtype=torch.float32, batch=1, groups=2, rows=5, channels=8, masked=False, normed=False, weighted=False
    )
    inputs.states.zero_()[..., 0] = 1.0
    inputs.rows.zero_()[0, :, 0] = torch.tensor([2000.0, 1990.0, -3000.0, 0.0, 1985.0])
    inputs.target.zero_()
    found = kernels(replace(inputs, scale=1.0), place)
    wanted = torch.tensor([2000.0, 1990.0, -3000.0, 0.0, 1985.0]).double().log_softmax(0)
    torch.testing.assert_close(found["loss"], torch.full((1, 2, 1), -wanted[0]).float(), rtol=1e-5, atol=2e-7)
    torch.testing.assert_close(found["every"][0, 0, 0], wanted.exp().float(), rtol=1e-5, atol=1e-30)


def test_offsets_beyond_two_to_the_31() -> None:
    """Only the last row is in memory and allowed; the strides before it are 2^33 elements."""
    inputs = sample_inputs(dtype=torch.bfloat16, batch=1, groups=3, rows=67, channels=16, weighted=False)
    inputs.valid[:] = False
    inputs.valid[:, -1] = True
    inputs.target.fill_(66)
    arguments = inputs.cross_entropy_args()
    with emulated() as emulation:
        _, expected, _ = cross_entropy._cross_entropy_cuda(*arguments)
        for stride in (2**33, -(2**33)):
            found = cross_entropy._cross_entropy_outputs(inputs.states)
            emulation.launches = []
            space = workspace(1, inputs.states, inputs.rows, inputs.valid, True, -1)
            native.call(
                "slot_head_cross_entropy_far",
                *found,
                space,
                inputs.states,
                inputs.rows[:, -1:].clone(),
                *arguments[2:9],
                stride,
            )
            assert emulation.launches and torch.equal(found[1], expected) and (found[0] == 0).all()
    assert expected.isfinite().all() and (expected != 0).all()


BAD = {
    "channels": (dict(channels=12), {}, "C must be a multiple of 8 and not 0, got 12"),
    "too many rows": (
        dict(batch=1, groups=1, rows=1, channels=8, masked=False),
        dict(rows=torch.zeros(1, 1, 8, dtype=torch.bfloat16).expand(1, 65537, 8)),
        "rows must be at most 65536, got V = 65537",
    ),
    "rows of another type": ({}, dict(rows=torch.zeros(2, 21, 40)), "rows must be bfloat16, got float32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_argument_is_named(case: str) -> None:
    options, changes, message = BAD[case]
    inputs = replace(sample_inputs(dtype=torch.bfloat16, **options), **changes)
    with emulated(), pytest.raises(ValueError) as caught:
        prediction._predict_cuda(*inputs.predict_args())
    assert str(caught.value) == f"slot_head_predict: {message}"


def test_workspace_is_checked() -> None:
    assert _core.slot_head_workspace_bytes(0, 1, 1, 1, 8, 0, 2, True, False, True, 6, 0) == -1
    inputs = sample_inputs(dtype=torch.bfloat16, **CASES["classes"])
    outputs = prediction._predict_outputs(inputs.states, inputs.rows, 6, True)
    arguments = (inputs.states, inputs.rows, inputs.valid, inputs.norm_weight, 1e-5, 1.0, 6, 0.0)
    with emulated(), pytest.raises(ValueError, match="workspace must have at least [0-9]+ bytes, got 16"):
        native.call("slot_head_predict", *outputs, torch.empty(4), *arguments)
