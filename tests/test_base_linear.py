"""Frozen bases: bf16, fp16 and int8 rows, what they cost in memory, and that training leaves them alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_network import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

from visionllm.model.base_linear import BaseLinear, quantise_rows
from visionllm.model.llm import LLM
from visionllm.model.lora import LoRALinear
from visionllm.ops import use_operators

FROZEN = {"bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
# Of outputs of size 1: one rounding of x, W and y each.
ROUNDING = {"bfloat16": 2**-6, "float16": 2**-9, "int8": 1e-5}
OPERATORS = ["kernels", "reference"]
# No weight, activation or adapter of these has another's shape.
CONFIG = dataclasses.replace(
    SMALL, llm_dim=40, llm_heads=5, llm_kv_heads=1, llm_ffn_dim=56, lora_rank=3,
    lora_targets=("q", "v", "down"),
)  # fmt: skip


def whole_weight(layer: BaseLinear) -> torch.Tensor:
    """In float64."""
    weight = layer.weight.detach().double()
    return weight * layer.weight_scale.double()[:, None] if layer.int8 else weight


@pytest.mark.parametrize("operators", OPERATORS)
@pytest.mark.parametrize("dtype", FROZEN)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
def test_product_and_gradients(dtype, operators, autocast, rank):
    torch.manual_seed(0)
    layer = (
        LoRALinear(24, 20, 3, 6.0, dtype=FROZEN[dtype]) if rank else BaseLinear(24, 20, dtype=FROZEN[dtype])
    )
    x = torch.randn(2, 5, 24, requires_grad=True)
    shortcut = torch.randn(2, 5, 20)
    expected_x = x.detach().double().requires_grad_()
    expected = expected_x @ whole_weight(layer).T
    if rank:
        torch.nn.init.normal_(layer.lora_b)
        a, b = (t.detach().double().requires_grad_() for t in (layer.lora_a, layer.lora_b))
        expected = expected + 2 * expected_x @ a.T @ b.T
    expected = torch.nn.functional.silu(expected) + shortcut
    with use_operators(operators), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = layer(x, "silu", shortcut)
    assert found.dtype == torch.float32  # the shortcut's
    grad = torch.randn(2, 5, 20)
    found.backward(grad)
    expected.backward(grad.double())
    tolerance = 2**-6 if autocast else ROUNDING[dtype]
    pairs = [(found, expected), (x.grad, expected_x.grad)]
    if rank:
        pairs += [(layer.lora_a.grad, a.grad), (layer.lora_b.grad, b.grad)]
    for got, wanted in pairs:
        assert (got.double() - wanted).abs().max() < tolerance * wanted.abs().max().clamp(min=1)
    assert layer.weight.grad is None and not layer.weight.requires_grad


def test_quantised_rows():
    torch.manual_seed(0)
    weight = torch.randn(6, 50) * torch.tensor([1e-6, 1e-2, 1.0, 1e3, 1e20, 0.0])[:, None]
    rows, scale = quantise_rows(weight)
    assert rows.dtype == torch.int8 and scale.dtype == torch.float32 and rows.abs().max() == 127
    error = (rows.double() * scale.double()[:, None] - weight).abs()
    assert (error <= 0.50001 * scale.double()[:, None]).all() and scale[5] == 1 and not rows[5].any()
    again, same = quantise_rows(rows.float() * scale[:, None])
    assert torch.equal(again, rows) and torch.allclose(same, scale, rtol=1e-6)
    assert quantise_rows(torch.zeros(3, 0))[0].shape == (3, 0)


@pytest.mark.parametrize("dtype", FROZEN)
def test_bytes_of_a_weight(dtype):
    llm = LLM(dataclasses.replace(CONFIG, base_dtype=dtype))
    linears = llm.linears().values()
    assert {layer.weight.element_size() for layer in linears} == {1 if dtype == "int8" else 2}
    trained = {name for name, p in llm.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in llm.named_parameters() if "lora" in name} and trained
    assert not llm.layers[0].q._packed._forms  # prediction must not hold a reordered copy either
    with torch.inference_mode():
        llm(torch.randn(1, 300, 40), torch.ones(1, 300).bool(), torch.randn(1, 2, 3, 40))
    assert not any(layer._packed._forms for layer in linears)


class _Shapes(TorchDispatchMode):
    """Shapes of what operators make, views of their arguments aside."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[tuple[int, ...], torch.dtype]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in given:
                self.made.add((tuple(one.shape), one.dtype))
        return result


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_a_step_copies_no_weight_and_makes_no_gradient_of_one(dtype, autocast):
    torch.manual_seed(0)
    llm = LLM(dataclasses.replace(CONFIG, base_dtype=dtype)).train()
    weights = {tuple(layer.weight.shape) for layer in llm.linears().values()}
    weights |= {shape[::-1] for shape in weights}
    with _Shapes() as shapes:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            states, answers = llm(
                torch.randn(2, 7, 40, requires_grad=True), torch.ones(2, 7).bool(), torch.randn(2, 3, 5, 40)
            )
        (states.float().square().mean() + answers.float().square().mean()).backward()
    assert len(shapes.made) > 10
    assert not [made for made in shapes.made if made[0] in weights]
    for name, parameter in llm.named_parameters():
        assert (parameter.grad is not None) == ("lora" in name)


def test_the_probe_sees_copies():
    """The dispatch mode above would have noticed: with a base in fp32 there are both."""
    llm = LLM(CONFIG)
    with _Shapes() as shapes, torch.autocast("cpu", torch.bfloat16):
        states, _ = llm(torch.randn(2, 7, 40), torch.ones(2, 7).bool(), torch.randn(2, 0, 5, 40))
        states.float().sum().backward()
    weights = {tuple(layer.weight.shape) for layer in llm.linears().values()}
    assert {(shape, dtype) for shape in weights for dtype in (torch.bfloat16, torch.float32)} <= shapes.made


@pytest.mark.parametrize("dtype", FROZEN)
def test_state_dict(dtype):
    config = dataclasses.replace(CONFIG, base_dtype=dtype)
    torch.manual_seed(0)
    llm, other = LLM(config), LLM(config)
    other.load_state_dict(llm.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(llm.parameters(), other.parameters(), strict=True))
    assert ("layers.0.q.weight_scale" in llm.state_dict()) == (dtype == "int8")


def test_int8_takes_floating_point_and_quantises_it():
    torch.manual_seed(0)
    exact = LLM(CONFIG)
    llm = LLM(dataclasses.replace(CONFIG, base_dtype="int8"))
    llm.load_state_dict({**llm.state_dict(), **exact.state_dict()})
    for name, layer in llm.linears().items():
        rows, scale = quantise_rows(exact.linears()[name].weight.detach())
        assert torch.equal(layer.weight, rows) and torch.equal(layer.weight_scale, scale)


@pytest.mark.parametrize("dtype", ["float32", *FROZEN])
def test_it_can_be_made_on_meta(dtype):
    with torch.device("meta"):
        llm = LLM(dataclasses.replace(CONFIG, base_dtype=dtype))
    assert all(p.is_meta for p in llm.parameters())
