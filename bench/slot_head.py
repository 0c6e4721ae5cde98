"""The slot head beside its peers: which row each slot takes, and cross-entropy with its gradients.

    python bench/slot_head.py [--device cuda] [--cases predict_500_1537 train_500_1025] [--repeats 30]

Cases are <what>_<slots>_<rows> at 4096 channels, always with the RMS norm before. `predict` gives best,
probability and logsumexp, with 81 rows (classes) the probability of every class too, with 1025 (locations)
the expectation near the best. Peers: the product on the same rows with argmax and nothing else; the same
outputs as ours in plain PyTorch, and that compiled; the full vocabulary of 32000 + 1537 rows with argmax.
`train` is cross-entropy forward and backward. Peers: F.cross_entropy of logits that are written, and that
compiled; F.linear_cross_entropy and Liger's fused one where they can be imported. `smooth` is the same
against a Gaussian over the rows. bfloat16 on CUDA; on the CPU, where the operator is still its PyTorch
reference, float32. Writes ``bench/results/slot_head_<threads or GPU>.json``, anew after each case.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import (
    Limits,
    Row,
    Work,
    add_device_option,
    compare,
    measure_limits,
    print_rows,
    require_device,
    results_name,
    write_results,
)
from torch import Tensor
from torch.nn import functional

from visionllm.ops import slot_head_cross_entropy, slot_head_predict
from visionllm.ops.slot_head import SampleInputs, sample_inputs

CHANNELS, VOCABULARY, WINDOW, SIGMA = 4096, 32000 + 1537, 6, 1.5


@dataclass(frozen=True)
class Case:
    what: str  # "predict", "train" or "smooth"
    slots: int
    rows: int


# 100 boxes or 100 outlines of 24 points: 500 and 4900 slots. 1537 rows are the paper's added tokens, 1025 the
# location tokens, 81 the classes of COCO and "no object".
CASES = {
    f"{what}_{slots}_{rows}": Case(what, slots, rows)
    for what in ("predict", "train")
    for slots in (500, 4900)
    for rows in (1537, 1025, 81)
} | {"smooth_500_1025": Case("smooth", 500, 1025), "smooth_4900_1025": Case("smooth", 4900, 1025)}
ON_CPU = ("predict_500_1025", "predict_500_81", "train_500_1025", "train_500_81")  # the others take minutes

Form = Callable[[], object]


def normed(inputs: SampleInputs) -> Tensor:
    assert inputs.norm_weight is not None
    return functional.rms_norm(
        inputs.states.flatten(0, 2), (CHANNELS,), inputs.norm_weight, inputs.epsilon
    )  # [slots, C]


def predict_forms(inputs: SampleInputs, case: Case, device: torch.device) -> dict[str, Form]:
    located, classes = case.rows == 1025, case.rows == 81
    options = dict(norm_weight=inputs.norm_weight, epsilon=inputs.epsilon, scale=inputs.scale)
    more = dict(window=WINDOW if located else None, offset=512.0, probabilities=classes)
    random = torch.Generator().manual_seed(1)
    vocabulary = torch.randn(VOCABULARY, CHANNELS, generator=random).to(inputs.rows)

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
        )
        return gradients(loss.mean())

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
        for a, b in zip(function(), expected, strict=True):
            difference = float((a - b).abs().max() / b.abs().max())
            if not difference < (5e-2 if dtype == torch.bfloat16 else 1e-3):
                raise SystemExit(
                    f"{name}: {form} differs from visionllm by {difference} of the largest gradient"
                )


def work(inputs: SampleInputs, case: Case) -> Work:
    """One product; training: two more for the gradients. The full vocabulary is not what has to be done."""
    assert inputs.norm_weight is not None
    tensors = inputs.states.numel() + inputs.rows.numel() + inputs.norm_weight.numel()
    product = 2 * case.slots * case.rows * CHANNELS
    if case.what != "predict":
        return Work(2 * tensors * inputs.states.element_size(), 3 * product)
    outputs = case.slots * (8 + 4 + 4 + (4 if case.rows == 1025 else 0) + (4 * 81 if case.rows == 81 else 0))
    return Work(tensors * inputs.states.element_size() + outputs, product)


def run_case(name: str, limits: Limits, repeats: int, device: torch.device) -> list[Row]:
    case = CASES[name]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = sample_inputs(
        device,
        dtype,
        batch=1,
        groups=100,
        slots=case.slots // 100,
        rows=case.rows,
        channels=CHANNELS,
        shared=True,
        masked=False,
        weighted=False,
        located=case.what == "smooth",
        requires_grad=case.what != "predict",
    )
    if case.what == "predict":
        forms = predict_forms(inputs, case, device)
    else:
        inputs.rows.data.mul_(CHANNELS**-0.5)  # logits of size 1 without a scale, which some peers lack
        inputs.target.abs_()  # no ignored slots
        forms = train_forms(inputs, case, device)
        check_gradients(name, forms, dtype)
    return compare(name, forms, work(inputs, case), limits, dict.fromkeys(forms, repeats), device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_device_option(parser)
    parser.add_argument("--cases", nargs="+", choices=CASES, help="(default: all; on the CPU four)")
    parser.add_argument("--repeats", type=int, help="(default 30; on the CPU 3)")
    parser.add_argument("--name", default="slot_head", help="how the file in bench/results begins")
    options = parser.parse_args()
    device = require_device(options.device)
    on_cuda = device.type == "cuda"
    limits = measure_limits(device, torch.bfloat16 if on_cuda else torch.float32)
    threads = torch.get_num_threads()
    rows: list[Row] = []
    for name in options.cases or (CASES if on_cuda else ON_CPU):
        new = run_case(name, limits, options.repeats or (30 if on_cuda else 3), device)
        print_rows(new)
        rows += new
        if on_cuda:
            path = write_results(results_name(options.name, device), rows, {"bfloat16": limits}, device)
        else:
            path = write_results(f"{options.name}_{threads}_threads", rows, {threads: limits})
        gc.collect()
    print(f"written to {path}")


if __name__ == "__main__":
    main()
