"""Convolution with ReLU6 or a shortcut as part of it, and its form for prediction on a CPU.

By torch.nn.functional, one picture's 1×1 convolutions on one thread go through im2col. One core of an AVX-512
machine took 22.8 ms that way for the trunk of a picture of 224 × 224 pixels, and takes 17.2 ms with packed
weights and everything fused; in bfloat16 16.4 and 11.1 ms.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionllm.model.packed_weights import PackedWeights, can_pack
from visionllm.ops.choice import autocast

Edges = tuple[int, int, int, int]  # left, right, top, bottom, in pixels


class Convolution(nn.Conv2d):
    """torch's, with ReLU6 or a shortcut's addition as part of it; both are fused where nothing is trained."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._packed = PackedConvolution(self)

    def edges(self, x: Tensor) -> Edges:
        """How far x [B, C, H, W] is padded."""
        height, width = (int(p) for p in self.padding)
        return width, width, height, height

    def forward(self, x: Tensor, relu6: bool = False, shortcut: Tensor | None = None) -> Tensor:
        if can_pack(x):
            return self._packed(x, self.edges(x), relu6, shortcut)
        y = self.convolve(x, self.edges(x))
        if relu6:
            y = F.relu6(y)
        return y if shortcut is None else shortcut + y

    def convolve(self, x: Tensor, edges: Edges) -> Tensor:
        left, right, top, bottom = edges
        if left == right and top == bottom:
            return F.conv2d(x, self.weight, self.bias, self.stride, (top, left), 1, self.groups)
        return F.conv2d(F.pad(x, edges), self.weight, self.bias, self.stride, 0, 1, self.groups)


class PackedConvolution(PackedWeights):
    FORMS = 3  # whole pictures, and parts of them (model/photo_classifier.py), sixteen or fewer

    def __call__(self, x: Tensor, edges: Edges, relu6: bool, shortcut: Tensor | None) -> Tensor:
        x = autocast(x)
        left, right, top, bottom = edges
        grown = 0
        if left == right and top == bottom:
            pad = (top, left)
        elif self.module.groups > 1 and right - left == 1 == bottom - top:
            # A first row and column of zeros in the kernel: cheaper than a padded copy of a wide feature map.
            grown, pad = 1, (bottom, right)
        else:
            x, pad = F.pad(x, edges), (0, 0)
        weight, bias = self.packed(x.dtype, x.shape, pad, grown)
        stride, groups = self.module.stride, self.module.groups
        if shortcut is not None and not relu6:
            return torch.ops.mkldnn._convolution_pointwise.binary(
                x, shortcut.to(x.dtype), weight, bias, pad, stride, (1, 1), groups, "add", 1.0, None, [], None
            )
        activation, limits = ("hardtanh", [0.0, 6.0]) if relu6 else ("none", [])
        y = torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, pad, stride, (1, 1), groups, activation, limits, ""
        )
        return y if shortcut is None else shortcut + y

    def pack(self, weight: Tensor, *how: Any) -> Tensor:
        shape, pad, grown = how
        weight = F.pad(weight, (grown, 0, grown, 0))
        return torch.ops.mkldnn._reorder_convolution_weight(
            weight, pad, self.module.stride, (1, 1), self.module.groups, list(shape)
        )
