"""ResNet-50 trunk with frozen batch norms, giving C3, C4 and C5 (strides 8, 16, 32).

Source of the architecture: He et al., 1512.03385, with the stride in a block's 3 × 3 convolution, as the
published weights of torchvision and timm have it ("v1.5"). A batch norm's statistics and factors are fixed,
as in the training of detectors: scale · (x − mean) / √(variance + ε) + shift. It is folded into its
convolution whenever that runs, and kept apart in the state, so that published weights go in unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionllm.model.packed_weights import PackedWeights, can_pack
from visionllm.ops.choice import autocast

BLOCKS = (3, 4, 6, 3)  # of the four stages
WIDTHS = (64, 128, 256, 512)  # inside a stage's blocks; EXPANSION times as many channels come out
EXPANSION = 4
STEM_CHANNELS = 64
OUTPUT_CHANNELS = tuple(EXPANSION * width for width in WIDTHS[1:])
EPSILON = 1e-5
# ImageNet's statistics, which published weights expect, of red, green and blue on pixel values 0..1.
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] → float32 [B, 3, H, W], channels last in memory, as oneDNN likes it."""
    mean, std = (torch.tensor(values, device=images.device) for values in (PIXEL_MEAN, PIXEL_STD))
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


class FrozenNormConvolution(nn.Conv2d):
    """Convolution without bias, a batch norm with fixed statistics, then a shortcut's addition and ReLU."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        for name, value in (("scale", 1.0), ("shift", 0.0), ("mean", 0.0), ("variance", 1.0)):
            self.register_buffer(name, torch.full((outputs,), value))
        self._packed = PackedFrozenNormConvolution(self)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution that does it all."""
        factor = self.scale * (self.variance + EPSILON).rsqrt()
        return self.weight * factor[:, None, None, None], self.shift - self.mean * factor

    def forward(self, x: Tensor, relu: bool = True, shortcut: Tensor | None = None) -> Tensor:
        if can_pack(x):
            return self._packed(x, relu, shortcut)
        weight, bias = self.folded()
        y = F.conv2d(x, weight, bias, self.stride, self.padding)
        if shortcut is not None:
            y = y + shortcut
        return F.relu(y) if relu else y


class PackedFrozenNormConvolution(PackedWeights):
    def __call__(self, x: Tensor, relu: bool, shortcut: Tensor | None) -> Tensor:
        x, module = autocast(x), self.module
        weight, bias = self.packed(x.dtype, x.shape)
        unary = "relu" if relu else None
        how = module.padding, module.stride, (1, 1), 1
        if shortcut is not None:
            return torch.ops.mkldnn._convolution_pointwise.binary(
                x, shortcut.to(x.dtype), weight, bias, *how, "add", 1.0, unary, [], None
            )
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *how, unary or "none", [], "")

    def own(self) -> list[Tensor]:
        module = self.module
        return [module.weight, module.scale, module.shift, module.mean, module.variance]

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.module.folded()
        return weight.to(dtype), bias.to(dtype)

    def pack(self, weight: Tensor, *how: Any) -> Tensor:
        (shape,), module = how, self.module
        return torch.ops.mkldnn._reorder_convolution_weight(
            weight, module.padding, module.stride, (1, 1), 1, list(shape)
        )


class Bottleneck(nn.Module):
    """1 × 1 to fewer channels, 3 × 3, 1 × 1 to more, and the shortcut, projected where shapes differ."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.reduce = FrozenNormConvolution(inputs, width, 1)
        self.spatial = FrozenNormConvolution(width, width, 3, stride)
        self.expand = FrozenNormConvolution(width, outputs, 1)
        self.shortcut = FrozenNormConvolution(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x, relu=False)
        return self.expand(self.spatial(self.reduce(x)), shortcut=shortcut)


class ResNet50(nn.Module):
    """Picture ``[B, 3, H, W]`` (of `normalised`) to ``[C3, C4, C5]`` of 512, 1024 and 2048 channels.

    Args:
        frozen_stages: the stem and this many of the four stages get no gradient, so that training neither
            stores nor walks back through the largest feature maps. Detectors train all but the first.

    Raises:
        ValueError: more frozen stages than there are.
    """

    def __init__(self, frozen_stages: int = 1) -> None:
        super().__init__()
        if not 0 <= frozen_stages <= len(BLOCKS):
            raise ValueError(f"ResNet50: frozen_stages must be 0 to {len(BLOCKS)}, got {frozen_stages}")
        self.frozen_stages = frozen_stages
        self.stem = FrozenNormConvolution(3, STEM_CHANNELS, 7, 2)
        stages, channels = [], STEM_CHANNELS
        for i, (blocks, width) in enumerate(zip(BLOCKS, WIDTHS, strict=True)):
            stage = []
            for block in range(blocks):
                stage.append(Bottleneck(channels, width, 2 if block == 0 and i > 0 else 1))
                channels = EXPANSION * width
            stages.append(nn.Sequential(*stage))
        self.stages = nn.ModuleList(stages)
        for module in (self.stem, *stages[:frozen_stages]):
            module.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            x = F.max_pool2d(self.stem(x), 3, 2, 1)
        features = []
        for i, stage in enumerate(self.stages):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= self.frozen_stages):
                x = stage(x)
            if i > 0:
                features.append(x)
        return features
