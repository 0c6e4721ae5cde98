"""The slot head beside its peers: which row each slot takes, and cross-entropy with its gradients.

    python bench/slot_head.py [--cases predict_500_1537 tiny_train] [--threads 1 2] [--types float32 bfloat16]
    python bench/slot_head.py --device cuda [--cases predict_500_1537 train_500_1025] [--repeats 30]

Cases are <what>_<slots>_<rows> at 4096 channels, always with the RMS norm before; the tiny ones have the
packaged model's sizes, 64 groups and 192 channels. `predict` gives best, probability and logsumexp, with 80
or 81 rows (classes) the probability of every class too, with 1025 (locations) the expectation near the best.
Peers: the product on the same rows with argmax and nothing else; the same outputs as ours in plain PyTorch,
and on CUDA that compiled; the full vocabulary of 32000 + 1537 rows with argmax. `train` is cross-entropy
forward and backward. Peers: F.cross_entropy of logits that are written, and on CUDA that compiled; the same
over the full vocabulary (tiny only); F.linear_cross_entropy and Liger's fused one where they can be imported.
`smooth` is the same against a Gaussian over the rows. bfloat16 on CUDA. Writes
``bench/results/slot_head_<threads or GPU>.json``, anew after each case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import Limits, Row, Work, compare, require_device
from operator_bench import (
    Measurement,
    chosen_types,
    operator_parser,
    relative_error,
    run_measurements,
    type_name,
)
from torch import Tensor
from torch.nn import functional

from visionllm.ops import slot_head_cross_entropy, slot_head_predict
from visionllm.ops.slot_head import SampleInputs, sample_inputs

VOCABULARY, WINDOW, SIGMA = 32000 + 1537, 6, 1.5


@dataclass(frozen=True)
class Case:
    what: str  # "predict", "train" or "smooth"
    groups: int
    slots: int  # of a group
    rows: int
    channels: int = 4096

    @property
    def total(self) -> int:
        return self.groups * self.slots

    @property
    def located(self) -> bool:
        return self.rows == 1025

    @property
    def small(self) -> bool:
        return self.channels < 1024


# 100 boxes or 100 outlines of 24 points: 500 and 4900 slots. 1537 rows are the paper's added tokens, 1025 the
# location tokens, 81 the classes of COCO and "no object".
ON_CUDA = {
    f"{what}_{100 * slots}_{rows}": Case(what, 100, slots, rows)
    for what in ("predict", "train")
    for slots in (5, 49)
    for rows in (1537, 1025, 81)
} | {
    "smooth_500_1025": Case("smooth", 100, 5, 1025),
    "smooth_4900_1025": Case("smooth", 100, 49, 1025),
}
# Four coordinates of 64 boxes, and their classes among 80 names.
TINY = {
    f"tiny_{what}_{rows}": Case(what, 64, slots, rows, 192)
    for what, slots, rows in (
        ("predict", 4, 1025),
        ("predict", 1, 80),
        ("smooth", 4, 1025),
        ("train", 4, 1025),
        ("train", 1, 80),
    )
}
CASES = ON_CUDA | TINY
# The others take minutes.
ON_CPU = (
    "predict_500_1537",
    "predict_500_1025",
    "predict_500_81",
    "train_500_1537",
    "smooth_500_1025",
    *TINY,
)

Form = Callable[[], object]


def normed(inputs: SampleInputs) -> Tensor:
    assert inputs.norm_weight is not None
    return functional.rms_norm(
        inputs.states.flatten(0, 2), inputs.norm_weight.shape, inputs.norm_weight, inputs.epsilon
    )  # [slots, C]


def whole_vocabulary(case: Case) -> Tensor:
    return torch.randn(VOCABULARY, case.channels, generator=torch.Generator().manual_seed(1))


def predict_forms(inputs: SampleInputs, case: Case, device: torch.device) -> dict[str, Form]:
    located, classes = case.located, case.rows in (80, 81)
    options = dict(norm_weight=inputs.norm_weight, epsilon=inputs.epsilon, scale=inputs.scale)
    more = dict(window=WINDOW if located else None, offset=512.0, probabilities=classes)
    vocabulary = whole_vocabulary(case).to(inputs.rows)

    def ours() -> object:
        return slot_head_predict(inputs.states, inputs.rows, **options, **more)

    def product_argmax() -> object:
        return (normed(inputs) @ inputs.rows[0].T).argmax(-1)

    def full_vocabulary() -> object:
        return (normed(inputs) @ vocabulary.T).argmax(-1)

    def plain() -> tuple[Tensor, ...]:
        logits = (normed(inputs) @ inputs.rows[0].T).float() * inputs.scale
        logsumexp = logits.logsumexp(-1)
        best = logits.argmax(-1, keepdim=True)
        outputs = (best, (logits.gather(-1, best)[:, 0] - logsumexp).exp(), logsumexp)
        if located:
            around = best + torch.arange(-WINDOW, WINDOW + 1, device=logits.device)
            inside = (around >= 0) & (around < case.rows)
            near = logits.gather(-1, around.clamp(0, case.rows - 1)).masked_fill(~inside, float("-inf"))
            outputs += ((near.softmax(-1) * (around - 512)).sum(-1),)
        return (*outputs, logits.softmax(-1)) if classes else outputs

    found, expected = slot_head_predict(inputs.states, inputs.rows, **options, **more), plain()
    torch.testing.assert_close(found.probability.flatten(), expected[1], rtol=0.1, atol=1e-2)
    forms: dict[str, Form] = {
        "visionllm": ours,
        "product_argmax": product_argmax,
        "same_outputs": plain,
        "full_vocabulary": full_vocabulary,
    }
    if device.type == "cuda":
        forms["compiled"] = torch.compile(plain)
    return forms


def train_forms(inputs: SampleInputs, case: Case, device: torch.device) -> dict[str, Form]:
    """Mean cross-entropy and the gradients of states, rows and norm weight."""
    smooth = case.what == "smooth"
    target = inputs.target.flatten()
    rows = inputs.rows[0]

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, inputs.leaves())

    def ours() -> object:
        loss = slot_head_cross_entropy(
            inputs.states,
            inputs.rows,
            inputs.target,
            norm_weight=inputs.norm_weight,
            epsilon=inputs.epsilon,
            sigma=SIGMA if smooth else None,
            reduction="sum",
        )
        return gradients(loss / case.total)

    def written_loss() -> Tensor:
        logits = (normed(inputs) @ rows.T).float()
        if not smooth:
            return functional.cross_entropy(logits, target)
        distance = torch.arange(case.rows, device=logits.device) - target.clamp(0, case.rows - 1)[:, None]
        wanted = (-(distance**2) / (2 * SIGMA**2)).softmax(-1)
        return functional.cross_entropy(logits, wanted)

    def written() -> object:
        return gradients(written_loss())

    forms: dict[str, Form] = {"visionllm": ours, "written_logits": written}
    if case.small and not smooth:
        vocabulary = whole_vocabulary(case).to(rows).mul_(case.channels**-0.5).requires_grad_()

        def full_vocabulary() -> object:
            loss = functional.cross_entropy((normed(inputs) @ vocabulary.T).float(), target)
            return torch.autograd.grad(loss, [inputs.states, vocabulary, inputs.norm_weight])

        forms["full_vocabulary"] = full_vocabulary
    if device.type == "cuda":
        compiled = torch.compile(written_loss)
        forms["compiled"] = lambda: gradients(compiled())
    if smooth:
        return forms
    if hasattr(functional, "linear_cross_entropy"):
        forms["linear_cross_entropy"] = lambda: gradients(
            functional.linear_cross_entropy(normed(inputs), rows, target)
        )
    if device.type == "cuda":
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        except ImportError as error:
            print(f"Liger left out: {error}")
        else:
            liger = LigerFusedLinearCrossEntropyLoss()
            forms["liger"] = lambda: gradients(liger(rows, normed(inputs), target))
    return forms


def check_gradients(name: str, forms: dict[str, Form], dtype: torch.dtype) -> None:
    expected = forms["visionllm"]()
    for form, function in forms.items():
        if form == "full_vocabulary":
            continue
        for a, b in zip(function(), expected, strict=True):
            difference = relative_error(a, b)
            if not difference < (1e-3 if dtype == torch.float32 else 5e-2):
                raise SystemExit(
                    f"{name}: {form} differs from visionllm by {difference} of the largest gradient"
                )


def work(inputs: SampleInputs, case: Case) -> Work:
    """One product; training: two more for the gradients. The full vocabulary is not what has to be done."""
    assert inputs.norm_weight is not None
    tensors = inputs.states.numel() + inputs.rows.numel() + inputs.norm_weight.numel()
    product = 2 * case.total * case.rows * case.channels
    if case.what != "predict":
        return Work(2 * tensors * inputs.states.element_size(), 3 * product)
    outputs = case.total * (8 + 4 + 4 + (4 if case.located else 4 * case.rows if case.rows < 1025 else 0))
    return Work(tensors * inputs.states.element_size() + outputs, product)


def run_case(name: str, dtype: torch.dtype, limits: Limits, repeats: int, device: torch.device) -> list[Row]:
    case = CASES[name]
    inputs = sample_inputs(
        device,
        dtype,
        batch=1,
        groups=case.groups,
        slots=case.slots,
        rows=case.rows,
        channels=case.channels,
        shared=True,
        masked=False,
        weighted=False,
        located=case.what == "smooth",
        requires_grad=case.what != "predict",
    )
    if case.what == "predict":
        forms = predict_forms(inputs, case, device)
    else:
        inputs.rows.data.mul_(case.channels**-0.5)  # logits of size 1 without a scale, which some peers lack
        inputs.target.abs_()  # no ignored slots
        forms = train_forms(inputs, case, device)
        check_gradients(name, forms, dtype)
    counts = dict.fromkeys(forms, repeats)
    if device.type == "cpu" and not case.small and "full_vocabulary" in counts:
        counts["full_vocabulary"] = min(repeats, 2)  # seconds a call
    title = name if dtype == torch.bfloat16 and device.type == "cuda" else f"{name} {type_name(dtype)}"
    return compare(title, forms, work(inputs, case), limits, counts, device)


def main() -> None:
    parser = operator_parser(__doc__, "slot_head", CASES, "(default 30; on the CPU with long calls 5)")
    options = parser.parse_args()
    device = require_device(options.device)
    on_cuda = device.type == "cuda"

    def measurement(name: str, dtype: torch.dtype) -> Measurement:
        repeats = options.repeats or (30 if on_cuda or CASES[name].small else 5)
        return Measurement(dtype, lambda limits: run_case(name, dtype, limits, repeats, device))

    measurements = [
        measurement(name, dtype)
        for name in options.cases or (ON_CUDA if on_cuda else ON_CPU)
        for dtype in chosen_types(options, device)
    ]
    run_measurements(options, device, measurements)


if __name__ == "__main__":
    main()
