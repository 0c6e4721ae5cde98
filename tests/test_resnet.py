"""The ResNet-50 trunk and its weights: against transformers' and against torchvision's block written out."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from published_detr import randomise
from transformers import ResNetConfig, ResNetForImageClassification

from visionllm.convert import ConvertError, TensorSource, fill, shapes_of
from visionllm.convert.resnet import resnet_steps
from visionllm.model.packed_weights import can_pack
from visionllm.model.resnet import BLOCKS, EXPANSION, WIDTHS, FrozenNormConvolution, ResNet50, normalised
from visionllm.ops import use_operators

with torch.no_grad(), use_operators("kernels"):
    PACKS = can_pack(torch.zeros(1))
needs_packing = pytest.mark.skipif(
    not PACKS,
    reason="oneDNN's operators are not part of this torch, or not for this processor",
)
TOLERANCE = 1e-4  # relative to features of size 1, through 49 convolutions in fp32


def state(seed=0, counters=True):
    """A state dict in torchvision's and timm's layout, with random values."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}

    def convolution(name, norm, inputs, outputs, kernel):
        shape = (outputs, inputs, kernel, kernel)
        fan_in = inputs * kernel * kernel
        tensors[f"{name}.weight"] = torch.randn(shape, generator=random) * fan_in**-0.5
        for kind in ("weight", "bias", "running_mean", "running_var"):
            value = 0.1 * torch.randn(outputs, generator=random)
            tensors[f"{norm}.{kind}"] = value + float(kind in ("weight", "running_var"))
        if counters:
            tensors[f"{norm}.num_batches_tracked"] = torch.tensor(7)

    convolution("conv1", "bn1", 3, 64, 7)
    channels = 64
    for i, (blocks, width) in enumerate(zip(BLOCKS, WIDTHS, strict=True), 1):
        for j in range(blocks):
            block = f"layer{i}.{j}"
            convolution(f"{block}.conv1", f"{block}.bn1", channels, width, 1)
            convolution(f"{block}.conv2", f"{block}.bn2", width, width, 3)
            convolution(f"{block}.conv3", f"{block}.bn3", width, 4 * width, 1)
            if j == 0:
                convolution(f"{block}.downsample.0", f"{block}.downsample.1", channels, 4 * width, 1)
            channels = 4 * width
    tensors["fc.weight"], tensors["fc.bias"] = torch.zeros(1000, 2048), torch.zeros(1000)
    return tensors


def by_name(tensors, x):
    """[C3, C4, C5] as torchvision and timm compute them (v1.5), written out by their names."""

    def layer(x, convolution, norm, stride=1):
        weight = tensors[f"{convolution}.weight"]
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)
        mean, variance = tensors[f"{norm}.running_mean"], tensors[f"{norm}.running_var"]
        return F.batch_norm(x, mean, variance, tensors[f"{norm}.weight"], tensors[f"{norm}.bias"])

    x = F.max_pool2d(layer(x, "conv1", "bn1", 2).relu(), 3, 2, 1)
    features = []
    for i, blocks in enumerate(BLOCKS, 1):
        for j in range(blocks):
            block, stride = f"layer{i}.{j}", 2 if i > 1 and j == 0 else 1
            y = layer(x, f"{block}.conv1", f"{block}.bn1").relu()
            y = layer(y, f"{block}.conv2", f"{block}.bn2", stride).relu()
            y = layer(y, f"{block}.conv3", f"{block}.bn3")
            if j == 0:
                x = layer(x, f"{block}.downsample.0", f"{block}.downsample.1", stride)
            x = (x + y).relu()
        features.append(x)
    return features[1:]


def trunk(tensors, **options):
    filled = ResNet50(**options).eval()
    source = TensorSource(tensors)
    fill(filled, source, resnet_steps(source, shapes_of(filled), "there"), "there")
    return filled


def pictures(height=65, width=100):
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, height, width, 3), generator=random, dtype=torch.uint8)


def close(found, expected):
    for one, other, width, stride in zip(found, expected, WIDTHS[1:], (8, 16, 32), strict=True):
        assert one.shape == (2, EXPANSION * width, -(-65 // stride), -(-100 // stride))
        scale = other.abs().max().item()
        torch.testing.assert_close(one, other, atol=TOLERANCE * scale, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("operators", ["kernels", "reference"])
def test_names_of_torchvision_and_timm(operators):
    tensors, x = state(), normalised(pictures())
    with use_operators(operators):
        close(trunk(tensors)(x), by_name(tensors, x))


@torch.no_grad()
@pytest.mark.parametrize("bare", [False, True])
def test_names_of_transformers(bare):
    theirs = ResNetForImageClassification(ResNetConfig()).eval()
    randomise(theirs, 0)
    x = normalised(pictures())
    expected = theirs(x, output_hidden_states=True).hidden_states
    tensors = theirs.resnet.state_dict() if bare else theirs.state_dict()
    close(trunk(tensors)(x), expected[2:])


def test_state_goes_in_unchanged():
    tensors = state(counters=False)
    ours = trunk(tensors).state_dict()
    assert torch.equal(ours["stem.scale"], tensors["bn1.weight"])
    assert torch.equal(ours["stages.3.2.expand.variance"], tensors["layer4.2.bn3.running_var"])
    assert torch.equal(ours["stages.1.0.shortcut.mean"], tensors["layer2.0.downsample.1.running_mean"])
    assert torch.equal(ours["stages.0.1.spatial.weight"], tensors["layer1.1.conv2.weight"])
    assert len(ours) == len(tensors) - 2  # the classifier


def test_every_difference_is_listed():
    tensors = state()
    del tensors["layer1.0.downsample.1.bias"], tensors["conv1.weight"]
    tensors["layer3.6.conv1.weight"] = torch.zeros(256, 1024, 1, 1)  # of a ResNet-101
    tensors["head.weight"] = torch.zeros(1)
    tensors["layer2.0.conv2.weight"] = torch.zeros(128, 4, 3, 3)  # of a ResNeXt
    with pytest.raises(ConvertError) as caught:
        trunk(tensors)
    lines = str(caught.value).splitlines()
    assert lines[0] == "there: 2 missing, 2 unused, 1 of another shape"
    assert {"  stages.0.0.shortcut.shift", "  stem.weight", "  head.weight"} < set(lines)
    assert "  layer3.6.conv1.weight (there is no stages.2.6.reduce.weight here)" in lines
    assert any("expected shape [128, 128, 3, 3], got [128, 4, 3, 3]" in line for line in lines)


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_frozen_stages_get_no_gradient(frozen):
    network = ResNet50(frozen)
    sum(f.mean() for f in network(normalised(pictures()))).backward()
    for name, parameter in network.named_parameters():
        parts = name.split(".")
        trained = parts[0] == "stages" and int(parts[1]) >= frozen
        assert parameter.requires_grad == trained
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trained, name
    assert not any(name.endswith(("scale", "variance")) for name, _ in network.named_parameters())
    with pytest.raises(ValueError, match="frozen_stages must be 0 to 4, got 5"):
        ResNet50(5)


@needs_packing
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (1, 1), (3, 1), (3, 2), (1, 2)])
def test_packed_convolutions(kernel, stride, dtype):
    torch.manual_seed(0)
    layer = FrozenNormConvolution(16, 32, kernel, stride)
    randomise(layer, 0)
    x = torch.randn(2, 16, 15, 10).contiguous(memory_format=torch.channels_last)
    shortcut = torch.randn(2, 32, -(-15 // stride), -(-10 // stride), dtype=dtype)
    rounding = 2**-5 if dtype == torch.bfloat16 else 1e-5
    for options in ({}, {"relu": False}, {"shortcut": shortcut}, {"relu": False, "shortcut": shortcut}):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = layer(x, **options)
            with use_operators("reference"):
                expected = layer(x, **options)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected.float(), atol=rounding, rtol=rounding)


@needs_packing
@torch.no_grad()
def test_packed_weights_follow_the_statistics():
    layer, x = FrozenNormConvolution(4, 4, 1), torch.rand(1, 4, 5, 5)
    before = layer(x, relu=False)
    layer.scale.mul_(2)
    torch.testing.assert_close(layer(x, relu=False), 2 * before)
    layer.shift.add_(1)
    torch.testing.assert_close(layer(x, relu=False), 2 * before + 1)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        copied.shift.add_(1)
        torch.testing.assert_close(copied(x, relu=False), 2 * before + 2)
    torch.testing.assert_close(layer(x, relu=False), 2 * before + 1)
