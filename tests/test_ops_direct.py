"""Calls past torch's dispatcher: the same results and gradients, and torch sees what it has to see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from visionllm.ops import (
    fusion_attention,
    lora_linear,
    ms_deform_attn,
    ms_deform_attn_fused,
    query_attention,
    slot_head_cross_entropy,
)
from visionllm.ops.direct import past_dispatcher

SCALE = 3.0


class Product:
    """An operator x * y of the package's namespace, and how often each of its ways is gone."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.registered = self.direct = 0
        self.library = torch.library.Library("visionllm", "FRAGMENT")
        self.library.define(f"{name}(Tensor x, Tensor? y, float scale) -> (Tensor, Tensor)")
        self.library.impl(name, self._registered, "CompositeExplicitAutograd")
        torch.library.register_fake(f"visionllm::{name}", self._product, lib=self.library)
        torch.library.register_autograd(
            f"visionllm::{name}", self._backward, setup_context=self._setup, lib=self.library
        )
        self.call = past_dispatcher(name, self._direct, self._setup, self._backward)

    @staticmethod
    def _product(x: Tensor, y: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        return x * (scale if y is None else y * scale), x.new_zeros(3)

    def _registered(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        self.registered += 1
        return self._product(*arguments)

    def _direct(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        self.direct += 1
        return self._product(*arguments)

    @staticmethod
    def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.mark_non_differentiable(output[1])
        ctx.scale = inputs[2]

    @staticmethod
    def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        return grad * (ctx.scale if y is None else y * ctx.scale), None if y is None else grad * x, None

    def ways(self) -> tuple[int, int]:
        """Calls by torch and past it since the last question."""
        found = self.registered, self.direct
        self.registered = self.direct = 0
        return found


@pytest.fixture(scope="module")
def product() -> Iterator[Product]:
    operator = Product("product_for_tests")
    yield operator
    operator.library._destroy()


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def test_plain_tensors_go_past_the_dispatcher(product: Product) -> None:
    x, y = leaf(2), torch.nn.Parameter(torch.randn(2))
    with torch.no_grad():
        assert torch.equal(product.call(x, y, SCALE)[0], x * (y * SCALE))
    product.call(x.detach(), None, SCALE)
    output, other = product.call(x, y, SCALE)
    assert output.requires_grad and not other.requires_grad
    assert product.ways() == (0, 3)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "recorded"])
def test_whoever_looks_at_operators_sees_them(product: Product, grad: bool) -> None:
    x = torch.randn(2).requires_grad_(grad)
    with Seen() as seen:
        product.call(x, None, SCALE)
    assert f"visionllm::{product.name}" in seen.names and product.ways() == (1, 0)
    with FlopCounterMode(display=False):
        product.call(x, None, SCALE)
    assert product.ways() == (1, 0)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        product.call(x, None, SCALE)
    assert f"visionllm::{product.name}" in {event.key for event in profiled.key_averages()}
    assert product.ways() == (1, 0)
    with torch.device("cpu"):  # a mode that may change what is called
        product.call(x, None, SCALE)
    assert product.ways() == (1, 0)
    product.call(x.as_subclass(Subclass), None, SCALE)
    assert product.ways() == (1, 0)
    product.call(x, x.detach().as_subclass(Subclass), SCALE)
    assert product.ways() == (1, 0)
    with FakeTensorMode() as mode:
        output, _ = product.call(mode.from_tensor(x), None, SCALE)
    assert type(output) is not Tensor and product.ways() == (0, 0)
    assert product.call(x.to("meta"), None, SCALE)[0].is_meta
    assert product.ways() == (0, 0)


def test_tracers_see_operators(product: Product) -> None:
    x = torch.randn(2)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda t: product.call(t, None, SCALE)[0])(x)
    assert f"visionllm.{product.name}" in graph.code
    traced = torch.jit.trace(lambda t: product.call(t, None, SCALE)[0], x, check_trace=False)
    assert product.name in str(traced.graph)
    assert product.ways()[1] == 0


def test_compiles_into_one_graph(product: Product) -> None:
    x, y = leaf(4), leaf(4)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return product.call(x.sin(), y, SCALE)[0].sum()

    expected = torch.autograd.grad(step(x, y), (x, y))
    product.ways()
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x, y), (x, y))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert product.ways()[1] == 0


def test_gradients_that_nobody_asked_for(product: Product) -> None:
    """The second output has none, and one that is None at the first gives None."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    x = leaf(2)
    (Nothing.apply(product.call(x, None, SCALE)[0]).sum() + x.sum()).backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 1.0]


def with_gradients(function: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    output = function()
    grad_output = torch.ones_like(output)
    return [output, *torch.autograd.grad(output, leaves, grad_output)]


def operators() -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    import importlib

    def inputs(module: str, **options: Any) -> Any:
        found = importlib.import_module(f"visionllm.ops.{module}")
        return found.sample_inputs(requires_grad=True, **options)

    lora = inputs("lora_linear", adapters=2, indexed=True)
    fusion = inputs("fusion_attention", texts=(11, 4))
    query = inputs("query_attention")
    plain, fused = inputs("ms_deform_attn"), inputs("ms_deform_attn_fused")
    slots = inputs("slot_head")

    def cross_entropy(reduction: str) -> Callable[[], Tensor]:
        options = dict(valid=slots.valid, norm_weight=slots.norm_weight, reduction=reduction)
        return lambda: slot_head_cross_entropy(slots.states, slots.rows, slots.target, **options)

    def leaves(args: tuple) -> list[Tensor]:
        return [t for t in args if isinstance(t, Tensor) and t.requires_grad]

    return {
        "lora_linear": (lambda: lora_linear(*lora.args()), leaves(lora.args())),
        "fusion_attention": (lambda: fusion_attention(*fusion.args()), leaves(fusion.args())),
        "query_attention": (lambda: query_attention(*query.args()), leaves(query.args())),
        "ms_deform_attn": (lambda: ms_deform_attn(*plain.args()), leaves(plain.args())),
        "ms_deform_attn_fused": (lambda: ms_deform_attn_fused(*fused.args()), leaves(fused.args())),
        "slot_head_cross_entropy": (cross_entropy("none"), slots.leaves()),
        "slot_head_cross_entropy_sum": (cross_entropy("sum"), slots.leaves()),
    }


@pytest.mark.parametrize("name", operators())
def test_every_operator_gives_the_same_bits_either_way(name: str) -> None:
    function, leaves = operators()[name]
    got = with_gradients(function, leaves)
    with Seen() as seen:
        expected = with_gradients(function, leaves)
    assert {f"visionllm::{name}", f"visionllm::{name}_backward"} <= set(seen.names)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", operators())
def test_second_derivatives_are_refused_either_way(name: str) -> None:
    function, leaves = operators()[name]
    grad = torch.autograd.grad(function().square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises((NotImplementedError, RuntimeError), match="_backward"):
        grad.square().sum().backward()
