"""Layers with packed weights against torch.nn.functional, and the features of instructions that are kept."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small_network import NAMES, pictures, small_network

from visionllm.instruction import EVAL_TEMPLATES, Instruction
from visionllm.model.backbone import DepthwiseConv, SameConv
from visionllm.model.convolution import Convolution, PackedConvolution
from visionllm.model.linear import PACKED_ROWS, Linear
from visionllm.model.packed_weights import can_pack
from visionllm.ops import use_operators

with torch.no_grad(), use_operators("kernels"):
    PACKS = can_pack(torch.zeros(1))
needs_packing = pytest.mark.skipif(
    not PACKS,
    reason="oneDNN's operators are not part of this torch, or not for this processor",
)
CONVOLUTIONS = {
    "pointwise": lambda: SameConv(24, 40, 1),
    "stem": lambda: SameConv(3, 32, 3, 2),
    "depthwise": lambda: DepthwiseConv(24, 24, 5, groups=24),
    "strided depthwise": lambda: DepthwiseConv(24, 24, 5, 2, groups=24),
    "strided depthwise 3": lambda: DepthwiseConv(24, 24, 3, 2, groups=24),
    "padded": lambda: Convolution(24, 16, 3, stride=2, padding=1, bias=False),
}


def both(call, dtype=None):
    """What the layer gives packed, and by torch.nn.functional."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        with use_operators("reference"):
            expected = call()
        with use_operators("kernels"):
            return call(), expected


def close(found, expected, dtype):
    rounding = 2**-6 if dtype == torch.bfloat16 else 1e-5
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(8, 8), (15, 9), (1, 1)])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(kind, size, dtype):
    torch.manual_seed(0)
    layer = CONVOLUTIONS[kind]()
    x = torch.randn(2, layer.in_channels, *size).contiguous(memory_format=torch.channels_last)
    close(*both(lambda: layer(x), dtype), dtype)
    found, expected = both(lambda: layer(3 * x, relu6=True), dtype)
    close(found, expected, dtype)
    assert found.min() >= 0 and found.max() <= 6
    shortcut = torch.randn(expected.shape).to(expected.dtype)
    close(*both(lambda: layer(x, shortcut=shortcut), dtype), dtype)
    close(*both(lambda: layer(x, True, shortcut), dtype), dtype)


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["", "gelu", "silu"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(bias, activation, dtype):
    torch.manual_seed(0)
    layer = Linear(12, 7, bias=bias)
    x, shortcut = torch.randn(2, PACKED_ROWS, 12), torch.randn(2, PACKED_ROWS, 7)
    close(*both(lambda: layer(x, activation), dtype), dtype)
    close(*both(lambda: layer(x, activation, shortcut), dtype), dtype)
    few = x[:1, :3]
    close(*both(lambda: layer(few, activation, shortcut[:1, :3]), dtype), dtype)


@needs_packing
@torch.no_grad()
def test_changed_weights_are_packed_anew():
    torch.manual_seed(0)
    layer, x = SameConv(8, 8, 1), torch.randn(1, 8, 4, 4)
    first = layer(x)
    layer.weight.mul_(2)
    layer.bias.mul_(2)
    torch.testing.assert_close(layer(x), 2 * first)
    layer.weight.data = layer.weight.data / 2
    layer.bias = torch.nn.Parameter(layer.bias / 2)
    torch.testing.assert_close(layer(x), first)


@needs_packing
@torch.no_grad()
def test_pictures_of_several_sizes_are_packed_once_each(monkeypatch):
    torch.manual_seed(0)
    layer, packs = SameConv(8, 8, 3), []
    pack = PackedConvolution.pack
    monkeypatch.setattr(PackedConvolution, "pack", lambda self, *how: packs.append(how) or pack(self, *how))
    sizes = [torch.randn(1, 8, side, side) for side in (4, 6, 9, 12)]
    expected = [both(lambda x=x: layer(x), torch.float32)[1] for x in sizes]
    packs.clear()
    for turn in range(3):
        for x, one in zip(sizes[:3], expected[:3], strict=True):
            torch.testing.assert_close(layer(x), one)
        if turn == 0:
            packs.clear()
    assert not packs
    layer(sizes[0])
    layer(sizes[3])  # the second goes
    assert len(packs) == 1
    for k in (0, 2, 3):
        torch.testing.assert_close(layer(sizes[k]), expected[k])
    assert len(packs) == 1
    layer(sizes[1])
    assert len(packs) == 2


@pytest.mark.parametrize("again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@torch.no_grad()
def test_copies_have_weights_of_their_own(again):
    torch.manual_seed(0)
    for layer, x in ((SameConv(8, 8, 1), torch.randn(1, 8, 4, 4)), (Linear(8, 8), torch.randn(200, 8))):
        before = layer(x)
        other = again(layer)
        other.weight.zero_()
        other.bias.zero_()
        assert (other(x) == 0).all()
        torch.testing.assert_close(layer(x), before)
        assert layer.state_dict().keys() == {"weight", "bias"}


def test_training_is_not_packed():
    layer, x = Linear(8, 8), torch.randn(200, 8)
    layer(x).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
    assert not can_pack(x)
    with torch.no_grad():
        assert not can_pack(x.double())


def test_features_of_an_instruction_are_kept_until_weights_change(monkeypatch):
    network = small_network()
    asked = [Instruction(classes=NAMES)]
    first = network.find(pictures(1), asked)[0].scores
    encodings = []
    encode = network.encode_text
    monkeypatch.setattr(network, "encode_text", lambda prompts: encodings.append(0) or encode(prompts))
    assert torch.equal(network.find(pictures(1), asked)[0].scores, first)
    assert not encodings
    network.find(pictures(1), [Instruction(classes=NAMES[:2])])
    assert len(encodings) == 1
    with torch.no_grad():
        network.text_encoder.norm.weight.mul_(1.5)
    assert not torch.equal(network.find(pictures(1), asked)[0].scores, first)
    assert len(encodings) == 2
    with torch.autocast("cpu", torch.bfloat16):
        network.find(pictures(1), asked)
    assert len(encodings) == 3
    network.find(pictures(1), asked)
    assert len(encodings) == 3
    other = Instruction(classes=NAMES, text=asked[0].render(EVAL_TEMPLATES["detection"][0]))
    assert other == asked[0] and not torch.equal(network.find(pictures(1), [other])[0].scores, first)
    assert len(encodings) == 4
