"""Results of slot_head's kernels, wherever they run, and what the float64 reference says they should be."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace

import torch
from comparison import TOLERANCES, assert_close
from emulation import emulated
from torch import Tensor

from visionllm.ops.slot_head import SampleInputs, rms_normed, sample_inputs, slot_logits
from visionllm.ops.slot_head_cross_entropy_reference import (
    slot_head_cross_entropy_backward_reference,
    slot_head_cross_entropy_reference,
)
from visionllm.ops.slot_head_predict import slot_head_predict_reference

# visionllm.ops.slot_head_cross_entropy names the function.
prediction = sys.modules["visionllm.ops.slot_head_predict"]
cross_entropy = sys.modules["visionllm.ops.slot_head_cross_entropy"]


def kernels(inputs: SampleInputs, place: str, backward: bool = True, **options: object) -> dict[str, Tensor]:
    """All results by name, on the CPU; place is "emulated", "device" or "cpu"."""
    device = "cuda" if place == "device" else "cpu"
    chosen = "_cpu" if place == "cpu" else "_cuda"
    predict = getattr(prediction, "_predict" + chosen)
    train = getattr(cross_entropy, "_cross_entropy" + chosen)
    train_backward = getattr(cross_entropy, "_cross_entropy_backward" + chosen)
    on_device = replace(inputs, **{n: t.to(device) for n, t in vars(inputs).items() if isinstance(t, Tensor)})
    with emulated(**options) if place == "emulated" else nullcontext():
        found = predict(*on_device.predict_args())
        results = dict(zip(("best", "probability", "logsumexp", "expectation", "every"), found, strict=True))
        arguments = on_device.cross_entropy_args()
        loss, *saved = train(*arguments)
        results |= {"loss": loss, "training_logsumexp": saved[0], "target_logsumexp": saved[1]}
        if backward:
            grad_loss = torch.linspace(-1, 2, loss.numel()).view(loss.shape).to(device)
            grads = train_backward(grad_loss, *arguments[:6], *saved, *arguments[6:])
            wanted = {
                "grad_states": True,
                "grad_rows": inputs.row_scale is None,
                "grad_norm_weight": inputs.norm_weight is not None,
            }
            results |= {n: g for n, g in zip(wanted, grads, strict=True) if wanted[n]}
    return {name: t.cpu() for name, t in results.items()}


def expected_results(inputs: SampleInputs) -> tuple[dict[str, Tensor], Tensor]:
    """In float64 from the states as normed and rounded by the contract, and the logits.

    The gradients are those of the norm without the rounding.
    """
    exact = replace(
        inputs,
        **{n: t.double() for n, t in vars(inputs).items() if isinstance(t, Tensor) and t.is_floating_point()},
    )
    normed = rms_normed(inputs.states, inputs.norm_weight, inputs.epsilon)
    rounded = replace(exact, states=normed.double(), norm_weight=None)
    found = slot_head_predict_reference(*rounded.predict_args())
    results = dict(zip(("best", "probability", "logsumexp", "expectation", "every"), found, strict=True))
    loss, logsumexp, target_logsumexp = slot_head_cross_entropy_reference(*rounded.cross_entropy_args())
    results |= {"loss": loss, "training_logsumexp": logsumexp, "target_logsumexp": target_logsumexp}
    arguments = exact.cross_entropy_args()
    loss, *saved = slot_head_cross_entropy_reference(*arguments)
    grad_loss = torch.linspace(-1, 2, loss.numel(), dtype=torch.float64).view(loss.shape)
    grads = slot_head_cross_entropy_backward_reference(grad_loss, *arguments[:6], *saved, *arguments[6:])
    results |= dict(zip(("grad_states", "grad_rows", "grad_norm_weight"), grads, strict=True))
    logits = slot_logits(
        rounded.states, rounded.rows, rounded.row_scale, inputs.valid, None, inputs.epsilon, inputs.scale
    )
    return results, logits


def assert_matches(inputs: SampleInputs, place: str, **options: object) -> dict[str, Tensor]:
    got = kernels(inputs, place, **options)
    expected, logits = expected_results(inputs)
    forward, backward = (TOLERANCES["slot_head" + part, inputs.states.dtype] for part in ("", "_backward"))
    for name, result in got.items():
        if name == "best":
            continue
        assert result.dtype == (inputs.states.dtype if name.startswith("grad") else torch.float32), name
        assert_close(name, result, expected[name], backward if name.startswith("grad") else forward)
    best = got["best"]
    if best.numel():
        found = logits.gather(-1, best.clamp(min=0)[..., None])[..., 0]
        close = found >= logits.amax(-1) - 1e-5 * logits.abs().where(logits.isfinite(), 0).amax()
        assert torch.equal(best < 0, expected["best"] < 0) and (close | (best < 0)).all(), "best"
    return got


def without_answers(dtype: torch.dtype, normed: bool) -> tuple[SampleInputs, Tensor]:
    """Three pictures of 70 slots, and which slots [3, 70, 1] have no answer.

    Those are states that are not finite, and a picture without an allowed row.
    """
    inputs = sample_inputs(dtype=dtype, batch=3, groups=70, rows=70, channels=16, normed=normed)
    inputs.states[0, 3, 0, 2], inputs.states[1, 65, 0, 15] = float("nan"), float("inf")
    inputs.states[1, 66, 0, 0] = -float("inf")
    inputs.valid[2] = False
    broken = torch.zeros(3, 70, 1, dtype=torch.bool)
    broken[0, 3], broken[1, 65:67], broken[2] = True, True, True
    return inputs, broken


def assert_says_no_answer(found: dict[str, Tensor], broken: Tensor) -> None:
    """-1 and NaN in those slots, and nowhere else."""
    assert torch.equal(found["best"] == -1, broken)
    for name in ("probability", "expectation"):
        assert torch.equal(found[name].isnan(), broken), name
    assert torch.equal(found["every"].isnan().all(-1), broken)
