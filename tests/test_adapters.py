"""Several adapters on one LLM: chosen for each sample, merged and unmerged."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_network import SMALL

from visionllm.model.llm import LLM, KVCache
from visionllm.model.lora import Adapter
from visionllm.ops import use_operators

OPERATORS = ["kernels", "reference"]
NAMES = ["one", None, "default", "two", "one"]


def make_llm(**changes) -> LLM:
    torch.manual_seed(0)
    llm = LLM(dataclasses.replace(SMALL, **changes))
    for linear in llm.linears().values():
        if linear.lora_b is not None:
            torch.nn.init.normal_(linear.lora_b, std=0.3)
    return llm.eval()


def make_adapter(llm: LLM, rank: int, targets: tuple[str, ...], layers=(0, 1), seed: int = 1) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    tensors, scales = {}, {}
    for name, linear in llm.linears().items():
        if name.rsplit(".", 1)[1] in targets and int(name.split(".")[1]) in layers:
            a = torch.randn(rank, linear.in_features, generator=generator) * linear.in_features**-0.5
            tensors[name] = (a, torch.randn(linear.out_features, rank, generator=generator) * 0.3)
            scales[name] = 1.5 / rank
    return Adapter(tensors, scales)


def with_adapters(**changes) -> LLM:
    """Of other ranks and targets than the LLM's own."""
    llm = make_llm(**changes)
    llm.add_adapter("one", make_adapter(llm, 3, ("q", "o", "down"), seed=1))
    llm.add_adapter("two", make_adapter(llm, 1, ("v", "gate"), layers=(1,), seed=2))
    return llm


def inputs(batch: int = 5):
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(6) < torch.tensor([6, 4, 5, 2, 6])[:batch, None]
    prefix = torch.randn(batch, 6, 32, generator=generator)
    return prefix, mask, torch.randn(batch, 2, 3, 32, generator=generator)


def folded(llm: LLM, name: str | None) -> LLM:
    """An LLM without adapters whose weights have one folded in."""
    other = make_llm(lora_rank=0)
    number = None if name is None else (llm.own_adapter() if name == "default" else ADAPTERS[name](llm))
    state = {key: value.clone() for key, value in llm.state_dict().items() if "lora" not in key}
    if number is not None:
        for layer, (a, b) in number.layers.items():
            state[layer + ".weight"] += number.scales[layer] * (b.double() @ a.double()).float()
    other.load_state_dict(state)
    return other


ADAPTERS = {
    "one": lambda llm: make_adapter(llm, 3, ("q", "o", "down"), seed=1),
    "two": lambda llm: make_adapter(llm, 1, ("v", "gate"), layers=(1,), seed=2),
}


@pytest.mark.parametrize("operators", OPERATORS)
@pytest.mark.parametrize("changes", [{}, {"lora_rank": 0}], ids=["own", "none of its own"])
@torch.no_grad()
def test_each_sample_has_its_adapter(operators, changes):
    llm = with_adapters(**changes)
    prefix, mask, slots = inputs()
    names = [None if changes and name == "default" else name for name in NAMES]
    with use_operators(operators):
        states, answers = llm(prefix, mask, slots, names)
        cache = KVCache(5, 6, torch.device("cpu"), llm.adapter_rows(names))
        read = llm.read(prefix, mask, cache)
        answered = llm.answer(slots, cache)
        for b, name in enumerate(names):
            expected = folded(llm, name)(prefix[b : b + 1], mask[b : b + 1], slots[b : b + 1])
            n = int(mask[b].sum())
            for got in (states, read):
                torch.testing.assert_close(got[b, :n], expected[0][0, :n], atol=1e-5, rtol=1e-5)
            for got in (answers, answered):
                torch.testing.assert_close(got[b], expected[1][0], atol=1e-5, rtol=1e-5)
    assert (states[0] - states[4])[:6].abs().max() > 0.01


@torch.no_grad()
def test_the_cache_keeps_the_choice_of_selected_rows():
    llm = with_adapters()
    prefix, mask, slots = inputs()
    rows = torch.tensor([3, 0, 0])
    cache = KVCache(5, 8, torch.device("cpu"), llm.adapter_rows(NAMES))
    llm.read(prefix, mask, cache)
    expected = llm.answer(slots, cache)[rows]
    cache.select(rows)
    torch.testing.assert_close(llm.answer(slots[rows], cache), expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match=r"adapters must have shape \[5\], got \[2\]"):
        KVCache(5, 8, torch.device("cpu"), llm.adapter_rows(["one", "two"]))


@pytest.mark.parametrize("operators", OPERATORS)
def test_own_and_loaded_adapters_train_apart(operators):
    """Only the network's own gets a gradient, of its samples alone."""
    llm = with_adapters().train()
    prefix, mask, slots = inputs()
    with use_operators(operators):
        llm(prefix, mask, slots, NAMES)[1].square().sum().backward()
        got = {name: p.grad for name, p in llm.named_parameters() if "lora" in name}
        for p in llm.parameters():
            p.grad = None
        llm(prefix[2:3], mask[2:3], slots[2:3])[1].square().sum().backward()
    for name, p in llm.named_parameters():
        if "lora" in name:
            torch.testing.assert_close(got[name], p.grad, atol=2e-4, rtol=1e-4)


def test_removed_adapters_leave_the_others_as_they_were():
    llm = with_adapters()
    prefix, mask, slots = inputs()
    with torch.no_grad():
        expected = llm(prefix[:2], mask[:2], slots[:2], ["two", None])[1]
        llm.remove_adapter("one")
        assert llm.adapter_names == ("two",)
        torch.testing.assert_close(
            llm(prefix[:2], mask[:2], slots[:2], ["two", None])[1], expected, atol=1e-6, rtol=1e-6
        )
        llm.remove_adapter("two")
    assert all(linear.added_a is None for linear in llm.linears().values())
    with pytest.raises(ValueError, match="adapters: expected one of default, got 'two'"):
        llm.adapter_rows(["two"])


def test_what_does_not_fit_is_refused():
    llm = with_adapters()
    good = make_adapter(llm, 2, ("q",))
    for name in ("one", "default", ""):
        with pytest.raises(ValueError, match="expected a new name other than 'default'"):
            llm.add_adapter(name, good)
    a, b = good.layers["layers.0.q"]
    for bad, message in (
        (Adapter({"layers.9.q": (a, b)}, {"layers.9.q": 1.0}), "layers.9.q: no such layer"),
        (Adapter({"layers.0.q": (a[:, 1:], b)}, good.scales), r"B \[32, R\], got \[2, 31\] and \[32, 2\]"),
        (Adapter({"layers.0.q": (a, b[:, :1])}, good.scales), "expected A"),
        (Adapter({"layers.0.q": (a / 0, b)}, good.scales), "layers.0.q: not finite"),
        (Adapter({"layers.0.q": (a, b)}, {}), "a scale is missing"),
        (Adapter({}, {}), "it has no layers"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            llm.add_adapter("new", bad)
    assert llm.adapter_names == ("one", "two")
    prefix, mask, slots = inputs()
    with pytest.raises(ValueError, match="adapters must be 5, one a sample, got"):
        llm(prefix, mask, slots, ["one"])


def test_the_own_adapter_in_and_out():
    llm, other = make_llm(), make_llm()
    for linear in other.linears().values():
        if linear.lora_a is not None:
            torch.nn.init.normal_(linear.lora_a)
    llm.set_own_adapter(other.own_adapter())
    assert all(torch.equal(x, y) for x, y in zip(llm.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="layers.0.k: only in one"):
        llm.set_own_adapter(make_adapter(llm, 2, ("q", "k", "v")))
    with pytest.raises(ValueError, match="expected rank 2 and scale 8.0, got 3 and 0.5"):
        llm.set_own_adapter(make_adapter(llm, 3, ("q", "v")))


@pytest.mark.parametrize("name", ["default", "one", "two"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@torch.no_grad()
def test_merge_and_unmerge(name, dtype):
    llm = with_adapters(base_dtype=dtype)
    prefix, mask, slots = inputs()
    before = {key: value.clone() for key, value in llm.state_dict().items()}
    expected = llm(prefix, mask, slots, [name] * 5)[1]
    llm.merge(name)
    found = llm(prefix, mask, slots)[1]
    tolerance = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}[dtype]  # the sums are rounded
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    llm.unmerge()
    after = llm.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    torch.testing.assert_close(llm(prefix, mask, slots, [name] * 5)[1], expected, atol=0, rtol=0)


@torch.no_grad()
def test_what_a_merged_llm_saves_is_whole():
    llm = with_adapters()
    prefix, mask, slots = inputs()
    llm.merge("default")
    expected = llm(prefix, mask, slots)[1]
    other = make_llm()
    other.load_state_dict(llm.state_dict())
    torch.testing.assert_close(other(prefix, mask, slots)[1], expected, atol=1e-5, rtol=1e-5)


def test_a_merged_llm_refuses_what_would_go_wrong():
    llm = with_adapters()
    llm.merge("one")
    for action in (
        llm.merge, llm.train, lambda: llm.remove_adapter("one"), lambda: llm.adapter_rows(["two"]),
        lambda: llm.load_state_dict(make_llm().state_dict()), lambda: llm.set_own_adapter(llm.own_adapter()),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="merged"):
            action()
    llm.unmerge()
    with pytest.raises(ValueError, match="nothing is merged"):
        llm.unmerge()
    with pytest.raises(ValueError, match="expected one of default, one, two, got 'three'"):
        llm.merge("three")
    with pytest.raises(ValueError, match="in training"):
        llm.train().merge()
    llm.eval().merge(keep=False)
    assert all(linear._original is None for linear in llm.linears().values())
    with pytest.raises(ValueError, match="keep=False"):
        llm.unmerge()
    with pytest.raises(ValueError, match="got int8 rows"):
        make_llm(base_dtype="int8").merge()


@pytest.mark.parametrize("operators", OPERATORS)
def test_dropout_is_of_the_adapters_input_in_training_alone(operators):
    llm = make_llm(lora_dropout=0.5)
    layer = llm.layers[0].q
    x = torch.randn(400, 3, 32)
    with use_operators(operators), torch.no_grad():
        plain, base = layer(x), torch.nn.functional.linear(x, layer.weight)
        llm.train()
        torch.manual_seed(5)
        dropped = layer(x)
        torch.manual_seed(5)
        seen = torch.nn.functional.dropout(x, 0.5)
        expected = base + layer.scale * seen @ layer.lora_a.T @ layer.lora_b.T
        llm.eval()
        assert torch.equal(layer(x), plain)
    torch.testing.assert_close(dropped, expected, atol=1e-4, rtol=1e-5)
    assert (dropped - plain).abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@torch.no_grad()
def test_adapters_beside_a_frozen_base(dtype):
    llm = with_adapters(base_dtype=dtype)
    prefix, mask, slots = inputs()
    found = llm(prefix, mask, slots, NAMES)[1]
    for b, name in enumerate(NAMES):
        alone = llm(prefix[b : b + 1], mask[b : b + 1], slots[b : b + 1], [name])[1]
        torch.testing.assert_close(found[b], alone[0], atol=0.05 if dtype == "bfloat16" else 1e-5, rtol=0.05)
