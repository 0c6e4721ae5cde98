"""slot_head on the CPU: its reference against plain loops and the model's own head, and torch's checks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small_network import SMALL
from torch import Tensor

from visionllm.model.config import LOCATION_BINS
from visionllm.model.llm import RMSNorm
from visionllm.model.slots import (
    BINS_PER_UNIT,
    LOCATION_SIGMA,
    SlotHead,
    expected_offsets,
    location_loss,
)
from visionllm.ops import slot_head_cross_entropy, slot_head_predict
from visionllm.ops.slot_head import SampleInputs, sample_inputs
from visionllm.ops.slot_head_cross_entropy_reference import (
    slot_head_cross_entropy_backward_reference,
    slot_head_cross_entropy_reference,
)
from visionllm.ops.slot_head_predict import slot_head_predict_reference

TINY = dict(groups=3, rows=7, channels=6, window=2)
CASES = {
    "classes": dict(TINY),
    "static classes": dict(TINY, shared=True),
    "locations": dict(TINY, slots=4, shared=True, masked=False, located=True),
    "locations masked": dict(TINY, slots=2, located=True),
    "no norm, no weight": dict(TINY, normed=False, weighted=False, masked=False),
    "one row": dict(TINY, rows=1, masked=False),
    "no slots": dict(TINY, groups=0),
    "no batch": dict(TINY, batch=0, shared=True),
}


def naive_logits(inputs: SampleInputs, b: int, g: int, s: int) -> list[float]:
    """Logits of one slot, number by number."""
    x = inputs.states[b, g, s].tolist()
    if inputs.norm_weight is not None:
        scale = 1 / math.sqrt(sum(v * v for v in x) / len(x) + inputs.epsilon)
        x = [v * scale * w for v, w in zip(x, inputs.norm_weight.tolist(), strict=True)]
    table = inputs.rows[b if len(inputs.rows) > 1 else 0].tolist()
    logits = [inputs.scale * sum(v * r for v, r in zip(x, row, strict=True)) for row in table]
    if inputs.valid is None:
        return logits
    return [z if ok else -math.inf for z, ok in zip(logits, inputs.valid[b].tolist(), strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_reference_says_what_plain_loops_say(case: str) -> None:
    inputs = sample_inputs(dtype=torch.float64, **CASES[case])
    best, probability, logsumexp, expectation, every = slot_head_predict_reference(*inputs.predict_args())
    loss, _, _ = slot_head_cross_entropy_reference(*inputs.cross_entropy_args())
    assert best.shape == loss.shape == inputs.states.shape[:-1] and best.dtype == torch.int64
    for b, g, s in torch.ones(best.shape).nonzero().tolist():
        logits = naive_logits(inputs, b, g, s)
        total = sum(math.exp(z) for z in logits)
        p = [math.exp(z) / total for z in logits]
        row = max(range(len(p)), key=lambda v: logits[v])
        assert best[b, g, s] == row
        near = range(max(0, row - inputs.window), min(len(p), row + inputs.window + 1))
        mean = sum(p[v] * (v - inputs.offset) for v in near) / sum(p[v] for v in near)
        torch.testing.assert_close(probability[b, g, s].item(), p[row])
        torch.testing.assert_close(logsumexp[b, g, s].item(), math.log(total))
        torch.testing.assert_close(expectation[b, g, s].item(), mean)
        torch.testing.assert_close(every[b, g, s].tolist(), p)
        factor = 1.0 if inputs.weight is None else inputs.weight[b, g, s].item()
        target = inputs.target[b, g, s].item()
        if inputs.sigma:
            centre = min(max(target, 0), len(p) - 1)
            weights = [math.exp(-((v - centre) ** 2) / (2 * inputs.sigma**2)) for v in range(len(p))]
            weights = [w if q > 0 else 0.0 for w, q in zip(weights, p, strict=True)]
            wanted = sum(-w * math.log(q) for w, q in zip(weights, p, strict=True) if w > 0) / sum(weights)
        else:
            wanted = -math.log(p[target]) if target >= 0 else 0.0
        torch.testing.assert_close(loss[b, g, s].item(), factor * wanted)


def test_reads_class_slots_as_the_model_does() -> None:
    """The head's query projection goes into the rows: q·r = (W s)·r = s·(Wᵀ r)."""
    torch.manual_seed(0)
    head, norm = SlotHead(SMALL), RMSNorm(SMALL.llm_dim)
    torch.nn.init.normal_(norm.weight)
    states, rows = torch.randn(2, 5, 5, SMALL.llm_dim), torch.randn(2, 4, SMALL.llm_dim)
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    expected = head.class_logits(norm(states)[:, :, 0], rows, mask)
    folded = torch.cat([rows, head.no_object.expand(2, 1, -1)], 1) @ head.class_query.weight
    options = dict(valid=F.pad(mask, (0, 1), value=True), norm_weight=norm.weight, scale=head.scale)
    found = slot_head_predict(states[:, :, 0], folded, probabilities=True, **options)
    assert torch.equal(found.best, expected.argmax(-1)) and found.expectation is None
    torch.testing.assert_close(found.probabilities, expected.softmax(-1))
    torch.testing.assert_close(found.probability, expected.softmax(-1).amax(-1))
    labels = torch.tensor([[0, 1, 4, 4, 0], [3, 2, 1, 0, 4]])
    loss = slot_head_cross_entropy(states[:, :, 0], folded, labels, **options)
    torch.testing.assert_close(loss, F.cross_entropy(expected.mT, labels, reduction="none"))


@pytest.mark.parametrize("window", [0, 6])
def test_reads_location_slots_as_the_model_does(window: int) -> None:
    torch.manual_seed(0)
    head, norm = SlotHead(SMALL), RMSNorm(SMALL.llm_dim)
    torch.nn.init.normal_(head.locations, std=0.3)
    states = torch.randn(2, 3, 5, SMALL.llm_dim)[:, :, 1:]
    logits = head.location_logits(norm(states))
    found = slot_head_predict(
        states, head.locations, norm_weight=norm.weight, window=window, offset=BINS_PER_UNIT
    )
    assert torch.equal(found.best, logits.argmax(-1)) and found.probabilities is None
    torch.testing.assert_close(found.expectation / BINS_PER_UNIT, expected_offsets(logits, window))


def test_trains_location_slots_as_the_model_does() -> None:
    torch.manual_seed(0)
    head, norm = SlotHead(SMALL), RMSNorm(SMALL.llm_dim)
    states = torch.randn(5, 4, SMALL.llm_dim, requires_grad=True)
    offsets = torch.randn(5, 4) * 300
    offsets[0] = torch.tensor([-9000.0, 9000.0, 512.0, -512.0])
    leaves = [states, head.locations, norm.weight]
    expected = location_loss(head.location_logits(norm(states)), offsets, torch.ones(5, 4))
    loss = slot_head_cross_entropy(
        states[None],
        head.locations,
        (offsets + BINS_PER_UNIT)[None],
        norm_weight=norm.weight,
        sigma=LOCATION_SIGMA,
    )
    assert loss.shape == (1, 5, 4) and head.locations.shape == (LOCATION_BINS, SMALL.llm_dim)
    torch.testing.assert_close(loss.sum(), expected)
    got = torch.autograd.grad(loss.sum(), leaves)
    for a, b in zip(got, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("no ") or "norm" in name])
def test_gradcheck(case: str) -> None:
    inputs = sample_inputs(dtype=torch.float64, requires_grad=True, **CASES[case])
    _, _, target, weight, valid, _, *scalars = inputs.cross_entropy_args()

    def loss(states: Tensor, rows: Tensor, norm_weight: Tensor | None = None) -> Tensor:
        return torch.ops.visionllm.slot_head_cross_entropy(
            states, rows, target, weight, valid, norm_weight, *scalars
        )[0]

    assert torch.autograd.gradcheck(loss, inputs.leaves())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_backward_reference_is_the_derivative_of_the_reference(case: str, dtype: torch.dtype) -> None:
    inputs = sample_inputs(dtype=dtype, requires_grad=True, **CASES[case])
    loss, *saved = slot_head_cross_entropy_reference(*inputs.cross_entropy_args())
    grad_loss = torch.randn_like(loss)
    expected = torch.autograd.grad(loss, inputs.leaves(), grad_loss)
    arguments, scalars = inputs.cross_entropy_args()[:6], inputs.cross_entropy_args()[6:]
    got = slot_head_cross_entropy_backward_reference(grad_loss, *arguments, *saved, *scalars)
    tolerance = {} if dtype == torch.float64 else dict(rtol=0.03, atol=0.03)
    for a, b in zip(got, expected, strict=len(expected) == 3):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("classes", torch.float32),
        ("locations", torch.bfloat16),
        ("no norm, no weight", torch.float64),
    ],
    ids=str,
)
def test_opcheck(case: str, dtype: torch.dtype) -> None:
    inputs = sample_inputs(dtype=dtype, **CASES[case])
    torch.library.opcheck(torch.ops.visionllm.slot_head_predict.default, inputs.predict_args())
    inputs = sample_inputs(dtype=dtype, requires_grad=True, **CASES[case])
    torch.library.opcheck(torch.ops.visionllm.slot_head_cross_entropy.default, inputs.cross_entropy_args())
    inputs = sample_inputs(dtype=dtype, **CASES[case])
    arguments = inputs.cross_entropy_args()
    loss, *saved = torch.ops.visionllm.slot_head_cross_entropy(*arguments)
    torch.library.opcheck(
        torch.ops.visionllm.slot_head_cross_entropy_backward.default,
        (torch.randn_like(loss), *arguments[:6], *saved, *arguments[6:]),
    )


def test_compiles_into_one_graph() -> None:
    def step(states, rows, target, norm_weight):
        loss = slot_head_cross_entropy(states.sin(), rows, target, norm_weight=norm_weight).square().mean()
        found = slot_head_predict(states.sin(), rows, norm_weight=norm_weight, window=2)
        return loss, found.best, found.expectation

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        inputs = sample_inputs(requires_grad=True, **CASES["no norm, no weight"], seed=3)
        norm_weight = torch.ones(6, requires_grad=True)
        loss, *rest = function(inputs.states, inputs.rows, inputs.target, norm_weight)
        loss.backward()
        results.append((loss.detach(), *rest, inputs.states.grad, inputs.rows.grad, norm_weight.grad))
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager)


def test_states_without_a_slot_dimension_and_rows_without_a_picture() -> None:
    inputs = sample_inputs(slots=3, shared=True, masked=False, normed=False, window=2)
    whole = slot_head_predict(inputs.states, inputs.rows, window=2, probabilities=True)
    flat = slot_head_predict(inputs.states.flatten(1, 2), inputs.rows[0], window=2, probabilities=True)
    for a, b in zip(whole, flat, strict=True):
        assert torch.equal(a.flatten(1, 2), b)
    loss = slot_head_cross_entropy(inputs.states, inputs.rows, inputs.target)
    flat_loss = slot_head_cross_entropy(
        inputs.states.flatten(1, 2), inputs.rows[0], inputs.target.flatten(1, 2)
    )
    assert torch.equal(loss.flatten(1, 2), flat_loss)


def test_autocast_like_types_are_converted() -> None:
    """States in bfloat16, parameters in float32: the gradients come in the parameters' type."""
    inputs = sample_inputs(**CASES["classes"])
    rows, norm_weight = inputs.rows.requires_grad_(), inputs.norm_weight.requires_grad_()
    loss = slot_head_cross_entropy(
        inputs.states.bfloat16(), rows, inputs.target, valid=inputs.valid, norm_weight=norm_weight
    )
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert rows.grad.dtype == norm_weight.grad.dtype == torch.float32 and rows.grad.abs().sum() > 0


def test_what_may_not_be_taken_is_not_looked_at() -> None:
    """NaN in rows that are not allowed and in the states of ignored slots changes nothing."""
    inputs = sample_inputs(requires_grad=True, **CASES["classes"])
    spoiled = inputs.rows.detach().masked_fill(~inputs.valid[..., None], float("nan"))
    ignored = (inputs.target < 0) | (inputs.weight == 0)
    assert ignored.any() and not inputs.valid.all()
    states = inputs.states.detach().masked_fill(ignored[..., None], float("nan"))
    results = []
    for x, rows in ((inputs.states, inputs.rows), (states.requires_grad_(), spoiled.requires_grad_())):
        arguments = inputs.cross_entropy_args()
        loss = torch.ops.visionllm.slot_head_cross_entropy(x, rows, *arguments[2:])[0]
        grads = torch.autograd.grad(loss.sum(), [x, rows, inputs.norm_weight])
        results.append((loss.detach(), *grads))
    for clean, dirty in zip(*results, strict=True):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    assert (results[0][0][ignored] == 0).all() and (results[0][1][ignored] == 0).all()


def test_no_answer_is_visible() -> None:
    """A state that is not finite, or no row to take, gives NaN and −1, never some row."""
    states = torch.randn(1, 4, 6)
    states[0, 0, 2], states[0, 1, 3] = float("nan"), float("inf")
    rows = torch.randn(1, 5, 6)
    valid = torch.tensor([[True] * 5])
    found = slot_head_predict(states, rows, valid=valid, window=1, probabilities=True)
    broken = torch.tensor([[True, True, False, False]])
    assert torch.equal(found.best == -1, broken)
    assert torch.equal(found.probability.isnan(), broken) and torch.equal(found.expectation.isnan(), broken)
    none = slot_head_predict(states, rows, valid=~valid, window=1, probabilities=True)
    assert (none.best == -1).all() and none.probability.isnan().all() and none.expectation.isnan().all()
    assert none.logsumexp[0, 2:].eq(-math.inf).all()
    loss = slot_head_cross_entropy(states[:, 2:], rows, torch.tensor([[5, 0]]))
    assert loss[0, 0].isnan() and loss[0, 1].isfinite(), "a wanted row beyond the rows must show"
    valid[0, 0] = False
    assert slot_head_cross_entropy(states[:, 2:], rows, torch.tensor([[0, 1]]), valid=valid)[0, 0] == math.inf


def test_first_of_equal_rows_wins() -> None:
    rows = torch.ones(1, 4, 8)
    rows[0, 0] = 0.0
    assert slot_head_predict(torch.ones(1, 1, 8), rows).best.item() == 1


def test_second_derivative_is_refused() -> None:
    inputs = sample_inputs(requires_grad=True, **CASES["classes"])
    loss = torch.ops.visionllm.slot_head_cross_entropy(*inputs.cross_entropy_args())[0]
    grad = torch.autograd.grad(loss.square().sum(), inputs.states, create_graph=True)[0]
    with pytest.raises((NotImplementedError, RuntimeError), match="slot_head_cross_entropy_backward"):
        grad.sum().backward()


S, R, T = torch.zeros(2, 3, 6), torch.zeros(2, 5, 6), torch.zeros(2, 3, dtype=torch.int64)
BAD = {
    "states rank": (lambda: slot_head_predict(S[0], R), "states must have shape [B, G, C] or [B, G, S, C]"),
    "states type": (lambda: slot_head_predict(S.long(), R), "states must be floating point, got int64"),
    "rows rank": (lambda: slot_head_predict(S, R[0, 0]), "rows must have shape [V, C], [1, V, C] or"),
    "rows batch": (lambda: slot_head_predict(S, R.repeat(2, 1, 1)), "rows must have shape [1 or B, V, C]"),
    "rows width": (lambda: slot_head_predict(S, R[..., :3]), "= [1 or 2, 1 or more, 6], got [2, 5, 3]"),
    "no rows": (lambda: slot_head_predict(S, R[:, :0]), "got [2, 0, 6]"),
    "valid shape": (
        lambda: slot_head_predict(S, R, valid=torch.ones(2, 4, dtype=torch.bool)),
        "valid must have shape [B, V] = [2, 5], got [2, 4]",
    ),
    "valid type": (lambda: slot_head_predict(S, R, valid=torch.ones(2, 5)), "valid must be bool"),
    "norm_weight": (
        lambda: slot_head_predict(S, R, norm_weight=torch.ones(5)),
        "norm_weight must have shape [C] = [6], got [5]",
    ),
    "window": (lambda: slot_head_predict(S, R, window=-1), "window must be at least 0, got -1"),
    "target shape": (
        lambda: slot_head_cross_entropy(S, R, T[:, :2]),
        "target must have the states' shape without C = [2, 3], got [2, 2]",
    ),
    "target needs sigma": (lambda: slot_head_cross_entropy(S, R, T.float()), "sigma must be given for"),
    "sigma needs centre": (lambda: slot_head_cross_entropy(S, R, T, sigma=1.0), "got 1.0 with int64"),
    "sigma": (lambda: slot_head_cross_entropy(S, R, T.float(), sigma=0.0), "sigma must be above 0, got 0.0"),
    "weight": (
        lambda: slot_head_cross_entropy(S, R, T, weight=torch.ones(2)),
        "weight must have the states' shape without C = [2, 3], got [2]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_argument_is_named(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith("slot_head_") and message in str(caught.value)
