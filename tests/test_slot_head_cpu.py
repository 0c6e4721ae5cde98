"""The CPU kernels of slot_head, each instruction set in turn, against the float64 reference."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from comparison import TOLERANCES, assert_close
from slot_head_cases import (
    assert_matches,
    assert_says_no_answer,
    expected_results,
    kernels,
    without_answers,
)
from torch import Tensor

from visionllm.ops import native, slot_head_cross_entropy, slot_head_predict
from visionllm.ops.slot_head import SampleInputs, aligned, sample_inputs

# visionllm.ops.slot_head_cross_entropy names the function.
cross_entropy = sys.modules["visionllm.ops.slot_head_cross_entropy"]

# Slots go in groups of 16 and blocks of up to 256, columns of gradients in 64s.
CASES = {
    "smallest": dict(batch=1, groups=1, rows=1, channels=1, masked=False),
    "classes": dict(),
    "odd": dict(batch=3, groups=5, slots=3, rows=37, channels=13),
    "several_groups": dict(batch=2, groups=70, rows=130, channels=72),
    "several_blocks": dict(batch=1, groups=149, slots=2, rows=9, channels=33, masked=False, shared=True),
    "several_columns": dict(batch=1, groups=3, rows=9, channels=337, masked=False),
    "static_classes": dict(groups=9, rows=33, shared=True),
    "locations": dict(
        batch=3, groups=6, slots=4, rows=150, channels=24, shared=True, masked=False, located=True
    ),
    "locations_masked": dict(groups=5, slots=2, rows=70, channels=16, located=True, window=0),
    "wide_window": dict(groups=3, rows=90, channels=8, window=64),
    "no_norm": dict(groups=5, slots=3, rows=70, channels=24, normed=False, weighted=False),
    "no_groups": dict(groups=0),
    "no_pictures": dict(batch=0, shared=True, masked=False),
    "int8": dict(groups=19, rows=53, channels=40, int8=True),
    "int8_locations": dict(slots=3, rows=130, shared=True, masked=False, located=True, int8=True),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case: str, dtype: torch.dtype, isa: str) -> None:
    assert_matches(sample_inputs(dtype=dtype, **CASES[case]), "cpu")


def test_the_kernels_are_what_torch_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    original = native.call
    monkeypatch.setattr(native, "call", lambda name, *rest: (names.append(name), original(name, *rest)))
    for int8 in (False, True):
        inputs = sample_inputs(int8=int8, requires_grad=True)
        torch.ops.visionllm.slot_head_predict(*inputs.predict_args())
        loss = torch.ops.visionllm.slot_head_cross_entropy(*inputs.cross_entropy_args())[0]
        torch.autograd.grad(loss.sum(), inputs.leaves())
    assert names == [
        "slot_head_predict",
        "slot_head_cross_entropy",
        "slot_head_cross_entropy_backward",
        "slot_head_predict_int8",
        "slot_head_cross_entropy_int8",
        "slot_head_cross_entropy_int8_backward",
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [name for name in CASES if "int8" not in name])
def test_sum_with_gradients_is_the_sum_and_its_gradients(case: str, dtype: torch.dtype, isa: str) -> None:
    inputs = sample_inputs(dtype=dtype, requires_grad=True, **CASES[case])
    arguments = inputs.cross_entropy_args()[:9]
    loss, *grads = torch.ops.visionllm.slot_head_cross_entropy_sum(*arguments)
    losses = torch.ops.visionllm.slot_head_cross_entropy(*arguments)[0]
    expected = torch.autograd.grad(losses.sum(), inputs.leaves())
    torch.testing.assert_close(loss, losses.sum(), rtol=1e-6, atol=1e-6)
    tolerance = TOLERANCES["slot_head_backward", dtype]
    for a, b in zip(grads, expected, strict=inputs.norm_weight is not None):
        assert a.dtype == dtype
        assert_close("gradient", a, b, tolerance)


def test_sum_through_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    original = native.call
    monkeypatch.setattr(native, "call", lambda name, *rest: (names.append(name), original(name, *rest)))
    inputs = sample_inputs(requires_grad=True, groups=4, rows=9, channels=6)
    options = dict(weight=inputs.weight, valid=inputs.valid, norm_weight=inputs.norm_weight)

    def loss(**more: str) -> Tensor:
        return slot_head_cross_entropy(inputs.states, inputs.rows, inputs.target, **options, **more)

    whole = loss(reduction="sum")
    assert whole.shape == () and names == ["slot_head_cross_entropy_sum"]
    got = torch.autograd.grad(whole * 0.25, inputs.leaves())
    for a, b in zip(got, torch.autograd.grad(loss().sum() * 0.25, inputs.leaves()), strict=True):
        torch.testing.assert_close(a, b)
    names.clear()
    with torch.no_grad():
        torch.testing.assert_close(loss(reduction="sum"), whole)
    assert names == ["slot_head_cross_entropy"]
    with pytest.raises(ValueError, match="reduction must be none or sum, got 'mean'"):
        loss(reduction="mean")
    grad = torch.autograd.grad(loss(reduction="sum"), inputs.states, create_graph=True)[0]
    with pytest.raises((NotImplementedError, RuntimeError), match="second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sum_by_opcheck(dtype: torch.dtype) -> None:
    inputs = sample_inputs(dtype=dtype, groups=3, rows=7, channels=6, requires_grad=True)
    arguments = inputs.cross_entropy_args()[:9]
    torch.library.opcheck(torch.ops.visionllm.slot_head_cross_entropy_sum.default, arguments)
    loss, *grads = torch.ops.visionllm.slot_head_cross_entropy_sum(*arguments)
    torch.library.opcheck(
        torch.ops.visionllm.slot_head_cross_entropy_sum_backward.default,
        (torch.ones_like(loss).detach(), *(t.detach() for t in inputs.leaves()), *grads),
    )


def test_sum_compiles_into_one_graph() -> None:
    def step(states: Tensor, rows: Tensor, target: Tensor) -> Tensor:
        return slot_head_cross_entropy(states.sin(), rows, target, reduction="sum").square()

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        inputs = sample_inputs(requires_grad=True, groups=3, rows=7, channels=6, masked=False, normed=False)
        loss = function(inputs.states, inputs.rows, inputs.target)
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs.leaves())))
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shared", "masked"), [(True, False), (True, True), (False, True)])
def test_chunks_of_slots_add_up(
    shared: bool, masked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward with 128 slots of a set at a time: two or three chunks, the last not full."""
    options = dict(batch=2, groups=46, slots=3, rows=11, channels=16, shared=shared, masked=masked)
    inputs = sample_inputs(dtype=dtype, **options)
    whole = kernels(inputs, "cpu")
    monkeypatch.setattr(cross_entropy, "SLOTS_AT_ONCE", 100)
    parts = assert_matches(inputs, "cpu")
    assert torch.equal(whole["grad_states"], parts["grad_states"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["two_pictures", "one_set", "int8"])
def test_same_bits_on_any_number_of_threads(
    case: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    options = dict(batch=2, groups=90, slots=2, rows=150, channels=330)  # enough work for several threads
    options |= dict(shared=True, masked=False) if case == "one_set" else dict(int8=case == "int8")
    inputs = sample_inputs(dtype=dtype, **options)
    results = []
    for count in (1, 1, 2, 3):
        threads(count)
        results.append(kernels(inputs, "cpu"))
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_slot_does_not_depend_on_the_others(dtype: torch.dtype, isa: str) -> None:
    inputs = sample_inputs(dtype=dtype, batch=1, groups=37, rows=40, channels=24)
    whole = kernels(inputs, "cpu")
    some = [3, 17, 36]
    fewer = {n: getattr(inputs, n)[:, some] for n in ("states", "target", "weight")}
    alone = kernels(replace(inputs, **fewer), "cpu", backward=False)
    for name, tensor in alone.items():
        assert torch.equal(tensor, whole[name][:, some]), name


def of_one_kind(first: int, last: int, dtype: torch.dtype) -> SampleInputs:
    """Slots first, ..., last - 1 of groups of five, as a view; rows out of a wider table."""
    count = last - first
    inputs = sample_inputs(dtype=dtype, groups=5, rows=70, channels=23, slots=count, window=3)
    states = torch.full((2, 5, 5, 23), float("nan"), dtype=dtype)
    states[:, :, first:last] = inputs.states
    rows = torch.full((2, 70, 41), float("nan"), dtype=dtype)
    rows[..., :23] = inputs.rows
    return replace(inputs, states=states[:, :, first:last], rows=rows[..., :23])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 5)])
@pytest.mark.parametrize("normed", [True, False])
def test_views_are_not_copied(first: int, last: int, normed: bool, dtype: torch.dtype) -> None:
    inputs = of_one_kind(first, last, dtype)
    inputs = inputs if normed else replace(inputs, norm_weight=None)
    assert aligned(inputs.states, False) is inputs.states and aligned(inputs.rows, False) is inputs.rows
    assert_matches(inputs, "cpu")


def test_other_views_are_taken_too() -> None:
    inputs = sample_inputs(**CASES["static_classes"])
    turned = replace(
        inputs,
        states=inputs.states.transpose(0, 3).contiguous().transpose(0, 3),
        rows=inputs.rows.transpose(1, 2).contiguous().transpose(1, 2),
        valid=inputs.valid.T.contiguous().T,
        target=inputs.target.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert not turned.states.is_contiguous() and not turned.rows.is_contiguous()
    expected = kernels(inputs, "cpu")
    for name, tensor in kernels(turned, "cpu").items():
        assert torch.equal(tensor, expected[name]), name
    expanded = assert_matches(replace(inputs, rows=inputs.rows.expand(2, -1, -1)), "cpu")
    assert expanded["grad_rows"].shape == (2, 33, 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_may_not_be_taken_is_not_looked_at(dtype: torch.dtype, isa: str) -> None:
    """NaN in rows that are not allowed and in states of ignored slots: the same bits as without."""
    inputs = sample_inputs(dtype=dtype, **CASES["classes"])
    ignored = (inputs.target < 0) | (inputs.weight == 0)
    spoiled = replace(
        inputs,
        rows=inputs.rows.masked_fill(~inputs.valid[..., None], float("nan")),
        states=inputs.states.masked_fill(ignored[..., None], float("nan")),
    )
    clean, dirty = kernels(inputs, "cpu"), kernels(spoiled, "cpu")
    assert ignored.any() and not inputs.valid.all()
    for name in ("loss", "grad_states", "grad_rows", "grad_norm_weight"):
        assert torch.equal(clean[name], dirty[name]), name
    assert torch.equal(clean["best"][~ignored], dirty["best"][~ignored])
    assert (dirty["best"][ignored] == -1).all() and (dirty["loss"][ignored] == 0).all()


def test_shared_rows_that_one_picture_may_not_take() -> None:
    """A row of NaN that only the first picture is allowed does not reach the second."""
    inputs = sample_inputs(groups=5, rows=6, shared=True, weighted=False)
    inputs.rows[0, 2] = float("nan")
    inputs.valid[0, 2], inputs.valid[1, 2] = True, False
    inputs.target.fill_(5)
    found = kernels(inputs, "cpu")
    assert found["grad_states"][0].isnan().all() and found["grad_states"][1].isfinite().all()
    assert found["logsumexp"][0].isnan().all() and found["logsumexp"][1].isfinite().all()


def test_a_scale_that_is_not_used_may_hold_anything() -> None:
    inputs = sample_inputs(**CASES["int8"])
    spoiled = replace(inputs, row_scale=inputs.row_scale.masked_fill(~inputs.valid, float("nan")))
    clean, dirty = kernels(inputs, "cpu"), kernels(spoiled, "cpu")
    for name, tensor in clean.items():
        assert torch.equal(tensor, dirty[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normed", [True, False])
def test_no_answer_is_visible(normed: bool, dtype: torch.dtype, isa: str) -> None:
    """States that are not finite and slots without an allowed row: -1 and NaN, as the reference says."""
    inputs, broken = without_answers(dtype, normed)
    found = kernels(replace(inputs, weight=None), "cpu", backward=False)
    assert_says_no_answer(found, broken)
    expected, _ = expected_results(inputs)
    tolerance = TOLERANCES["slot_head", dtype]
    # Infinite where that is what the reference finds, NaN where it finds that.
    assert_close("logsumexp", found["logsumexp"], expected["logsumexp"], tolerance)
    infinite = expected["logsumexp"].isinf()
    assert torch.equal(found["logsumexp"][infinite].double(), expected["logsumexp"][infinite])
    assert infinite[2].all() and infinite[1, 65] == (not normed)
    assert torch.equal(found["loss"].isfinite(), ~broken | (inputs.target < 0))
    assert_close("probability", found["probability"][~broken], expected["probability"][~broken], tolerance)


def test_targets_out_of_reach_are_visible(isa: str) -> None:
    inputs = sample_inputs(groups=4, rows=70, channels=16, weighted=False)
    inputs.valid[0, 1] = False
    inputs.target[0, :, 0] = torch.tensor([70, 1, -1, 69])
    found = kernels(inputs, "cpu")
    assert found["loss"][0, 0].isnan() and found["loss"][0, 1].eq(float("inf"))
    assert found["loss"][0, 2] == 0 and found["loss"][0, 3].isfinite()
    assert found["grad_states"][0, 0].isnan().all() and found["grad_states"][0, 1:].isfinite().all()
    located = sample_inputs(groups=4, rows=70, channels=16, located=True, weighted=False)
    located.target[0, 0] = float("nan")
    found = kernels(located, "cpu")
    assert found["loss"][0, 0].isnan() and found["loss"][0, 1:].isfinite().all()
    assert found["grad_states"][0, 0].isnan().all() and found["grad_states"][0, 1:].isfinite().all()


@pytest.mark.parametrize("sigma", [0.05, 1.5, 40.0, 1e4])
def test_gaussians_of_any_width(sigma: float, isa: str) -> None:
    for masked in (False, True):
        inputs = sample_inputs(groups=9, rows=300, channels=16, located=True, masked=masked)
        if masked:  # the nearest allowed row may be far
            inputs.valid[:, :150] = False
        assert_matches(replace(inputs, sigma=sigma), "cpu")


def test_first_of_equal_rows_wins(isa: str) -> None:
    inputs = sample_inputs(batch=1, groups=3, rows=200, channels=8, masked=False, normed=False)
    inputs.states.fill_(1.0)
    for first, equal in ((0, (0, 1)), (3, (3, 35, 150)), (130, (130, 131, 199))):
        inputs.rows.zero_()
        inputs.rows[0, list(equal)] = 1.0
        assert (kernels(inputs, "cpu", backward=False)["best"] == first).all()


def test_window_ends_where_the_rows_do(isa: str) -> None:
    for best in (0, 5, 64, 127, 129):
        inputs = sample_inputs(batch=1, groups=1, rows=130, channels=8, masked=False, normed=False)
        inputs.states.fill_(1.0)
        inputs.rows[..., 1:] = 0.0
        distance = (torch.arange(130) - best).abs()
        inputs.rows[0, :, 0] = torch.where(distance <= 6, 3.0 - distance % 3, 2.5)
        inputs.rows[0, best, 0] = 3.5
        assert_matches(inputs, "cpu", backward=False)


def test_large_logits_keep_their_digits(isa: str) -> None:
    """A certain and right slot's loss is small beside its logits."""
    inputs = sample_inputs(batch=1, groups=2, rows=5, channels=8, masked=False, normed=False, weighted=False)
    inputs.states.zero_()[..., 0] = 1.0
    inputs.rows.zero_()[0, :, 0] = torch.tensor([2000.0, 1990.0, -3000.0, 0.0, 1985.0])
    inputs.target.zero_()
    found = kernels(replace(inputs, scale=1.0), "cpu")
    wanted = torch.tensor([2000.0, 1990.0, -3000.0, 0.0, 1985.0]).double().log_softmax(0)
    torch.testing.assert_close(found["loss"], torch.full((1, 2, 1), -wanted[0]).float(), rtol=1e-5, atol=2e-7)
    torch.testing.assert_close(found["every"][0, 0, 0], wanted.exp().float(), rtol=1e-5, atol=1e-30)


def test_a_whole_vocabulary_is_taken() -> None:
    """More rows than a CUDA kernel takes."""
    inputs = sample_inputs(batch=1, groups=2, rows=70000, channels=8, shared=True, masked=False)
    assert_matches(inputs, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_int8_rows(dtype: torch.dtype) -> None:
    inputs = sample_inputs(dtype=dtype, groups=3, rows=7, channels=6, int8=True, requires_grad=True)
    arguments = inputs.cross_entropy_args()
    torch.library.opcheck(torch.ops.visionllm.slot_head_cross_entropy.default, arguments)
    plain = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    torch.library.opcheck(
        torch.ops.visionllm.slot_head_predict.default,
        tuple(a.detach() if isinstance(a, Tensor) else a for a in inputs.predict_args()),
    )
    loss, *saved = torch.ops.visionllm.slot_head_cross_entropy(*plain)
    torch.library.opcheck(
        torch.ops.visionllm.slot_head_cross_entropy_backward.default,
        (torch.randn_like(loss), *plain[:6], *saved, *plain[6:]),
    )


def test_int8_rows_stand_for_what_they_are_scaled_to() -> None:
    """The same as with the scaled rows written out, through torch's functions."""
    inputs = sample_inputs(groups=4, slots=2, rows=30, shared=True, masked=False, int8=True)
    written = inputs.rows[0].float() * inputs.row_scale[0][:, None]
    options = dict(norm_weight=inputs.norm_weight, scale=inputs.scale)
    quantized = dict(row_scale=inputs.row_scale[0])
    found = slot_head_predict(inputs.states, inputs.rows[0], window=2, **options, **quantized)
    expected = slot_head_predict(inputs.states, written, window=2, **options)
    assert torch.equal(found.best, expected.best)
    torch.testing.assert_close(found.expectation, expected.expectation)
    states = inputs.states.requires_grad_()
    losses = [
        slot_head_cross_entropy(states, rows, inputs.target, **options, **more).sum()
        for rows, more in ((inputs.rows[0], quantized), (written, {}))
    ]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, states)[0] for loss in losses))


S, R, Q = torch.zeros(2, 3, 6), torch.zeros(5, 6), torch.zeros(5, 6, dtype=torch.int8)
BAD = {
    "int8 without scale": (
        lambda: slot_head_predict(S, Q),
        "row_scale must be given with int8 rows, got none",
    ),
    "scale without int8": (
        lambda: slot_head_predict(S, R, row_scale=torch.ones(5)),
        "rows must be int8 where row_scale is given, got float32",
    ),
    "scale shape": (
        lambda: slot_head_predict(S, Q, row_scale=torch.ones(6)),
        "row_scale must have the rows' shape without C = [5], got [6]",
    ),
    "scale type": (
        lambda: slot_head_predict(S, Q, row_scale=torch.ones(5, dtype=torch.int64)),
        "row_scale must be floating point, got int64",
    ),
    "no channels": (
        lambda: slot_head_predict(S[..., :0], R[:, :0]),
        "C must be at least 1, got 0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_argument_is_named(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith("slot_head_predict: ") and message in str(caught.value)


def test_the_core_names_what_does_not_fit() -> None:
    inputs = sample_inputs(int8=True)
    outputs = [torch.empty(2, 7, 1, dtype=torch.int64), *(torch.empty(2, 7, 1) for _ in range(2)), None, None]
    rest = (inputs.valid, inputs.norm_weight, 1e-5, 1.0, 0, 0.0)
    with pytest.raises(ValueError, match=r"slot_head_predict_int8: rows must be int8, got float32"):
        native.call(
            "slot_head_predict_int8", *outputs, inputs.states, inputs.rows.float(), inputs.row_scale, *rest
        )
    with pytest.raises(ValueError, match=r"row_scale must have shape \[R, V\] = \[2, 21\], got \[2, 20\]"):
        scale = inputs.row_scale[:, :20]
        native.call("slot_head_predict_int8", *outputs, inputs.states, inputs.rows, scale, *rest)
