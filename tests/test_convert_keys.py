"""Rules from a source's names to a model's: nothing is missing, left over or of another shape unsaid."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from visionllm.convert import ConvertError, Rule, Step, TensorSource, convert, fill, plan, shapes_of

RULES = (
    Rule(r"layers\.(\d+)\.fc\.(weight|bias)", r"\1.\2"),
    Rule(r"steps", None, why="a counter"),
)


def module(device="cpu"):
    with torch.device(device):
        return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))


def published():
    random = torch.Generator().manual_seed(0)
    shapes = {"layers.0.fc.weight": (2, 3), "layers.0.fc.bias": (2,)}
    shapes |= {"layers.1.fc.weight": (4, 2), "layers.1.fc.bias": (4,), "steps": ()}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def planned(tensors, rules=RULES, optional=()):
    return plan(TensorSource(tensors).shapes, shapes_of(module()), rules, "there", optional)


def test_steps_follow_the_source():
    assert planned(published())[:2] == [
        Step("layers.0.fc.weight", "0.weight"),
        Step("layers.0.fc.bias", "0.bias"),
    ]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fill(device):
    tensors, filled = published(), module(device)
    fill(filled, TensorSource(tensors), planned(tensors), "there")
    for name, parameter in filled.named_parameters():
        layer, kind = name.split(".")
        assert torch.equal(parameter, tensors[f"layers.{layer}.fc.{kind}"])
        assert parameter.requires_grad
        assert parameter.data_ptr() != tensors[f"layers.{layer}.fc.{kind}"].data_ptr()


def test_every_difference_is_listed():
    tensors = published()
    del tensors["layers.0.fc.bias"]
    tensors["layers.1.fc.weight"] = torch.zeros(4, 3)
    tensors["layers.2.fc.bias"] = torch.zeros(4)
    tensors["pooler"] = torch.zeros(1)
    with pytest.raises(ConvertError) as caught:
        planned(tensors)
    lines = str(caught.value).splitlines()
    assert lines[0] == "there: 1 missing, 2 unused, 1 of another shape"
    assert lines[lines.index("missing:") + 1] == "  0.bias"
    assert "  layers.2.fc.bias (there is no 2.bias here)" in lines and "  pooler" in lines
    assert "  layers.1.fc.weight → 1.weight: expected shape [4, 2], got [4, 3]" in lines


def test_long_lists_are_cut_and_counted():
    tensors = published() | {f"more.{i}": torch.zeros(1) for i in range(50)}
    with pytest.raises(ConvertError) as caught:
        planned(tensors)
    text = str(caught.value)
    assert "50 unused" in text and "unused (the first 20 of 50):" in text and text.count("more.") == 20


def test_a_target_has_one_source():
    tensors = published() | {"again.1.fc.bias": torch.zeros(4)}
    with pytest.raises(ConvertError, match=r"1\.bias: by layers\.1\.fc\.bias and by again\.1\.fc\.bias"):
        planned(tensors, (*RULES, Rule(r"again\.(\d+)\.fc\.bias", r"\1.bias")))


def test_optional_targets_keep_their_values():
    tensors = published()
    del tensors["layers.0.fc.bias"]
    filled = module()
    before = filled[0].bias.clone()
    fill(filled, TensorSource(tensors), planned(tensors, optional=(r"\d\.bias",)), "there")
    assert torch.equal(filled[0].bias, before)
    with pytest.raises(ConvertError, match="1 missing"):
        planned(tensors, optional=(r"\d\.bia",))  # the whole name must match


def test_transforms_and_several_targets():
    tensors = {"packed": torch.arange(12.0).view(3, 4)}
    target = {"first": (4, 2), "last": (1, 4)}
    rules = (Rule("packed", "first", lambda t: t[:2].T), Rule("packed", "last", lambda t: t[2:]))
    source = TensorSource(tensors)
    read = dict(convert(source, plan(source.shapes, target, rules, "there"), "there"))
    assert torch.equal(read["first"], tensors["packed"][:2].T)
    assert torch.equal(read["last"], tensors["packed"][2:])
    with pytest.raises(ConvertError, match=r"expected shape \[2, 4\], got \[4, 2\] \(from \[3, 4\]\)"):
        plan(source.shapes, {"first": (2, 4), "last": (1, 4)}, rules, "there")
    with pytest.raises(ConvertError, match=r"expected a shape that becomes \[5, 5\], got \[3, 4\]: "):
        plan(source.shapes, {"first": (5, 5)}, (Rule("packed", "first", lambda t: t.view(5, 5)),), "there")


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "not finite"), (float("inf"), "not finite"), (1, "expected floating point")],
)
def test_broken_values_are_named(value, message):
    source = TensorSource({"a": torch.tensor([value])})
    with pytest.raises(ConvertError, match=f"there: a: {message}"):
        dict(convert(source, [Step("a", "b")], "there"))


def test_whole_numbers_go_where_they_are_expected():
    class Counted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("of", torch.zeros(3, dtype=torch.int16))

    module, numbers = Counted(), torch.tensor([3, 1, 2], dtype=torch.int16)
    fill(module, TensorSource({"a": numbers}), [Step("a", "of")], "there")
    assert torch.equal(module.of, numbers)
    with pytest.raises(ConvertError, match=r"there: a: expected torch.int16, got torch.float32"):
        fill(module, TensorSource({"a": numbers.float()}), [Step("a", "of")], "there")
