"""The model by the operators and by plain torch: the same answers, losses and gradients."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from comparison import TOLERANCES, assert_close
from small_network import NAMES, SMALL, pictures, small_network, two_pictures

from visionllm.instruction import Instruction
from visionllm.ops import choice, use_operators

FP32 = TOLERANCES["network", torch.float32]
GRADIENT = TOLERANCES["network_gradient", torch.float32]
OPERATORS = {
    "fusion_attention",
    "lora_linear",
    "ms_deform_attn_fused",
    "query_attention",
    "slot_head_predict",
    "slot_head_cross_entropy",
}
ADAPTED = ("q", "k", "v", "o", "gate", "up", "down")


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Records which of the package's operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "visionllm":
            self.names.add(func._schema.name.removeprefix("visionllm::"))
        return func(*args, **(kwargs or {}))


def answers(how: str, **changes) -> tuple[dict[str, torch.Tensor], set[str]]:
    network = small_network(**changes)
    instructions = [Instruction(classes=NAMES), Instruction(classes=NAMES[:2])]
    with use_operators(how), torch.no_grad(), Calls() as calls:
        prompts = network.tokenizer.prompts(instructions, SMALL.num_queries)
        text = network.encode_text(prompts)
        tokens = network.image_tokens(pictures(2), text)
        reading = network.read_slots(prompts, text, tokens)
        found = reading.answers(network.config.coordinate_window)
    values = dict(
        boxes=tokens.boxes[-1],
        objectness=tokens.objectness[-1],
        memory=tokens.memory,
        states=reading.states,
        probabilities=found.probabilities,
        offsets=found.offsets,
        bins=found.bins,
    )
    return values, calls.names


def training_step(how: str, **changes) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], set[str]]:
    network = small_network(**changes).train()
    torch.manual_seed(0)
    with use_operators(how), Calls() as calls:
        losses = network.loss(two_pictures())
        losses["total"].backward()
    gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    return losses, gradients, calls.names


@pytest.mark.parametrize(
    "changes",
    [{}, {"class_rows": "static"}, {"lora_targets": ADAPTED}, {"coordinate_window": 0, "lora_rank": 0}],
    ids=str,
)
def test_a_prediction_is_the_same(changes):
    plain, none = answers("reference", **changes)
    found, ran = answers("kernels", **changes)
    expected = (
        OPERATORS - {"slot_head_cross_entropy"} - ({"lora_linear"} if "lora_rank" in changes else set())
    )
    assert ran == expected and not none
    for name, value in plain.items():
        if value.is_floating_point():
            assert_close(name, found[name], value, FP32)
        else:
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("changes", [{}, {"lora_targets": ADAPTED}, {"keep_pretrained": True}], ids=str)
def test_a_training_step_is_the_same(changes):
    losses, gradients, none = training_step("reference", **changes)
    other_losses, other_gradients, ran = training_step("kernels", **changes)
    backward = {f"{name}_backward" for name in OPERATORS - {"slot_head_predict"}}
    assert ran >= OPERATORS | backward and not none
    assert other_losses.keys() == losses.keys() and other_gradients.keys() == gradients.keys()
    for name, loss in losses.items():
        assert_close(name, other_losses[name], loss, FP32)
    for name, gradient in gradients.items():
        assert_close(name, other_gradients[name], gradient, GRADIENT)


def test_autocast_trains_alike():
    """In bfloat16 every gradient is finite, and the losses are those in fp32.

    Rounding decides which image tokens a random network puts first, and so single losses by a few percent in
    plain torch too: the mean over some networks counts.
    """
    wanted, found = [], []
    for seed in range(6):
        wanted.append(training_step("reference", seed=seed)[0]["total"].item())
        with torch.autocast("cpu", torch.bfloat16):
            losses, gradients, _ = training_step("kernels", seed=seed)
        assert all(g.isfinite().all() for g in gradients.values())
        found.append(losses["total"].item())
    assert sum(found) == pytest.approx(sum(wanted), rel=2e-2)


def test_the_choice_ends_with_its_block():
    before = choice.chosen()
    with use_operators("reference"):
        assert choice.chosen() == "reference"
        with pytest.raises(KeyError), use_operators("kernels"):
            assert choice.chosen() == "kernels"
            raise KeyError
        assert choice.chosen() == "reference"
    assert choice.chosen() == before


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="use_operators: expected one of kernels, reference, got 'torch'"):
        with use_operators("torch"):
            pass


@pytest.mark.parametrize(("value", "expected"), [("", "kernels"), ("reference", "reference"), ("none", None)])
def test_the_environment_chooses_for_a_process(value, expected, monkeypatch):
    monkeypatch.setenv("VISIONLLM_OPS", value)
    script = "from visionllm.ops import choice; print(choice.chosen())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if expected is None:
        assert done.returncode and "VISIONLLM_OPS: expected one of kernels, reference" in done.stderr
    else:
        assert done.stdout.strip() == expected, done.stderr


def test_float64_runs_plain_torch():
    x = torch.zeros(1)
    with use_operators("kernels"):
        assert choice.uses_operators(x) and not choice.uses_operators(x.double())
    with use_operators("reference"):
        assert not choice.uses_operators(x)
